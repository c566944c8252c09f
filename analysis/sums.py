"""What a report's pass over a store counts, what that comes to, and how batches are counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float64, Int64

from analysis.accumulate import Moments
from analysis.dynamics import (
    BasinAccumulator,
    Basins,
    ClassDirections,
    Dynamics,
    DynamicsAccumulator,
    angular_updates,
)
from analysis.pass_over import ONE_TOKEN, States
from analysis.similarity import Cka, CkaAccumulator, CosineAccumulator
from analysis.spectra import CovarianceAccumulator, Covariances
from storage_schemas.spec import Kind, StoreSpec


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What one pass over a store has found, by token kind where it is of one.

    Attributes:
        layers: Of all arrays.
        n_images: Of the one-token kinds.
        n_images_wide: Of registers and patches.
        cosines: Between layers.
        cka: Between layers; "cls+patch_mean" of the two joined.
        dynamics: Per layer and step.
        covariances: Of states, about their mean.
        updates: Of angular updates, about zero.
        basins: Of CLS, else of patch means; None where the store has fewer than two classes.
    """

    layers: tuple[int, ...]
    n_images: int
    n_images_wide: int
    cosines: Mapping[str, Moments]
    cka: Mapping[str, Cka]
    dynamics: Mapping[str, Dynamics]
    covariances: Mapping[str, Covariances]
    updates: Mapping[str, Covariances]
    basins: Basins | None

    @property
    def distance(self) -> Float64[np.ndarray, "layer layer"]:
        """Mean over the one-token kinds of 1 - cosine: what is cut into phases."""
        means = [self.cosines[kind].mean for kind in ONE_TOKEN if kind in self.cosines]
        distance = 1 - np.mean(means, axis=0)
        np.fill_diagonal(distance, 0)
        return (distance + distance.T) / 2


class Sums:
    """The accumulators of a report, for some kinds of tokens or all; those of workers merge into those of all.

    Memory: 8 layer dim (dim + 1) bytes twice for each kind, 490 MB for ViT-B/14 with four kinds; and 8 layer class dim
    for the directions of classes.
    """

    def __init__(self, spec: StoreSpec, kinds: Sequence[Kind], n_classes: int) -> None:
        n = len(spec.layers)
        one = tuple(kind for kind in ONE_TOKEN if kind in kinds)
        joined = ["+".join(one)] if len(one) > 1 else []
        self.cosines = {kind: CosineAccumulator(n, layers=spec.layers) for kind in kinds}
        self.cka = {name: CkaAccumulator(n) for name in [*one, *joined]}
        self.dynamics = {kind: DynamicsAccumulator(spec.layers) for kind in kinds}
        self.covariances = {kind: CovarianceAccumulator(n, spec.dim) for kind in kinds}
        self.updates = {kind: CovarianceAccumulator(n - 1, spec.dim) for kind in kinds}
        self.directions = ClassDirections(n, n_classes, spec.dim) if one and n_classes > 1 else None
        self.basins: BasinAccumulator | None = None

    def merge(self, other: Self) -> None:
        """Count what a worker has counted, of some of our kinds."""
        for name in ("cosines", "cka", "dynamics", "covariances", "updates"):
            mine = getattr(self, name)
            for kind, part in getattr(other, name).items():
                mine[kind].merge(part)
        if self.directions is not None and other.directions is not None:
            self.directions.merge(other.directions)
        if self.basins is not None and other.basins is not None:
            self.basins.merge(other.basins)

    def begin_basins(self) -> None:
        """Measure from now on against the directions that classes have so far; nothing where there are not two."""
        if self.directions is not None and (self.directions.counts > 0).sum() > 1:
            self.basins = BasinAccumulator(self.directions.result())


def feed(sums: Sums, kind: Kind, layers: Sequence[int]) -> Callable[[States, Int64[np.ndarray, " row"]], None]:
    def update(states: States, _: np.ndarray) -> None:
        found = states[kind]
        sums.cosines[kind].update(found)
        sums.dynamics[kind].update(found)
        sums.covariances[kind].update(found)
        sums.updates[kind].update(angular_updates(found, layers))

    return update


def similar(sums: Sums) -> Callable[[States, Int64[np.ndarray, " row"]], None]:
    def update(states: States, _: np.ndarray) -> None:
        for name, part in sums.cka.items():
            part.update(np.concatenate([states[kind][:, :, 0] for kind in name.split("+")], axis=-1))

    return update


def step_middles(layers: Sequence[int]) -> Float64[np.ndarray, " step"]:
    """Where a step between two layers is drawn on an axis of layers."""
    values = np.asarray(layers, dtype=np.float64)
    return (values[1:] + values[:-1]) / 2

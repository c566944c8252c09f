"""Everything a report measures on one store, in one pass over it: which accumulators there are, and what they found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
from analysis.pass_over import ONE_TOKEN, Analysis, States, pass_over, stop_after
from analysis.similarity import BATCH_ROWS, Cka, CkaAccumulator, CosineAccumulator
from analysis.spectra import CovarianceAccumulator, Covariances
from infra.console import UserError
from storage_schemas import Store
from storage_schemas.spec import Kind


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


class StoreAnalyses:
    """The accumulators of a report and how they are fed; those of two workers merge.

    Memory: 8 layer dim (dim + 1) bytes twice for each kind, 490 MB for ViT-B/14 with four kinds; and the kernels of a
    batch, 8 layer batch_rows^2.

    Args:
        store: That is passed over.
        limit: Images of the one-token kinds.
        wide_limit: Images of registers and patches.

    Raises:
        UserError: Fewer than two layers.
    """

    def __init__(self, store: Store, *, limit: int, wide_limit: int) -> None:
        spec = store.spec
        if len(spec.layers) < 2:
            raise UserError(f"{store.location} holds {len(spec.layers)} layer; analyses over depth need 2 or more")
        n, self._kinds = len(spec.layers), spec.token_kinds
        self.layers = spec.layers
        self._one = tuple(kind for kind in ONE_TOKEN if kind in spec.token_kinds)
        self._stop, self._wide_stop = stop_after(store, limit), stop_after(store, wide_limit)
        self._middle = stop_after(store, min(limit, store.n_valid) // 2)
        self.cosines = {kind: CosineAccumulator(n, layers=spec.layers) for kind in self._kinds}
        joined = ["+".join(self._one)] if len(self._one) > 1 else []
        self.cka = {name: CkaAccumulator(n) for name in [*self._one, *joined]}
        self.dynamics = {kind: DynamicsAccumulator(spec.layers) for kind in self._kinds}
        self.covariances = {kind: CovarianceAccumulator(n, spec.dim) for kind in self._kinds}
        self.updates = {kind: CovarianceAccumulator(n - 1, spec.dim) for kind in self._kinds}
        self.labels, self.n_classes = class_numbers(store)
        self.directions = ClassDirections(n, self.n_classes, spec.dim)
        self.basins: BasinAccumulator | None = None

    def analyses(self) -> list[Analysis]:
        """What the pass has to feed."""
        asked = [Analysis(name="CKA", kinds=self._one, update=self._similar, stop=self._stop)] if self._one else []
        for kind in self._kinds:
            stop = self._stop if kind in ONE_TOKEN else self._wide_stop
            asked.append(Analysis(name="dynamics and spectra", kinds=(kind,), update=self._feed(kind), stop=stop))
        if self._one and self.n_classes > 1:
            asked.append(Analysis(name="classes", kinds=self._one[:1], update=self._classes, stop=self._stop))
        return asked

    def _feed(self, kind: Kind) -> Callable[[States, Int64[np.ndarray, " row"]], None]:
        def update(states: States, _: np.ndarray) -> None:
            found = states[kind]
            self.cosines[kind].update(found)
            self.dynamics[kind].update(found)
            self.covariances[kind].update(found)
            self.updates[kind].update(angular_updates(found, self.layers))

        return update

    def _similar(self, states: States, _: np.ndarray) -> None:
        for name, sums in self.cka.items():
            sums.update(np.concatenate([states[kind][:, :, 0] for kind in name.split("+")], axis=-1))

    def _classes(self, states: States, rows: np.ndarray) -> None:
        """Directions from the first half of the images, angles to them from the second: none is its own measure."""
        found, labels = states[self._one[0]][:, :, 0], self.labels[rows]
        first = (rows < self._middle) & (labels >= 0)
        self.directions.update(found[first], labels[first])
        second = (rows >= self._middle) & (labels >= 0)
        if second.any() and (self.directions.counts > 0).sum() > 1:
            if self.basins is None:
                self.basins = BasinAccumulator(self.directions.result())
            self.basins.update(found[second], labels[second])

    def result(self, n_images: int, n_images_wide: int) -> Findings:
        return Findings(
            layers=self.layers,
            n_images=n_images,
            n_images_wide=n_images_wide,
            cosines={kind: part.result() for kind, part in self.cosines.items()},
            cka={name: part.result() for name, part in self.cka.items()},
            dynamics={kind: part.result() for kind, part in self.dynamics.items()},
            covariances={kind: part.result() for kind, part in self.covariances.items()},
            updates={kind: part.result(centred=False) for kind, part in self.updates.items()},
            basins=None if self.basins is None else self.basins.result(),
        )


def class_numbers(store: Store) -> tuple[Int64[np.ndarray, " sample"], int]:
    """The class of each sample, 0 to the number of classes - 1 in the order of labels, -1 where it has none."""
    labels = np.asarray(store.samples["label"].to_pylist(), dtype=object)
    known = np.array([label is not None and label >= 0 for label in labels], dtype=bool)
    numbers = np.full(len(labels), -1, np.int64)
    names, numbers[known] = np.unique(labels[known].astype(np.int64), return_inverse=True)
    return numbers, len(names)


def measure_store(
    store: Store,
    *,
    limit: int,
    wide_limit: int,
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Findings:
    """Measure everything in one pass.

    Args:
        store: Finished or not; what is committed counts.
        limit: Only the first so many valid images, a random choice, as stores are in shuffled order.
        wide_limit: The same for registers and patches.
        batch_rows: Of minibatch CKA.
        progress: Told the number of images after each batch.

    Raises:
        UserError: Too few images or layers, or states that have no direction.
        StoreError, ObjectError: As `Store.read`.
    """
    if store.n_valid < 4:
        raise UserError(f"{store.location} has {store.n_valid} valid images; the unbiased HSIC needs 4 or more")
    both = StoreAnalyses(store, limit=limit, wide_limit=wide_limit)
    try:
        pass_over(store, both.analyses(), batch_rows=batch_rows, progress=progress)
    except ValueError as error:
        raise UserError(f"{store.location}: {error}") from error
    return both.result(min(limit, store.n_valid), min(wide_limit, store.n_valid))


def step_middles(layers: Sequence[int]) -> Float64[np.ndarray, " step"]:
    """Where a step between two layers is drawn on an axis of layers."""
    values = np.asarray(layers, dtype=np.float64)
    return (values[1:] + values[:-1]) / 2

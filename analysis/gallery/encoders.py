"""How alike the layers of an encoder are, of any depth and with any tokens: from arrays, or from a store.

Cosines are averaged over images and tokens of a kind. CKA is of the one-token kinds joined, minibatches of whole
batches. Encoders that saw the same images are compared with each other too: CKA needs no common width.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Float64, Int64

from analysis.accumulate import Moments, finite_mean
from analysis.pass_over import ONE_TOKEN, Analysis, States, batches, pass_over, stop_after
from analysis.similarity import LEAST_ROWS, Cka, CkaAccumulator, CosineAccumulator
from infra.console import UserError
from storage_schemas import Store

Progress = Callable[[int], None] | None


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Similarity between the layers of one encoder.

    Attributes:
        layers: Their numbers.
        cosines: By token kind: (layer, layer).
        cka: Of the one-token kinds joined; None where there is none, or no batch of 4 images.
    """

    layers: tuple[int, ...]
    cosines: Mapping[str, Moments]
    cka: Cka | None

    @property
    def distance(self) -> Float64[np.ndarray, "layer layer"]:
        """Mean over the one-token kinds, or else over all, of 1 - cosine."""
        kinds: list[str] = [kind for kind in self.cosines if kind in ONE_TOKEN]
        distance = 1 - np.mean([self.cosines[kind].mean for kind in kinds or self.cosines], axis=0)
        np.fill_diagonal(distance, 0)
        return (distance + distance.T) / 2

    def mean_cosine(self, kind: str) -> float:
        """Over all pairs of different layers but layer 0, the embedding; NaN where there is no pair."""
        start = int(self.layers[0] == 0)
        inner = self.cosines[kind].mean[start:, start:]
        return finite_mean(inner[~np.eye(len(inner), dtype=bool)])


class AlikeAccumulator:
    """Sums of `Alike`, batch by batch; those of workers merge.

    Args:
        layers: Their numbers.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._cosines: dict[str, CosineAccumulator] = {}
        self._cka = CkaAccumulator(len(self._layers))

    def update(self, states: Mapping[str, Float[np.ndarray, "row layer token dim"]]) -> None:
        """Count rows, of whatever kinds are given; the one-token kinds that come together are a minibatch of CKA.

        Raises:
            ValueError: States that are zero or not finite.
        """
        for kind, values in states.items():
            self._cosines.setdefault(kind, CosineAccumulator(len(self._layers), layers=self._layers)).update(values)
        if joined := [values[:, :, 0] for kind, values in states.items() if kind in ONE_TOKEN]:
            self._cka.update(np.concatenate(joined, axis=-1))

    def merge(self, other: Self) -> None:
        """Count what another has counted, on other rows."""
        for kind, part in other._cosines.items():
            self._cosines.setdefault(kind, CosineAccumulator(len(self._layers), layers=self._layers)).merge(part)
        self._cka.merge(other._cka)

    def result(self) -> Alike:
        return Alike(
            layers=self._layers,
            cosines={kind: part.result() for kind, part in self._cosines.items()},
            cka=self._cka.result() if self._cka.n_batches else None,
        )


def store_alike(store: Store, *, limit: int, wide_limit: int, progress: Progress = None) -> Alike:
    """Of the layers and token kinds that a store has, in one pass.

    Args:
        store: Finished or not.
        limit: Images of CLS and patch means.
        wide_limit: Images of registers and patches.
        progress: Told the number of images after each batch.

    Raises:
        UserError: No image, or states that have no direction.
        StoreError, ObjectError: As `Store.read`.
    """
    sums = AlikeAccumulator(store.layers)

    def count(states: States, _: Int64[np.ndarray, " row"]) -> None:
        sums.update(states)

    kinds = store.spec.token_kinds
    one = tuple(kind for kind in ONE_TOKEN if kind in kinds)
    wide = [kind for kind in kinds if kind not in one]
    stop, wide_stop = stop_after(store, limit), stop_after(store, wide_limit)
    asked = [Analysis(name="similarity", kinds=one, update=count, stop=stop)] if one else []
    asked += [Analysis(name="similarity", kinds=(kind,), update=count, stop=wide_stop) for kind in wide]
    try:
        pass_over(store, asked, progress=progress)
    except ValueError as error:
        raise UserError(f"{store.location}: {error}") from error
    return sums.result()


def same_images(stores: Sequence[Store], limit: int) -> Int64[np.ndarray, " row"]:
    """Rows, of the first `limit`, that hold the same image in every store; none where sources or orders differ.

    Stores of one source share its digest, of the names and sizes of all images, which LIMIT= does not change, and their
    order, which one that was made with LIMIT= begins as the others do. Names alone do not tell: those of other images
    of another folder may be the same.
    """
    if len({store.spec.source_digest for store in stores}) > 1:
        return np.zeros(0, np.int64)
    n = min(limit, *(store.n_samples for store in stores))
    ids = [store.samples["sample_id"][:n].to_pylist() for store in stores]
    if any(one != ids[0] for one in ids[1:]):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.logical_and.reduce([store.valid[:n] for store in stores]))


def cka_between(
    first: Store, second: Store, rows: Int64[np.ndarray, " row"], *, progress: Progress = None
) -> Float64[np.ndarray, "layer other"]:
    """Minibatch CKA between the layers of two encoders on the same images, of the one-token kinds that both have.

    Raises:
        UserError: They have no such kind in common, or there are fewer than 4 images.
    """
    kinds = [kind for kind in ONE_TOKEN if kind in first.spec.token_kinds and kind in second.spec.token_kinds]
    if not kinds or len(rows) < LEAST_ROWS:
        raise UserError(
            f"{first.location} and {second.location} have {len(rows)} images and {', '.join(kinds) or 'no kind'} in "
            f"common; expected {LEAST_ROWS} images or more, and CLS or patch means"
        )
    sums = CkaAccumulator(len(first.layers) + len(second.layers))
    for run in batches(first.spec, rows):
        both = [[store.read(None, run, kind)[:, :, 0] for kind in kinds] for store in (first, second)]
        sums.update(*(np.concatenate(one, axis=-1) for one in both))
        if progress is not None:
            progress(len(run))
    return sums.result().values[: len(first.layers), len(first.layers) :]


def pairs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each two, once."""
    return list(itertools.combinations(names, 2))

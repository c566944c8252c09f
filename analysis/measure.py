"""Everything a report measures on one store, in one pass over it or in shares of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from analysis.dynamics import BasinAccumulator
from analysis.pass_over import ONE_TOKEN, Analysis, States, batches, pass_nbytes, pass_over, slice_values, stop_after
from analysis.similarity import BATCH_ROWS, LEAST_ROWS
from analysis.sums import Findings, Sums, feed, similar
from infra.console import UserError
from storage_schemas import Store
from storage_schemas.spec import Kind, StoreSpec

# Of a batch in float64, that measuring dynamics holds at a time: states, directions, updates, their directions.
_COPIES = 6


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the pass: what one worker is given at a time.

    Attributes:
        rows: Ascending sample indices.
        kinds: Token kinds that are measured.
        classes: Whether rows make the mean directions of classes ("directions"), are measured against given ones
            ("angles"), or first the one and then the other ("both", which takes all rows); None for neither.
        similar: Whether CKA is measured.
    """

    rows: Int64[np.ndarray, " row"]
    kinds: tuple[Kind, ...]
    classes: Literal["directions", "angles", "both"] | None
    similar: bool


class StoreAnalyses:
    """How the sums of a report are fed, in one pass or in shares of it.

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
        self.store, self.layers = store, spec.layers
        self.n_images, self.n_images_wide = min(limit, store.n_valid), min(wide_limit, store.n_valid)
        self.one = tuple(kind for kind in ONE_TOKEN if kind in spec.token_kinds)
        self.wide = tuple(kind for kind in spec.token_kinds if kind not in ONE_TOKEN)
        self._stop, self._wide_stop = stop_after(store, limit), stop_after(store, wide_limit)
        self._middle = stop_after(store, self.n_images // 2)
        self._labels, self._n_classes = class_numbers(store)

    def sums(self, kinds: Sequence[Kind] | None = None) -> Sums:
        """Empty ones."""
        return Sums(self.store.spec, self.store.spec.token_kinds if kinds is None else kinds, self._n_classes)

    def all_at_once(self) -> Share:
        """Everything, for one pass in the store's order."""
        rows = np.flatnonzero(self.store.valid)
        return Share(rows=rows, kinds=self.store.spec.token_kinds, classes="both", similar=True)

    def shares(self, batch_rows: int = BATCH_ROWS) -> list[Share]:
        """The same in shares for workers: the batches of CKA for the one-token kinds, shards for the others,
        which take longer and come first.

        Angles to the directions of classes are not among them: see `angle_shares`.
        """
        spec, rows = self.store.spec, np.flatnonzero(self.store.valid)
        wide = batches(spec, rows[rows < self._wide_stop], spec.samples_per_shard)
        one = batches(spec, rows[rows < self._stop], batch_rows) if self.one else []
        return [
            *(Share(rows=run, kinds=(kind,), classes=None, similar=False) for kind in self.wide for run in wide),
            *(Share(rows=run, kinds=self.one, classes="directions", similar=True) for run in one),
        ]

    def angle_shares(self, batch_rows: int = BATCH_ROWS) -> list[Share]:
        """What is left once all directions of classes are known: the kind of classes, for the second half of images."""
        rows = np.flatnonzero(self.store.valid)
        rows = rows[(rows >= self._middle) & (rows < self._stop)]
        runs = batches(self.store.spec, rows, batch_rows)
        return [Share(rows=run, kinds=self.one[:1], classes="angles", similar=False) for run in runs]

    def measure(
        self,
        share: Share,
        sums: Sums,
        *,
        batch_rows: int = BATCH_ROWS,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Read a share of the store and count it.

        Raises:
            UserError: States that have no direction.
            StoreError, ObjectError: As `Store.read`.
        """
        try:
            pass_over(
                self.store, self._analyses(share, sums), rows=share.rows, batch_rows=batch_rows, progress=progress
            )
        except ValueError as error:
            raise UserError(f"{self.store.location}: {error}") from error

    def measure_share(
        self,
        share: Share,
        directions: Float64[np.ndarray, "class layer dim"] | None,
        *,
        batch_rows: int = BATCH_ROWS,
    ) -> Sums:
        """What a worker does: the sums of one share; with angles to the directions of classes where these are given."""
        sums = self.sums(share.kinds if directions is None else ())
        sums.basins = None if directions is None else BasinAccumulator(directions)
        self.measure(share, sums, batch_rows=batch_rows)
        return sums

    def _analyses(self, share: Share, sums: Sums) -> list[Analysis]:
        asked = []
        if share.similar and self.one:
            asked.append(Analysis(name="CKA", kinds=self.one, update=similar(sums), stop=self._stop))
        for kind in share.kinds if share.classes != "angles" else ():
            stop = self._stop if kind in ONE_TOKEN else self._wide_stop
            update = feed(sums, kind, self.layers)
            asked.append(Analysis(name="dynamics and spectra", kinds=(kind,), update=update, stop=stop))
        if share.classes and not (sums.directions is None and sums.basins is None):
            update = self._classes(share, sums)
            asked.append(Analysis(name="classes", kinds=self.one[:1], update=update, stop=self._stop))
        return asked

    def _classes(self, share: Share, sums: Sums) -> Callable[[States, Int64[np.ndarray, " row"]], None]:
        """Directions from the first half of the images, angles to them from the second: none is its own measure."""

        def update(states: States, rows: np.ndarray) -> None:
            found, labels = states[self.one[0]][:, :, 0], self._labels[rows]
            first = (rows < self._middle) & (labels >= 0)
            if share.classes != "angles" and sums.directions is not None:
                sums.directions.update(found[first], labels[first])
            second = (rows >= self._middle) & (labels >= 0)
            if share.classes == "directions" or not second.any():
                return
            if sums.basins is None and share.classes == "both":
                sums.begin_basins()
            if sums.basins is not None:
                sums.basins.update(found[second], labels[second])

        return update

    def result(self, sums: Sums) -> Findings:
        return Findings(
            layers=self.layers,
            n_images=self.n_images,
            n_images_wide=self.n_images_wide,
            cosines={kind: part.result() for kind, part in sums.cosines.items()},
            cka={name: part.result() for name, part in sums.cka.items()},
            dynamics={kind: part.result() for kind, part in sums.dynamics.items()},
            covariances={kind: part.result() for kind, part in sums.covariances.items()},
            updates={kind: part.result(centred=False) for kind, part in sums.updates.items()},
            basins=None if sums.basins is None else sums.basins.result(),
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
    check_images(store)
    asked = StoreAnalyses(store, limit=limit, wide_limit=wide_limit)
    sums = asked.sums()
    asked.measure(asked.all_at_once(), sums, batch_rows=batch_rows, progress=progress)
    return asked.result(sums)


def measure_shares(
    asked: StoreAnalyses,
    run: Callable[[Sequence[Share], Float64[np.ndarray, "class layer dim"] | None], Iterable[Sums]],
    batch_rows: int = BATCH_ROWS,
) -> Findings:
    """The same as `measure_store`, in shares that others measure: memory is that of the sums and of one share's.

    Args:
        asked: Of the store.
        run: Measures shares, in any order, as `StoreAnalyses.measure_share` does; called once or twice, as angles to
            the directions of classes have to wait for the directions.
        batch_rows: Of minibatch CKA.
    """
    sums = asked.sums()
    for found in run(asked.shares(batch_rows), None):
        sums.merge(found)
    sums.begin_basins()
    if sums.basins is not None and sums.directions is not None:
        for found in run(asked.angle_shares(batch_rows), sums.directions.result()):
            sums.merge(found)
    return asked.result(sums)


def measure_nbytes(spec: StoreSpec, n_classes: int, batch_rows: int = BATCH_ROWS) -> int:
    """Bytes that `measure_store` holds at most: 1.6 GB for ViT-B/14 and 1,000 classes, however many images there are.

    States as they are read, the sums, and what is made of a batch of the one-token kinds or of a slice of the others.
    """
    n, dim = len(spec.layers), spec.dim
    one = [kind for kind in ONE_TOKEN if kind in spec.token_kinds]
    rows = max(1, batch_rows // spec.samples_per_chunk) * spec.samples_per_chunk if one else 0
    products = len(spec.token_kinds) * 16 * n * dim * (dim + 1)
    directions = 24 * n_classes * n * dim if one else 0
    values = 8 * max(rows * n * dim, slice_values(spec, batch_rows))
    kernels = 8 * n * rows**2
    made = max(_COPIES * values, kernels + values, 8 * rows * n * n_classes + 5 * values)
    reading = pass_nbytes(spec, spec.token_kinds, batch_rows=batch_rows) + made + 8 * n * dim**2
    # The covariances, beside the sums that they are made of; and one layer's directions of classes, less one of them.
    ending = products + 24 * n * dim**2 + 16 * n_classes * dim
    return products + directions + max(reading, ending)


def check_images(store: Store) -> None:
    """Refuse a store with too few images, before anything is read."""
    if store.n_valid < LEAST_ROWS:
        raise UserError(
            f"{store.location} has {store.n_valid} valid images; the unbiased HSIC needs {LEAST_ROWS} or more"
        )

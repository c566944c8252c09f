"""One pass over a store that feeds all analyses: the chunks that one of them needs, each read once, and no others.

Rows come in batches of whole chunks, in the store's order, which is shuffled. Kinds with one token (cls, patch_mean)
are read for a whole batch; registers and patches in windows of it, since a batch of ViT-B's patches would be 10 GB. The
next part is read while this one is counted.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from infra.console import UserError
from storage_schemas import Store
from storage_schemas.spec import Kind, StoreSpec

#: Rows of a batch, in whole chunks; one chunk at least.
BATCH_ROWS = 1024
#: Kinds of which a whole batch is read.
ONE_TOKEN: tuple[Kind, ...] = ("cls", "patch_mean")

_WINDOW_NBYTES = 64 * 2**20  # of float32 states of one kind, or one chunk of them
_SLICE_NBYTES = 8 * 2**20  # of a window's states that an analysis is given at a time, or one row of them

States = Mapping[str, Float32[np.ndarray, "row layer token dim"]]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What one analysis wants of the pass.

    Attributes:
        name: For messages.
        kinds: Token kinds that it reads: one-token ones, or else one of registers and patches. With the former an
            update is a whole batch; with the latter a slice of a window, of any number of rows.
        update: Counts rows, given states by kind and the rows' sample indices.
        stop: Only samples below this index; None for all.
    """

    name: str
    kinds: tuple[Kind, ...]
    update: Callable[[States, Int64[np.ndarray, " row"]], None]
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of which some kinds are read together, for some analyses; `n_done` images are finished with it."""

    rows: np.ndarray
    kinds: tuple[Kind, ...]
    analyses: tuple[Analysis, ...]
    rows_at_once: int
    n_done: int


def pass_over(
    store: Store,
    analyses: Sequence[Analysis],
    *,
    layers: Sequence[int] | None = None,
    rows: Int64[np.ndarray, " row"] | None = None,
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Read what the analyses ask for and give it to them.

    Args:
        store: Finished or not; what is committed counts. Memory: `pass_nbytes`.
        analyses: Each is given its kinds, at all of the layers.
        layers: None for all of the store.
        rows: Ascending sample indices; None for all valid ones. A worker is given some of the `batches`.
        batch_rows: Of the one-token kinds.
        progress: Told the number of images after each batch.

    Returns:
        Number of images that at least one analysis was given.

    Raises:
        UserError: There is no image, or a kind that the store lacks; names the analyses.
        StoreError, ObjectError: As `Store.read`.
    """
    chosen = tuple(store.layers if layers is None else layers)
    taken = _wanted(np.flatnonzero(store.valid) if rows is None else rows, analyses)
    _check(store, analyses, taken)
    parts = _parts(store.spec, analyses, batches(store.spec, taken, batch_rows), len(chosen))

    def read(part: _Part) -> States:
        return {kind: store.read(chosen, part.rows, kind) for kind in part.kinds}

    with ThreadPoolExecutor(1) as ahead:
        coming: deque[tuple[_Part, Future[States]]] = deque()
        for part in parts:
            coming.append((part, ahead.submit(read, part)))
            if len(coming) > 1:
                _give(*coming.popleft(), progress)
        while coming:
            _give(*coming.popleft(), progress)
    return len(taken)


def batches(spec: StoreSpec, rows: Int64[np.ndarray, " row"], batch_rows: int = BATCH_ROWS) -> list[np.ndarray]:
    """Ascending rows in runs of whole chunks, at most `batch_rows` planned samples, or one chunk; each not empty."""
    samples = max(1, batch_rows // spec.samples_per_chunk) * spec.samples_per_chunk
    return np.split(rows, np.flatnonzero(np.diff(rows // samples)) + 1) if len(rows) else []


def stop_after(store: Store, n_images: int) -> int:
    """The sample index below which the store has so many valid images, or all that it has."""
    rows = np.flatnonzero(store.valid)
    return int(rows[min(n_images, len(rows)) - 1]) + 1 if len(rows) and n_images > 0 else 0


def pass_nbytes(
    spec: StoreSpec, kinds: Sequence[Kind], n_layers: int | None = None, batch_rows: int = BATCH_ROWS
) -> int:
    """Bytes of states that a pass holds at most: the part that is counted and the one that is read meanwhile.

    What analyses hold, and the float64 values they make of a batch or a slice, is their own.
    """
    layers = len(spec.layers) if n_layers is None else n_layers
    chunk = spec.samples_per_chunk
    one = sum(4 * layers * spec.dim for kind in kinds if kind in ONE_TOKEN)
    wide = max((4 * layers * spec.dim * _n_tokens(spec, kind) for kind in kinds if kind not in ONE_TOKEN), default=0)
    batch = max(1, batch_rows // chunk) * chunk
    window = max(1, min(batch, _WINDOW_NBYTES // (wide * chunk) * chunk) // chunk) * chunk if wide else 0
    return 2 * max(batch * one, window * wide)


def slice_values(spec: StoreSpec, batch_rows: int = BATCH_ROWS) -> int:
    """Values of registers or patches that an analysis is given at a time, at most."""
    wide = [_n_tokens(spec, kind) for kind in spec.token_kinds if kind not in ONE_TOKEN]
    row = len(spec.layers) * spec.dim * max(wide, default=0)
    rows = max(1, batch_rows // spec.samples_per_chunk) * spec.samples_per_chunk
    return min(rows, max(1, _SLICE_NBYTES // (4 * row))) * row if wide else 0


def _wanted(rows: np.ndarray, analyses: Sequence[Analysis]) -> np.ndarray:
    stops = [analysis.stop for analysis in analyses]
    known = [stop for stop in stops if stop is not None]
    return rows[rows < max(known, default=0)] if len(known) == len(stops) else rows


def _check(store: Store, analyses: Sequence[Analysis], rows: np.ndarray) -> None:
    known = store.spec.token_kinds
    problems = [
        f"{analysis.name} reads {kind}, which {store.spec.teacher} has not; the store has {', '.join(known)}"
        for analysis in analyses
        for kind in analysis.kinds
        if kind not in known
    ]
    if not len(rows):
        problems.append("there is no image to analyse: make extract")
    if problems:
        raise UserError("\n  ".join([f"{store.location} cannot be analysed:", *problems]))
    assert all(len(one.kinds) == 1 or set(one.kinds) <= set(ONE_TOKEN) for one in analyses)


def _parts(spec: StoreSpec, analyses: Sequence[Analysis], runs: Sequence[np.ndarray], n_layers: int) -> Iterator[_Part]:
    whole = [one for one in analyses if set(one.kinds) <= set(ONE_TOKEN)]
    windowed: dict[Kind, list[Analysis]] = {}
    for one in analyses:
        if one not in whole:
            windowed.setdefault(one.kinds[0], []).append(one)
    for run in runs:
        parts = [_part(run, whole, len(run))] if whole else []
        for kind, some in windowed.items():
            row_nbytes = 4 * n_layers * _n_tokens(spec, kind) * spec.dim
            at_once = max(1, _SLICE_NBYTES // row_nbytes)
            parts += [_part(rows, some, at_once) for rows in batches(spec, run, _WINDOW_NBYTES // row_nbytes)]
        parts = [part for part in parts if len(part.rows)]
        yield from parts[:-1]
        yield _Part(**{**vars(parts[-1]), "n_done": len(run)})


def _part(rows: np.ndarray, analyses: Sequence[Analysis], rows_at_once: int) -> _Part:
    rows = _wanted(rows, analyses)
    kinds = tuple(dict.fromkeys(kind for one in analyses for kind in one.kinds))
    return _Part(rows=rows, kinds=kinds, analyses=tuple(analyses), rows_at_once=max(1, rows_at_once), n_done=0)


def _give(part: _Part, coming: Future[States], progress: Callable[[int], None] | None) -> None:
    states = coming.result()
    for start in range(0, len(part.rows), part.rows_at_once):
        piece = slice(start, start + part.rows_at_once)
        for analysis in part.analyses:
            rows = _wanted(part.rows[piece], [analysis])
            if len(rows):
                analysis.update({kind: states[kind][piece][: len(rows)] for kind in analysis.kinds}, rows)
    if progress is not None and part.n_done:
        progress(part.n_done)


def _n_tokens(spec: StoreSpec, kind: Kind) -> int:
    return {"registers": spec.n_registers, "patches": spec.n_patches}.get(kind, 1)

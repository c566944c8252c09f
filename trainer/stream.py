"""Stream the states of a span from a store: every valid sample once per pass, in an order that is arithmetic.

Threads read whole chunks and check them; each sample goes from the object straight to its place in its future batch, so
a batch is contiguous without any gathering. See docs/decisions for what this beat.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import finalize

import numpy as np

from infra.console import say
from storage_schemas.errors import NotCommittedError, SchemaError
from storage_schemas.reader import Store
from storage_schemas.spec import Span, StoreSpec
from trainer.batch import Copier, DeviceBatch, HostBatch
from trainer.chunk_reader import ChunkReader, default_threads, is_remote, thread_nbytes
from trainer.order import PassOrder, make_pass_order, make_read_plan
from trainer.ring import Ring, ring_nbytes, stream_kinds

__all__ = ["DeviceBatch", "HostBatch", "LayerSliceStream", "Span", "stream_memory_nbytes"]

_STATE_VERSION = 1
_FIXED_NBYTES = 4 * 2**20  # Python's own objects of a stream, and what its allocator keeps


class LayerSliceStream:
    """One pass over a store's valid samples, states `span.start` to `span.stop` of each; then iteration ends.

    The order depends on the store, seed, epoch and lanes alone: ranks and threads only share the work. Each stored byte
    of the span is read, checked and decoded once per pass. Use it as a context manager, or close it.

    Attributes:
        store, span, batch_size, seed, epoch, rank, world_size: As given.
        shards: The shards that take part, or None for all.
        n_lanes: Chunks that are mixed with each other; `lanes`, or less in a small store.
    """

    def __init__(
        self,
        store: Store,
        span: Span,
        batch_size: int = 64,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lanes: int = 64,
        threads: int | None = None,
        *,
        readahead: float = 1.0,
        partial: bool = False,
        shards: Sequence[int] | None = None,
    ) -> None:
        """Check everything and take the memory; threads start with the first batch.

        Args:
            store: From `open_store`.
            span: Both ends included.
            batch_size: Samples of a batch over all ranks; the last batch may be smaller.
            seed: Of the order.
            epoch: Number of the pass; each has its own order.
            rank: This process, 0 to world_size - 1.
            world_size: Processes that share the pass.
            lanes: Most chunks to be mixed with each other. Memory grows with it.
            threads: Reading threads; more than cores help where storage is slow to answer. None: one per core, 2 to 8,
                or 32 where the store is in S3.
            readahead: Buffers beyond one chunk per lane, as a fraction; 1 hides the refills of the lanes, 0 halves the
                memory and stalls at each.
            partial: Accept a store that is not finished, with the shards committed now.
            shards: With `partial`, exactly these shards: all ranks must agree while the store still grows.

        Raises:
            SchemaError: A layer of the span is not in the store.
            NotCommittedError: The store is not finished and `partial` is False, or a shard of `shards` is missing.
            ValueError: A number is out of range, or there are more ranks than lanes.
            TypeError: The store or the span is something else; says what, and what to give.
        """
        _check_kinds(store, span)
        self._is_remote = is_remote(store)
        threads = default_threads(remote=self._is_remote) if threads is None else threads
        _check_numbers(1, batch_size=batch_size, threads=threads, world_size=world_size, lanes=lanes)
        _check_numbers(0, seed=seed, epoch=epoch, rank=rank)
        if rank >= world_size:
            raise ValueError(f"rank is {rank}; expected 0 to {world_size - 1}")
        if not 0 <= readahead < math.inf:
            raise ValueError(f"readahead is {readahead}; expected a finite number, at least 0")
        _check_span(store, span)
        self.store, self.span, self.batch_size, self.seed = store, span, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shards = _frozen_shards(store, partial, shards)
        self._lanes, self._n_threads, self._readahead = lanes, threads, readahead
        self._copier = Copier()
        self._ring: Ring | None = None
        self._reader: ChunkReader | None = None
        self._batch: HostBatch | None = None
        self._closed = False
        self._totals = _Totals()
        self._set_pass(self._make_order(seed, epoch, self.shards), epoch, 0)

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return self._order.n_batches(self.batch_size)

    @property
    def n_samples(self) -> int:
        """Samples of a whole pass, over all ranks."""
        return self._order.n_samples

    @property
    def position(self) -> int:
        """Samples handed out so far in this pass, over all ranks."""
        return min(self._next * self.batch_size, self.n_samples)

    @property
    def memory_nbytes(self) -> int:
        """The most bytes that this rank takes: buffers of lanes x chunk x states x (1 + readahead), threads, order."""
        n_rows = self._plan.n_buffers * self._n_buffer_rows
        per_thread = thread_nbytes(self.store.spec, remote=self._is_remote)
        return _memory_nbytes(self.store.spec, self.span, self._order, n_rows, self._n_threads * per_thread)

    @property
    def bytes_fetched(self) -> int:
        """Bytes read from objects since the stream was made."""
        return self._totals.bytes_fetched + (self._reader.bytes_fetched if self._reader else 0)

    @property
    def bytes_needed(self) -> int:
        """Stored bytes of the chunks that held what was asked for."""
        return self._totals.bytes_needed + (self._reader.bytes_needed if self._reader else 0)

    @property
    def n_chunks_read(self) -> int:
        """Chunks of one (layer, kind) read."""
        return self._totals.n_chunks_read + (self._reader.n_chunks_read if self._reader else 0)

    @property
    def waited_s(self) -> float:
        """Seconds that the consumer waited for batches."""
        return self._totals.waited_s + (self._reader.waited_s if self._reader else 0.0)

    @property
    def amplification(self) -> float:
        """Bytes fetched per byte needed; 1 before anything was read."""
        return self.bytes_fetched / self.bytes_needed if self.bytes_needed else 1.0

    def __iter__(self) -> "LayerSliceStream":
        return self

    def __next__(self) -> HostBatch:
        """The next batch; the one before is released.

        Raises:
            ObjectError, ChecksumError, DecodeError: From a reading thread; names the object. It comes at the next batch
                after it happened, and again at every further one.
        """
        self._check_open()
        self._release()
        if self._next >= len(self):
            self._stop_reader()
            raise StopIteration
        if self._reader is None:
            self._start_reader()
        assert self._reader is not None
        assert self._ring is not None
        self._reader.wait(self._next)
        n_batch = min(self.batch_size, self.n_samples - self._next * self.batch_size)
        self._batch = HostBatch(self._reader, self._ring, self._next, n_batch, self._copier)
        self._next += 1
        return self._batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of another pass; buffers are kept."""
        self._check_open()
        _check_numbers(0, epoch=epoch)
        self._stop_reader()
        self._set_pass(self._make_order(self.seed, epoch, self.shards), epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values: after the batch handed out last.

        The same for every rank, thread count and span, and good for another number of ranks.
        """
        return {
            "version": _STATE_VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self._next,
            **self._identity(self._order),
            "shards": None if self.shards is None else list(self.shards),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: seed, epoch, place and shards come from it.

        Raises:
            ValueError: The state is of another batch size, number of lanes or set of samples, or lacks something;
                lists each difference.
            NotCommittedError: The store lacks a shard that the state was made with.
        """
        self._check_open()
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"stream state has version {state.get('version')!r}; expected {_STATE_VERSION}")
        _check_state(state, self.state_dict())
        shards = self.shards
        if state["shards"] is not None:
            shards = _frozen_shards(self.store, True, state["shards"])
        seed, epoch, batch = int(state["seed"]), int(state["epoch"]), int(state["batch"])
        order = self._make_order(seed, epoch, shards)
        problems = [
            f"{name} was {state[name]!r}, is {value!r} now"
            for name, value in self._identity(order).items()
            if state[name] != value
        ]
        if not problems and not 0 <= batch <= order.n_batches(self.batch_size):
            problems.append(f"batch {batch} is not in the pass; it has {order.n_batches(self.batch_size)}")
        if problems:
            raise ValueError(
                "the stream cannot continue from this state: " + "; ".join(problems) + ". Use the settings of the "
                "interrupted run, or start another one"
            )
        self._stop_reader()
        self.seed, self.shards = seed, shards
        self._set_pass(order, epoch, batch)

    def close(self) -> None:
        """End all threads and give the memory back. More than once is no error.

        A thread whose read does not return within two seconds is left behind, and ends when it does.
        """
        self._closed = True
        self._stop_reader()
        self._ring = None

    def __enter__(self) -> "LayerSliceStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the stream is closed")

    def _identity(self, order: PassOrder) -> dict[str, Any]:
        """What must agree for a place in the pass to mean the same."""
        return {
            "batch_size": self.batch_size,
            "n_lanes": order.n_lanes,
            "samples_per_chunk": order.samples_per_chunk,
            "n_samples": order.n_samples,
            "valid_digest": hashlib.sha256(np.packbits(order.valid).tobytes()).hexdigest()[:16],
        }

    def _make_order(self, seed: int, epoch: int, shards: tuple[int, ...] | None) -> PassOrder:
        valid = _valid_in(self.store, shards)
        return make_pass_order(valid, self.store.spec.samples_per_chunk, seed=seed, epoch=epoch, lanes=self._lanes)

    def _set_pass(self, order: PassOrder, epoch: int, next_batch: int) -> None:
        spec = self.store.spec
        self._order, self.epoch, self._next, self.n_lanes = order, epoch, next_batch, order.n_lanes
        if self.world_size > self.n_lanes:
            raise ValueError(
                f"{self.world_size} ranks, but only {self.n_lanes} lanes (lanes={self._lanes}, "
                f"{len(self._order.chunk)} chunks of {spec.samples_per_chunk} samples); use at most {self.n_lanes} "
                "ranks, or a store with smaller chunks"
            )
        self._plan = make_read_plan(
            self._order,
            self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            start_batch=next_batch,
            readahead=self._readahead,
        )
        self._rank_starts = self._order.rank_starts(self.batch_size, self.rank, self.world_size)
        self._n_buffer_rows = int(np.diff(self._rank_starts).max())
        n_rows = self._plan.n_buffers * self._n_buffer_rows
        if self._ring is None or self._ring.n_rows < n_rows:
            self._ring = None  # give the old one back before the new one is made
            self._ring = Ring(spec, self.span.n_states, n_rows)

    def _start_reader(self) -> None:
        assert self._ring is not None
        self._reader = ChunkReader(
            self.store,
            self.span,
            self._order,
            self._plan,
            self._ring,
            batch_size=self.batch_size,
            start_batch=self._next,
            rank_starts=self._rank_starts,
            rank_lanes=self._order.rank_lanes(self.rank, self.world_size),
            n_buffer_rows=self._n_buffer_rows,
            n_threads=self._n_threads,
        )
        self._abandoned = finalize(self, self._reader.stop)  # the threads also end if nobody closes the stream

    def _release(self) -> None:
        if self._batch is not None:
            self._batch.release()
            self._batch = None

    def _stop_reader(self) -> None:
        self._release()
        reader, self._reader = self._reader, None
        if reader is not None:
            self._abandoned.detach()
            reader.stop()
            if not reader.join():
                self._ring = None
                say(f"{self.store.location}: some reads hang; they are left behind, each with its memory, to end alone")
            self._totals.add(reader)


class _Totals:
    """Counters of the readers that have ended."""

    def __init__(self) -> None:
        self.bytes_fetched = self.bytes_needed = self.n_chunks_read = 0
        self.waited_s = 0.0

    def add(self, reader: ChunkReader) -> None:
        self.bytes_fetched += reader.bytes_fetched
        self.bytes_needed += reader.bytes_needed
        self.n_chunks_read += reader.n_chunks_read
        self.waited_s += reader.waited_s


def stream_memory_nbytes(
    spec: StoreSpec,
    span: Span,
    batch_size: int = 64,
    world_size: int = 1,
    lanes: int = 64,
    threads: int | None = None,
    *,
    readahead: float = 1.0,
    remote: bool = False,
) -> int:
    """The most bytes that each rank of a stream will take, for a plan; a store without bad images is assumed.

    About lanes x chunk x states x (1 + readahead) / world_size. The stream's own `memory_nbytes` knows the bad images.
    `remote` says that the store is in S3.
    """
    order = make_pass_order(np.ones(spec.n_samples, bool), spec.samples_per_chunk, lanes=lanes)
    most_rows = 0
    for rank in range(min(world_size, order.n_lanes)):
        plan = make_read_plan(order, batch_size, rank=rank, world_size=world_size, readahead=readahead)
        n_rows = int(np.diff(order.rank_starts(batch_size, rank, world_size)).max())
        most_rows = max(most_rows, plan.n_buffers * n_rows)
    n_threads = default_threads(remote=remote) if threads is None else threads
    return _memory_nbytes(spec, span, order, most_rows, n_threads * thread_nbytes(spec, remote=remote))


def _memory_nbytes(spec: StoreSpec, span: Span, order: PassOrder, n_rows: int, threads_nbytes: int) -> int:
    return ring_nbytes(spec, span.n_states, n_rows) + order.planning_nbytes + threads_nbytes + _FIXED_NBYTES


def _check_numbers(least: int, **numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")


def _check_state(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError for what `state_dict` would have written and is not there, or is no number."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the stream state lacks {', '.join(missing)}; give what state_dict() returned, whole")
    _check_numbers(0, **{name: state[name] for name in ("seed", "epoch", "batch")})
    shards = state["shards"]
    if shards is not None and not (isinstance(shards, Sequence) and all(isinstance(s, int) for s in shards)):
        raise ValueError(f"shards of the stream state are {shards!r}; expected a list of whole numbers, or None")


def _check_kinds(store: object, span: object) -> None:
    if not isinstance(store, Store):
        raise TypeError(f"store is {type(store).__name__}, expected a Store: give open_store({_shown(store)})")
    if not isinstance(span, Span):
        raise TypeError(f"span is {type(span).__name__}, expected a Span: give Span(0, 7) or Span.parse('0-7')")


def _shown(store: object) -> str:
    return repr(os.fspath(store)) if isinstance(store, str | os.PathLike) else "path"


def _check_span(store: Store, span: Span) -> None:
    missing = [layer for layer in span.states if layer not in store.layers]
    if missing:
        raise SchemaError(
            f"BLOCK={span}",
            [
                f"{store.location} has no layer {', '.join(map(str, missing))}; it has "
                f"{', '.join(map(str, store.layers))}. Choose a span within them"
            ],
        )
    assert stream_kinds(store.spec)


def _frozen_shards(store: Store, partial: bool, shards: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shards that take part; None where that is all of them by right."""
    committed = store.committed
    if shards is not None:
        if not partial:
            raise ValueError("shards were given for a whole pass; give partial=True with them")
        missing = [s for s in shards if not (0 <= s < len(committed) and committed[s])]
        if missing:
            raise NotCommittedError(
                f"{store.location}: shards {', '.join(map(str, missing[:10]))} are not committed, but the pass was "
                "begun with them. Mend the store (make verify REPAIR=1) or begin another run"
            )
        return tuple(sorted(shards))
    if committed.all():
        return None
    if not partial:
        raise NotCommittedError(
            f"{store.location} is not finished: {int(committed.sum())} of {len(committed)} shards are committed. Run "
            "the same make extract again, or use what is there: PARTIAL=1"
        )
    return tuple(np.flatnonzero(committed).tolist())


def _valid_in(store: Store, shards: Sequence[int] | None) -> np.ndarray:
    if shards is None:
        return store.valid
    valid = np.zeros(store.n_samples, bool)
    for shard in shards:
        rows = store.spec.shard_samples(shard)
        valid[rows.start : rows.stop] = store.valid[rows.start : rows.stop]
    return valid

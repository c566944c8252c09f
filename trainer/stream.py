"""Stream the states of a span from a store: every valid sample once per pass, in an order that is arithmetic.

Threads read whole chunks and check them; each sample goes from the object straight to its place in its future batch, so
a batch is contiguous without any gathering. Passes that follow each other share buffers: while one ends, the first
chunks of the next are read. See docs/decisions for what this beat.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import finalize

import numpy as np

from infra.console import say
from storage_schemas.reader import Store
from storage_schemas.spec import Span, StoreSpec
from trainer.batch import Copier, DeviceBatch, HostBatch
from trainer.chunk_reader import ChunkReader
from trainer.order import PassOrder, make_pass_order
from trainer.rank_pass import RankPass, make_rank_pass
from trainer.reading_threads import default_threads, is_remote, thread_nbytes
from trainer.ring import Ring, ring_nbytes
from trainer.stream_checks import check_kinds, check_numbers, check_span, check_state, frozen_shards, valid_in

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
        n_steps: int | None = None,
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
            n_steps: Batches that will be asked for in all, counted from the first of pass 0, by a caller that goes from
                each pass to the next with `set_epoch`. The first chunks of the next pass are then read while one ends,
                into buffers that are free, and what only later batches hold is not read. None: each pass for itself.

        Raises:
            SchemaError: A layer of the span is not in the store.
            NotCommittedError: The store is not finished and `partial` is False, or a shard of `shards` is missing.
            ValueError: A number is out of range, or there are more ranks than lanes.
            TypeError: The store or the span is something else; says what, and what to give.
        """
        check_kinds(store, span)
        self._is_remote = is_remote(store)
        threads = default_threads(remote=self._is_remote) if threads is None else threads
        check_numbers(1, batch_size=batch_size, threads=threads, world_size=world_size, lanes=lanes)
        check_numbers(0, seed=seed, epoch=epoch, rank=rank)
        if rank >= world_size:
            raise ValueError(f"rank is {rank}; expected 0 to {world_size - 1}")
        if not 0 <= readahead < math.inf:
            raise ValueError(f"readahead is {readahead}; expected a finite number, at least 0")
        if n_steps is not None:
            check_numbers(1, n_steps=n_steps)
        check_span(store, span)
        self.store, self.span, self.batch_size, self.seed = store, span, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shards = frozen_shards(store, partial, shards)
        self._lanes, self._n_threads, self._readahead, self._n_steps = lanes, threads, readahead, n_steps
        self._copier = Copier()
        self._ring: Ring | None = None
        self._following: RankPass | None = None  # appended to the reader's
        self._reader: ChunkReader | None = None
        self._batch: HostBatch | None = None
        self._closed = False
        self._totals = _Totals()
        self._waited_s = 0.0
        self._next = 0
        self._set_pass(self._make_order(valid_in(store, self.shards), seed, epoch), epoch, 0)

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return self._pass.n_batches

    @property
    def n_samples(self) -> int:
        """Samples of a whole pass, over all ranks."""
        return self._pass.order.n_samples

    @property
    def position(self) -> int:
        """Samples handed out so far in this pass, over all ranks."""
        return min(self._next * self.batch_size, self.n_samples)

    @property
    def memory_nbytes(self) -> int:
        """The most bytes that this rank takes: buffers of lanes x chunk x states x (1 + readahead), threads, orders.

        Of this pass: another one may want a few rows more where images are bad or ranks have unequal shares.
        """
        per_thread = thread_nbytes(self.store.spec, remote=self._is_remote)
        return _memory_nbytes(
            self.store.spec,
            self.span,
            self._pass.order,
            self.batch_size,
            self._n_buffers * self._n_buffer_rows,
            self._n_threads * per_thread,
        )

    @property
    def bytes_fetched(self) -> int:
        """Bytes read from objects since the stream was made."""
        return self._totals.bytes_fetched + (self._reader.bytes_fetched if self._reader else 0)

    @property
    def bytes_needed(self) -> int:
        """Stored bytes of the chunks that held what was asked for, but for those of a pass that was never begun."""
        return self._totals.bytes_needed + (self._reader.bytes_needed if self._reader else 0)

    @property
    def n_chunks_read(self) -> int:
        """Chunks of one (layer, kind) read."""
        return self._totals.n_chunks_read + (self._reader.n_chunks_read if self._reader else 0)

    @property
    def waited_s(self) -> float:
        """Seconds that the consumer waited for batches, planning included."""
        return self._waited_s

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
                after it happened, and again at every further one; with `n_steps` it may be of the next pass's reads.
            ValueError: More than `n_steps` batches were asked for.
        """
        begin = time.perf_counter()
        try:
            return self._next_batch()
        finally:
            self._waited_s += time.perf_counter() - begin

    def _next_batch(self) -> HostBatch:
        self._check_open()
        self._release()
        if self._next >= len(self):
            if self._following is None:
                self._stop_reader()
            raise StopIteration
        if self._next >= self._n_wanted(self.epoch, len(self)):
            raise ValueError(
                f"batch {self._next} of pass {self.epoch} was asked for, but the stream was made for {self._n_steps} "
                "batches in all: give as many n_steps as will be taken"
            )
        reader, ring = self._started()
        if reader.expects_more and self._following is None and self._next + self._n_buffers >= len(self):
            self._append_pass(reader)
        place = self._first_place + self._next
        reader.wait(place)
        n_batch = min(self.batch_size, self.n_samples - self._next * self.batch_size)
        self._batch = HostBatch(reader, ring, place, self._next, n_batch, self._copier)
        self._next += 1
        return self._batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of another pass; buffers are kept, and with `n_steps` what was read ahead of the next."""
        begin = time.perf_counter()
        self._check_open()
        check_numbers(0, epoch=epoch)
        following = self._following
        if self._reader is not None and following is not None and epoch == following.epoch and self._next == len(self):
            self._release()
            self._first_place = self._reader.begin_next()
            self._pass, self.epoch, self._next, self._following = following, epoch, 0, None
        else:
            self._set_pass(self._make_order(self._pass.order.valid, self.seed, epoch), epoch, 0)
        self._waited_s += time.perf_counter() - begin

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values: after the batch handed out last.

        The same for every rank, thread count and span, and good for another number of ranks.
        """
        return {
            "version": _STATE_VERSION,
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self._next,
            **self._identity(self._pass.order),
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
        check_state(state, self.state_dict())
        shards = self.shards
        if state["shards"] is not None:
            shards = frozen_shards(self.store, True, state["shards"])
        seed, epoch, batch = int(state["seed"]), int(state["epoch"]), int(state["batch"])
        order = self._make_order(valid_in(self.store, shards), seed, epoch)
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
        self._set_pass(order, epoch, batch)
        self.seed, self.shards = seed, shards

    def close(self) -> None:
        """End all threads and give the memory back. More than once is no error, nor is it from another thread.

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

    def _make_order(self, valid: np.ndarray, seed: int, epoch: int) -> PassOrder:
        return make_pass_order(valid, self.store.spec.samples_per_chunk, seed=seed, epoch=epoch, lanes=self._lanes)

    def _n_wanted(self, epoch: int, n_batches: int) -> int:
        """Batches that will be asked for of a pass of so many."""
        return n_batches if self._n_steps is None else max(0, min(n_batches, self._n_steps - epoch * n_batches))

    def _has_next(self, epoch: int) -> bool:
        """Whether batches of the pass after this one will be asked for."""
        return self._n_steps is not None and self._n_steps > (epoch + 1) * len(self)

    def _set_pass(self, order: PassOrder, epoch: int, next_batch: int) -> None:
        """Begin a pass anew; what is refused leaves the one in use as it is."""
        spec = self.store.spec
        if self.world_size > order.n_lanes:
            raise ValueError(
                f"{self.world_size} ranks, but only {order.n_lanes} lanes (lanes={self._lanes}, "
                f"{len(order.chunk)} chunks of {spec.samples_per_chunk} samples); use at most {order.n_lanes} "
                "ranks, or a store with smaller chunks"
            )
        self._stop_reader()
        self.epoch, self._next, self.n_lanes = epoch, next_batch, order.n_lanes
        self._pass = self._plan(order, epoch, next_batch)
        self._first_place, self._following = 0, None
        self._n_buffers, self._n_buffer_rows = self._pass.plan.n_buffers, self._pass.most_rows
        n_rows = self._n_buffers * self._n_buffer_rows
        if self._ring is None or self._ring.n_rows < n_rows:
            self._ring = None  # give the old one back before the new one is made
            self._ring = Ring(spec, self.span.n_states, n_rows)

    def _plan(self, order: PassOrder, epoch: int, start_batch: int = 0, n_buffers: int | None = None) -> RankPass:
        return make_rank_pass(
            order,
            epoch,
            self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            start_batch=start_batch,
            stop_batch=self._n_wanted(epoch, order.n_batches(self.batch_size)),
            readahead=self._readahead,
            n_buffers=n_buffers,
        )

    def _started(self) -> tuple[ChunkReader, Ring]:
        """The reader at work and its buffers, which another thread may close at any moment."""
        reader, ring = self._reader, self._ring
        if reader is None and ring is not None:
            reader = self._start_reader(ring)
        if self._closed:
            self._stop_reader()  # close() may have come too early to see it
        self._check_open()
        assert reader is not None
        assert ring is not None
        return reader, ring

    def _start_reader(self, ring: Ring) -> ChunkReader:
        reader = ChunkReader(
            self.store,
            self.span,
            self._pass,
            ring,
            start_batch=self._next,
            n_buffer_rows=self._n_buffer_rows,
            n_threads=self._n_threads,
            expects_more=self._has_next(self.epoch),
        )
        self._abandoned = finalize(self, reader.stop)  # the threads also end if nobody closes the stream
        self._reader = reader
        return reader

    def _append_pass(self, reader: ChunkReader) -> None:
        """Have the next pass read in the buffers that this one no longer needs, where its chunks fit into them."""
        epoch = self.epoch + 1
        order = self._make_order(self._pass.order.valid, self.seed, epoch)
        following = self._plan(order, epoch, n_buffers=self._n_buffers)
        if following.fits(self._n_buffers, self._n_buffer_rows):
            self._following = following
            reader.append(following, expects_more=self._has_next(epoch))
        else:  # it begins with larger ones
            reader.append(None)

    def _release(self) -> None:
        if self._batch is not None:
            self._batch.release()
            self._batch = None

    def _stop_reader(self) -> None:
        self._release()
        self._following = None
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

    def add(self, reader: ChunkReader) -> None:
        self.bytes_fetched += reader.bytes_fetched
        self.bytes_needed += reader.bytes_needed - reader.bytes_ahead
        self.n_chunks_read += reader.n_chunks_read


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
        one = make_rank_pass(order, 0, batch_size, rank=rank, world_size=world_size, readahead=readahead)
        most_rows = max(most_rows, one.plan.n_buffers * one.most_rows)
    n_threads = default_threads(remote=remote) if threads is None else threads
    return _memory_nbytes(spec, span, order, batch_size, most_rows, n_threads * thread_nbytes(spec, remote=remote))


def _memory_nbytes(
    spec: StoreSpec, span: Span, order: PassOrder, batch_size: int, n_rows: int, threads_nbytes: int
) -> int:
    orders = order.kept_nbytes(batch_size) + order.planning_nbytes  # of one pass, while the next is planned
    return ring_nbytes(spec, span.n_states, n_rows) + orders + threads_nbytes + _FIXED_NBYTES

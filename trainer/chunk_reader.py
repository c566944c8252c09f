"""The threads that fill a stream's batches: whole chunks from the store, each sample straight to its future place."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from infra.machine import n_cores
from infra.objects import SMALL_ROW_NBYTES
from infra.retry import pointless_once
from storage_schemas.codecs import DecodeError, raw_chunk_nbytes
from storage_schemas.errors import ChecksumError
from storage_schemas.layout import decode_payload, payload_bounds
from storage_schemas.reader import ChunkLocation, Store, check_crc
from storage_schemas.spec import Span, StoreSpec
from trainer.order import PassOrder, ReadPlan
from trainer.ring import Ring, stream_kinds

_JOIN_S = 2.0
_LOCAL_THREADS = 8
_REMOTE_THREADS = 32  # as many requests as `infra.s3` has in flight
_REPLY_COPIES = 2  # of a chunk in memory while the network brings it
_BLOSC_BLOCK_NBYTES = 2**20  # the largest that it chooses; to decode, it sets three of them aside
_STACK_NBYTES = 2**18  # of a thread: stack, and what the C library and the interpreter set aside for it
_N_PLANNED = 8  # chunks whose places are worked out at a time; one by one would cost more than their checksums


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placement:
    """Where the samples of one chunk go.

    Attributes:
        chunk: Index in the store.
        rows: Ring row of each sample of the chunk, -1 for nowhere.
        wanted: Places within the chunk of the samples that go somewhere; None for all.
        wanted_rows: Their ring rows.
        buffers: Their buffers.
    """

    chunk: int
    rows: np.ndarray
    wanted: np.ndarray | None
    wanted_rows: np.ndarray
    buffers: np.ndarray


def is_remote(store: Store) -> bool:
    """Whether reads cross a network, and so wait much longer than they work."""
    return "s3://" in store.location


def default_threads(*, remote: bool) -> int:
    """Threads to read with: what keeps the cores busy, or the network."""
    return _REMOTE_THREADS if remote else max(2, min(_LOCAL_THREADS, n_cores()))


def thread_nbytes(spec: StoreSpec, *, remote: bool) -> int:
    """Memory that one reading thread needs at most: to decode, for samples that go nowhere, and for its own stack."""
    largest = max(raw_chunk_nbytes(spec, kind) for kind in stream_kinds(spec))
    codec = 0 if spec.codec == "none" else 3 * min(largest, _BLOSC_BLOCK_NBYTES)
    passing = _REPLY_COPIES * largest if remote else max(_passing_nbytes(spec, kind) for kind in stream_kinds(spec))
    return sum(scratch_nbytes(spec)) + codec + passing + _STACK_NBYTES


def _passing_nbytes(spec: StoreSpec, kind: str) -> int:
    """What `read_rows` takes while it reads a chunk: at most a row, or without the compiled reader two chunks."""
    row = raw_chunk_nbytes(spec, kind) // spec.samples_per_chunk
    return row if row >= SMALL_ROW_NBYTES else 2 * raw_chunk_nbytes(spec, kind)


def is_plain(spec: StoreSpec) -> bool:
    """Whether the payload of a chunk is its samples and nothing else, so that each can be read into its place."""
    return spec.codec == "none" and spec.backend == "zarr"


def scratch_nbytes(spec: StoreSpec) -> tuple[int, int]:
    """Memory of one thread for payloads, and for what they decode to; nothing for plain chunks."""
    if is_plain(spec):
        return 0, 0
    kinds = stream_kinds(spec)
    payload = max(payload_bounds(spec, kind, spec.samples_per_chunk)[1] for kind in kinds)
    return payload, 0 if spec.codec == "none" else max(raw_chunk_nbytes(spec, kind) for kind in kinds)


class _Scratch:
    """One thread's own memory, made once."""

    def __init__(self, spec: StoreSpec) -> None:
        payload, decoded = scratch_nbytes(spec)
        self.payload, self.decoded = np.empty(payload, np.uint8), np.empty(decoded, np.uint8)


class ChunkReader:
    """Reads the chunks of one pass, or of its remainder, with threads that end with it.

    The consumer calls `wait(batch)` for batches in order and `release(batch)` when it needs one no longer; nothing
    else. Chunks are read in the plan's order, each when all its batches have buffers.

    Attributes:
        precision: Of the patches.
        bytes_fetched: Bytes read from objects.
        bytes_needed: Stored bytes of the chunks that were asked for.
        n_chunks_read: Chunks of one (layer, kind).
        waited_s: Seconds that `wait` took.
    """

    def __init__(
        self,
        store: Store,
        span: Span,
        order: PassOrder,
        plan: ReadPlan,
        ring: Ring,
        *,
        batch_size: int,
        start_batch: int,
        rank_starts: np.ndarray,
        rank_lanes: np.ndarray,
        n_buffer_rows: int,
        n_threads: int,
    ) -> None:
        self._store, self._span, self._order, self._plan, self._ring = store, span, order, plan, ring
        self.precision = store.spec.precision
        self._batch_size, self._n_buffer_rows = batch_size, n_buffer_rows
        self._rank_starts, self._rank_lanes = rank_starts, rank_lanes
        self._opens_at = plan.opens_at.tolist()
        self._kinds = stream_kinds(store.spec)
        self._targets = [[ring.arrays[kind][:, state] for kind in self._kinds] for state in range(span.n_states)]
        self._plain = is_plain(store.spec)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # readers wait here for buffers
        self._filled = threading.Condition(self._lock)  # the consumer waits here for its batch
        self._start_batch = self._oldest = start_batch
        self._n_tasks, self._next_task = len(plan.dealt) * span.n_states, 0
        self._placements: list[_Placement] = []  # of reads [n * _N_PLANNED, (n + 1) * _N_PLANNED)
        self._missing = np.zeros(plan.n_buffers, np.int64)  # (sample, state) still to come, by buffer
        for batch in range(start_batch, start_batch + plan.n_buffers):
            self._missing[batch % plan.n_buffers] = self._n_parts(batch)
        self._copies: list[torch.cuda.Event | None] = [None] * plan.n_buffers
        self._on_cuda = torch.cuda.is_available()
        self._error: BaseException | None = None
        self._stopped = False
        self.bytes_fetched = self.bytes_needed = self.n_chunks_read = 0
        self.waited_s = 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"stream-reader-{i}", daemon=True)
            for i in range(min(n_threads, self._n_tasks))
        ]
        for thread in self._threads:
            thread.start()

    def rows(self, batch: int) -> slice:
        """The ring rows of a batch."""
        start = batch % self._plan.n_buffers * self._n_buffer_rows
        return slice(start, start + int(self._rank_starts[batch + 1] - self._rank_starts[batch]))

    def wait(self, batch: int) -> None:
        """Block until a batch is complete; raise what went wrong in a thread as soon as anything did."""
        begin = time.perf_counter()
        with self._lock:
            while self._error is None and not self._stopped and self._missing[batch % self._plan.n_buffers]:
                self._filled.wait()
            self.waited_s += time.perf_counter() - begin
            if self._error is not None:
                raise self._error
            if self._stopped:
                raise RuntimeError("the stream was closed while a batch was awaited")

    def release(self, batch: int, copied: torch.cuda.Event | None = None) -> None:
        """Give a batch's buffer to a later batch, once `copied` has happened on the device."""
        with self._lock:
            assert batch == self._oldest, "batches are released in order"
            self._oldest += 1
            buffer = batch % self._plan.n_buffers
            self._missing[buffer] = self._n_parts(batch + self._plan.n_buffers)
            self._copies[buffer] = copied
            self._room.notify_all()

    def stop(self) -> None:
        """End the threads, without waiting for them."""
        with self._lock:
            self._stopped = True
            self._room.notify_all()
            self._filled.notify_all()

    def join(self) -> bool:
        """Wait until the stopped threads are gone: each ends after the chunk it is reading.

        Returns:
            Whether all are. A read that does not come back soon, as from a server that hangs, keeps its thread; the
            buffers must then not be used again, as it may still write to them.
        """
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _n_parts(self, batch: int) -> int:
        if batch + 1 >= len(self._rank_starts):
            return 0
        return int(self._rank_starts[batch + 1] - self._rank_starts[batch]) * self._span.n_states

    def _work(self) -> None:
        try:
            scratch = _Scratch(self._store.spec)
            with pointless_once(lambda: self._stopped):
                while (task := self._take()) is not None:
                    self._read(*task, scratch)
        except BaseException as error:  # noqa: BLE001 - not swallowed: the consumer raises it at its next batch
            with self._lock:
                self._error = self._error or error
                self._stopped = True
                self._room.notify_all()
                self._filled.notify_all()

    def _take(self) -> tuple[_Placement, int] | None:
        """The next (chunk, state) to read, when there is room for it; None when there is nothing more to do."""
        with self._lock:
            while not self._stopped and self._next_task < self._n_tasks:
                read, state = divmod(self._next_task, self._span.n_states)
                if self._opens_at[read] > self._oldest:
                    self._room.wait()
                    continue
                if state == 0 and read % _N_PLANNED == 0:
                    self._placements = self._place(read)
                self._next_task += 1
                return self._placements[read % _N_PLANNED], state
            return None

    def _place(self, first_read: int) -> list[_Placement]:
        """Work out where the samples of the next chunks go."""
        dealt = self._plan.dealt[first_read : first_read + _N_PLANNED]
        chunk, samples_per_chunk = self._order.chunk[dealt], self._order.samples_per_chunk
        sample, lane, k = self._order.chunk_entries(dealt)
        position = self._order.positions(lane, k)
        mine = position if self._rank_lanes.all() else self._order.positions(lane, k, self._rank_lanes)
        batch = position // self._batch_size
        row = batch % self._plan.n_buffers * self._n_buffer_rows + mine - self._rank_starts[batch]
        row[batch < self._start_batch] = -1  # after a resume, a chunk may be partly used up
        rows = np.full((len(dealt), samples_per_chunk), -1)
        which = np.repeat(np.arange(len(dealt)), np.diff(self._order.chunk_start)[dealt])
        rows[which, sample - chunk[which] * samples_per_chunk] = row
        placements = []
        for one_chunk, one_rows in zip(chunk.tolist(), rows):
            wanted = np.flatnonzero(one_rows >= 0)
            wanted_rows = one_rows[wanted]
            placements.append(
                _Placement(
                    chunk=one_chunk,
                    rows=one_rows,
                    wanted=None if len(wanted) == samples_per_chunk else wanted,
                    wanted_rows=wanted_rows,
                    buffers=wanted_rows // self._n_buffer_rows,
                )
            )
        return placements

    def _read(self, placement: _Placement, state: int, scratch: _Scratch) -> None:
        self._await_copies(placement)
        needed = fetched = 0
        for kind, target in zip(self._kinds, self._targets[state]):
            location = self._store.chunk(self._span.start + state, kind, placement.chunk)
            needed += location.nbytes
            if self._plain:
                fetched += self._read_plain(location, target, placement)
            else:
                fetched += self._read_encoded(kind, location, target, placement, scratch)
            if self._stopped:
                return
        if state == 0:
            self._ring.sample_index[placement.wanted_rows] = self._sample_index(placement)
        with self._lock:
            self.bytes_needed += needed
            self.bytes_fetched += fetched
            self.n_chunks_read += len(self._kinds)
            np.subtract.at(self._missing, placement.buffers, 1)
            if not self._missing[self._oldest % self._plan.n_buffers]:
                self._filled.notify_all()

    def _sample_index(self, placement: _Placement) -> np.ndarray:
        places = np.arange(len(placement.rows)) if placement.wanted is None else placement.wanted
        return placement.chunk * len(placement.rows) + places

    def _await_copies(self, placement: _Placement) -> None:
        """Wait until the device has copied the earlier batches out of the buffers that we are about to overwrite."""
        for buffer in set(placement.buffers.tolist()) if self._on_cuda else ():
            copied = self._copies[buffer]
            if copied is not None:
                copied.synchronize()
                self._copies[buffer] = None

    def _read_plain(self, location: ChunkLocation, target: np.ndarray, placement: _Placement) -> int:
        fetched = len(placement.rows) * target[0].nbytes
        if fetched != location.nbytes:
            raise ChecksumError(
                location.key,
                f"{self._store.location}/{location.key}: by the commit this chunk has {location.nbytes:,} bytes, "
                f"{fetched:,} were expected. Mend it: make verify STORE={self._store.location} REPAIR=1",
            )
        crc = self._store.objects.read_rows(location.key, location.offset, target, placement.rows)
        check_crc(self._store.location, location, crc)
        return fetched

    def _read_encoded(
        self, kind: str, location: ChunkLocation, target: np.ndarray, placement: _Placement, scratch: _Scratch
    ) -> int:
        payload = scratch.payload[: location.nbytes]
        crc = self._store.objects.read_rows(location.key, location.offset, payload[None], np.zeros(1, np.int64))
        check_crc(self._store.location, location, crc)
        try:
            values = decode_payload(self._store.spec, kind, placement.chunk, payload.data, scratch.decoded)
        except DecodeError as error:
            raise DecodeError(f"{self._store.location}/{location.key}, chunk {placement.chunk}: {error}") from error
        target[placement.wanted_rows] = values if placement.wanted is None else values[placement.wanted]
        return payload.nbytes

"""The threads that fill a stream's batches: whole chunks from the store, each sample straight to its future place."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch
from crc32c import crc32c

from storage_schemas.codecs import decode_chunk, raw_chunk_nbytes
from storage_schemas.reader import ChunkLocation, Store, check_crc, check_payload
from storage_schemas.spec import Span, StoreSpec
from trainer.order import PassOrder, ReadPlan
from trainer.ring import Ring, sample_nbytes, stream_kinds

# Samples at least this large are read from the object straight to their places; smaller ones come with their whole
# chunk and are copied from the cache, since a system call each would cost more than the copy.
SCATTER_NBYTES = 65_536

_JOIN_S = 30.0


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
        locations: Where the chunk's bytes lie, by state and kind.
    """

    chunk: int
    rows: list[int]
    wanted: np.ndarray | None
    wanted_rows: np.ndarray
    buffers: np.ndarray
    locations: list[list[ChunkLocation]]


class _Scratch:
    """One thread's own memory, made once: for payloads to unpack, and for bytes that nobody asked for."""

    def __init__(self, spec: StoreSpec) -> None:
        self.payload = memoryview(bytearray(payload_nbytes(spec)))
        self.decoded = np.empty(decoded_nbytes(spec), np.uint8)
        self._plain: dict[str, np.ndarray] = {}
        if spec.codec == "none":  # a payload that needs no decoding is always seen in the same way
            for kind in stream_kinds(spec):
                if not scatters(spec, kind):
                    self._plain[kind] = decode_chunk(spec, kind, self.payload[: raw_chunk_nbytes(spec, kind)])

    def decode(self, spec: StoreSpec, kind: str, payload: memoryview) -> np.ndarray:
        """The values of a payload that lies at the beginning of `self.payload`."""
        plain = self._plain.get(kind)
        if plain is not None and plain.nbytes == payload.nbytes:
            return plain
        return decode_chunk(spec, kind, payload, self.decoded)


def scatters(spec: StoreSpec, kind: str) -> bool:
    """Whether samples of a kind are read straight to their places."""
    return spec.codec == "none" and sample_nbytes(spec, kind) >= SCATTER_NBYTES


def payload_nbytes(spec: StoreSpec) -> int:
    """Scratch bytes of a thread for stored payloads; a codec may add a little to what it cannot compress."""
    whole = [raw_chunk_nbytes(spec, kind) for kind in stream_kinds(spec) if not scatters(spec, kind)]
    one = [sample_nbytes(spec, kind) for kind in stream_kinds(spec)]
    return max(whole + one) + (0 if spec.codec == "none" else 65_536)


def decoded_nbytes(spec: StoreSpec) -> int:
    """Scratch bytes of a thread for decoded chunks."""
    return 0 if spec.codec == "none" else max(raw_chunk_nbytes(spec, kind) for kind in stream_kinds(spec))


class ChunkReader:
    """Reads the chunks of one pass, or of its remainder, with threads that end with it.

    The consumer calls `wait(batch)` for batches in order and `release(batch)` when it needs one no longer; nothing
    else. Chunks are read in the plan's order, each when all its batches have buffers.

    Attributes:
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
        self._batch_size, self._n_buffer_rows = batch_size, n_buffer_rows
        self._rank_starts, self._rank_lanes = rank_starts, rank_lanes
        self._opens_at = plan.opens_at.tolist()
        self._kinds = [
            (kind, sample_nbytes(store.spec, kind) if scatters(store.spec, kind) else 0)
            for kind in stream_kinds(store.spec)
        ]
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

    def join(self) -> None:
        """Wait until the stopped threads are gone: each ends after the sample it is reading.

        Raises:
            TimeoutError: A read did not come back.
        """
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        alive = [thread.name for thread in self._threads if thread.is_alive()]
        if alive:
            raise TimeoutError(f"{self._store.location}: reads did not return in {_JOIN_S:.0f} s: {', '.join(alive)}")

    def _n_parts(self, batch: int) -> int:
        if batch + 1 >= len(self._rank_starts):
            return 0
        return int(self._rank_starts[batch + 1] - self._rank_starts[batch]) * self._span.n_states

    def _work(self) -> None:
        try:
            scratch = _Scratch(self._store.spec)
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
                    rows=one_rows.tolist(),
                    wanted=None if len(wanted) == samples_per_chunk else wanted,
                    wanted_rows=wanted_rows,
                    buffers=wanted_rows // self._n_buffer_rows,
                    locations=[
                        [self._store.chunk(layer, kind, one_chunk) for kind, _ in self._kinds]
                        for layer in self._span.states
                    ],
                )
            )
        return placements

    def _read(self, placement: _Placement, state: int, scratch: _Scratch) -> None:
        self._await_copies(placement)
        needed = fetched = 0
        for (kind, scattered_nbytes), location in zip(self._kinds, placement.locations[state]):
            needed += location.nbytes
            if scattered_nbytes:
                fetched += self._read_scattered(kind, scattered_nbytes, location, placement, state, scratch)
            else:
                fetched += self._read_whole(kind, location, placement, state, scratch)
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

    def _read_scattered(
        self, kind: str, nbytes: int, location: ChunkLocation, placement: _Placement, state: int, scratch: _Scratch
    ) -> int:
        assert location.nbytes == nbytes * len(placement.rows)
        nowhere = scratch.payload[:nbytes]
        parts = [self._ring.place(kind, row, state) if row >= 0 else nowhere for row in placement.rows]
        crc = fetched = 0
        for part in self._store.objects.read_parts(location.key, location.offset, parts):
            crc = crc32c(part, crc)  # a sample at a time: what was just read is still in the cache
            fetched += part.nbytes
            if self._stopped:
                return fetched
        check_crc(self._store.location, location, crc)
        return fetched

    def _read_whole(
        self, kind: str, location: ChunkLocation, placement: _Placement, state: int, scratch: _Scratch
    ) -> int:
        payload = scratch.payload[: location.nbytes]
        self._store.objects.read_into(location.key, location.offset, payload)
        check_payload(self._store.location, location, payload)
        values = scratch.decode(self._store.spec, kind, payload)
        if placement.wanted is not None:
            values = values[placement.wanted]
        self._ring.arrays[kind][placement.wanted_rows, state] = values
        return payload.nbytes

"""The threads that fill a stream's batches: whole chunks from the store, each sample straight to its future place."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from infra.retry import pointless_once
from storage_schemas.codecs import DecodeError
from storage_schemas.errors import ChecksumError
from storage_schemas.layout import decode_payload
from storage_schemas.reader import ChunkLocation, Store, check_crc
from storage_schemas.spec import Span, StoreSpec
from trainer.rank_pass import RankPass
from trainer.reading_threads import is_plain, scratch_nbytes
from trainer.ring import Ring, stream_kinds

_JOIN_S = 2.0
_N_PLANNED = 8  # chunks whose places are worked out at a time; one by one would cost more than their checksums


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placement:
    """Where the samples of one chunk go.

    Attributes:
        first: Place of the first batch of its pass.
        chunk: Index in the store.
        rows: Ring row of each sample of the chunk, -1 for nowhere.
        wanted: Places within the chunk of the samples that go somewhere; None for all.
        wanted_rows: Their ring rows.
        buffers: Their buffers.
    """

    first: int
    chunk: int
    rows: np.ndarray
    wanted: np.ndarray | None
    wanted_rows: np.ndarray
    buffers: np.ndarray


class _Scratch:
    """One thread's own memory, made once."""

    def __init__(self, spec: StoreSpec) -> None:
        payload, decoded = scratch_nbytes(spec)
        self.payload, self.decoded = np.empty(payload, np.uint8), np.empty(decoded, np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placed:
    """A pass and the place of its first batch."""

    first: int
    of: RankPass

    @property
    def stop(self) -> int:
        return self.first + self.of.n_batches


class ChunkReader:
    """Reads the chunks of a pass or its remainder, and of passes appended to it, with threads that end with the last.

    The consumer calls `wait(place)` for batches in order and `release(place)` when it needs one no longer; and, where
    more passes were announced, `append` while its pass still goes on. A batch's place is its number in its pass,
    counted on through the passes. Chunks are read in the plans' order, each when all its batches have buffers: so the
    first chunks of a pass are read while the one before ends.

    Attributes:
        precision: Of the patches.
        expects_more: Another pass may be appended.
        bytes_fetched: Bytes read from objects.
        bytes_needed: Stored bytes of the chunks that were asked for.
        bytes_ahead: Those of them that belong to a pass which was not begun yet.
        n_chunks_read: Chunks of one (layer, kind).
    """

    def __init__(
        self,
        store: Store,
        span: Span,
        first: RankPass,
        ring: Ring,
        *,
        start_batch: int,
        n_buffer_rows: int,
        n_threads: int,
        expects_more: bool,
    ) -> None:
        self._store, self._span, self._ring = store, span, ring
        self.precision = store.spec.precision
        self._n_buffers, self._n_buffer_rows = first.plan.n_buffers, n_buffer_rows
        self._kinds = stream_kinds(store.spec)
        self._targets = [[ring.arrays[kind][:, state] for kind in self._kinds] for state in range(span.n_states)]
        self._plain = is_plain(store.spec)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # readers wait here for buffers, and for another pass
        self._filled = threading.Condition(self._lock)  # the consumer waits here for its batch
        self._passes = [_Placed(first=0, of=first)]  # the one in use, and the one after it
        self._reading, self._next_task = self._passes[0], 0
        self._begun = 0  # place of the first batch of the pass in use
        self.expects_more = expects_more
        self._start = self._oldest = start_batch
        self._placements: list[_Placement] = []  # of reads [n * _N_PLANNED, (n + 1) * _N_PLANNED)
        self._missing = np.zeros(self._n_buffers, np.int64)  # (sample, state) still to come, by buffer
        for place in range(start_batch, start_batch + self._n_buffers):
            self._missing[place % self._n_buffers] = self._n_parts(place)
        self._copies: list[torch.cuda.Event | None] = [None] * self._n_buffers
        self._on_cuda = torch.cuda.is_available()
        self._error: BaseException | None = None
        self._stopped = False
        self.bytes_fetched = self.bytes_needed = self.bytes_ahead = self.n_chunks_read = 0
        n_tasks = len(first.plan.dealt) * span.n_states
        self._threads = [
            threading.Thread(target=self._work, name=f"stream-reader-{i}", daemon=True)
            for i in range(n_threads if expects_more else min(n_threads, n_tasks))
        ]
        for thread in self._threads:
            thread.start()

    def append(self, following: RankPass | None, *, expects_more: bool = False) -> None:
        """Read this pass after the one in use, which goes on still; None: nothing more is to be read.

        Args:
            following: The next pass, planned for as many buffers as there are (`RankPass.fits`).
            expects_more: Yet another pass may be appended, once this one is in use.
        """
        with self._lock:
            assert self.expects_more
            assert self._begun == self._passes[-1].first, "one pass is appended at a time"
            self.expects_more = expects_more
            if following is not None:
                placed = _Placed(first=self._passes[-1].stop, of=following)
                self._passes = [self._passes[-1], placed]
                for place in range(placed.first, self._oldest + self._n_buffers):
                    self._missing[place % self._n_buffers] = self._n_parts(place)
            self._room.notify_all()

    def begin_next(self) -> int:
        """Have the appended pass in use, all batches before it being released; returns the place of its first batch."""
        with self._lock:
            self._passes = self._passes[-1:]  # the pass that ended has had its memory
            self._begun, self.bytes_ahead = self._passes[0].first, 0
            assert self._oldest == self._begun
            return self._begun

    def rows(self, place: int) -> slice:
        """The ring rows of a batch."""
        start = place % self._n_buffers * self._n_buffer_rows
        return slice(start, start + self._n_rows(place))

    def wait(self, place: int) -> None:
        """Block until a batch is complete; raise what went wrong in a thread as soon as anything did."""
        with self._lock:
            while self._error is None and not self._stopped and self._missing[place % self._n_buffers]:
                self._filled.wait()
            if self._error is not None:
                raise self._error
            if self._stopped:
                raise RuntimeError("the stream was closed while a batch was awaited")

    def release(self, place: int, copied: torch.cuda.Event | None = None) -> None:
        """Give a batch's buffer to a later batch, once `copied` has happened on the device."""
        with self._lock:
            assert place == self._oldest, "batches are released in order"
            self._oldest += 1
            buffer = place % self._n_buffers
            self._missing[buffer] = self._n_parts(place + self._n_buffers)
            self._copies[buffer] = copied
            self._room.notify_all()

    def stop(self) -> None:
        """End the threads, without waiting for them."""
        with self._lock:
            self._stopped = True
            self._room.notify_all()
            self._filled.notify_all()

    def join(self) -> bool:
        """Wait until the stopped threads are gone, each after the chunk it is reading, and the device has its copies.

        Returns:
            Whether all threads are gone. A read that does not come back soon, as from a server that hangs, keeps its
            thread; the buffers must then not be used again, as it may still write to them.
        """
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for copied in self._copies:
            if copied is not None:  # another reader may be given the same buffers
                copied.synchronize()
        return not any(thread.is_alive() for thread in self._threads)

    def _n_rows(self, place: int) -> int:
        """This rank's samples in a batch; 0 where no pass is known yet."""
        for placed in self._passes:
            if placed.first <= place < placed.stop:
                return placed.of.n_rows(place - placed.first)
        return 0

    def _n_parts(self, place: int) -> int:
        return self._n_rows(place) * self._span.n_states

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
            while not self._stopped:
                reading = self._reading
                read, state = divmod(self._next_task, self._span.n_states)
                if read == len(reading.of.plan.dealt):
                    # not the last one: two may have been appended since, where all of a pass fits into the buffers
                    following = next((placed for placed in self._passes if placed.first == reading.stop), None)
                    if following is not None:
                        self._reading, self._next_task = following, 0
                    elif self.expects_more:
                        self._room.wait()
                    else:
                        return None
                    continue
                if reading.first + reading.of.plan.opens_at[read] > self._oldest:
                    self._room.wait()
                    continue
                if state == 0 and read % _N_PLANNED == 0:
                    self._placements = self._place(reading, read)
                self._next_task += 1
                return self._placements[read % _N_PLANNED], state
            return None

    def _place(self, reading: _Placed, first_read: int) -> list[_Placement]:
        """Work out where the samples of the next chunks go."""
        of, order = reading.of, reading.of.order
        dealt = of.plan.dealt[first_read : first_read + _N_PLANNED]
        chunk, samples_per_chunk = order.chunk[dealt], order.samples_per_chunk
        sample, lane, k = order.chunk_entries(dealt)
        position = order.positions(lane, k)
        mine = position if of.lanes.all() else order.positions(lane, k, of.lanes)
        batch = position // of.batch_size
        place = reading.first + batch
        row = place % self._n_buffers * self._n_buffer_rows + mine - of.starts[batch]
        row[place < self._start] = -1  # after a resume, a chunk may be partly used up
        rows = np.full((len(dealt), samples_per_chunk), -1)
        which = np.repeat(np.arange(len(dealt)), np.diff(order.chunk_start)[dealt])
        rows[which, sample - chunk[which] * samples_per_chunk] = row
        placements = []
        for one_chunk, one_rows in zip(chunk.tolist(), rows):
            wanted = np.flatnonzero(one_rows >= 0)
            wanted_rows = one_rows[wanted]
            placements.append(
                _Placement(
                    first=reading.first,
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
        needed = fetched = n_read = 0
        for kind, target in zip(self._kinds, self._targets[state]):
            location = self._store.chunk(self._span.start + state, kind, placement.chunk)
            needed += location.nbytes
            if self._plain:
                fetched += self._read_plain(location, target, placement)
            else:
                fetched += self._read_encoded(kind, location, target, placement, scratch)
            n_read += 1
            if self._stopped:
                break  # no batch is handed out any more, but what was read is counted
        if state == 0:
            self._ring.sample_index[placement.wanted_rows] = self._sample_index(placement)
        with self._lock:
            self.bytes_needed += needed
            self.bytes_fetched += fetched
            if placement.first > self._begun:
                self.bytes_ahead += needed
            self.n_chunks_read += n_read
            np.subtract.at(self._missing, placement.buffers, 1)
            if not self._missing[self._oldest % self._n_buffers]:
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

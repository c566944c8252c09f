"""What the machine could do at best: the same bytes from the page cache by `preadv`, with nothing done to them."""

import mmap
import os
import queue
import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np

from benchmarks.peers import KINDS, Batch, Part, Pass
from benchmarks.stream_data import StreamData
from storage_schemas import open_store
from storage_schemas.codecs import chunk_shape, kind_dtype
from storage_schemas.reader import ChunkLocation

ALIGNMENT = 4096


@contextmanager
def preadv_into_a_ring(data: StreamData, *, ring_nbytes: int, threads: int = 2) -> Iterator[Pass]:
    """Threads read whole chunks in shuffled order into a ring of huge pages; no checksum, files stay open.

    Args:
        data: Where the store is.
        ring_nbytes: Memory that is used in turn; as much as the stream takes, so that the caches help both alike.
        threads: Reading threads.
    """
    store = open_store(data.store)
    keys = [(state, kind) for state in data.span.states for kind in KINDS]
    places, slot_nbytes = {}, 0
    for state, kind in keys:
        places[state, kind] = slot_nbytes
        slot_nbytes += -(-store.chunk(state, kind, 0).nbytes // ALIGNMENT) * ALIGNMENT
    n_slots = max(threads + 1, ring_nbytes // slot_nbytes)
    with ExitStack() as files:
        opened: dict[str, int] = {}

        def descriptor(location: ChunkLocation) -> int:
            if location.key not in opened:
                opened[location.key] = os.open(data.store / location.key, os.O_RDONLY)
                files.callback(os.close, opened[location.key])
            return opened[location.key]

        reads = []
        for chunk in range(store.spec.n_chunks):
            locations = [store.chunk(state, kind, chunk) for state, kind in keys]
            reads.append(
                (chunk, [(descriptor(at), at.offset, at.nbytes, places[key]) for key, at in zip(keys, locations)])
            )
        memory = mmap.mmap(-1, n_slots * slot_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # other systems, or a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        ring = memoryview(memory)
        np.frombuffer(memory, np.uint8)[::ALIGNMENT] = 1  # every page is there before the clock runs

        def batch(chunk: int, slot: int) -> Batch:
            first = chunk * store.spec.samples_per_chunk
            rows = range(first, min(first + store.spec.samples_per_chunk, store.n_samples))
            parts = []
            for state, kind in keys:
                shape, dtype = chunk_shape(store.spec, kind), kind_dtype(store.spec, kind)
                values = np.ndarray(shape, dtype, memory, slot * slot_nbytes + places[state, kind])
                parts.append(Part(kind=kind, state=state, values=values[: len(rows)]))
            return Batch(sample_index=rows, parts=parts)

        def one_pass() -> Iterator[Batch]:
            todo = deque(random.sample(reads, len(reads)))
            free, done = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, int] | BaseException]()
            for slot in range(n_slots):
                free.put(slot)

            def work() -> None:
                try:
                    while True:
                        try:
                            chunk, pieces = todo.popleft()
                        except IndexError:
                            return
                        slot = free.get()
                        for file, offset, nbytes, place in pieces:
                            start = slot * slot_nbytes + place
                            n = os.preadv(file, [ring[start : start + nbytes]], offset)
                            if n != nbytes:
                                raise OSError(f"{n} bytes instead of {nbytes} at {offset} of chunk {chunk}")
                        done.put((chunk, slot))
                except BaseException as error:  # noqa: BLE001 - the consumer raises it
                    done.put(error)

            pool = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
            for thread in pool:
                thread.start()
            for _ in reads:
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                yield batch(*item)
                free.put(item[1])
            for thread in pool:
                thread.join()

        yield one_pass

"""How many threads read for a stream, and what memory each of them takes."""

from infra.machine import n_cores
from infra.objects import SMALL_ROW_NBYTES
from storage_schemas.codecs import raw_chunk_nbytes
from storage_schemas.layout import payload_bounds
from storage_schemas.reader import Store
from storage_schemas.spec import StoreSpec
from trainer.ring import stream_kinds

_LOCAL_THREADS = 8
_REMOTE_THREADS = 32  # as many requests as `infra.s3` has in flight
_REPLY_COPIES = 2  # of a chunk in memory while the network brings it
_BLOSC_BLOCK_NBYTES = 2**20  # the largest that it chooses; to decode, it sets three of them aside
_STACK_NBYTES = 2**18  # of a thread: stack, and what the C library and the interpreter set aside for it


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

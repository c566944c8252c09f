"""Requests to a remote store and their bytes, counted before they are made. Opens nothing.

Bytes are those of objects, sent and read back: data, commits, documents, index, claims and signs of life. Not in them:
replies to LIST, headers, requests that are made again, and images that lie on a server themselves. A test holds
requests against those that a server logs, and bytes against those that the run itself counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from infra.status import BEAT_EVERY_S
from storage_schemas.commit import Commit, Fidelity, ObjectRecord, statistics_nbytes
from storage_schemas.create import StoreDocument
from storage_schemas.index import index_to_bytes
from storage_schemas.keys import (
    SAMPLES_KEY,
    TEACHER_PREFIX,
    array_kind,
    shard_object_key,
    sharded_array_paths,
    statistics_key,
)
from storage_schemas.layout import array_documents, object_nbytes, payload_nbytes, room_nbytes
from storage_schemas.spec import Span, StoreSpec
from storage_schemas.zarr_layout import CRC_NBYTES

LIST_PAGE = 1000  # keys of one reply
_PIECE_NBYTES = 2**24  # of a document that verify reads piece by piece
_N_INDEXED = 4  # shards of the index whose size is worked out; longer ones grow in proportion

#: Requests of an extraction beside those for documents and shards. PUT: the probe for the right to write, two probes
#: whether conditions are honoured, heartbeat and status as it begins and ends. GET: with a look at what lies above.
_FIXED_PUT = 12
_FIXED_GET = 9
_FIXED_LIST = 13
_WORKER_PUT = 2  # its own two probes
#: Bytes of the heartbeats that a job reads as it begins and ends.
_HEARTBEATS_NBYTES = 1200
#: Bytes of what is put under log/: of each shard its claim and its line in the record, and what a run has once.
_LOG_SHARD_NBYTES = 500
_LOG_NBYTES = 4000


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests, and the bytes of the objects that they carry. DELETE is free and not counted."""

    put: int = 0
    get: int = 0
    list: int = 0
    bytes_out: int = 0
    bytes_in: int = 0

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(
            put=self.put + other.put,
            get=self.get + other.get,
            list=self.list + other.list,
            bytes_out=self.bytes_out + other.bytes_out,
            bytes_in=self.bytes_in + other.bytes_in,
        )


def extraction_requests(
    spec: StoreSpec,
    *,
    teacher_files: Mapping[str, int],
    samples_nbytes: int,
    n_shards: int | None = None,
    n_workers: int = 1,
) -> Requests:
    """Of a whole extraction by one job, with the summary at its end, but for its sign of life.

    Args:
        spec: Identity of the store.
        teacher_files: Sizes of what goes under teacher/, by name.
        samples_nbytes: Size of samples.parquet.
        n_shards: Those that are still to be done; None for all. The store exists if not all are.
        n_workers: Each reads store.json, samples.parquet and the teacher.
    """
    n_shards = spec.n_shards if n_shards is None else n_shards
    n_pages = -(-spec.n_shards // LIST_PAGE)
    commit, index, identity = commit_nbytes(spec), index_nbytes(spec), identity_nbytes(spec, teacher_files)
    documents = {**{key: len(data) for key, data in array_documents(spec).items()}, "samples": samples_nbytes}
    begin = Requests(
        put=len(documents) + len(teacher_files) + 1,
        bytes_out=sum(documents.values()) + sum(teacher_files.values()) + identity,
    )
    a_shard = Requests(
        put=len(sharded_array_paths(spec)) + 3,  # statistics, commit, claim
        get=1,  # is there a commit
        bytes_out=shard_nbytes(spec, 0) + commit,
    )
    end = Requests(  # the commits for the index; then the summary opens the store
        put=1,
        get=spec.n_shards + 4,
        list=3 * n_pages,
        bytes_out=index,
        bytes_in=spec.n_shards * commit + index + identity,
    )
    of_shards = replace(
        a_shard,
        put=n_shards * a_shard.put,
        get=n_shards * a_shard.get,
        bytes_out=data_nbytes(spec) * n_shards // spec.n_shards + n_shards * (commit + _LOG_SHARD_NBYTES),
    )
    fixed = Requests(
        put=_FIXED_PUT + n_workers * _WORKER_PUT,
        get=_FIXED_GET + n_workers * (len(teacher_files) + 2),
        list=_FIXED_LIST,
        bytes_out=_LOG_NBYTES,
        bytes_in=_HEARTBEATS_NBYTES + n_workers * (sum(teacher_files.values()) + samples_nbytes + identity),
    )
    return (begin if n_shards == spec.n_shards else Requests()) + of_shards + end + fixed


def alive_requests(seconds: int | float, n_shards: int) -> Requests:
    """Of showing that a job is alive, for so long: heartbeat and status, and what is done when there is more of it."""
    n = int(seconds / BEAT_EVERY_S)
    return Requests(put=2 * n + min(n, n_shards), get=n)


def epoch_requests(spec: StoreSpec, span: Span) -> Requests:
    """Of one training epoch of a span: one ranged GET for each chunk, layer and kind."""
    kinds = [kind for kind in spec.array_kinds if kind != "patch_mean"]
    n_states = len([layer for layer in spec.layers if span.start <= layer <= span.stop])
    last = len(spec.chunk_samples(spec.n_chunks - 1))
    nbytes = sum(
        (spec.n_chunks - 1) * payload_nbytes(spec, kind, spec.samples_per_chunk) + payload_nbytes(spec, kind, last)
        for kind in kinds
    )
    return Requests(get=spec.n_chunks * n_states * len(kinds), bytes_in=n_states * nbytes)


def verify_requests(spec: StoreSpec, *, teacher_files: Mapping[str, int], samples_nbytes: int) -> Requests:
    """Of reading every object of a complete store again."""
    n_objects = spec.n_shards * (len(sharded_array_paths(spec)) + 2)
    documents = {key: len(data) for key, data in array_documents(spec).items()}
    n_files = sum(max(1, -(-nbytes // _PIECE_NBYTES)) for nbytes in teacher_files.values())
    n_kept = n_objects + len(documents) + len(teacher_files) + 3
    return Requests(
        get=n_objects + len(documents) + n_files + 3,  # store.json, samples, index
        list=3 + -(-n_kept // LIST_PAGE) + -(-spec.n_shards // LIST_PAGE),
        bytes_in=data_nbytes(spec)
        + spec.n_shards * commit_nbytes(spec)
        + sum(documents.values())
        + sum(teacher_files.values())
        + samples_nbytes
        + identity_nbytes(spec, teacher_files)
        + index_nbytes(spec),
    )


def shard_nbytes(spec: StoreSpec, shard: int) -> int:
    """Bytes of a shard's data objects with codec "none"."""
    arrays = sum(object_nbytes(spec, path, shard) for path in sharded_array_paths(spec))
    return arrays + statistics_nbytes(spec) + CRC_NBYTES


def data_nbytes(spec: StoreSpec) -> int:
    """Bytes of all data objects with codec "none"; all shards but the last are alike."""
    return (spec.n_shards - 1) * shard_nbytes(spec, 0) + shard_nbytes(spec, spec.n_shards - 1)


def identity_nbytes(spec: StoreSpec, teacher_files: Mapping[str, int]) -> int:
    """Size of store.json."""
    keys = [*array_documents(spec), SAMPLES_KEY, *(f"{TEACHER_PREFIX}{name}" for name in teacher_files)]
    return len(StoreDocument(spec=spec, documents=dict.fromkeys(keys, "0" * 64)).to_bytes())


def commit_nbytes(spec: StoreSpec) -> int:
    """About the size of a full shard's commit."""
    return len(expected_commit(spec, 0).to_bytes())


def index_nbytes(spec: StoreSpec) -> int:
    """About the size of index.parquet."""
    n = min(spec.n_shards, _N_INDEXED)
    few = replace(spec, n_samples=min(spec.n_samples, n * spec.samples_per_shard))
    data = index_to_bytes(few, "0" * 64, [expected_commit(few, shard) for shard in range(n)])
    return len(data) * spec.n_shards // n


def expected_commit(spec: StoreSpec, shard: int) -> Commit:
    """One with sizes as they will be, and numbers of the usual length."""
    rng = np.random.default_rng(shard)
    objects = {
        shard_object_key(spec, path, shard): _record(spec, path, shard, rng) for path in sharded_array_paths(spec)
    }
    objects[statistics_key(shard)] = ObjectRecord(
        nbytes=statistics_nbytes(spec) + CRC_NBYTES,
        crc32c=_crc(rng),
        chunks=np.array([[0, statistics_nbytes(spec), _crc(rng)]], np.int64),
    )
    rounded = [path for path in sharded_array_paths(spec) if array_kind(path) == "patches"]
    fidelity = {
        path: Fidelity(relative_mse=1e-8 * rng.random(), r2=1 - 1e-8 * rng.random(), worst=rng.random())
        for path in (rounded if spec.precision != "float32" else [])
    }
    return Commit(shard=shard, store="0" * 64, bad_images=(), objects=objects, fidelity=fidelity)


def _record(spec: StoreSpec, path: str, shard: int, rng: np.random.Generator) -> ObjectRecord:
    kind, chunks = array_kind(path), spec.shard_chunks(shard)
    nbytes = np.full(len(chunks), payload_nbytes(spec, kind, spec.samples_per_chunk))
    nbytes[-1] = payload_nbytes(spec, kind, len(spec.chunk_samples(chunks[-1])))  # a store's last may be short
    rooms = room_nbytes(spec, nbytes)
    offsets = np.cumsum(rooms) - rooms
    places = np.stack([offsets, nbytes, rng.integers(0, 2**32, len(nbytes))], axis=1).astype(np.int64)
    return ObjectRecord(nbytes=object_nbytes(spec, path, shard), crc32c=_crc(rng), chunks=places)


def _crc(rng: np.random.Generator) -> int:
    return int(rng.integers(0, 2**32))

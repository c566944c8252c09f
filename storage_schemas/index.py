"""index.parquet: all commits of a complete store in one table, one row an object; a pure function of the commits.

The table's metadata holds what commits say beside their objects. The file is sealed: the sha256 of all its other bytes
lies between its last data page and its footer, where Parquet readers never look. So a changed byte is found before
anything is parsed, and an index stays valid when another release of Arrow would spell the same table in other bytes.
"""

import hashlib
import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.commit import Commit, Fidelity, ObjectRecord, commit_problems, objects_fit
from storage_schemas.documents import canonical_json, sha256
from storage_schemas.errors import SchemaError
from storage_schemas.keys import INDEX_KEY, data_object_keys, shard_object_keys, sharded_array_paths
from storage_schemas.limits import most_nbytes
from storage_schemas.parquet import read_parquet
from storage_schemas.spec import FORMAT_VERSION, StoreSpec

_DIGEST_NBYTES = 32
_TAIL_NBYTES = 8

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("crc32c", pa.int64(), nullable=False),
        pa.field("chunk_offset", pa.list_(pa.int64()), nullable=False),
        pa.field("chunk_nbytes", pa.list_(pa.int64()), nullable=False),
        pa.field("chunk_crc32c", pa.list_(pa.int64()), nullable=False),
    ]
)


def index_to_bytes(spec: StoreSpec, store: str, commits: Sequence[Commit]) -> bytes:
    """The index of a complete store.

    Args:
        spec: Identity of the store.
        store: Digest of its store.json.
        commits: Of every shard, in shard order.
    """
    assert [c.shard for c in commits] == list(range(spec.n_shards))
    rows = [(c.shard, key, c.objects[key]) for c in commits for key in shard_object_keys(spec, c.shard)]
    lengths = np.cumsum([0, *(len(record.chunks) for _, _, record in rows)])
    chunks = np.concatenate([record.chunks for _, _, record in rows])
    offsets = pa.array(lengths, pa.int32())
    columns = [
        pa.array([shard for shard, _, _ in rows], pa.int32()),
        pa.array([key for _, key, _ in rows], pa.string()),
        pa.array([record.nbytes for _, _, record in rows], pa.int64()),
        pa.array([record.crc32c for _, _, record in rows], pa.int64()),
        *(pa.ListArray.from_arrays(offsets, pa.array(chunks[:, i])) for i in range(3)),
    ]
    table = pa.table(columns, schema=SCHEMA)
    metadata = {
        "format_version": FORMAT_VERSION,
        "store": store,
        "bad_images": [list(bad) for c in commits for bad in c.bad_images],
        "fidelity": [
            [c.shard, path, f.relative_mse, f.r2, f.worst] for c in commits for path, f in sorted(c.fidelity.items())
        ],
    }
    table = table.replace_schema_metadata({"index": canonical_json(metadata)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return seal_parquet(sink.getvalue())


def commits_from_index(spec: StoreSpec, store: str, data: bytes) -> list[Commit]:
    """The commits that an index was made from.

    Raises:
        SchemaError: It is not the whole and unchanged index of this store.
    """
    body = unseal_parquet(INDEX_KEY, data)
    try:
        n_chunks = len(sharded_array_paths(spec)) * spec.n_chunks + spec.n_shards
        most = most_nbytes(spec, INDEX_KEY)
        table = read_parquet(body, [SCHEMA], most_nbytes=most, most_values=2 * n_chunks).combine_chunks()
        metadata = json.loads((table.schema.metadata or {})[b"index"])
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {metadata['format_version']!r}; this version reads {FORMAT_VERSION}")
        written_for = str(metadata["store"])
        ends, chunks = _chunks(table)
        commits = _commits(spec, written_for, table, ends, chunks, metadata)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise SchemaError(INDEX_KEY, [f"not an index of this format: {type(error).__name__}: {error}"]) from error
    if written_for != store:
        raise SchemaError(INDEX_KEY, [f"belongs to store {written_for[:16]}, this store is {store[:16]}"])
    if [c.shard for c in commits] != list(range(spec.n_shards)):
        raise SchemaError(INDEX_KEY, [f"lists {len(commits)} shards, expected 0 to {spec.n_shards - 1}, each once"])
    fit = _objects_fit(spec, table, ends, chunks)  # all at once; one by one only to say what does not
    problems = [
        f"shard {c.shard}: {p}" for c in commits for p in commit_problems(spec, store, c.shard, c, objects_fit=fit)
    ]
    if sum(len(c.objects) for c in commits) != table.num_rows:
        problems.append("lists an object twice")
    if problems:
        raise SchemaError(INDEX_KEY, problems)
    return commits


def is_index_of(spec: StoreSpec, store: str, data: bytes) -> bool:
    """Whether these bytes are an unchanged index of this store, as their digest tells; its rows are not read.

    It may be of an earlier content: whoever has committed a shard since then has to write it anew.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(unseal_parquet(INDEX_KEY, data)))
        metadata = json.loads((file.schema_arrow.metadata or {})[b"index"])
        found = metadata["format_version"], metadata["store"], file.metadata.num_rows
    except (SchemaError, pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError):
        return False
    return found == (FORMAT_VERSION, store, spec.n_shards * len(shard_object_keys(spec, 0)))


def seal_parquet(data: bytes) -> bytes:
    """Insert the sha256 of a Parquet file in front of its footer, which stays where its length says."""
    place = _footer_start(data)
    return data[:place] + hashlib.sha256(data).digest() + data[place:]


def unseal_parquet(key: str, data: bytes) -> bytes:
    """The Parquet file as it was before `seal_parquet`.

    Raises:
        SchemaError: The bytes are no sealed Parquet file, or were changed since they were written.
    """
    place = _footer_start(data)
    start = place - _DIGEST_NBYTES
    if start < 0 or place > len(data) - _TAIL_NBYTES:
        raise SchemaError(key, [f"{len(data):,} bytes that are no whole Parquet file"])
    body = data[:start] + data[place:]
    written, actual = data[start:place].hex(), sha256(body)
    if actual != written:
        raise SchemaError(key, [f"content digest is {actual[:16]}, the file says {written[:16]}: it was changed"])
    return body


def _footer_start(data: bytes) -> int:
    """Where a Parquet file's footer begins; it ends with its own length and four letters."""
    return len(data) - _TAIL_NBYTES - int.from_bytes(data[-_TAIL_NBYTES : -_TAIL_NBYTES // 2], "little")


def _chunks(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Where the chunks of each row begin and end, and those of all rows, (chunk, 3)."""
    ends = np.asarray(_list_column(table, "chunk_offset").offsets)
    return ends, np.stack([np.asarray(_list_column(table, name).values) for name in SCHEMA.names[4:]], axis=1)


def _objects_fit(spec: StoreSpec, table: pa.Table, ends: np.ndarray, chunks: np.ndarray) -> bool:
    """Whether the rows are those of all shards in order, and fit the identity."""
    if table.num_rows % spec.n_shards:
        return False
    shards = np.repeat(np.arange(spec.n_shards), table.num_rows // spec.n_shards)
    if not np.array_equal(table["shard"].to_numpy(), shards):
        return False
    if ends[0] != 0 or ends[-1] != len(chunks) or table["key"].to_pylist() != data_object_keys(spec):
        return False
    return objects_fit(spec, table["nbytes"].to_numpy(), table["crc32c"].to_numpy(), np.diff(ends), chunks)


def _commits(
    spec: StoreSpec, store: str, columns: pa.Table, ends: np.ndarray, chunks: np.ndarray, metadata: dict
) -> list[Commit]:
    objects: dict[int, dict[str, ObjectRecord]] = {}
    for row, (shard, key, nbytes, crc) in enumerate(zip(*(columns[n].to_pylist() for n in SCHEMA.names[:4]))):
        objects.setdefault(shard, {})[key] = ObjectRecord(
            nbytes=nbytes, crc32c=crc, chunks=chunks[ends[row] : ends[row + 1]]
        )
    bad: dict[int, list[tuple[int, str]]] = {}
    for index, code in metadata["bad_images"]:
        bad.setdefault(index // spec.samples_per_shard, []).append((index, code))
    fidelity: dict[int, dict[str, Fidelity]] = {}
    for shard, path, relative_mse, r2, worst in metadata["fidelity"]:
        fidelity.setdefault(shard, {})[path] = Fidelity(relative_mse=relative_mse, r2=r2, worst=worst)
    return [
        Commit(
            shard=shard,
            store=store,
            bad_images=tuple(bad.get(shard, ())),
            objects=records,
            fidelity=fidelity.get(shard, {}),
        )
        for shard, records in objects.items()
    ]


def _list_column(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name]
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)

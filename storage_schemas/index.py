"""index.parquet: all commits of a complete store in one table, one row an object; a pure function of the commits.

The table's metadata holds what commits say beside their objects, and a digest over every column, because Parquet pages
carry no checksum of their own that readers must check.
"""

import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.commit import Commit, Fidelity, ObjectRecord, commit_problems
from storage_schemas.documents import canonical_json, sha256
from storage_schemas.errors import SchemaError
from storage_schemas.keys import INDEX_KEY, shard_object_keys
from storage_schemas.spec import FORMAT_VERSION, StoreSpec

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
        "columns": _columns_digest(table),
    }
    text = canonical_json(metadata)
    table = table.replace_schema_metadata({"index": text, "index_digest": sha256(text)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def commits_from_index(spec: StoreSpec, store: str, data: bytes) -> list[Commit]:
    """The commits that an index was made from.

    Raises:
        SchemaError: It is not the whole and unchanged index of this store.
    """
    try:
        table = pq.read_table(io.BytesIO(data))
        text = (table.schema.metadata or {})[b"index"]
        written = (table.schema.metadata or {})[b"index_digest"].decode()
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise SchemaError(INDEX_KEY, [f"not an index: {type(error).__name__}: {error}"]) from error
    if sha256(text) != written:
        raise SchemaError(INDEX_KEY, ["its metadata was changed since it was written"])
    metadata = json.loads(text)
    if metadata["store"] != store:
        raise SchemaError(INDEX_KEY, [f"belongs to store {metadata['store'][:16]}, this store is {store[:16]}"])
    if not table.schema.equals(SCHEMA) or _columns_digest(table) != metadata["columns"]:
        raise SchemaError(INDEX_KEY, ["its columns were changed since it was written"])
    commits = _commits(spec, store, table, metadata)
    problems = [f"shard {c.shard}: {p}" for c in commits for p in commit_problems(spec, store, c.shard, c)]
    if [c.shard for c in commits] != list(range(spec.n_shards)):
        problems.append(f"lists {len(commits)} shards, the store has {spec.n_shards}")
    if problems:
        raise SchemaError(INDEX_KEY, problems)
    return commits


def _commits(spec: StoreSpec, store: str, table: pa.Table, metadata: dict) -> list[Commit]:
    columns = table.combine_chunks()
    ends = np.asarray(_list_column(columns, "chunk_offset").offsets)
    chunks = np.stack([np.asarray(_list_column(columns, name).values) for name in SCHEMA.names[4:]], axis=1)
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


def _columns_digest(table: pa.Table) -> str:
    """sha256 over every value, independent of how Arrow or Parquet arrange their bytes."""
    parts = []
    for name in SCHEMA.names:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            lengths = np.diff(np.asarray(column.offsets))
            parts += [lengths.astype("<i8").tobytes(), np.asarray(column.flatten()).astype("<i8").tobytes()]
        elif pa.types.is_string(column.type):
            parts.append("\n".join(column.to_pylist()).encode())
        else:
            parts.append(np.asarray(column).astype("<i8").tobytes())
    return sha256(b"".join(sha256(part).encode() for part in parts))

"""Stores made to harm, sealed correctly: refused with our message, in bounded memory, before anything is unpacked."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.objects import MemoryObjects, check_key
from storage_schemas import open_store
from storage_schemas.commit import read_commit
from storage_schemas.documents import MAX_DOCUMENT_NBYTES, seal, unseal
from storage_schemas.errors import SchemaError
from storage_schemas.index import SCHEMA as INDEX_SCHEMA
from storage_schemas.index import commits_from_index, seal_parquet
from storage_schemas.keys import commit_key, commit_shard, is_owned, is_shard_object, is_teacher_key
from storage_schemas.limits import most_nbytes
from storage_schemas.parquet import _check_pages, read_parquet
from storage_schemas.samples import SCHEMA, samples_from_bytes, samples_to_bytes
from storage_schemas.spec import MAX_SHARD_CHUNKS, MAX_SHARD_SAMPLES, StoreSpec
from storage_schemas.verify import verify_store
from tests import examples
from tests.stores import make_samples, make_spec, write_planted
from tests.strategies import specs


def peak_nbytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forged_store(**changes: Any) -> MemoryObjects:
    """A store whose identity was changed and sealed again."""
    objects = MemoryObjects()
    write_planted(objects, make_spec(n_samples=5, layers=(0,)))
    document = unseal("store.json", objects.get("store.json"))
    document["spec"].update(changes)
    objects.put("store.json", seal(document))
    return objects


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


BIG = 10**4200  # Python spells no product of two of them
IDENTITIES: dict[str, tuple[dict[str, Any], str]] = {
    "numbers whose product cannot be spelled": (
        {"dim": BIG, "samples_per_chunk": BIG, "samples_per_shard": BIG},
        r"dim is 10+\.\.\.0+, expected an integer from 1 to 9,223,372,036,854,775,807",
    ),
    "a grid like that": ({"grid": [BIG, BIG]}, "grid is"),
    "a seed": ({"order_seed": -BIG}, "order_seed is -1"),
    "a micro-batch": ({"micro_batch": 2**63}, "micro_batch is 9223372036854775808"),
    "registers": ({"n_registers": BIG}, "n_registers is"),
    "layers": ({"layers": list(range(10**5))}, "layers are"),
    "deep preprocessing": ({"preprocessing": {"a": nested(16)}}, "at most 16 deep"),
    "very deep preprocessing": ({"preprocessing": {"a": nested(900)}}, "at most 16 deep"),
    "half a character": ({"teacher": "\ud800"}, "teacher is .*, expected printable text"),
    "a name that clears the screen": ({"teacher": "\x1b[2J"}, "expected printable text"),
    "a digest with a new line": ({"source_digest": "0\nerror: all is well"}, "source_digest is .*printable text"),
    "a megabyte of name": ({"backend": "x" * 10**6}, r"backend is 'x+\.\.\.x+'"),
    "a shard of too many samples": ({"samples_per_shard": 4 * MAX_SHARD_SAMPLES}, "at most 65,536 are supported"),
    "a shard of too many chunks": (
        {"samples_per_shard": 2**16, "samples_per_chunk": 1},
        rf"chunks in a shard, at most {MAX_SHARD_CHUNKS:,} are",
    ),
}


@pytest.mark.parametrize("kind", IDENTITIES)
def test_identities_that_would_break_arithmetic_or_terminals(kind: str) -> None:
    changes, message = IDENTITIES[kind]
    objects = forged_store(**changes)
    with pytest.raises(SchemaError, match=message) as caught:
        open_store(objects)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()
    assert [problem.key for problem in verify_store(objects)] == ["store.json"]


def test_integers_that_python_cannot_spell_are_refused_where_they_are_given() -> None:
    with pytest.raises(SchemaError, match="dim is a number of thousands of digits"):
        make_spec(dim=10**5000)


@pytest.mark.parametrize("piece", [b"[],", pytest.param(b'{"":0},', marks=pytest.mark.slow)])
def test_documents_full_of_small_values_take_bounded_memory(piece: bytes) -> None:
    data = b'{"digest":"x","a":[' + piece * ((MAX_DOCUMENT_NBYTES - 100) // len(piece)) + b"0]}"
    before = peak_nbytes()
    with pytest.raises(SchemaError):
        unseal("store.json", data)
    assert peak_nbytes() - before < 350 * 2**20


def test_a_commit_may_be_as_large_as_its_store_can_need() -> None:
    """And no larger, since eight are read at once: a real one is a fraction of that."""
    vit_b = make_spec(
        layers=tuple(range(13)), dim=768, n_samples=1_281_167, samples_per_shard=256, samples_per_chunk=16
    )
    assert most_nbytes(vit_b, commit_key(0)) < 300_000
    objects = MemoryObjects()
    write_planted(objects, make_spec(n_samples=5))
    objects.put(commit_key(0), objects.get(commit_key(0)) + b" " * most_nbytes(make_spec(n_samples=5), commit_key(0)))
    objects.delete("index.parquet")
    assert "bytes; at most" in open_store(objects).damaged_commits[commit_key(0)]


# ---------------------------------------------------------------- parquet


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


def samples_table(ids: list[str], class_name: str = "c") -> pa.Table:
    n = len(ids)
    columns = [np.arange(n), pa.array(ids), [0] * n, [class_name] * n, [1] * n]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)], schema=SCHEMA)


def cheated(data: bytes, find: int, say: int) -> bytes:
    """The footer says another number where it says this one, in as many bytes."""
    old, new = (_zigzag(value) for value in (find, say))
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert len(old) == len(new)
    assert old in data[start:]
    return data[:start] + data[start:].replace(old, new)


def _zigzag(value: int) -> bytes:
    value, out = value << 1, []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


N = 50
LONG = "a" * (10**6)
TABLES: dict[str, tuple[bytes, str]] = {
    "one page of 50 MB": (
        parquet(samples_table([f"{LONG}{i}" for i in range(N)]), use_dictionary=False),
        "its pages unpack to 50,0[0-9,]+ bytes; at most 1,099,776 are read",
    ),
    "one name of 1 MB, 50 times": (
        parquet(samples_table([str(i) for i in range(N)], class_name=LONG)),
        "its text has 50,000,[0-9]+ bytes when it is spelled out; at most 1,099,776 are read",
    ),
    "a name twice": (parquet(samples_table(["x", *map(str, range(N - 2)), "x"])), "sample_id 'x' is there 2 times"),
    "too many rows": (parquet(samples_table([str(i) for i in range(N + 1)])), "51 rows, store.json says 50"),
    "lists": (parquet(pa.table({name: [[1]] * N for name in SCHEMA.names})), "columns are sample_index list"),
    "structs": (parquet(pa.table({"a": [{"b": {"c": 1}}] * N})), "columns are a struct"),
    "a dictionary": (
        parquet(samples_table(list("abc") * 9).set_column(3, "class_name", pa.array(["c"] * 27).dictionary_encode())),
        "columns are .*dictionary",
    ),
    "no columns": (parquet(pa.table({})), "columns are"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_samples_that_are_too_much_are_refused_before_they_are_unpacked(kind: str) -> None:
    data, message = TABLES[kind]
    assert len(data) < 40_000
    before = peak_nbytes()
    with pytest.raises(SchemaError, match=message) as caught:
        samples_from_bytes(data, N)
    assert peak_nbytes() - before < 16 * 2**20
    assert len(str(caught.value)) < 1000


def test_what_the_footer_says_of_sizes_is_not_believed() -> None:
    """Readers make room for what page headers say, so those count."""
    data = parquet(samples_table([f"{LONG}{i}" for i in range(N)]), use_dictionary=False)
    claimed = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(1).total_uncompressed_size
    lying = cheated(data, claimed, 2**25)
    assert pq.ParquetFile(io.BytesIO(lying)).metadata.row_group(0).column(1).total_uncompressed_size == 2**25
    with pytest.raises(SchemaError, match="its pages unpack to 50,0"):
        samples_from_bytes(lying, N)


def footer_of(columns: list[tuple[int, int]]) -> bytes:
    """A footer with nothing but one row group whose columns have their pages at these places, of these sizes."""
    body = bytearray([0x49, 0x1C, 0x19, 0xFC, *varint(len(columns))])  # row groups (4): one; its columns (1)
    for place, nbytes in columns:
        body += bytes(
            [0x3C, 0x76, *varint(2 * nbytes), 0x26, *varint(2 * place), 0, 0]
        )  # metadata (3): sizes (7), place (9)
    return bytes([*body, 0, 0])


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def file_of(pages: bytes, columns: list[tuple[int, int]]) -> bytes:
    footer = footer_of(columns)
    return b"PAR1" + pages + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def test_columns_that_share_their_pages_are_refused_before_these_are_read_again() -> None:
    """Ten thousand columns, each of the same ten thousand empty pages, would take a hundred million steps."""
    pages = 10_000 * bytes([0x25, 0, 0x15, 0, 0])  # nothing unpacked (2), nothing held (3)
    _check_pages(file_of(pages, [(4, len(pages))]), 10**6, 10**6)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"columns of [0-9,]+ bytes and more in a file of"):
        _check_pages(file_of(pages, 10_000 * [(4, len(pages))]), 10**6, 10**6)
    assert time.process_time() - began < 10  # read again each time, it would be minutes


def test_lists_of_very_many_zeros_are_no_index() -> None:
    """Ten million numbers that are all alike take some hundred bytes."""
    spec = make_spec()
    values = {"shard": [0], "key": ["k"], "nbytes": [1], "crc32c": [1]}
    columns = [pa.array(values[f.name], f.type) if f.name in values else None for f in INDEX_SCHEMA]
    zeros = pa.ListArray.from_arrays(pa.array([0, 10**7], pa.int32()), pa.array(np.zeros(10**7, np.int64)))
    table = pa.table([zeros if column is None else column for column in columns], schema=INDEX_SCHEMA)
    data = parquet(table)
    assert len(data) < 40_000
    with pytest.raises(SchemaError, match=r"10,000,000 values; at most|unpack to"):
        commits_from_index(spec, "0" * 64, seal_parquet(data))


@settings(max_examples=examples.of(150))
@given(st.data())
def test_damaged_tables_are_refused_or_the_same(data: st.DataObject) -> None:
    """Footers, page headers and pages: no other error, whatever a byte says."""
    sound = samples_to_bytes(make_samples(7))
    changed = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = samples_from_bytes(bytes(changed), 7)
    except SchemaError:
        return
    assert found.num_rows == 7
    assert found["sample_index"].to_pylist() == list(range(7))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "lz4", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_tables_of_other_writers_are_read(compression: str, version: str) -> None:
    """Several row groups and pages, either kind of page, with and without dictionaries and statistics."""
    table = samples_table([f"n{i % 7}/{i}.jpg" for i in range(5000)])
    for dictionary in (True, False):
        sink = io.BytesIO()
        pq.write_table(
            table, sink, compression=compression, data_page_version=version, use_dictionary=dictionary,
            row_group_size=1500, data_page_size=2000, write_statistics=dictionary, write_page_index=dictionary,
            write_page_checksum=dictionary,
        )  # fmt: skip
        assert samples_from_bytes(sink.getvalue(), 5000).equals(table)
        assert read_parquet(sink.getvalue(), [SCHEMA], most_nbytes=10**6, most_values=5000).equals(table)
        with pytest.raises(ValueError, match="5,000 values; at most 4,999 are read"):
            read_parquet(sink.getvalue(), [SCHEMA], most_nbytes=10**6, most_values=4999)


# ---------------------------------------------------------------- keys, commits, arithmetic

parts = st.sampled_from(
    ["..", ".", "", "~", "layer_00", "cls", "c", "0", "commits", "000000.json", "store.json", "teacher", "log", "a\0b",
     "\u202e", "%2e%2e", "..\\x", "teacher.bin", "x" * 300, "9" * 5000 + ".json", "000000.tar", "zarr.json"]
)  # fmt: skip


@settings(max_examples=examples.of(300))
@given(st.lists(parts | st.text(max_size=5), min_size=1, max_size=5))
def test_no_strange_key_is_ours(pieces: list[str]) -> None:
    key = "/".join(pieces)
    spec = make_spec()
    if is_owned(key) or is_shard_object(spec, key) or is_teacher_key(key) or commit_shard(key) is not None:
        assert check_key(key) == key
        assert is_owned(key)
        assert ".." not in key.split("/")
        assert key.isascii()
        assert key.isprintable()


@given(st.integers(0, 10**10 - 1))
def test_commit_keys_that_are_read_are_owned(shard: int) -> None:
    assert is_owned(commit_key(shard))
    assert commit_shard(commit_key(shard)) == shard


@settings(max_examples=examples.of(30))
@given(st.data())
def test_every_changed_byte_of_a_commit_is_refused(data: st.DataObject) -> None:
    objects, spec = MemoryObjects(), make_spec(n_samples=5, layers=(0,))
    write_planted(objects, spec)
    digest, sound = open_store(objects).document.digest, objects.get(commit_key(0))
    assert read_commit(spec, digest, 0, sound).to_bytes() == sound
    changed = bytearray(sound)
    changed[data.draw(st.integers(0, len(sound) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SchemaError):
        read_commit(spec, digest, 0, bytes(changed))


@given(specs())
def test_every_sample_is_in_one_row_of_one_chunk_of_one_shard(spec: StoreSpec) -> None:
    rows = [
        (shard, chunk, sample)
        for shard in range(spec.n_shards)
        for chunk in spec.shard_chunks(shard)
        for sample in spec.chunk_samples(chunk)
    ]
    assert [sample for _, _, sample in rows] == list(range(spec.n_samples))
    assert all(sample in spec.shard_samples(shard) for shard, _, sample in rows)
    assert all(1 <= len(spec.chunk_samples(chunk)) <= spec.samples_per_chunk for _, chunk, _ in rows)
    for chunk in (-1, spec.n_chunks):
        with pytest.raises(IndexError, match="is not in the store"):
            spec.chunk_samples(chunk)

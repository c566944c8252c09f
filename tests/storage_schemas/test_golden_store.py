"""A store of format version 1, kept as bytes: still read, still written alike, and readable from FORMAT.md alone."""

import hashlib
import json
import struct
from pathlib import Path

import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from storage_schemas.digest import content_digest
from tests.storage_schemas.golden_store import (
    BAD_IMAGES,
    TEACHER_FILES,
    golden_head_inputs,
    golden_spec,
    golden_states,
    write_golden,
)

GOLDEN = Path(__file__).parents[1] / "golden/store_v1"
VALID = [0, 2, 3, 4]

# With the pinned releases of Arrow and numcodecs. A new release of either may spell the same content in other bytes:
# then test_every_object_is_written_as_it_was still passes but for the Parquet files or the compressed chunks.
DIGESTS = {
    ("zstd-1", "byte"): "aff1a2921dbff1453105d8a03df8c188b8627306ea7bd620154f55bf5fa83e05",
    ("none", "none"): "e1f53b3c42ab9eea293c00f8a928defc5c0f469b58f60ba348bedfbe479fa3b3",
    ("lz4", "bit"): "c2e2382e1284c2a0f9d81132905aedec241ba1cd34ce6000c5284081111fa460",
}


def test_a_store_of_version_1_is_read():
    store = open_store(GOLDEN)
    assert store.verify() == []
    assert store.spec == golden_spec()
    assert (store.n_samples, store.n_committed, store.n_valid) == (5, 5, 4)
    assert store.table.bad_images == BAD_IMAGES
    np.testing.assert_array_equal(store.read(), golden_states(range(5))[VALID])
    np.testing.assert_array_equal(store.read_head_input(), golden_head_inputs(range(5))[VALID])
    assert store.samples["sample_id"].to_pylist()[1] == "classe 1/é1.png"
    assert store.read_teacher_files() == TEACHER_FILES
    np.testing.assert_allclose(
        store.statistics.mean[:, 0], golden_states(range(5))[VALID][:, :, 0].mean(axis=0, dtype=np.float64), rtol=1e-12
    )


def test_the_kept_store_has_its_digest():
    assert content_digest(FolderObjects(GOLDEN)) == DIGESTS["zstd-1", "byte"]


@pytest.mark.parametrize(("codec", "shuffle"), DIGESTS)
def test_stores_are_written_as_they_were(codec, shuffle):
    objects = MemoryObjects()
    write_golden(objects, golden_spec(codec, shuffle))
    assert content_digest(objects) == DIGESTS[codec, shuffle]


def test_every_object_is_written_as_it_was():
    """The same as by digest, but it names the objects that drifted."""
    kept, written = FolderObjects(GOLDEN), MemoryObjects()
    write_golden(written, golden_spec())
    keys = [info.key for info in kept.list()]
    assert keys == [info.key for info in written.list()]
    assert [key for key in keys if kept.get(key) != written.get(key)] == []


# What follows is a reader written from FORMAT.md. It uses nothing of this project.

CRC_TABLE = []
for i in range(256):
    crc = i
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    CRC_TABLE.append(crc)


def castagnoli(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def spelled(document: dict) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def unsealed(path: Path) -> dict:
    document = json.loads(path.read_bytes())
    assert path.read_bytes() == spelled(document)
    digest = document.pop("digest")
    assert hashlib.sha256(spelled(document)).hexdigest() == digest
    return document


def plain_chunks(root: Path, path: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """All rows of an array, padding and bad ones included."""
    spec = unsealed(root / "store.json")["spec"]
    chunks = []
    for shard in range(2):
        commit = unsealed(root / f"commits/{shard:06d}.json")
        key = f"{path}/c/{shard}" + "/0" * len(shape)
        record, data = commit["objects"][key], (root / key).read_bytes()
        assert len(data) == record["nbytes"]
        assert castagnoli(data) == record["crc32c"]
        entries = []
        for offset, nbytes, crc in record["chunks"]:
            payload = data[offset : offset + nbytes]
            assert offset % 64 == 0
            assert castagnoli(payload) == crc
            assert data[offset + nbytes : offset + nbytes + 4] == struct.pack("<I", crc)
            raw = numcodecs.Blosc().decode(payload)
            chunks.append(np.frombuffer(raw, dtype).reshape(spec["samples_per_chunk"], *shape))
            entries += [offset, nbytes + 4]
        n_absent = spec["samples_per_shard"] // spec["samples_per_chunk"] - len(record["chunks"])
        index = struct.pack(f"<{len(entries) + 2 * n_absent}Q", *entries, *([2**64 - 1] * 2 * n_absent))
        assert data[-len(index) - 4 :] == index + struct.pack("<I", castagnoli(index))
    return np.concatenate(chunks)


def test_a_reader_written_from_the_page_reads_the_states():
    identity = unsealed(GOLDEN / "store.json")
    spec, truth = identity["spec"], golden_states(range(5))
    assert (identity["format_version"], spec["layers"], spec["codec"]) == (1, [0, 2], "zstd-1")
    tokens = {"cls": slice(0, 1), "registers": slice(1, 2), "patches": slice(2, 4)}
    for i, layer in enumerate(spec["layers"]):
        for kind, places in tokens.items():
            shape = (4,) if kind == "cls" else (places.stop - places.start, 4)
            found = plain_chunks(GOLDEN, f"layer_{layer:02d}/{kind}", shape, "<f2" if kind == "patches" else "<f4")
            assert found.shape == (6, *shape), "three chunks of two"
            np.testing.assert_array_equal(found[VALID].reshape(4, -1, 4), truth[VALID, i, places])
            assert np.isnan(found[[1, 5]]).all(), "the bad image and the row past the end"
    np.testing.assert_array_equal(
        plain_chunks(GOLDEN, "head_input", (8,), "<f4")[VALID], golden_head_inputs(range(5))[VALID]
    )


def test_a_reader_written_from_the_page_reads_documents_and_tables():
    identity = unsealed(GOLDEN / "store.json")
    for key, digest in identity["documents"].items():
        assert hashlib.sha256((GOLDEN / key).read_bytes()).hexdigest() == digest
    store = hashlib.sha256((GOLDEN / "store.json").read_bytes()).hexdigest()
    commits = [unsealed(GOLDEN / f"commits/{shard:06d}.json") for shard in range(2)]
    assert [commit["store"] for commit in commits] == [store, store]
    assert [commit["bad_images"] for commit in commits] == [[[1, "truncated"]], []]

    data = (GOLDEN / "index.parquet").read_bytes()
    [n] = struct.unpack("<I", data[-8:-4])
    end = len(data) - n - 8
    assert data[end - 32 : end] == hashlib.sha256(data[: end - 32] + data[end:]).digest()
    table = pq.read_table(pa.BufferReader(data))
    rows = [(shard, key, record) for shard, c in enumerate(commits) for key, record in c["objects"].items()]
    found = {(row["shard"], row["key"]): row for row in table.to_pylist()}
    assert len(found) == len(rows)
    for shard, key, record in rows:
        row = found[shard, key]
        assert (row["nbytes"], row["crc32c"]) == (record["nbytes"], record["crc32c"])
        columns = ("chunk_offset", "chunk_nbytes", "chunk_crc32c")
        assert [list(chunk) for chunk in zip(*(row[name] for name in columns))] == record["chunks"]
    assert json.loads(table.schema.metadata[b"index"])["store"] == store


def test_a_reader_written_from_the_page_reads_statistics():
    truth = golden_states(range(5))[:, :, 0].astype(np.float64)  # of CLS, the first kind
    for shard, rows in ((0, [0, 2, 3]), (1, [4])):
        data = (GOLDEN / f"statistics/c/{shard}/0/0/0/0").read_bytes()
        assert data[-4:] == struct.pack("<I", castagnoli(data[:-4]))
        moments = np.frombuffer(data[:-4], "<f8").reshape(2, 4, 5, 4)
        seen = truth[rows]
        np.testing.assert_array_equal(moments[:, 0, 0], len(rows))
        np.testing.assert_allclose(moments[:, 0, 1], seen.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(moments[:, 0, 2], ((seen - seen.mean(axis=0)) ** 2).sum(axis=0), atol=1e-12)
        np.testing.assert_array_equal(moments[:, 0, 3], seen.min(axis=0))
        np.testing.assert_array_equal(moments[:, 0, 4], seen.max(axis=0))

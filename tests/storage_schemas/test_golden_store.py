"""Stores of format version 1, kept as bytes: still read, still written alike, and readable from FORMAT.md alone."""

import gzip
import hashlib
import json
import struct
import zlib
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
    KEPT,
    TEACHER_FILES,
    golden_head_inputs,
    golden_spec,
    golden_states,
    write_golden,
)
from tests.stores import as_stored

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = FOLDER / "store_v1"
VALID = [0, 2, 3, 4]

# With the pinned releases of Arrow and numcodecs, and zlib 1.2.13. Another release may spell the same content in other
# bytes: then test_every_object_is_written_as_it_was still passes but for the Parquet files or the compressed chunks.
DIGESTS = {
    "store_v1": "aff1a2921dbff1453105d8a03df8c188b8627306ea7bd620154f55bf5fa83e05",
    "store_v1_int8": "4f2951f42efa7fd8058e90acd30a1142d07cce85af9b30a17ed3a5b9d763f607",
    "store_v1_webdataset": "6ab730119704b5fdb1a016a2276d8f0353e04f91960f0f4566ca6f6ec7510196",
}
VARIANTS = {
    "e1f53b3c42ab9eea293c00f8a928defc5c0f469b58f60ba348bedfbe479fa3b3": {"codec": "none", "shuffle": "none"},
    "c2e2382e1284c2a0f9d81132905aedec241ba1cd34ce6000c5284081111fa460": {"codec": "lz4", "shuffle": "bit"},
    "0db2a7292630bd358d7245d495148141d40f362c5c1fd2afba872862d08bb4ef": {
        "backend": "webdataset",
        "codec": "none",
        "shuffle": "none",
    },
    "cc338e677d9629f7e9896e5bf361095d8a5da6bef6d53b62801a16c66ff4dfb6": {
        "backend": "webdataset",
        "codec": "none",
        "shuffle": "none",
        "precision": "int8",
    },
    "d45e5d603bf90223940f6338a5eb4d7b635e58855ee99d287c698e2be4a1e863": {
        "codec": "none",
        "shuffle": "none",
        "precision": "bfloat16",
    },
}


@pytest.mark.parametrize("name", KEPT)
def test_a_store_of_version_1_is_read(name):
    store = open_store(FOLDER / name)
    assert store.verify() == []
    assert store.spec == golden_spec(**KEPT[name])
    assert (store.n_samples, store.n_committed, store.n_valid) == (5, 5, 4)
    assert store.table.bad_images == BAD_IMAGES
    np.testing.assert_array_equal(store.read(), as_stored(store.spec, golden_states(range(5))[VALID]))
    np.testing.assert_array_equal(store.read_head_input(), golden_head_inputs(range(5))[VALID])
    assert store.samples["sample_id"].to_pylist()[1] == "classe 1/é1.png"
    assert store.read_teacher_files() == TEACHER_FILES
    np.testing.assert_allclose(
        store.statistics.mean[:, 0], golden_states(range(5))[VALID][:, :, 0].mean(axis=0, dtype=np.float64), rtol=1e-12
    )


@pytest.mark.parametrize("name", KEPT)
def test_kept_stores_have_their_digests(name):
    assert content_digest(FolderObjects(FOLDER / name)) == DIGESTS[name]


@pytest.mark.parametrize("digest", VARIANTS)
def test_stores_are_written_as_they_were(digest):
    objects = MemoryObjects()
    write_golden(objects, golden_spec(**VARIANTS[digest]))
    assert content_digest(objects) == digest


@pytest.mark.parametrize("name", KEPT)
def test_every_object_is_written_as_it_was(name):
    """The same as by digest, but it names the objects that drifted."""
    kept, written = FolderObjects(FOLDER / name), MemoryObjects()
    write_golden(written, golden_spec(**KEPT[name]))
    keys = [info.key for info in kept.list()]
    assert keys == [info.key for info in written.list()]
    if "ng" in zlib.ZLIB_RUNTIME_VERSION:  # which deflates otherwise than zlib
        keys = [key for key in keys if not key.endswith(".tar") and not key.startswith(("commits/", "index"))]
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


def plain_members(root: Path, path: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """All rows of an array of a WebDataset store, bad ones included."""
    rows, kind = [], path.rpartition("/")[2]
    for shard in range(2):
        key = f"{path}/{shard:06d}.tar"
        record, data = unsealed(root / f"commits/{shard:06d}.json")["objects"][key], (root / key).read_bytes()
        assert len(data) == record["nbytes"]
        assert castagnoli(data) == record["crc32c"]
        place, chunk_ends = 0, []
        for offset, nbytes, crc in record["chunks"]:
            assert castagnoli(data[offset : offset + nbytes]) == crc
            chunk_ends.append(offset + nbytes)
        while chunk_ends:
            size = int(data[place + 124 : place + 135], 8)
            assert data[place : place + 512] == ustar(f"{len(rows):09d}.{kind}.npy.gz", size)
            assert data[place + 512 :][:10] == bytes.fromhex("1f8b08000000000000ff")
            file = gzip.decompress(data[place + 512 : place + 512 + size])
            said = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
            assert file[:128] == b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + said.ljust(117).encode() + b"\n"
            rows.append(np.frombuffer(file[128:], dtype).reshape(shape))
            place += 512 + -(-size // 512) * 512
            if len(rows) in (2, 4, 5):
                assert place == chunk_ends.pop(0)
        assert data[place:] == bytes(1024)
    return np.stack(rows)


def ustar(name: str, size: int) -> bytes:
    parts = [name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size]
    front = b"".join(parts) + b"00000000000\0"
    rest = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(255, b"\0")
    return front + b"%06o\0 " % (sum(front) + 8 * ord(" ") + sum(rest)) + rest


@pytest.mark.parametrize("name", KEPT)
def test_a_reader_written_from_the_page_reads_the_states(name):
    root = FOLDER / name
    identity = unsealed(root / "store.json")
    spec, truth = identity["spec"], golden_states(range(5))
    assert (identity["format_version"], spec["layers"]) == (1, [0, 2])
    read = plain_members if spec["backend"] == "webdataset" else plain_chunks
    n_rows, bad = (5, [1]) if spec["backend"] == "webdataset" else (6, [1, 5])  # one is past the end of the store
    for i, layer in enumerate(spec["layers"]):
        folder = f"layer_{layer:02d}"
        for kind, shape, tokens in (("cls", (4,), slice(0, 1)), ("registers", (1, 4), slice(1, 2))):
            found = read(root, f"{folder}/{kind}", shape, "<f4")
            assert found.shape == (n_rows, *shape)
            np.testing.assert_array_equal(found[VALID].reshape(4, 1, 4), truth[VALID, i, tokens])
            assert np.isnan(found[bad]).all()
        dtype = {"float16": "<f2", "int8": "|i1", "bfloat16": "<u2"}[spec["precision"]]
        patches = read(root, f"{folder}/patches", (2, 4), dtype)
        assert patches.shape == (n_rows, 2, 4)
        if spec["precision"] == "int8":
            scale = read(root, f"{folder}/patches_scale", (4,), "<f4")
            np.testing.assert_array_equal(scale[VALID], np.abs(truth[VALID, i, 2:]).max(axis=1) / np.float32(127))
            assert (patches[bad] == 0).all()
            patches = patches * scale[:, None, :]
            np.testing.assert_allclose(patches[VALID], truth[VALID, i, 2:], atol=scale[VALID].max() / 2)
        elif spec["precision"] == "bfloat16":
            assert (patches[bad] == 0x7FC0).all()
            patches = (patches.astype(np.uint32) << 16).view(np.float32)
        if spec["precision"] != "int8":
            np.testing.assert_array_equal(patches[VALID], truth[VALID, i, 2:])
        assert np.isnan(patches[bad]).all()
    np.testing.assert_array_equal(read(root, "head_input", (8,), "<f4")[VALID], golden_head_inputs(range(5))[VALID])


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

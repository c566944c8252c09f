"""Objects far larger than any that this format has: refused by size, before they are read."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from storage_schemas.create import plan_documents
from storage_schemas.digest import content_digest, object_sha256
from storage_schemas.documents import sha256
from storage_schemas.errors import SchemaError
from storage_schemas.find import find_stores
from storage_schemas.keys import INDEX_KEY, SAMPLES_KEY, STORE_KEY, commit_key
from storage_schemas.limits import MAX_TEACHER_FILE_NBYTES, most_nbytes
from storage_schemas.samples import Sample
from storage_schemas.verify import verify_store
from tests.stores import make_spec, write_planted

HUGE_NBYTES, LITTLE_NBYTES = 20 * 2**30, 2**28


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What would read such an object fails at once, and not by taking the machine down.

    Data alone is limited: addresses are set aside for each thread, more or fewer as threads happen to meet.
    """
    former = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (used + LITTLE_NBYTES, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, former)


def test_memory_is_little_indeed():
    with pytest.raises(MemoryError):
        bytes(2 * LITTLE_NBYTES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_planted(FolderObjects(tmp_path / "store"), make_spec(), {5: "empty"}, teacher_files={"weights.bin": b"abc"})
    return tmp_path / "store"


def inflate(folder: Path, key: str, nbytes: int = HUGE_NBYTES) -> None:
    """A file of that size which takes no room."""
    os.truncate(folder / key, nbytes)


def test_store_json(folder):
    inflate(folder, STORE_KEY)
    with pytest.raises(SchemaError, match=r"store\.json has 21,474,836,480 bytes; at most 8,388,608 are read"):
        open_store(folder)
    assert [p.key for p in verify_store(FolderObjects(folder))] == [STORE_KEY]
    assert find_stores(folder) == {"": str(folder)}, "verify must be able to speak of it"


def test_a_commit(folder):
    inflate(folder, commit_key(1))
    (folder / INDEX_KEY).unlink()
    store = open_store(folder)
    assert "has 21,474,836,480 bytes; at most" in store.damaged_commits[commit_key(1)]
    problems = verify_store(FolderObjects(folder))
    assert [(p.key, p.shard) for p in problems] == [(commit_key(1), 1)]


def test_the_index(folder):
    inflate(folder, INDEX_KEY)
    assert open_store(folder).read().shape[0] == 20
    [problem] = verify_store(FolderObjects(folder))
    assert problem.key == INDEX_KEY
    assert "has 21,474,836,480 bytes; at most" in problem.found


@pytest.mark.parametrize("key", [SAMPLES_KEY, "layer_00/zarr.json"])
def test_documents_that_store_json_names(folder, key):
    inflate(folder, key)
    store = open_store(folder)
    with pytest.raises(SchemaError, match=r"has 21,474,836,480 bytes; at most .* REPAIR=1"):
        store.read_document(key)
    [problem] = store.verify()
    assert problem.key == key
    assert "has 21,474,836,480 bytes; at most" in problem.found


def test_a_file_of_the_teacher(folder):
    """Weights may be large, larger than memory; verify hashes them piece by piece, up to a limit."""
    inflate(folder, "teacher/weights.bin", MAX_TEACHER_FILE_NBYTES + 1)
    with pytest.raises(SchemaError, match=r"has 68,719,476,737 bytes; at most 68,719,476,736 are read"):
        open_store(folder).read_teacher_files()
    assert [p.key for p in verify_store(FolderObjects(folder))] == ["teacher/weights.bin"]
    inflate(folder, "teacher/weights.bin", LITTLE_NBYTES + 77)  # more than this test may have in memory
    [problem] = verify_store(FolderObjects(folder))
    assert (problem.key, problem.what) == ("teacher/weights.bin", "changed")


def test_a_digest_takes_pieces(tmp_path):
    data = np.random.default_rng(0).bytes(2**25 + 77)
    objects = MemoryObjects()
    objects.put("a", data)
    assert object_sha256(objects, "a", len(data)) == sha256(data)
    (tmp_path / "store").mkdir()
    (tmp_path / "store/large").touch()
    inflate(tmp_path / "store", "large", LITTLE_NBYTES + 77)
    assert len(content_digest(FolderObjects(tmp_path / "store"), threads=1)) == 64


@pytest.mark.parametrize("n_samples", [1, 21, 500])
def test_real_documents_are_far_below_their_limits(n_samples):
    objects = MemoryObjects()
    spec = make_spec(n_samples=n_samples, samples_per_shard=4, layers=(0,))
    bad = {i: "undecodable" for i in range(n_samples) if i % 5}
    write_planted(objects, spec, bad)
    for key in (SAMPLES_KEY, INDEX_KEY, "zarr.json", STORE_KEY, commit_key(0)):
        assert len(objects.get(key)) < most_nbytes(spec, key) / 4, key


def test_a_store_that_nobody_would_read_is_not_begun():
    """Names of 8 kB would make a samples.parquet beyond the limit."""
    spec = make_spec(n_samples=600)
    rng = np.random.default_rng(0)
    samples = [Sample(sample_id=rng.bytes(4000).hex(), label=0, class_name="a", nbytes=1) for _ in range(600)]
    limit = most_nbytes(spec, SAMPLES_KEY)
    with pytest.raises(SchemaError, match=rf"samples\.parquet has [0-9,]+ bytes; at most {limit:,} are supported"):
        plan_documents(spec, samples, {})

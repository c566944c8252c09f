"""The verb that reads into rows of an array and checksums on the way: compiled, in Python, on every back end."""

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from infra import native
from infra.native import read_rows_function, scatter_rows_function
from infra.object_rows import scatter_rows
from infra.objects import FolderObjects, MemoryObjects, ObjectMissingError, Objects, ShortObjectError

DATA = np.random.default_rng(0).integers(0, 256, 700_000, dtype=np.uint8).tobytes()


@pytest.fixture(params=["compiled", "python", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Objects:
    made: Objects = MemoryObjects() if request.param == "memory" else FolderObjects(tmp_path)
    if request.param == "python":
        monkeypatch.setattr("infra.folder_objects.read_rows_function", lambda: None)
    elif request.param == "compiled" and read_rows_function() is None:
        pytest.skip("no compiler here")
    made.put("a/b", DATA)
    return made


BYTES = np.zeros((4, 100), np.uint8)
READ_ONLY = np.frombuffer(bytes(400), np.uint8).reshape(4, 100)


@pytest.mark.parametrize(
    ("out", "rows", "message"),
    [
        (BYTES, np.array([0, 4]), "row 4 is past the end of an array of 4 rows"),
        (BYTES[:0], np.array([-1]), "has no rows"),
        (np.array(0, np.uint8), np.array([0]), "has no rows"),
        (BYTES, np.empty(0, np.int64), "some integers along one axis"),
        (BYTES, np.array([[0]]), "some integers along one axis"),
        (BYTES, np.array([0.0]), "some integers along one axis"),
        (BYTES[:, ::2], np.array([0]), "must be contiguous"),
        (BYTES[:, :0], np.array([0]), "rows of 0 bytes"),
        (np.full((2, 2), None), np.array([0]), "of object cannot be read into"),
        (READ_ONLY, np.array([0]), "must be writable"),
    ],
)
def test_places_that_c_must_not_write_to(objects: Objects, out: np.ndarray, rows: np.ndarray, message: str) -> None:
    """Refused by an error, which unlike an assertion is there under `python -O` too."""
    with pytest.raises(ValueError, match=message):
        objects.read_rows("a/b", 0, out, rows)
    assert not BYTES.any()


@pytest.mark.parametrize("row_nbytes", [1, 24, 3000, 70_000, 200_000])
def test_pieces_go_to_their_rows(objects: Objects, row_nbytes: int) -> None:
    store = np.zeros((9, 2, row_nbytes), np.uint8)
    rows = np.array([7, -1, 0])
    crc = objects.read_rows("a/b", 11, store[:, 1], rows)
    pieces = [np.frombuffer(DATA, np.uint8, row_nbytes, 11 + i * row_nbytes) for i in range(3)]
    assert crc == crc32c(b"".join(pieces))
    assert np.array_equal(store[7, 1], pieces[0])
    assert np.array_equal(store[0, 1], pieces[2])
    store[[7, 0], 1] = 0
    assert not store.any(), "something was written elsewhere"


def test_rows_of_any_item_and_many_of_them(objects: Objects) -> None:
    out = np.zeros((300, 3, 4), np.float32)
    rows = np.random.default_rng(1).permutation(300)
    rows[5:290:7] = -1
    crc = objects.read_rows("a/b", 4, out, rows)
    expected = np.frombuffer(DATA, np.uint8, out.nbytes, 4).reshape(300, -1)
    assert crc == crc32c(expected.tobytes())
    found = out.view(np.uint8).reshape(300, -1)
    assert all(np.array_equal(found[row], expected[i]) for i, row in enumerate(rows) if row >= 0)


def test_errors_name_the_object(objects: Objects) -> None:
    out, rows = np.zeros((2, 100), np.uint8), np.array([0, 1])
    with pytest.raises(ObjectMissingError, match=r"a/c is missing"):
        objects.read_rows("a/c", 0, out, rows)
    with pytest.raises(ShortObjectError, match="bytes 699900 to 700100 were asked for, the object has 700000") as short:
        objects.read_rows("a/b", 699_900, out, rows)
    assert short.value.key == "a/b"
    with pytest.raises(ValueError, match="not a plain relative path"):
        objects.read_rows("../b", 0, out, rows)
    with pytest.raises(ValueError, match="past the end"):
        objects.read_rows("a/b", 0, out, np.array([2]))
    with pytest.raises(ValueError, match="must be contiguous"):
        objects.read_rows("a/b", 0, out.T, np.array([0]))


@pytest.mark.skipif(read_rows_function() is None, reason="no compiler here")
@given(st.integers(1, 60_000), st.integers(0, 1000), st.integers(0, 2**32))
def test_compiled_checksum_is_crc32c(nbytes: int, start: int, seed: int) -> None:
    objects = FolderObjects(CHECKSUM_FOLDER)
    out = np.zeros((3, nbytes), np.uint8)
    rows = np.random.default_rng(seed).permutation(3)
    assert objects.read_rows("data", start, out, rows) == crc32c(DATA[start : start + 3 * nbytes])
    assert out[rows].tobytes() == DATA[start : start + 3 * nbytes]


@pytest.fixture(autouse=True, scope="module")
def checksum_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global CHECKSUM_FOLDER
    CHECKSUM_FOLDER = tmp_path_factory.mktemp("checksums")
    FolderObjects(CHECKSUM_FOLDER).put("data", DATA)


CHECKSUM_FOLDER = Path()


def test_files_are_closed(objects: Objects) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for start in (0, 699_999):
        try:
            objects.read_rows("a/b", start, np.zeros((1, 100), np.uint8), np.array([0]))
        except ShortObjectError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(read_rows_function() is None, reason="no compiler here")
def test_processes_may_build_at_once(tmp_path: Path) -> None:
    """Three builds side by side into one empty cache: all get a working function, one library stays."""
    program = (
        "import contextlib, sys, pathlib, infra.native as native\n"
        "native._cache_folder = lambda: contextlib.nullcontext(pathlib.Path(sys.argv[1]))\n"
        "assert native.read_rows_function() is not None"
    )
    started = [subprocess.Popen([sys.executable, "-W", "error", "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(240) for process in started] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native._load.__wrapped__() is None


@pytest.mark.skipif(read_rows_function() is None, reason="no compiler here")
def test_without_an_environment_to_keep_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.prefix", sys.base_prefix)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native._load.__wrapped__() is not None
    assert list(tmp_path.iterdir()) == []


def test_a_failing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(native, "_cache_folder", lambda: nullcontext(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.warns(RuntimeWarning, match=r"read_rows.c could not be built with .*false; reading goes on in Python"):
        assert native._load.__wrapped__() is None
    assert list(tmp_path.iterdir()) == []


def test_threads_load_it_once() -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(read_rows_function())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(function is found[0] for function in found)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("row_nbytes", [2, 24, 3000, 70_000])
def test_bytes_in_memory_go_to_their_rows(compiled: bool, row_nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr("infra.object_rows.scatter_rows_function", lambda: None)
    elif scatter_rows_function() is None:
        pytest.skip("no compiler here")
    data = np.frombuffer(DATA, np.uint8)[1 : 1 + 5 * row_nbytes]  # at an odd address
    out = np.zeros((6, 2, row_nbytes // 2), "<u2")[:, 0]
    assert scatter_rows(data, out, np.array([4, -1, 0, 5, 2])) == crc32c(data.data)
    pieces = data.reshape(5, row_nbytes)
    for piece, row in ((0, 4), (2, 0), (3, 5), (4, 2)):
        assert out[row].tobytes() == pieces[piece].tobytes()[: row_nbytes // 2 * 2]
    assert not out[[1, 3]].any()

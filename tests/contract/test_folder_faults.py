"""What a folder does when the machine fails it: full disk, no permission, a writer killed in the middle, links."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.console import UserError
from infra.objects import FolderObjects, ObjectAccessError, ObjectMissingError, open_objects

REPOSITORY = Path(__file__).parents[2]


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPOSITORY,
        check=False,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_names_the_object_and_leaves_nothing(small_disk):
    objects = FolderObjects(small_disk / "store")
    objects.put("a/old", b"as it was")
    with pytest.raises(ObjectAccessError, match="a/new could not be written: No space left on device") as caught:
        objects.put("a/new", [bytes(40_000), bytes(40_000)])
    assert caught.value.key == "a/new"
    with pytest.raises(ObjectAccessError, match="a/old could not be written"):
        objects.put("a/old", bytes(80_000))
    assert files(small_disk) == ["store/a/old"]
    assert objects.get("a/old") == b"as it was"
    objects.put("a/new", bytes(20_000))  # what was half written has given its room back


def test_a_size_limit_is_a_full_disk_too(tmp_path):
    """The same without a mount, so that it is tested everywhere: the operating system cuts the write."""
    code = """
import resource, signal, sys
from infra.objects import FolderObjects, ObjectAccessError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
objects = FolderObjects(sys.argv[1])
objects.put("fits", bytes(50_000))
try:
    objects.put("a/big", [bytes(40_000), bytes(40_000)])
except ObjectAccessError as error:
    print(error.key, "|", error)
"""
    done = run_python(code, tmp_path / "store")
    assert "a/big |" in done.stdout, done.stderr
    assert "could not be written: File too large" in done.stdout
    assert files(tmp_path) == ["store/fits"]


def test_a_writer_killed_in_the_middle_leaves_no_object(tmp_path):
    code = """
import os, signal, sys
from infra.objects import FolderObjects
class Pieces(list):
    def __iter__(self):
        yield bytes(100_000)
        os.kill(os.getpid(), signal.SIGKILL)
FolderObjects(sys.argv[1]).put("a/key", Pieces())
"""
    objects = FolderObjects(tmp_path)
    objects.put("a/key", b"as it was")
    done = run_python(code, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(files(tmp_path)) == 2, "the torn file should still be there, or this test proves nothing"
    assert [info.key for info in objects.list()] == ["a/key"]
    assert objects.get("a/key") == b"as it was"
    assert objects.sweep() == 1
    assert objects.sweep() == 0
    assert files(tmp_path) == ["a/key"]


@pytest.fixture
def without_rights(tmp_path: Path) -> Iterator[Path]:
    """A folder with one object, which this process may neither read nor change."""
    folder = tmp_path / "store"
    FolderObjects(folder).put("a/key", b"secret")
    former, mode = os.geteuid(), folder.stat().st_mode
    folder.chmod(0)
    if former == 0:  # root may do everything; nobody may not
        os.seteuid(65534)
    yield folder
    os.seteuid(former)
    folder.chmod(mode)


def test_no_permission_is_said_for_every_verb(without_rights):
    objects = FolderObjects(without_rights)
    verbs = {
        "could not be read: Permission denied": [
            lambda: objects.get("a/key"),
            lambda: objects.read_into("a/key", 0, memoryview(bytearray(1))),
            lambda: list(objects.list()),
            lambda: list(objects.list("a/")),
            lambda: objects.list_folder(),
            lambda: objects.list_folder("a/"),
        ],
        "could not be written: Permission denied": [
            lambda: objects.put("a/key", b"x"),
            lambda: objects.put_new("a/key", b"x"),
        ],
        "nothing can be written to .*/store: Permission denied": [objects.check_writable],
        "could not be deleted: Permission denied": [lambda: objects.delete("a/key")],
    }
    for message, calls in verbs.items():
        for call in calls:
            with pytest.raises(ObjectAccessError, match=message):
                call()


def test_whether_it_can_be_written_is_asked_without_making_the_folder(tmp_path):
    FolderObjects(tmp_path / "not" / "yet").check_writable()
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ObjectAccessError, match=r"nothing can be written to .*/file/store: Not a directory"):
        FolderObjects(tmp_path / "file" / "store").check_writable()


def test_a_folder_in_the_place_of_a_new_object_is_said(tmp_path):
    objects = FolderObjects(tmp_path)
    objects.put("a/b", b"x")
    with pytest.raises(ObjectAccessError, match="a could not be written: File exists"):
        objects.put_new("a", b"x")
    assert files(tmp_path) == ["a/b"]


def test_a_file_where_a_folder_should_be_is_said(tmp_path):
    objects = FolderObjects(tmp_path)
    objects.put("a", b"file")
    with pytest.raises(ObjectAccessError, match="a/b could not be written"):
        objects.put("a/b", b"x")
    assert files(tmp_path) == ["a"]


def test_links_are_read_but_never_listed_or_followed_by_a_listing(tmp_path):
    outside = FolderObjects(tmp_path / "outside")
    outside.put("precious", b"x")
    objects = FolderObjects(tmp_path / "store")
    objects.put("a/key", b"y")
    (tmp_path / "store/link").symlink_to(tmp_path / "outside")
    (tmp_path / "store/a/loop").symlink_to(tmp_path / "store")
    assert objects.get("link/precious") == b"x"
    assert [info.key for info in objects.list()] == ["a/key"]
    assert [info.key for info in objects.list("link/")] == []


def test_nothing_is_written_or_deleted_through_a_link_that_leads_out(tmp_path):
    outside = FolderObjects(tmp_path / "outside")
    outside.put("precious", b"x")
    objects = FolderObjects(tmp_path / "store")
    objects.put("a/key", b"y")
    (tmp_path / "store/link").symlink_to(tmp_path / "outside")
    for change in (
        lambda: objects.put("link/precious", b"z"),
        lambda: objects.put("link/new/below", b"z"),
        lambda: objects.delete("link/precious"),
    ):
        with pytest.raises(ObjectAccessError, match=r"leads out of .*/store, to .*/outside"):
            change()
    assert [(info.key, info.nbytes) for info in outside.list()] == [("precious", 1)]


def test_a_store_below_a_link_is_an_ordinary_store(tmp_path):
    """The folder itself may be reached by a link, as when data/ lies on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    objects = FolderObjects(tmp_path / "data/store")
    objects.put("a/key", b"y")
    assert [info.key for info in objects.list()] == ["a/key"]
    objects.delete("a/key")
    assert files(tmp_path / "disk") == []


def test_a_link_in_place_of_an_object_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"x")
    objects = FolderObjects(tmp_path / "store")
    objects.put("a/key", b"y")
    for change in (lambda: objects.put("a/key", b"new"), lambda: objects.delete("a/key")):
        (tmp_path / "store/a/key").unlink()
        (tmp_path / "store/a/key").symlink_to(tmp_path / "precious")
        change()
        assert (tmp_path / "precious").read_bytes() == b"x"
        assert not (tmp_path / "store/a/key").is_symlink()
        objects.put("a/key", b"y")


def test_a_name_too_long_is_an_error_with_the_key(tmp_path):
    objects = FolderObjects(tmp_path)
    with pytest.raises(ObjectAccessError, match="could not be written"):
        objects.put("x" * 300, b"x")
    with pytest.raises(ObjectAccessError, match="could not be read"):
        objects.get("x" * 300)


def test_reading_leaves_no_open_files(tmp_path):
    objects = FolderObjects(tmp_path)
    objects.put("key", bytes(10))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        objects.get("key")
        objects.read_into("key", 0, memoryview(bytearray(10)))
        list(objects.list())
        with pytest.raises(ObjectMissingError):
            objects.get("not")
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_by_location(tmp_path):
    objects = open_objects(tmp_path / "store")
    assert objects.location == str(tmp_path / "store")
    with pytest.raises(UserError, match=r"gs://bucket/x: give a local path without '://', or s3://bucket/prefix"):
        open_objects("gs://bucket/x")


def test_without_hard_links_the_first_of_two_still_stays(tmp_path, monkeypatch):
    """As on exFAT and many network mounts."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    objects = FolderObjects(tmp_path)
    assert objects.put_new("a/key", b"first")
    assert not objects.put_new("a/key", b"second")
    assert objects.get("a/key") == b"first"
    assert files(tmp_path) == ["a/key"]


@pytest.mark.parametrize("verb", ["put", "put_new"])
def test_a_put_whose_file_another_job_swept_is_done_again(tmp_path, verb):
    """Two jobs that begin at one moment: one sweeps what it takes for leftovers of a dead one."""
    objects, n_swept = FolderObjects(tmp_path), []

    class Swept(list):
        def __iter__(self) -> Iterator[bytes]:
            yield b"whole"
            if not n_swept:
                n_swept.append(FolderObjects(tmp_path).sweep())

    getattr(objects, verb)("a/key", Swept([b"whole"]))
    assert n_swept == [1]
    assert objects.get("a/key") == b"whole"
    assert files(tmp_path) == ["a/key"]

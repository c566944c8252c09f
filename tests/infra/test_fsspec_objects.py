"""Objects through fsspec, only read: the same answers and errors as of the other back ends."""

import secrets
from pathlib import Path

import fsspec
import pytest

from infra.console import UserError
from infra.fsspec_objects import FsspecObjects, open_read_only, split_key
from infra.objects import (
    FolderObjects,
    MemoryObjects,
    ObjectAccessError,
    ObjectMissingError,
    ObjectTooLargeError,
    ShortObjectError,
)

KEYS = ("x/1.jpg", "x-y/2.jpg", "x/z/3 é.jpg", "w", "xa", "x.jpg")


@pytest.fixture(params=["memory", "file"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> FsspecObjects:
    url = f"memory://{secrets.token_hex(4)}/top" if request.param == "memory" else f"file://{tmp_path}/top"
    fs, root = fsspec.core.url_to_fs(url)
    for key in KEYS:
        fs.makedirs(f"{root}/{key}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{key}", f"bytes of {key}".encode())
    opened = open_read_only(f"{url}/")
    assert isinstance(opened, FsspecObjects)
    assert opened.location == url
    return opened


def test_listings_are_those_of_objects_in_memory(objects):
    model = MemoryObjects()
    for key in KEYS:
        model.put(key, f"bytes of {key}".encode())
    for prefix in ("", "x", "x/", "x-", "x/z/3", "nothing", "x/1.jpg", "no/such/"):
        assert list(objects.list(prefix)) == list(model.list(prefix)), prefix
    for prefix in ("", "x/", "x/z/", "nothing/"):
        assert objects.list_folder(prefix) == model.list_folder(prefix), prefix


def test_objects_and_ranges_are_read_and_errors_name_them(objects):
    assert objects.get("x/z/3 é.jpg") == "bytes of x/z/3 é.jpg".encode()
    part = bytearray(4)
    objects.read_into("x/1.jpg", 6, memoryview(part))
    assert part == b"of x"
    objects.read_into("x/1.jpg", 6, memoryview(bytearray()))
    with pytest.raises(ObjectMissingError, match=r"top/x/2\.jpg is missing"):
        objects.get("x/2.jpg")
    with pytest.raises(ObjectMissingError, match=r"top/x/2\.jpg is missing"):
        objects.read_into("x/2.jpg", 0, memoryview(part))
    with pytest.raises(ObjectTooLargeError, match="has 16 bytes; at most 15 are read"):
        objects.get("x/1.jpg", at_most=15)
    with pytest.raises(ShortObjectError, match="bytes 14 to 18 were asked for, the object has 16"):
        objects.read_into("x/1.jpg", 14, memoryview(part))


@pytest.mark.parametrize("key", ["../w", "/etc/passwd", "x/../../w", "", "x//1.jpg"])
def test_keys_stay_below_the_place(objects, key):
    for act in (lambda: objects.get(key), lambda: objects.read_into(key, 0, memoryview(bytearray(1)))):
        with pytest.raises(ValueError, match="is not a plain relative path"):
            act()


def test_what_a_driver_raises_names_the_object(objects, monkeypatch):
    def fail(*args: object, **options: object) -> bytes:
        raise RuntimeError("token expired\nsecond line")

    monkeypatch.setattr(type(objects._fs), "cat_file", fail)
    monkeypatch.setattr(type(objects._fs), "ls", fail)
    for act in (lambda: objects.get("w"), lambda: objects.read_into("w", 0, memoryview(bytearray(1)))):
        with pytest.raises(ObjectAccessError, match=r"top/w could not be read: RuntimeError: token expired$"):
            act()
    with pytest.raises(ObjectAccessError, match="could not be listed: RuntimeError: token expired"):
        list(objects.list())


def test_a_server_that_ignores_ranges_is_no_source(objects, monkeypatch):
    monkeypatch.setattr(type(objects._fs), "cat_file", lambda *args, **options: b"all of it")
    with pytest.raises(ObjectAccessError, match="sends more than the range asked for"):
        objects.read_into("w", 0, memoryview(bytearray(2)))


def test_places_are_opened_by_their_scheme(tmp_path):
    assert isinstance(open_read_only(str(tmp_path)), FolderObjects)
    with pytest.raises(UserError, match="Protocol not known: nope"):
        open_read_only("nope://bucket/folder")
    with pytest.raises(UserError, match=r"needs a driver that is not installed: .*adlfs"):
        open_read_only("abfs://container/folder")


@pytest.mark.parametrize("location", ["s3://bucket", "s3://", "gs://bucket/folder/", "file.pth"])
def test_what_names_no_object_is_told(location):
    with pytest.raises(UserError, match="names no object; give one such as"):
        split_key(location)


def test_keys_are_split_off():
    assert split_key("s3://bucket/weights.pth") == ("s3://bucket", "weights.pth")
    assert split_key("gs://bucket/a/b/weights.pth") == ("gs://bucket/a/b", "weights.pth")

"""The verb that fills several buffers from one part of an object, on every back end there is."""

import os
from pathlib import Path

import pytest

from infra.objects import FolderObjects, MemoryObjects, ObjectMissingError, Objects, ShortObjectError


@pytest.fixture(params=["folder", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    made: Objects = FolderObjects(tmp_path) if request.param == "folder" else MemoryObjects()
    made.put("a/b", bytes(range(100)))
    return made


def test_buffers_are_filled_in_turn(objects: Objects) -> None:
    parts = [memoryview(bytearray(n)) for n in (5, 1, 0, 20)]
    full = 0
    for i, part in enumerate(objects.read_parts("a/b", 7, parts)):
        assert part is parts[i]
        full += part.nbytes
        assert b"".join(parts)[:full] == bytes(range(7, 7 + full))
    assert full == 26


def test_errors_name_the_object(objects: Objects) -> None:
    with pytest.raises(ObjectMissingError, match=r"a/c is missing") as missing:
        list(objects.read_parts("a/c", 0, [memoryview(bytearray(1))]))
    assert missing.value.key == "a/c"
    with pytest.raises(ShortObjectError, match="bytes 90 to 105 were asked for, the object has 100"):
        list(objects.read_parts("a/b", 90, [memoryview(bytearray(5)), memoryview(bytearray(10))]))


def test_abandoned_read_closes_its_file(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path)
    objects.put("a", bytes(10))
    before = len(os.listdir("/proc/self/fd"))
    reading = objects.read_parts("a", 0, [memoryview(bytearray(5)), memoryview(bytearray(5))])
    next(reading)
    reading.close()
    assert len(os.listdir("/proc/self/fd")) == before

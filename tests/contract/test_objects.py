"""One suite of behaviour for every back end of infra.objects."""

import pickle
import threading
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.objects import (
    Folder,
    MemoryObjects,
    ObjectInfo,
    ObjectMissingError,
    Objects,
    ObjectTooLargeError,
    ShortObjectError,
    read_range,
)
from infra.s3 import S3Objects
from tests import examples
from tests.contract.backends import BACKENDS

BAD_KEYS = ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a/..", "a\\b", "a\0b", "a\nb", "\ud800"]


@pytest.fixture(params=BACKENDS)
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return BACKENDS[request.param](tmp_path)


class BrokenPieces(Sequence):
    """Pieces of an object of which the second cannot be had."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        if index:
            raise RuntimeError("the second piece broke")
        return bytes(100_000)

    def __iter__(self) -> Iterator[bytes]:
        yield self[0]
        yield self[1]


def infos(objects: Objects, prefix: str = "") -> list[tuple[str, int]]:
    return [(info.key, info.nbytes) for info in objects.list(prefix)]


def test_what_was_put_is_read_back(objects):
    objects.put("a/b/c", b"hello")
    assert objects.get("a/b/c") == b"hello"
    assert infos(objects) == [("a/b/c", 5)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 3,
        bytearray(b"xyz"),
        memoryview(b"xyz"),
        [b"x", memoryview(b"y"), bytearray(b"z")],
        [],
        [b"", b""],
        memoryview(np.arange(6, dtype="<f4").reshape(2, 3)),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_form_of_bytes_can_be_put(objects, data):
    objects.put("key", data)
    pieces = data if isinstance(data, list) else [data]
    assert objects.get("key") == b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces)


def test_an_object_larger_than_asked_for_is_refused_with_both_sizes(objects):
    objects.put("a/key", bytes(1234))
    assert len(objects.get("a/key", at_most=1234)) == 1234
    with pytest.raises(ObjectTooLargeError, match=r"a/key has 1,234 bytes; at most 1,233 are read") as caught:
        objects.get("a/key", at_most=1233)
    assert caught.value.key == "a/key"
    with pytest.raises(ObjectMissingError):
        objects.get("a/not", at_most=1)


def test_a_put_replaces_the_whole_object(objects):
    objects.put("key", b"a long first content")
    objects.put("key", b"short")
    assert objects.get("key") == b"short"
    assert infos(objects) == [("key", 5)]


def test_memory_that_was_put_may_be_used_again(objects):
    """Shard buffers are filled anew as soon as a put returns."""
    buffer = bytearray(b"first")
    objects.put("key", memoryview(buffer))
    buffer[:] = b"other"
    assert objects.get("key") == b"first"


def test_a_new_object_replaces_nothing(objects):
    assert objects.put_new("a/key", [b"fir", memoryview(b"st")]) is True
    assert objects.put_new("a/key", b"second") is False
    assert objects.get("a/key") == b"first"
    objects.delete("a/key")
    assert objects.put_new("a/key", b"") is True
    assert objects.put_new("a/key", b"") is False
    assert infos(objects) == [("a/key", 0)]
    with pytest.raises(RuntimeError, match="second piece"):
        objects.put_new("b", BrokenPieces())
    assert infos(objects) == [("a/key", 0)]


def test_of_many_writers_of_a_new_object_one_is_first(objects):
    if isinstance(objects, S3Objects) and not objects._conditions_work():
        pytest.skip("this server knows no conditional writes")
    first: list[int] = []

    def write(i: int) -> None:
        if objects.put_new("claim", bytes([i]) * 10_000):
            first.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first) == 1
    assert objects.get("claim") == bytes(first) * 10_000
    assert objects.sweep() == 0


def test_a_folder_is_listed_one_level_deep(objects):
    for key in ["a/1", "a/b/2", "a/b/3", "a/c.d/e/4", "a-b", "z", "ab/5"]:
        objects.put(key, key.encode())
    objects.put("gone/x", b"x")
    objects.delete("gone/x")
    assert objects.list_folder() == Folder(
        objects=[ObjectInfo(key="a-b", nbytes=3), ObjectInfo(key="z", nbytes=1)], folders=["a/", "ab/"]
    )
    assert objects.list_folder("a/") == Folder(objects=[ObjectInfo(key="a/1", nbytes=3)], folders=["a/b/", "a/c.d/"])
    assert objects.list_folder("a/b/").folders == []
    assert objects.list_folder("nothing/here/") == Folder(objects=[], folders=[])


@pytest.mark.parametrize("prefix", ["a", "/", "../", "a//", "a/b"])
def test_what_is_no_folder_is_refused(objects, prefix):
    with pytest.raises(ValueError, match=r"ends in '/'|not a plain relative path"):
        objects.list_folder(prefix)


def test_whether_it_can_be_written_is_tried_and_leaves_nothing(objects):
    objects.check_writable()
    assert infos(objects) == []
    objects.put("a", b"x")
    objects.check_writable()
    assert infos(objects) == [("a", 1)]


def test_missing_objects_are_named(objects):
    objects.put("folder/there", b"x")
    for key in ("nothing", "folder/not", "folder", "folder/there/below"):
        with pytest.raises(ObjectMissingError, match=f"{key} is missing") as caught:
            objects.get(key)
        assert caught.value.key == key
        with pytest.raises(ObjectMissingError, match=f"{key} is missing"):
            objects.read_into(key, 0, memoryview(bytearray(1)))


@pytest.mark.parametrize(("start", "nbytes"), [(0, 0), (0, 10), (3, 4), (9, 1), (10, 0), (0, 1)])
def test_a_range_is_read_into_memory_of_the_caller(objects, start, nbytes):
    objects.put("key", bytes(range(10)))
    buffer = bytearray(b"\xff" * nbytes)
    objects.read_into("key", start, memoryview(buffer))
    assert bytes(buffer) == bytes(range(10))[start : start + nbytes]
    assert read_range(objects, "key", start, nbytes) == buffer


def test_a_range_fills_arrays_of_any_item_size(objects):
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    objects.put("key", [b"head", memoryview(values)])
    found = np.zeros((3, 4), "<f4")
    objects.read_into("key", 4, memoryview(found))
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(("start", "nbytes"), [(0, 11), (10, 1), (11, 1), (5, 100), (10**15, 1)])
def test_a_range_past_the_end_is_an_error_with_both_sizes(objects, start, nbytes):
    objects.put("key", bytes(10))
    with pytest.raises(ShortObjectError, match=rf"key: bytes {start} to {start + nbytes} .*has 10") as caught:
        read_range(objects, "key", start, nbytes)
    assert caught.value.key == "key"


def test_listing_is_by_prefix_in_key_order(objects):
    keys = ["a/1", "a/10", "a/2", "a.txt", "ab/x/y", "b", "a-b/z", "c/d/e/f"]
    for key in keys:
        objects.put(key, key.encode())
    assert infos(objects) == [(key, len(key)) for key in sorted(keys)]
    for prefix in ("a", "a/", "a/1", "ab/", "ab/x/y", "ab/x/", "b", "b/", "c/d", "c/d/e/f", "nothing/here", "zz"):
        assert infos(objects, prefix) == [(key, len(key)) for key in sorted(keys) if key.startswith(prefix)], prefix


def test_empty_objects_list_nothing(objects):
    assert infos(objects) == []
    assert infos(objects, "commits/") == []


@pytest.mark.parametrize("prefix", ["../", "/", "a/../../", "a//"])
def test_a_prefix_that_climbs_out_is_refused(objects, prefix):
    with pytest.raises(ValueError, match="not a plain relative path"):
        infos(objects, prefix)


def test_deleting_is_repeatable(objects):
    objects.put("a/b", b"x")
    objects.put("a/c", b"y")
    objects.delete("a/b")
    objects.delete("a/b")
    objects.delete("never/was")
    assert infos(objects) == [("a/c", 1)]
    with pytest.raises(ObjectMissingError):
        objects.get("a/b")


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_keys_that_are_no_plain_paths_are_refused_by_every_verb(objects, key):
    verbs = [
        lambda: objects.get(key),
        lambda: objects.put(key, b"x"),
        lambda: objects.put_new(key, b"x"),
        lambda: objects.read_into(key, 0, memoryview(bytearray(1))),
        lambda: list(objects.read_parts(key, 0, [memoryview(bytearray(1))])),
        lambda: objects.delete(key),
    ]
    for verb in verbs:
        with pytest.raises(ValueError, match="is not a plain relative path"):
            verb()
    assert infos(objects) == []


def test_an_interrupted_put_leaves_no_object(objects):
    with pytest.raises(RuntimeError, match="second piece"):
        objects.put("new", BrokenPieces())
    objects.put("old", b"as it was")
    with pytest.raises(RuntimeError, match="second piece"):
        objects.put("old", BrokenPieces())
    assert infos(objects) == [("old", 9)]
    assert objects.get("old") == b"as it was"
    assert objects.sweep() == 0


def test_a_reader_sees_the_old_object_or_the_new_one(objects):
    contents = [bytes([i]) * 200_000 for i in range(4)]
    objects.put("key", contents[0])
    stop = threading.Event()
    torn: list[str] = []

    def write() -> None:
        try:
            for i in range(150):
                objects.put("key", [memoryview(contents[i % 4])[:70_000], memoryview(contents[i % 4])[70_000:]])
        finally:
            stop.set()

    def read() -> None:
        while not stop.is_set():
            for data in (objects.get("key"), bytes(read_range(objects, "key", 1, 199_999))):
                if len(set(data[::1000])) != 1 or len(data) < 199_999:
                    torn.append(f"{len(data)} bytes of {set(data[::1000])}")
            if infos(objects) != [("key", 200_000)]:
                torn.append(f"listed {infos(objects)}")

    threads = [threading.Thread(target=f) for f in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torn == []


def test_many_writers_of_one_key_leave_one_of_their_contents(objects):
    """A stale worker may write late: the object is one of the two, never a mixture."""

    def write(i: int) -> None:
        for _ in range(20):
            objects.put("shared/key", bytes([i]) * 50_000)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = objects.get("shared/key")
    assert len(data) == 50_000
    assert len(set(data)) == 1
    assert infos(objects) == [("shared/key", 50_000)]


def test_errors_keep_their_key_when_sent_to_another_process(objects):
    with pytest.raises(ObjectMissingError) as caught:
        objects.get("a/b")
    sent = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own exception, made here
    assert (type(sent), sent.key, str(sent)) == (ObjectMissingError, "a/b", str(caught.value))


PARTS = ["a", "b", "ab", "a.b", "0", "c-d"]
KEYS = st.sampled_from(["/".join(parts) for n in (1, 2) for parts in product(PARTS, repeat=n)])


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
HISTORIES = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.binary(max_size=20)),
        st.tuples(st.just("delete"), KEYS, st.none()),
        st.tuples(st.just("list"), KEYS, st.none()),
    ),
    max_size=30,
)


@settings(max_examples=examples.of(40), suppress_health_check=CHECKS)
@given(HISTORIES)
@pytest.mark.parametrize("backend", ["folder", "memory"])
def test_any_history_gives_what_a_dictionary_gives(backend, tmp_path_factory, history):
    check_history(BACKENDS[backend](tmp_path_factory.mktemp("history")), history)


@settings(max_examples=5, suppress_health_check=CHECKS)
@given(HISTORIES)
@pytest.mark.parametrize("backend", ["s3-moto", "s3-rclone"])
def test_any_history_gives_it_on_s3_too(backend, tmp_path, history):
    # rclone keeps a folder for "a" once there is "a/b", and answers the deletion of the key "a" with 500 for ever
    check_history(BACKENDS[backend](tmp_path), history, may_delete_folders=backend != "s3-rclone")


def check_history(
    objects: Objects, history: list[tuple[str, str, bytes | None]], may_delete_folders: bool = True
) -> None:
    model: dict[str, bytes] = {}
    ever: set[str] = set()
    for verb, key, data in history:
        if verb == "list":
            expected = [ObjectInfo(key=k, nbytes=len(v)) for k, v in sorted(model.items()) if k.startswith(key)]
            assert list(objects.list(key)) == expected
        elif data is None:
            if may_delete_folders or not any(_below(other, key) for other in ever):
                objects.delete(key)
                model.pop(key, None)
        elif not any(_below(key, other) or _below(other, key) for other in ever):
            # left out: a key in the place of a folder, even one that was emptied; a file system refuses it
            objects.put(key, data)
            model[key] = data
            ever.add(key)
    assert {info.key: objects.get(info.key) for info in objects.list()} == model


def _below(key: str, other: str) -> bool:
    return key.startswith(f"{other}/")


def test_memory_objects_have_a_location():
    assert MemoryObjects().location == "memory://"

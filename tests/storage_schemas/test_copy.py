"""Copies: byte for byte what an extraction of that part would have written, whatever happens on the way."""

import dataclasses
import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.console import ExitCode, UserError
from infra.objects import FolderObjects, MemoryObjects, ObjectAccessError, ObjectError, Objects
from infra.status import MAX_SIGN_NBYTES, my_heartbeat
from storage_schemas import copy as copying
from storage_schemas import open_store
from storage_schemas.__main__ import main
from storage_schemas.catalogue import list_stores
from storage_schemas.copy import copy_store, prepare_copy, run_copy
from storage_schemas.copy_claim import Claim
from storage_schemas.copy_plan import Part, copied_spec
from storage_schemas.digest import content_digest
from storage_schemas.errors import ChecksumError, SchemaError
from storage_schemas.from_arrays import write_store
from storage_schemas.indices import parse_layers
from storage_schemas.keys import INDEX_KEY, STORE_KEY, commit_key
from storage_schemas.spec import BACKENDS, CODECS_OF, StoreSpec
from tests import examples
from tests.cases import one_in
from tests.storage_schemas.test_corruptions import copy_of
from tests.stores import make_samples, make_spec, planted_head_inputs, planted_states, write_planted
from tests.strategies import bad_images, specs

BAD = {5: "truncated", 20: "empty"}
TEACHER_FILES = {"config.json": b'{"name": "fake"}\n', "weights.safetensors": bytes(range(256))}


def planted(spec: StoreSpec | None = None, bad: dict[int, str] | None = None) -> MemoryObjects:
    objects = MemoryObjects("memory://source/")
    write_planted(objects, spec or make_spec(), BAD if bad is None else bad, teacher_files=TEACHER_FILES)
    return objects


def written_directly(whole: StoreSpec, part: StoreSpec, bad: dict[int, str]) -> MemoryObjects:
    """The store of a part as `write_store` makes it from the same states."""
    places = [whole.layers.index(layer) for layer in part.layers]
    objects = MemoryObjects("memory://direct/")
    write_store(
        objects,
        part,
        make_samples(whole.n_samples)[: part.n_samples],
        lambda rows: planted_states(whole, rows)[:, places],
        head_inputs_of=lambda rows: planted_head_inputs(whole, rows),
        bad_images={index: code for index, code in bad.items() if index < part.n_samples},
        teacher_files=TEACHER_FILES,
    )
    return objects


class Watched(MemoryObjects):
    """Counts reads by key; refuses to be written if asked; fails from the n-th put on."""

    def __init__(self, location: str, *, read_only: bool = False, puts_left: float = float("inf")) -> None:
        super().__init__(location)
        self.reads: Counter[str] = Counter()
        self.puts: list[str] = []
        self.read_only, self.puts_left = read_only, puts_left
        self._counting = threading.Lock()

    def read_into(self, key, start, buffer):
        with self._counting:
            self.reads[key] += 1
        super().read_into(key, start, buffer)

    def put(self, key, data):
        with self._counting:
            assert not self.read_only, "a source is never written"
            if self.puts_left <= 0:
                raise ObjectAccessError(key, f"{self.location}{key} could not be written: no space left")
            self.puts_left -= 1
            self.puts.append(key)
        super().put(key, data)

    def put_new(self, key, data):
        raise AssertionError("a copy has no use for this")

    def delete(self, key):
        assert not self.read_only
        super().delete(key)


def watched(source: MemoryObjects, **options) -> Watched:
    made = Watched("memory://watched/")
    for info in source.list():
        made.put(info.key, source.get(info.key))
    made.read_only, made.puts = options.get("read_only", False), []
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "int8"},
        {"precision": "bfloat16", "codec": "zstd-1", "shuffle": "bit"},
        {"precision": "float32", "has_cls": False, "n_registers": 0},
        {"n_samples": 3},
    ],
)
def test_a_whole_copy_is_byte_identical(changes):
    spec = make_spec(**changes)
    source = watched(planted(spec, {0: "empty"}), read_only=True)
    target = Watched("memory://target/")
    copy_store(source, target)
    assert content_digest(target) == content_digest(source)
    for shard in range(spec.n_shards):
        assert target.get(commit_key(shard)) == source.get(commit_key(shard))
    assert open_store(target).verify() == []


def test_objects_are_read_once_each_and_store_json_comes_before_shards():
    source, target = watched(planted()), Watched("memory://target/")
    copy_store(source, target)
    data = [key for key in target.puts if "/c/" in key]
    assert {key: source.reads[key] for key in data} == dict.fromkeys(data, 1)
    place = target.puts.index(STORE_KEY)
    assert all("/c/" in key or key.startswith("commits/") or key == INDEX_KEY for key in target.puts[place + 1 :])
    for shard in range(3):
        commit = target.puts.index(commit_key(shard))
        of_shard = [key for key in data if int(key.partition("/c/")[2].partition("/")[0]) == shard]
        assert len(of_shard) == 14
        assert max(map(target.puts.index, of_shard)) < commit, "a commit comes after all objects of its shard"
    assert target.puts[-1] == INDEX_KEY


@settings(max_examples=8)
@given(st.data())
def test_a_part_is_what_writing_that_part_gives(data):
    """Any store, any of its layers, any limit: the bytes that the same states give when only they are written."""
    whole = data.draw(specs())
    bad = data.draw(bad_images(whole.n_samples))
    layers = tuple(sorted(data.draw(st.sets(st.sampled_from(whole.layers), min_size=1))))
    limit = data.draw(st.integers(1, whole.n_samples + 3))
    source, target = planted(whole, bad), MemoryObjects("memory://target/")
    copy_store(source, target, layers=layers, limit=limit)
    n_samples = min(-(-limit // whole.samples_per_shard) * whole.samples_per_shard, whole.n_samples)
    part = dataclasses.replace(whole, layers=layers, n_samples=n_samples)
    assert content_digest(target) == content_digest(written_directly(whole, part, bad))


class TestConvert:
    @settings(max_examples=6)
    @given(st.data())
    def test_there_and_back_again(self, data):
        self.check_there_and_back(data)

    @pytest.mark.slow
    @settings(max_examples=examples.of(100))
    @given(st.data())
    def test_there_and_back_again_many_times(self, data):
        self.check_there_and_back(data)

    def check_there_and_back(self, data):
        """Any store in any form: its values in any other form are the same bits, and going back gives its bytes."""
        whole = data.draw(specs())
        bad = data.draw(bad_images(whole.n_samples))
        backend = data.draw(st.sampled_from(BACKENDS))
        codec = data.draw(st.sampled_from(CODECS_OF[backend]))
        first, second, third = planted(whole, bad), MemoryObjects("memory://b/"), MemoryObjects("memory://c/")
        copy_store(first, second, backend=backend, codec=codec)
        a, b = open_store(first), open_store(second)
        shuffle = b.spec.shuffle
        assert b.spec == dataclasses.replace(whole, backend=backend, codec=codec, shuffle=shuffle)
        for kind in ("all", *whole.token_kinds):
            assert a.read(tokens=kind).tobytes() == b.read(tokens=kind).tobytes()
        assert a.statistics.to_array().tobytes() == b.statistics.to_array().tobytes()
        assert (a.table.fidelity, a.table.bad_images) == (b.table.fidelity, b.table.bad_images)
        assert a.samples.equals(b.samples)
        assert b.verify() == []
        direct = MemoryObjects()
        write_planted(direct, b.spec, bad, teacher_files=TEACHER_FILES)
        assert content_digest(second) == content_digest(direct), "as if it had been written in that form"
        copy_store(second, third, backend=whole.backend, codec=whole.codec, shuffle=whole.shuffle)
        assert content_digest(third) == content_digest(first)

    @pytest.mark.parametrize(
        ("changes", "part", "form"),
        [
            ({"codec": "zstd-3", "shuffle": "bit"}, {"backend": "webdataset"}, ("webdataset", "none", "none")),
            ({"backend": "webdataset", "codec": "gzip"}, {"backend": "zarr"}, ("zarr", "none", "none")),
            ({"codec": "lz4", "shuffle": "bit"}, {"backend": "zarr"}, ("zarr", "lz4", "bit")),
            ({}, {"backend": "zarr", "codec": "lz4"}, ("zarr", "lz4", "byte")),
            ({}, {"backend": "zarr", "codec": "lz4", "shuffle": "bit"}, ("zarr", "lz4", "bit")),
        ],
    )
    def test_defaults(self, changes, part, form):
        spec = copied_spec(make_spec(**changes), Part(**part))
        assert (spec.backend, spec.codec, spec.shuffle) == form

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"backend": "hdf5"}, "FORMAT=hdf5: expected one of zarr, webdataset"),
            ({"backend": "webdataset", "codec": "lz4"}, "CODEC=lz4: webdataset has none, gzip"),
            (
                {"backend": "zarr", "shuffle": "bit"},
                "SHUFFLE=bit: with CODEC=none expected none; lz4, zstd-1, zstd-3 have one",
            ),
            ({"codec": "lz4", "shuffle": "none"}, "SHUFFLE=none: with CODEC=lz4 expected byte or bit"),
            ({"backend": "webdataset", "shuffle": "baz"}, "SHUFFLE=baz: expected one of none, byte, bit"),
        ],
    )
    def test_forms_that_there_are_not(self, part, message):
        with pytest.raises(SchemaError) as error:
            copied_spec(make_spec(), Part(**part))
        assert (error.value.title, error.value.problems) == ("this cannot be converted", (message,))

    def test_everything_that_is_no_form_is_said_together(self):
        with pytest.raises(SchemaError) as error:
            copied_spec(make_spec(), Part(backend="foo", codec="bar", shuffle="baz"))
        assert error.value.problems == (
            "FORMAT=foo: expected one of zarr, webdataset",
            "CODEC=bar: expected one of none, lz4, zstd-1, zstd-3, gzip",
            "SHUFFLE=baz: expected one of none, byte, bit",
        )

    def test_it_is_resumed_and_damage_is_named(self):
        source, target = planted(), MemoryObjects("memory://target/")
        good = source.get("layer_01/patches/c/1/0/0")
        source.put("layer_01/patches/c/1/0/0", good[:-1] + b"x")
        with pytest.raises(ChecksumError, match="layer_01/patches/c/1/0/0"):
            copy_store(source, target, backend="webdataset")
        assert not open_store(target).committed[1]
        source.put("layer_01/patches/c/1/0/0", good)
        copy_store(source, target, backend="webdataset")
        assert open_store(target).is_complete
        assert open_store(target).verify() == []

    def test_the_door(self, tmp_path, capsys):
        write_planted(FolderObjects(tmp_path / "a"), make_spec(), BAD)
        for store, to, flags in [
            ("a", "b", ["--format", "webdataset", "--codec", "gzip"]),
            ("b", "c", ["--format", "zarr", "--codec", "none"]),
        ]:
            assert main(["convert", str(tmp_path / store), str(tmp_path / to), *flags]) == ExitCode.OK
        assert (tmp_path / "b/layer_00/cls/000000.tar").exists()
        assert _digest(tmp_path / "a") == _digest(tmp_path / "c")
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "d"), "--format", "tar"]) == ExitCode.BAD_INPUT
        assert "FORMAT=tar: expected one of zarr, webdataset" in capsys.readouterr().err


class TestResume:
    @pytest.mark.parametrize("layers", [pytest.param(None, marks=pytest.mark.slow), (2,)])
    def test_after_a_crash_at_every_put(self, layers, monkeypatch):
        monkeypatch.setattr(copying, "N_THREADS", 2)
        source, whole = (
            planted(make_spec(n_samples=10, layers=(0, 2), n_registers=0), {5: "empty"}),
            Watched("memory://whole/"),
        )
        copy_store(source, whole, layers=layers)
        for n_puts in range(len(whole.puts)):
            target = Watched("memory://target/", puts_left=n_puts)
            with pytest.raises(ObjectAccessError, match="no space left"):
                copy_store(source, target, layers=layers)
            done = {key for key in target.puts if key.startswith("commits/")}
            target.puts_left, target.puts, reader = float("inf"), [], watched(source)
            copy_store(reader, target, layers=layers)
            assert content_digest(target) == content_digest(whole), f"after {n_puts} puts"
            assert not done & set(target.puts), "what was committed is not copied again"
            assert open_store(target).verify() == []

    def test_a_finished_copy_is_left_alone(self):
        source, target = watched(planted()), Watched("memory://target/")
        copy_store(source, target)
        source.reads.clear()
        target.puts.clear()
        copy_store(source, target)
        assert not source.reads
        assert target.puts == []

    def test_a_stop_ends_after_the_shard_in_flight(self):
        source, target = planted(), Watched("memory://target/")
        asked = iter([False, True])
        assert run_copy(prepare_copy(source, target, Part()), stop=lambda: next(asked)) == 1
        assert open_store(target).committed.tolist() == [True, False, False]
        assert run_copy(prepare_copy(source, target, Part())) == 2
        assert content_digest(target) == content_digest(source)

    def test_an_unfinished_source_is_copied_as_far_as_it_goes(self):
        whole = planted()
        source, target = copy_of(whole), MemoryObjects("memory://target/")
        for key in (INDEX_KEY, commit_key(1)):
            source.delete(key)
        copy_store(source, target)
        store = open_store(target)
        assert (store.committed.tolist(), store.damaged_commits) == ([True, False, True], {})
        assert store.verify() == []
        copy_store(whole, target)
        assert content_digest(target) == content_digest(whole)

    def test_a_shard_extracted_again_is_copied_again(self):
        first, second = planted(bad={}), planted(bad={8: "empty"})
        target = Watched("memory://target/")
        copy_store(first, target)
        target.puts.clear()
        copy_store(second, target)
        assert content_digest(target) == content_digest(second)
        assert commit_key(0) not in target.puts

    def test_no_commit_speaks_of_objects_that_are_being_replaced(self, monkeypatch):
        """A shard was extracted again, and its second copy dies in the middle: its first commit is gone before."""
        monkeypatch.setattr(copying, "N_THREADS", 1)
        first, second = planted(bad={}), planted(bad={8: "empty"})
        target = Watched("memory://target/")
        copy_store(first, target)
        target.puts_left, target.puts = 1, []
        with pytest.raises(ObjectAccessError, match="no space left"):
            copy_store(second, target)
        assert len(target.puts) == 1
        assert target.get(target.puts[0]) == second.get(target.puts[0]) != first.get(target.puts[0])
        assert list(target.list(commit_key(1))) == []
        assert open_store(target).committed.tolist() == [True, False, True]
        target.puts_left = float("inf")
        copy_store(second, target)
        assert content_digest(target) == content_digest(second)

    def test_a_commit_lost_or_damaged_at_the_target_is_mended(self):
        source, target = planted(), MemoryObjects("memory://target/")
        copy_store(source, target)
        target.put(commit_key(0), b"{}")
        target.delete(commit_key(2))
        target.delete(INDEX_KEY)
        copy_store(source, target)
        assert content_digest(target) == content_digest(source)


class TestDamagedSource:
    @pytest.mark.parametrize(
        ("how", "key", "layers"),
        one_in(
            5,
            ["flip", "cut", "delete", "swap"],
            ["layer_01/patches/c/1/0/0", "layer_01/cls/c/1/0", "statistics/c/1/0/0/0/0", "head_input/c/1/0"],
            [None, (1,)],
        ),
    )
    def test_it_is_named_and_the_rest_stays(self, key, how, layers, monkeypatch):
        monkeypatch.setattr(copying, "N_THREADS", 1)
        source, target = planted(), MemoryObjects("memory://target/")
        data = source.get(key)
        if how == "delete":
            source.delete(key)
        else:
            other = source.get(key.replace("/c/1", "/c/0"))
            flipped = data[:100] + bytes([data[100] ^ 4]) + data[101:]
            source.put(key, {"flip": flipped, "cut": data[:-1], "swap": other}[how])
        with pytest.raises((ChecksumError, ObjectError), match=key):
            copy_store(source, target, layers=layers)
        store = open_store(target)
        assert not store.committed[1]
        assert store.verify() == []
        source.put(key, data)
        copy_store(source, target, layers=layers)
        assert open_store(target).is_complete

    @pytest.mark.parametrize("key", ["samples.parquet", "teacher/weights.safetensors", "layer_00/zarr.json"])
    def test_a_damaged_document_stops_the_copy_before_store_json(self, key):
        source, target = planted(), MemoryObjects("memory://target/")
        source.put(key, source.get(key) + b" ")
        with pytest.raises(ChecksumError, match=f"{key}: sha256 .* REPAIR=1"):
            copy_store(source, target)
        assert STORE_KEY not in {info.key for info in target.list()}

    def test_a_damaged_commit_is_named_when_all_others_are_copied(self):
        source, target = planted(), MemoryObjects("memory://target/")
        source.put(commit_key(1), b"{}")
        source.put(INDEX_KEY, b"")
        with pytest.raises(ChecksumError, match=r"(?s)damaged commits.*commits/000001.json: .*REPAIR=1"):
            copy_store(source, target)
        assert open_store(target).committed.tolist() == [True, False, True]


class TestRefusals:
    def test_another_identity_field_by_field(self):
        source, target = planted(), MemoryObjects("memory://target/")
        copy_store(source, target)
        before = content_digest(target)
        with pytest.raises(SchemaError) as error:
            copy_store(source, target, layers=[0, 1], limit=8)
        assert error.value.problems == (
            "layers: it has (0, 1, 2), the copy would have (0, 1)",
            "n_samples: it has 21, the copy would have 8",
        )
        other = MemoryObjects("memory://other/")
        write_planted(other, make_spec(), teacher_files={"config.json": b"{}"})
        with pytest.raises(SchemaError, match=r"teacher/config.json: another content than the copy would have"):
            copy_store(other, target)
        assert content_digest(target) == before

    @pytest.mark.parametrize("key", ["mine.txt", "commits/000000.json", "train/store.json"])
    def test_a_place_that_holds_something_else(self, key):
        target = MemoryObjects("memory://target/")
        target.put(key, b"")
        target.put(f"{key}.more", b"")
        named = f"{key.split('/')[0]}/" if "/" in key else f"{key}, {key}.more"
        with pytest.raises(UserError, match=f"is not empty and is no store: it holds {named}. Choose"):
            copy_store(planted(), target)

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"layers": [1, 7]}, r"this cannot be copied:\n  layer 7 is not stored; the store has 0 to 2$"),
            ({"layers": range(2, 9)}, r"this cannot be copied:\n  layers 3 to 8 are not stored; the store has 0 to 2$"),
            ({"limit": 0}, "LIMIT=0: expected at least 1 sample"),
            ({"codec": "lzma"}, "CODEC=lzma: zarr has none, lz4, zstd-1, zstd-3"),
        ],
    )
    def test_a_part_that_there_is_not(self, part, message):
        with pytest.raises(SchemaError, match=message):
            copy_store(planted(), MemoryObjects(), **part)

    @pytest.mark.parametrize("text", ["", "7-0", "a", "1,", "0-100", "-1"])
    def test_layers_that_are_no_layers(self, text):
        with pytest.raises(SchemaError, match=f"LAYERS={text}: *\n  expected a range such as 0-7"):
            parse_layers(text)

    def test_a_layer_that_is_asked_for_twice(self):
        with pytest.raises(SchemaError, match="LAYERS=0,3,3:\n  3 is there more than once; expected each layer once"):
            parse_layers("0,3,3")


def test_bytes_in_flight_are_bounded(monkeypatch):
    """With room for two of the largest objects, never more than that is held, and the copy still ends."""
    source, in_flight, most, lock = watched(planted()), 0, 0, threading.Lock()
    together, n_large = threading.Barrier(2), 0
    largest = max(info.nbytes for info in source.list() if "/c/" in info.key)
    monkeypatch.setattr(copying, "MEMORY_NBYTES", 2 * largest)

    class Counting(MemoryObjects):
        def put(self, key, data):
            nonlocal in_flight
            super().put(key, data)
            if "/c/" in key:
                with lock:
                    in_flight -= len(self.get(key))

    real = source.read_into

    def read_into(key, start, buffer):
        nonlocal in_flight, most, n_large
        with lock:
            in_flight += buffer.nbytes
            most = max(most, in_flight)
            n_large += buffer.nbytes == largest
            meets = buffer.nbytes == largest and n_large <= 2
        if meets:
            together.wait(100)
        real(key, start, buffer)

    source.read_into = read_into
    target = Counting("memory://target/")
    copy_store(source, target)
    assert in_flight == 0
    assert largest < most <= 2 * largest
    monkeypatch.setattr(copying, "MEMORY_NBYTES", 1)  # every object is larger: one at a time
    most = 0
    copy_store(source, Counting("memory://alone/"))
    assert most == largest


class TestDoor:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        write_planted(FolderObjects(tmp_path / "digits/train"), make_spec(), BAD)
        write_planted(FolderObjects(tmp_path / "digits/val"), make_spec(n_samples=4))
        return tmp_path / "digits"

    def test_both_splits(self, root, tmp_path, capsys):
        to = tmp_path / "to"
        assert main(["copy", str(root), str(to)]) == ExitCode.OK
        for split in ("train", "val"):
            assert _digest(to / split) == _digest(root / split)
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == f"Next: make train BLOCK=0-2 STORE={to}"
        assert f"{to}/train: complete; " in out
        assert "copy train 0%" in err
        assert main(["copy", str(root), str(to)]) == ExitCode.OK
        assert "there already: 3 shards" in capsys.readouterr().err

    def test_a_part_of_one(self, root, tmp_path, capsys):
        to = tmp_path / "to"
        assert main(["copy", str(root / "train"), str(to), "--layers", "1-2", "--limit", "9"]) == ExitCode.OK
        store = open_store(to)
        assert (store.layers, store.n_samples) == ((1, 2), 16)
        np.testing.assert_array_equal(store.read(), open_store(root / "train").read([1, 2], store.valid.nonzero()[0]))
        err = capsys.readouterr().err
        assert "LIMIT=9 is rounded up to 16 samples, whole shards of 8" in err
        assert "2 of 3 layers, 16 of 21 samples" in err

    def test_a_target_that_is_the_store_or_inside_it(self, root, tmp_path, capsys):
        (tmp_path / "link").symlink_to(root)
        for store, to, message in [
            (root, "", "TO is missing"),
            (root, f"{root}/", "is the STORE itself"),
            (root, tmp_path / "link", "is the STORE itself"),
            (root, root / "train/copy", "lies inside STORE="),
            (root / "train", root / "train/a/b", "lies inside STORE="),
            (root, root / "../digits/c", "lies inside STORE="),
            (root / "val", root / "train/a/b", f"lies inside a store, {root / 'train'}"),
        ]:
            before = _digest(root)
            assert main(["copy", str(store), str(to)]) == ExitCode.BAD_INPUT
            assert message in capsys.readouterr().err
            assert _digest(root) == before
        assert main(["copy", str(root / "val"), str(tmp_path)]) == ExitCode.BAD_INPUT, "TO holds the store"
        assert "is not empty and is no store" in capsys.readouterr().err

    def test_wrong_targets(self, root, tmp_path, capsys):
        (tmp_path / "file").write_bytes(b"")
        write_planted(FolderObjects(tmp_path / "store"), make_spec())
        for to, message in [("file", "is a file; a store is a folder"), ("store", "is a store; stores train and val")]:
            assert main(["copy", str(root if to == "store" else root / "val"), str(tmp_path / to)]) == 2
            assert message in capsys.readouterr().err
        assert main(["copy", str(tmp_path / "nowhere"), str(tmp_path / "to")]) == ExitCode.BAD_INPUT

    def test_a_disk_without_room(self, root, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda place: _Usage())
        assert main(["copy", str(root), str(tmp_path / "to")]) == ExitCode.BAD_INPUT
        assert "has 10 B free and up to" in capsys.readouterr().err
        assert not (tmp_path / "to").exists()

    def test_damage_is_exit_code_3(self, root, tmp_path, capsys):
        (root / "train/layer_00/cls/c/2/0").write_bytes(b"x")
        assert main(["copy", str(root), str(tmp_path / "to")]) == ExitCode.PROBLEMS
        assert "layer_00/cls/c/2/0" in capsys.readouterr().err
        (root / "val" / commit_key(0)).unlink()
        assert main(["copy", str(root / "val"), str(tmp_path / "val")]) == ExitCode.PROBLEMS
        assert "commits/000000.json: it is missing, though the store was finished once" in capsys.readouterr().err

    def test_the_target_shows_that_it_was_written(self, root, tmp_path, capsys):
        to = tmp_path / "to"
        assert main(["copy", str(root / "val"), str(to)]) == ExitCode.OK
        [status] = [json.loads(path.read_bytes()) for path in to.glob("log/*/status.json")]
        assert (status["state"], status["source"]) == ("copied", str(root / "val"))
        assert status["bytes_done"] == status["bytes_total"] > 0
        assert not (to / "log/heartbeat.json").exists()
        entry = list_stores(FolderObjects(to)).entries[0]
        assert (entry.state, entry.running) == ("copied", ())
        assert entry.last_active == pytest.approx(time.time(), abs=60)

    def test_a_job_that_writes_there_is_not_disturbed(self, root, tmp_path, capsys):
        to = tmp_path / "to"
        FolderObjects(to).put("log/heartbeat.json", my_heartbeat("20260101-x", time.time()).to_bytes())
        assert main(["copy", str(root / "val"), str(to)]) == ExitCode.BAD_INPUT
        assert "is being written by another job (run 20260101-x, process" in capsys.readouterr().err
        assert not (to / STORE_KEY).exists()
        gone = my_heartbeat("20260101-x", time.time()).to_bytes().replace(b'"pid": ', b'"pid": 9')
        FolderObjects(to).put("log/heartbeat.json", gone)
        (to / ".half.put-tmp").write_bytes(b"left by a killed copy")
        assert main(["copy", str(root / "val"), str(to)]) == ExitCode.OK
        assert not (to / ".half.put-tmp").exists()

    @pytest.mark.parametrize("key", ["log/heartbeat.json", "log/heartbeats/20260101-x.json"])
    def test_a_job_that_leads_or_joined_is_seen(self, key, root, tmp_path, capsys):
        """One that joined may outlive the one that led; what it is writing is not swept away."""
        to = tmp_path / "to"
        place = FolderObjects(to)
        assert main(["copy", str(root / "val"), str(to)]) == ExitCode.OK
        place.delete(commit_key(0))
        place.put(key, my_heartbeat("20260101-x", time.time()).to_bytes())
        (to / ".half.put-tmp").write_bytes(b"being written")
        capsys.readouterr()
        assert main(["copy", str(root / "val"), str(to)]) == ExitCode.BAD_INPUT
        assert "is being written by another job (run 20260101-x, process" in capsys.readouterr().err
        assert (to / ".half.put-tmp").exists()
        assert not (to / "commits/000000.json").exists()
        place.put(key, b"x" * (MAX_SIGN_NBYTES + 1))
        assert main(["copy", str(root / "val"), str(to)]) == ExitCode.OK
        assert list(place.list("log/heartbeat")) == []

    def test_a_failed_copy_says_so_and_why(self, root, tmp_path, capsys):
        (root / "val/layer_00/cls/c/0/0").write_bytes(b"x")
        to = tmp_path / "to"
        assert main(["copy", str(root / "val"), str(to)]) == ExitCode.PROBLEMS
        [status] = [json.loads(path.read_bytes()) for path in to.glob("log/*/status.json")]
        assert status["state"] == "failed"
        assert "layer_00/cls/c/0/0" in status["cause"]
        assert f"{status['cause']}" in capsys.readouterr().err
        assert not (to / "log/heartbeat.json").exists()

    def test_the_error_that_stopped_it_is_said_though_the_heartbeat_cannot_be_taken_away(
        self, root, tmp_path, capsys, monkeypatch
    ):
        stopped, real_put, real_get = threading.Event(), FolderObjects.put, FolderObjects.get

        def put(self, key, data):
            if key == "statistics/c/0/0/0/0/0":
                stopped.set()
                raise ObjectAccessError(key, "the disk is full")
            real_put(self, key, data)

        def get(self, key, at_most=None):
            if stopped.is_set():
                raise ObjectAccessError(key, "input/output error")
            return real_get(self, key, at_most=at_most)

        monkeypatch.setattr(FolderObjects, "put", put)
        monkeypatch.setattr(FolderObjects, "get", get)
        assert main(["copy", str(root / "val"), str(tmp_path / "to")]) == ExitCode.PROBLEMS
        err = capsys.readouterr().err
        assert "the disk is full. What is copied stays; the same command goes on from there" in err
        assert "input/output error" not in err

    @pytest.mark.parametrize("verb", ["get", "check_writable"])
    def test_before_it_begins_nothing_is_copied_and_nothing_said_of_it(self, verb, root, tmp_path, capsys, monkeypatch):
        def refuse(self, *args, **options):
            raise ObjectAccessError("store.json", "403 Forbidden")

        monkeypatch.setattr(FolderObjects, verb, refuse)
        assert main(["copy", str(root / "val"), str(tmp_path / "to")]) == ExitCode.BAD_INPUT
        assert capsys.readouterr().err.splitlines()[-1] == "error: 403 Forbidden"
        assert not (tmp_path / "to").exists()

    def test_ctrl_c_ends_it_after_the_shard_in_flight(self, root, tmp_path, capsys, monkeypatch):
        real = FolderObjects.put

        def put(self, key, data):
            real(self, key, data)
            if key == commit_key(0) and "to" in str(self.location):
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(copying, "N_THREADS", 1)
        monkeypatch.setattr(copying, "MEMORY_NBYTES", 1)
        monkeypatch.setattr(FolderObjects, "put", put)
        to = tmp_path / "to"
        assert main(["copy", str(root / "train"), str(to)]) == ExitCode.INTERRUPTED
        assert 1 <= open_store(to).committed.sum() < 3
        assert "Next: the same copy again" in capsys.readouterr().out
        monkeypatch.undo()
        assert main(["copy", str(root / "train"), str(to)]) == ExitCode.OK
        assert _digest(to) == _digest(root / "train")

    def test_an_unfinished_source_is_no_error(self, root, tmp_path, capsys):
        for name in (INDEX_KEY, commit_key(1)):
            (root / "train" / name).unlink()
        assert main(["copy", str(root / "train"), str(tmp_path / "to")]) == ExitCode.OK
        out, err = capsys.readouterr()
        assert "not in the source yet, or damaged: 1 shard; a later" in err
        assert "2 of 3 shards" in out
        assert out.splitlines()[-1] == "Next: the same copy again, to go on with what is missing"


class TestClaim:
    def test_of_two_that_begin_at_one_moment_one_is_refused(self):
        """Both have seen a free place; whoever writes second finds the first."""
        ready, results = threading.Barrier(2), []

        class Both(MemoryObjects):
            def put_new(self, key, data):
                ready.wait(100)
                return super().put_new(key, data)

        target = Both("memory://target/")

        def take() -> None:
            claim = Claim(target)
            try:
                claim.take()
                results.append(claim.run_id)
            except UserError as error:
                results.append(error)

        threads = [threading.Thread(target=take) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [refused] = [result for result in results if isinstance(result, UserError)]
        [winner] = [result for result in results if isinstance(result, str)]
        assert f"is being written by another job (run {winner}, process" in str(refused)

    def test_one_that_was_thought_dead_leaves_the_place(self):
        target = MemoryObjects("memory://target/")
        mine = Claim(target)
        mine.take()
        mine.renew()
        theirs = my_heartbeat("20260101-x", time.time()).to_bytes()
        target.put("log/heartbeat.json", theirs)
        with pytest.raises(UserError, match="run 20260101-x, process"):
            mine.renew()
        mine.release()
        assert target.get("log/heartbeat.json") == theirs

    def test_what_dead_jobs_left_is_replaced(self):
        target = MemoryObjects("memory://target/")
        dead = my_heartbeat("20260101-x", time.time()).to_bytes().replace(b'"pid": ', b'"pid": 9')
        for key in ("log/heartbeat.json", "log/heartbeats/20260101-x.json"):
            target.put(key, dead)
        claim = Claim(target)
        claim.take()
        assert [info.key for info in target.list("log/")] == ["log/heartbeat.json"]
        assert claim.run_id.encode() in target.get("log/heartbeat.json")
        claim.release()
        assert list(target.list()) == []


class _Usage:
    free = 10


def _digest(store: Path) -> str:
    return content_digest(FolderObjects(store))


def test_copies_cross_back_ends(tmp_path):
    source = planted()
    first: Objects = FolderObjects(tmp_path / "a")
    copy_store(source, first)
    back = MemoryObjects()
    copy_store(first, back)
    assert content_digest(source) == content_digest(first) == content_digest(back)

"""Which stores lie below a place: found without listing their objects, each shown as it is."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from infra.console import ExitCode
from infra.objects import FolderObjects, MemoryObjects, ObjectAccessError, Objects
from infra.status import Heartbeat, my_heartbeat
from storage_schemas import open_store
from storage_schemas.__main__ import main
from storage_schemas.catalogue import DEPTH, Catalogue, describe_stores, list_stores
from storage_schemas.copy import copy_store
from storage_schemas.keys import INDEX_KEY, commit_key
from tests.stores import make_spec, write_planted

NOW = 1_800_000_000.0


class CountingObjects(MemoryObjects):
    """Counts requests by verb, and the keys and folders that listings gave."""

    def __init__(self, location: str = "memory://") -> None:
        super().__init__(location)
        self.requests: Counter[str] = Counter()
        self.n_listed = 0
        self.folders: list[str] = []

    def list_folder(self, prefix=""):
        plain = MemoryObjects()
        plain._objects = self._objects  # whose own listing is not counted
        folder = plain.list_folder(prefix)
        with self._lock:
            self.requests["list"] += 1
            self.n_listed += len(folder.objects) + len(folder.folders)
            self.folders.append(prefix)
        return folder

    def list(self, prefix=""):
        raise AssertionError(f"everything below {prefix!r} was listed")

    def get(self, key, *, at_most=None):
        with self._lock:
            self.requests["get"] += 1
        return super().get(key, at_most=at_most)


def add_store(place: MemoryObjects, prefix: str, **changes) -> MemoryObjects:
    """Write a planted store below a prefix; gives a copy of its own."""
    store = MemoryObjects()
    write_planted(store, make_spec(**changes))
    for info in store.list():
        place.put(f"{prefix}{info.key}", store.get(info.key))
    return store


def unfinished(place: MemoryObjects, prefix: str, *shards: int) -> None:
    for key in (INDEX_KEY, *map(commit_key, shards)):
        place.delete(f"{prefix}{key}")


def test_every_store_as_it_is():
    place = CountingObjects("memory://bucket")
    whole = add_store(place, "digits/train/")
    add_store(place, "digits/val/", n_samples=4, teacher="other", precision="int8")
    coded = add_store(place, "a/b/c/coded/", layers=(0, 2), codec="zstd-3", shuffle="bit")
    unfinished(place, "a/b/c/coded/", 1)
    tar = add_store(place, "tar/", backend="webdataset", precision="bfloat16")
    place.put("a/images/0001.jpg", b"")
    entries = {entry.name: entry for entry in list_stores(place, now=NOW).entries}
    assert list(entries) == ["a/b/c/coded", "digits/train", "digits/val", "tar"]
    train, val, part = entries["digits/train"], entries["digits/val"], entries["a/b/c/coded"]
    assert train.spec == open_store(whole).spec
    assert (train.n_committed, train.is_complete, train.is_estimate) == (3, True, False)
    assert train.nbytes == open_store(whole).table.stored_nbytes
    assert entries["tar"].nbytes == open_store(tar).table.stored_nbytes
    assert (val.spec.teacher, val.n_committed) == ("other", 1)
    assert (part.n_committed, part.is_complete) == (2, False)
    sizes = [sum(o.nbytes for o in c.objects.values()) for c in _commits(coded)]
    assert (part.nbytes, part.is_estimate) == (sizes[0] + sizes[2], False), "both commits were read"
    assert train.location == "memory://bucket/digits/train"
    text = describe_stores(list_stores(place, now=NOW), now=NOW).splitlines()
    assert text[0].split() == [
        "store",
        "teacher",
        "samples",
        "layers",
        "stored",
        "as",
        "size",
        "done",
        "last",
        "activity",
    ]
    assert text[1].split()[:8] == ["a/b/c/coded", "fake", "21", "0,", "2", "zarr", "float16", "zstd-3"]
    assert text[1].endswith("2 of 3 shards              -")
    assert "complete" in text[2]


def _commits(objects: Objects):
    from storage_schemas.reader import read_commits

    return read_commits(objects, open_store(objects).document)[0]


def test_requests_do_not_grow_with_the_stores():
    """Each store takes the same few requests, and keys listed are those of its first level, however large it is."""
    counts = []
    for n_samples in (8, 400):
        place = CountingObjects()
        add_store(place, "deep/store/", n_samples=n_samples)
        n_objects = len(list(MemoryObjects.list(place)))
        found = list_stores(place)
        assert [entry.name for entry in found.entries] == ["deep/store"]
        assert not [prefix for prefix in place.folders if "layer" in prefix or "statistics" in prefix]
        counts.append((dict(place.requests), place.n_listed, n_objects))
    (small, n_small, _), (large, n_large, n_objects) = counts
    assert small == large == {"list": 3, "get": 1}
    assert n_small == n_large < 15 < 700 < n_objects


def test_an_unfinished_store_takes_its_commits_names_and_no_more():
    place = CountingObjects()
    add_store(place, "", n_samples=400)
    unfinished(place, "", 7)
    entry = list_stores(place).entries[0]
    assert (entry.name, entry.n_committed) == (".", 49)
    assert place.folders == ["", "commits/"]
    assert place.requests == {"list": 2, "get": 1}


def test_a_compressed_store_is_estimated_from_three_commits():
    place = CountingObjects()
    store = add_store(place, "s/", n_samples=400, codec="zstd-1", shuffle="byte")
    entry = list_stores(place).entries[0]
    assert entry.is_estimate
    assert entry.nbytes == pytest.approx(open_store(store).table.stored_nbytes, rel=0.02)
    assert place.requests["get"] == 1 + 3
    assert "~" in describe_stores(list_stores(place))


def test_stores_are_never_looked_into_and_depth_is_bounded():
    place = CountingObjects()
    add_store(place, "outer/")
    add_store(place, "outer/copy/")
    add_store(place, "a/b/c/d/")
    add_store(place, "a/b/c/d2/e/")
    catalogue = list_stores(place)
    assert [entry.name for entry in catalogue.entries] == ["a/b/c/d", "outer"]
    assert catalogue.unseen == ["a/b/c/d2/e/"]
    assert f"1 folders more than {DEPTH} levels down" in describe_stores(catalogue)


def test_no_more_folders_than_that(monkeypatch):
    monkeypatch.setattr("storage_schemas.catalogue.MAX_FOLDERS", 10)
    place = CountingObjects()
    for i in range(50):
        place.put(f"images/n{i:04d}/x.jpg", b"")
    catalogue = list_stores(place)
    assert (catalogue.n_folders, len(catalogue.unseen)) == (10, 42)
    assert place.requests["list"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: place.put("s/store.json", b"{}"), "expected a JSON object with a 'digest'"),
        (lambda place: place.delete("s/store.json"), "s/store.json is missing"),
    ],
)
def test_a_damaged_identity_is_named_and_hides_nothing_else(change, message):
    place = CountingObjects("memory://b/")
    add_store(place, "s/")
    add_store(place, "t/")
    change(place)
    entries = list_stores(place).entries
    assert [entry.name for entry in entries] == ["s", "t"]
    assert message in entries[0].problem
    assert entries[1].is_complete
    assert f"s  cannot be read: {entries[0].problem}" in describe_stores(list_stores(place))


class PartlyDenied(CountingObjects):
    """Refuses to list these folders."""

    denied: tuple[str, ...] = ()

    def list_folder(self, prefix=""):
        if prefix in self.denied:
            raise ObjectAccessError(prefix, f"{self.location}/{prefix} could not be listed: permission denied")
        if "//" in f"/{prefix}":
            raise ValueError("no plain path")
        return super().list_folder(prefix)


class TestWhatCannotBeListed:
    def test_a_folder_is_named_and_hides_no_store(self, capsys):
        place = PartlyDenied("memory://b")
        add_store(place, "s/")
        add_store(place, "deep/t/")
        place.put("lost+found/x", b"")
        place.denied = ("lost+found/",)
        catalogue = list_stores(place)
        assert [entry.name for entry in catalogue.entries] == ["deep/t", "s"]
        assert all(entry.is_complete for entry in catalogue.entries)
        line = "not looked into: lost+found/: memory://b/lost+found/ could not be listed: permission denied"
        assert line in describe_stores(catalogue).splitlines()

    @pytest.mark.parametrize("folder", ["log/", "commits/", "log/heartbeats/"])
    def test_a_store_that_is_listed_in_part_has_that_problem(self, folder):
        place = PartlyDenied("memory://b")
        for name in ("s/", "t/"):
            add_store(place, name)
            unfinished(place, name, 1)
            place.put(f"{name}log/heartbeats/r2.json", b"{}")
        place.denied = (f"s/{folder}",)
        broken, whole = list_stores(place).entries
        assert (broken.spec, broken.problem) == (None, f"memory://b/s/{folder} could not be listed: permission denied")
        assert (whole.problem, whole.n_committed) == (None, 2)

    def test_the_place_itself_must_be_listed(self):
        place = PartlyDenied("memory://b")
        place.denied = ("",)
        with pytest.raises(ObjectAccessError, match="could not be listed"):
            list_stores(place)

    def test_a_folder_of_a_strange_name_is_one_that_is_not_looked_into(self):
        place = PartlyDenied()
        add_store(place, "s/")
        place._objects["a//b"] = b""
        catalogue = list_stores(place)
        assert [entry.name for entry in catalogue.entries] == ["s"]
        assert catalogue.refused == {"a//": "no plain path"}


class TestActivity:
    def beat(self, **changes) -> bytes:
        values = {"host": "far", "kernel": "other", "pid": 7, "started": 1.0, "time": NOW - 30, "run_id": "r1"}
        return Heartbeat(**(values | changes)).to_bytes()

    def entry(self, documents: dict[str, bytes], now: float = NOW):
        place = CountingObjects()
        add_store(place, "s/")
        for key, data in documents.items():
            place.put(f"s/log/{key}", data)
        return list_stores(place, now=now).entries[0]

    def test_the_newest_status_counts(self):
        entry = self.entry(
            {
                "20260101T000000-1-a/status.json": json.dumps({"time": NOW - 900, "state": "stopped"}).encode(),
                "20260102T000000-1-b/status.json": json.dumps({"time": NOW - 300, "state": "complete"}).encode(),
                "20260103T000000-1-c/status.json": b"{torn",
                "claims/000001.json": b"{}",
            }
        )
        assert (entry.last_active, entry.state, entry.running) == (NOW - 300, "complete", ())

    @pytest.mark.parametrize("said", ["1" + "0" * 400, "1e999", "-1e999", "NaN", "-1", "1e300", '"x"', "null"])
    def test_a_status_of_no_plausible_time_says_nothing(self, said):
        entry = self.entry(
            {
                "20260101T000000-1-a/status.json": json.dumps({"time": NOW - 900, "state": "stopped"}).encode(),
                "20260102T000000-1-b/status.json": f'{{"time": {said}, "state": "running"}}'.encode(),
            }
        )
        assert (entry.last_active, entry.state) == (NOW - 900, "stopped")
        assert json.loads(json.dumps(entry.to_json(), allow_nan=False))["last_active"] == NOW - 900

    def test_leaders_and_those_that_joined_run(self):
        beats = {"heartbeat.json": self.beat(), "heartbeats/r2.json": self.beat(run_id="r2", time=NOW - 5)}
        entry = self.entry(beats)
        assert entry.running == ("run r1, process 7 on far", "run r2, process 7 on far")
        assert entry.last_active == NOW - 5

    def test_a_job_without_a_sign_of_life_does_not_run(self):
        assert self.entry({"heartbeat.json": self.beat(time=NOW - 100)}).running == ()
        gone = my_heartbeat("r3", time.time()).to_bytes().replace(b'"pid": ', b'"pid": 4')
        assert self.entry({"heartbeat.json": gone}, now=time.time()).running == ()
        assert self.entry({"heartbeat.json": my_heartbeat("r3", 0.0).to_bytes()}).running != ()

    def test_it_is_shown(self):
        place = CountingObjects()
        for name, age in (("a", 130), ("b", None)):
            add_store(place, f"{name}/")
            if age:
                place.put(f"{name}/log/2026-x/status.json", json.dumps({"time": NOW - age}).encode())
        lines = describe_stores(list_stores(place, now=NOW), now=NOW).splitlines()
        assert lines[1].endswith("2 min 10 s ago")
        assert lines[2].endswith(" -")


class TestDoor:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        for split in ("train", "val"):
            write_planted(FolderObjects(tmp_path / "digits" / split), make_spec())
        return tmp_path

    def test_table_and_json(self, root, capsys):
        assert main(["stores", str(root)]) == ExitCode.OK
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
            "store",
            "digits/train",
            "digits/val",
        ]
        assert main(["stores", str(root), "--json"]) == ExitCode.OK
        [train, _] = json.loads(capsys.readouterr().out)
        assert (train["name"], train["complete"], train["n_shards"]) == ("digits/train", True, 3)
        assert train["location"] == f"{root}/digits/train"
        assert train["spec"]["teacher"] == "fake"
        assert main(["stores", str(root / "digits/val")]) == ExitCode.OK
        assert capsys.readouterr().out.splitlines()[1].startswith(".  ")

    def test_damage_is_exit_code_3(self, root, capsys):
        (root / "digits/val/store.json").write_bytes(b"x")
        assert main(["stores", str(root)]) == ExitCode.PROBLEMS
        assert "digits/val  cannot be read: store.json: not a JSON document" in capsys.readouterr().out
        assert main(["stores", str(root), "--json"]) == ExitCode.PROBLEMS
        assert "not a JSON document" in json.loads(capsys.readouterr().out)[1]["problem"]

    def test_nothing_there(self, tmp_path, capsys):
        (tmp_path / "file").write_bytes(b"")
        (tmp_path / "empty").mkdir()
        for name, said in [
            ("nowhere", "there is no folder"),
            ("file", f"{tmp_path / 'file'} is a file; give the folder"),
            ("empty", f"there is no store below {tmp_path / 'empty'}; looked into 1 folder\n"),
        ]:
            assert main(["stores", str(tmp_path / name)]) == ExitCode.BAD_INPUT
            assert said in capsys.readouterr().err

    def test_a_place_that_cannot_be_listed_is_bad_input_as_for_inspect(self, monkeypatch, capsys):
        def refuse(objects: Objects) -> Catalogue:
            raise ObjectAccessError("", "there is no bucket nobucket")

        monkeypatch.setattr("storage_schemas.__main__.list_stores", refuse)
        assert main(["stores", "somewhere"]) == ExitCode.BAD_INPUT
        assert "there is no bucket nobucket" in capsys.readouterr().err

    def test_no_store_is_named(self, capsys):
        assert main(["inspect", ""]) == ExitCode.BAD_INPUT
        assert "STORE is empty: give the path of a store" in capsys.readouterr().err

    def test_a_copy_is_listed_as_it_grows(self, root, tmp_path, capsys):
        (root / "digits/train" / commit_key(1)).unlink()
        (root / "digits/train" / INDEX_KEY).unlink()
        copy_store(FolderObjects(root / "digits/train"), FolderObjects(tmp_path / "copy"))
        assert main(["stores", str(tmp_path)]) == ExitCode.OK
        assert "2 of 3 shards" in capsys.readouterr().out.splitlines()[1]

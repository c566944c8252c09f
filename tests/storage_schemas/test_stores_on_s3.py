"""Copies, listings and unions where stores lie on S3, on two unrelated servers."""

import os
from pathlib import Path

import numpy as np
import pytest

from infra.console import ExitCode
from infra.objects import FolderObjects, open_objects
from storage_schemas import open_store
from storage_schemas.__main__ import main
from storage_schemas.catalogue import list_stores
from storage_schemas.copy import copy_store
from storage_schemas.digest import content_digest
from storage_schemas.keys import INDEX_KEY, commit_key
from tests.s3_servers import S3Server, anonymous_environment, read_only_environment
from tests.stores import make_spec, write_planted

pytestmark = pytest.mark.s3
BAD = {5: "truncated", 20: "empty"}


@pytest.fixture
def local(tmp_path) -> Path:
    write_planted(FolderObjects(tmp_path / "local/train"), make_spec(precision="int8"), BAD)
    write_planted(FolderObjects(tmp_path / "local/val"), make_spec(n_samples=4, precision="int8"))
    return tmp_path / "local"


def digest(location: Path | str) -> str:
    return content_digest(open_objects(location))


def test_there_across_and_back(s3_location, local, tmp_path, capsys):
    """Disk to S3, S3 to S3 as tars, and back to a disk: the same store again."""
    assert main(["copy", str(local), f"{s3_location}/a"]) == ExitCode.OK
    assert digest(f"{s3_location}/a/train") == digest(local / "train")
    assert open_store(f"{s3_location}/a/train").verify() == []
    assert main(["convert", f"{s3_location}/a", f"{s3_location}/b", "--format", "webdataset"]) == ExitCode.OK
    assert main(["convert", f"{s3_location}/b", str(tmp_path / "c"), "--format", "zarr"]) == ExitCode.OK
    for split in ("train", "val"):
        assert digest(tmp_path / "c" / split) == digest(local / split)
    assert main(["copy", f"{s3_location}/a/", f"{s3_location}/a"]) == ExitCode.BAD_INPUT
    assert main(["copy", f"{s3_location}/a", f"{s3_location}/a/train/x"]) == ExitCode.BAD_INPUT
    assert "lies inside STORE" in capsys.readouterr().err


def test_an_interrupted_copy_goes_on(s3_location, local):
    source, target = open_objects(local / "train"), open_objects(f"{s3_location}/t")
    copy_store(source, target, layers=(1,))
    for key in (INDEX_KEY, commit_key(1)):
        target.delete(key)
    puts = target.requests["put"]
    copy_store(source, target, layers=(1,))
    assert target.requests["put"] - puts == 7 + 2, "the objects of shard 1, its commit, the index"
    assert open_store(target).is_complete


def test_a_shared_bucket_is_listed_in_few_requests(s3_location, local):
    for split in ("train", "val"):
        copy_store(open_objects(local / split), open_objects(f"{s3_location}/deep/er/{split}"))
    place = open_objects(s3_location)
    entries = list_stores(place).entries
    assert [(entry.name, entry.is_complete) for entry in entries] == [("deep/er/train", True), ("deep/er/val", True)]
    assert [entry.location for entry in entries] == [f"{s3_location}/deep/er/{split}" for split in ("train", "val")]
    assert entries[0].nbytes == open_store(local / "train").table.stored_nbytes
    assert (place.requests["list"], place.requests["get"]) == (5, 2)


def test_a_union_of_s3_and_disk(s3_location, local):
    copy_store(open_objects(local / "train"), open_objects(f"{s3_location}/front"), layers=(0, 1))
    copy_store(open_objects(local / "train"), FolderObjects(local / "back"), layers=(2,))
    union, whole = open_store([f"{s3_location}/front", local / "back"]), open_store(local / "train")
    assert union.layers == (0, 1, 2)
    assert union.read().tobytes() == whole.read().tobytes()
    np.testing.assert_array_equal(union.statistics.to_array(), whole.statistics.to_array())
    assert union.verify() == []
    (local / "back/layer_02/cls/c/0/0").unlink()
    assert [problem.key for problem in union.verify()] == [f"{local}/back/layer_02/cls/c/0/0"]


@pytest.mark.parametrize("who", [read_only_environment, anonymous_environment])
def test_reading_needs_no_leave_to_write(s3_server: S3Server, who, local, tmp_path, monkeypatch, capsys):
    """Inspect, list and copy from a bucket that is not ours to write; copying into it is refused at once."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.make_bucket()
    copy_store(open_objects(local / "train"), open_objects(f"s3://{bucket}/s"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in who(s3_server, bucket).items():
        monkeypatch.setenv(name, value)
    assert main(["inspect", f"s3://{bucket}/s"]) == ExitCode.OK
    assert main(["stores", f"s3://{bucket}"]) == ExitCode.OK
    assert main(["copy", f"s3://{bucket}/s", str(tmp_path / "mirror")]) == ExitCode.OK
    assert digest(tmp_path / "mirror") == digest(local / "train")
    assert open_store(f"s3://{bucket}/s").verify() == []
    capsys.readouterr()
    assert main(["copy", str(local / "val"), f"s3://{bucket}/v"]) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err
    assert "403" in err
    assert "goes on from there" not in err


def test_a_bucket_that_there_is_not_is_bad_input(s3_location, local, capsys):
    missing = "s3://there-is-no-such-bucket-here/x"
    for command in (["inspect", missing], ["digest", missing], ["copy", missing, str(local / "to")]):
        assert main(command) == ExitCode.BAD_INPUT
        assert "there-is-no-such-bucket-here" in capsys.readouterr().err
    assert main(["copy", str(local / "val"), missing]) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err
    assert "there-is-no-such-bucket-here" in err
    assert "goes on from there" not in err


def test_the_endpoint_may_be_given(s3_server: S3Server, local, monkeypatch, capsys):
    bucket = s3_server.make_bucket()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    there = ["--endpoint-url", s3_server.endpoint]
    assert main(["copy", str(local / "val"), f"s3://{bucket}/v", *there]) == ExitCode.OK
    assert main(["inspect", f"s3://{bucket}/v", *there]) == ExitCode.OK
    assert main(["digest", f"s3://{bucket}/v", *there]) == ExitCode.OK
    assert digest(local / "val") in capsys.readouterr().out
    assert main(["stores", f"s3://{bucket}", *there]) == ExitCode.OK

"""Where settings point to, and what is said at the end."""

import os
from pathlib import Path

import pytest
from PIL import Image

from infra.console import ExitCode, UserError
from infra.objects import FolderObjects, open_objects
from pipeline.__main__ import main
from pipeline.config import ExtractConfig, check_inputs, store_root
from tests.pipeline_jobs import fake_arguments


def write_images(folder: Path, n: int = 3) -> None:
    folder.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (24, 24), (40 * i, 90, 10)).save(folder / f"{i}.png")


def run(*args: str) -> int:
    return main([*args, "--teacher", "fake_vit", "--no-ray"])


@pytest.mark.parametrize(
    ("images", "store"), [("digits", "digits"), ("a/b", "b"), ("a/b/", "b"), (".", "here"), ("b/..", "here")]
)
def test_the_default_store_has_the_name_of_the_images(
    images: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert store_root(ExtractConfig(images=images)) == f"data/stores/{store}"


def test_paths_are_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ExtractConfig(images="~/x", weights="w.pth", head="h.pth", store="~/s/")
    assert config.images == str(tmp_path / "x")
    assert (config.weights, config.head) == (os.path.abspath("w.pth"), os.path.abspath("h.pth"))
    assert config.store == str(tmp_path / "s")
    assert ExtractConfig(weights="random:0").weights == "random:0"


BROKEN_ADDRESSES = ("s3:", "s3:/", "s3://", "S3://", "s3:/bucket/x", "s3:bucket", "s3:///x", "gs://", "memory:")


@pytest.mark.parametrize("address", BROKEN_ADDRESSES)
@pytest.mark.parametrize("name", ["store", "images", "weights", "head"])
def test_what_was_meant_as_an_address_is_no_folder(
    name: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """STORE=s3://$BUCKET where BUCKET is unset would else fill a folder called "s3:"."""
    monkeypatch.chdir(tmp_path)
    for command in ("extract", "plan", "verify"):
        assert run(command, f"--{name}", address) == ExitCode.BAD_INPUT
        assert f"{name.upper()}={address} is no whole address: no bucket follows" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", BROKEN_ADDRESSES)
def test_no_door_opens_it_as_a_folder(address: str) -> None:
    with pytest.raises(UserError, match="is no whole address"):
        open_objects(address)


def test_such_a_folder_can_be_named_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./s3:", str(tmp_path / "s3:/x"), "a:b", "x/y:"):
        assert isinstance(open_objects(name), FolderObjects)
    assert ExtractConfig(images="./s3:", store="./s3:/x").images == str(tmp_path / "s3:")


@pytest.mark.parametrize("inside", ["", "stores", "a/b"])
def test_a_store_inside_its_images_is_refused(inside: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images/cat")
    with pytest.raises(UserError, match=r"lies inside IMAGES.*Give a STORE elsewhere"):
        check_inputs(ExtractConfig(images=str(tmp_path / "images"), store=str(tmp_path / "images" / inside)))
    check_inputs(ExtractConfig(images=str(tmp_path / "images"), store=str(tmp_path / "images2")))


def test_a_val_split_alone_is_not_offered_for_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images/val/cat")
    store = tmp_path / "my store"
    assert run("extract", "--images", str(tmp_path / "images"), "--store", str(store)) == 0
    assert f"Next: make inspect STORE='{store}'" in capsys.readouterr().out
    assert main(["verify", "--store", str(store)]) == 0


def test_verify_says_how_far_an_unfinished_store_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images/cat", n=5)
    store = tmp_path / "store"
    sizes = ["--samples-per-shard", "2", "--samples-per-chunk", "1"]
    assert run("extract", "--images", str(tmp_path / "images"), "--store", str(store), *sizes) == 0
    (store / "commits/000001.json").unlink()
    (store / "index.parquet").unlink()
    capsys.readouterr()
    assert main(["verify", "--store", str(store)]) == 0
    said = capsys.readouterr().out
    assert "sound so far, 2 of 3 shards are committed" in said
    assert "goes on with the missing ones" in said


def test_what_max_error_refused_goes_on_in_the_same_store_as_the_message_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images/cat")
    (tmp_path / "images/cat/bad.png").write_bytes(b"no image")
    arguments = fake_arguments(tmp_path / "images", tmp_path / "store")
    assert main(["extract", *arguments, "--max-error", "1e-12"]) == ExitCode.PROBLEMS
    assert "to go on in the same STORE with other settings, give ARGS=--overwrite" in capfd.readouterr().err
    again = ["extract", *arguments, "--max-error", "1e-12", "--precision", "float32"]
    assert main(again) == ExitCode.BAD_INPUT
    capfd.readouterr()
    assert main([*again, "--overwrite"]) == ExitCode.OK
    said, told = capfd.readouterr()
    assert "1 image did not decode; its row is invalid:" in said
    assert " objects, 1 shard of " in told

"""What a person meets: `python -m trainer probe`, on stores and images, its places, its errors, a real kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra.console import ExitCode, run_door
from infra.objects import FolderObjects, open_objects
from storage_schemas import Span
from tests.trainer.probes.imagenet_trees import write_imagenet
from tests.trainer.published import seeded_raptor
from tests.trainer.tiny import CPU, tiny_config, tiny_teacher, write_tiny_pair
from trainer.__main__ import main
from trainer.data import open_training_data
from trainer.probes.results import read_result, read_results
from trainer.raptor_teacher import save_ends
from trainer.run_files import RunFiles
from trainer.table import make_table
from trainer.table_sources import find_results
from trainer.train import train

REPOSITORY = Path(__file__).parents[3]
Door = Callable[..., tuple[int, str, str]]


@pytest.fixture
def door(capsys: pytest.CaptureFixture[str]) -> Door:
    """Runs the door and returns exit code, standard output and standard error."""

    def run(**options: object) -> tuple[int, str, str]:
        arguments = ["probe", "--device", "cpu"]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, str(value)]
        code = run_door(lambda: main(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_pair(tmp_path_factory.mktemp("store") / "tiny")


@pytest.fixture(scope="module")
def runs(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Raptor over the whole depth, and a block of the middle."""
    root = tmp_path_factory.mktemp("runs")
    for blocks, name in (("0-1,1-3", "raptor"), ("1-2", "block")):
        data = open_training_data(store, blocks, variable="BLOCKS" if "," in blocks else "BLOCK")
        config = tiny_config(spans=data.spans, n_steps=3, teacher_forcing_steps=0, seed=4)
        run = RunFiles(FolderObjects(root / name))
        run.claim({"train": config.to_json(), "data": data.identity})
        assert train(config, data, run, machine=CPU) is not None
        if name == "raptor":  # the block is as an earlier version left it, without anything of its teacher
            save_ends(run, data.teacher)
    assert data.span == Span(1, 2)
    return root


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_whole_probe_and_again(door: Door, store: str, tmp_path: Path) -> None:
    out = tmp_path / "probe"
    code, said, err = door(task="digits", store=store, out=out, batch_size=8, epochs=4)
    assert code == ExitCode.OK, err
    assert "51 parameters on the frozen teacher fake_vit, seed 0" in err
    assert "4 epochs of 41 samples in batches of 8, top-1 on 18; float32 on cpu" in err
    assert "probe digits 100%: 160/160 samples" in err
    for part in ("fake_vit: top-1 of digits on 18 samples", "last epoch", "chosen on these same", f"{out}/result.json"):
        assert part in said, part
    before = snapshot(out)
    code, again, _ = door(task="digits", store=store, out=out, batch_size=8, epochs=4)
    assert code == ExitCode.OK
    assert "This probe is finished; there is nothing to do" in again
    assert snapshot(out) == before


def test_a_raptor(door: Door, store: str, runs: Path, tmp_path: Path) -> None:
    code, said, err = door(task="digits", store=store, run=runs / "raptor", out=tmp_path / "p", batch_size=8, epochs=2)
    assert code == ExitCode.OK, err
    assert "Raptor k=2 of fake_vit: top-1 of digits" in said
    result = read_result(FolderObjects(tmp_path / "p"))
    assert (result.what, result.spans, result.model_seed, result.seed) == ("raptor", ["0-1", "1-3"], 4, 0)
    assert result.run == str(runs / "raptor")
    config = RunFiles(FolderObjects(runs / "raptor")).read_config()
    assert config is not None
    only_watching = {"seed", "spans", "log_every", "validate_every", "validation_samples", "checkpoint_every"}
    learned = {name: value for name, value in config["train"].items() if name not in only_watching}
    assert result.raptor_settings == learned
    assert {"loss", "noise", "n_steps", "depth_scaling"} <= learned.keys()
    assert result.compute == "float32"
    assert result.run_weights == RunFiles(FolderObjects(runs / "raptor")).read_result()["weights_sha256"]


def test_an_imported_raptor(door: Door, store: str, tmp_path: Path) -> None:
    """Published weights become a RUN that a probe takes, and a table knows both as one model."""
    torch.save(seeded_raptor(5, 8, 2), tmp_path / "raptor2.pt")
    flags = {"from": tmp_path / "raptor2.pt", "blocks": "0-2,2-3", "store": store, "run": tmp_path / "run", "heads": 2}
    flags |= {"seed": 1001, "device": "cpu"}
    assert main(["import", *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]) == 0
    code, said, err = door(task="digits", store=store, run=tmp_path / "run", out=tmp_path / "p", batch_size=8, epochs=2)
    assert code == ExitCode.OK, err
    assert "Raptor k=2 of fake_vit: top-1 of digits" in said
    found = find_results([str(tmp_path)])
    [probe], [run] = found.probes, found.runs
    assert (probe.result.spans, probe.result.model_seed) == (["0-2", "2-3"], 1001)
    assert (probe.model.key, probe.model.imported) == (run.model.key, True)
    assert (probe.model.teacher_weights, run.model.teacher_weights) == (tiny_teacher().core_digest,) * 2
    [row] = make_table(found.runs, found.probes).of(what="raptor", task="digits", selection="last")
    assert row.mean == probe.result.last


@pytest.mark.parametrize("s3_server", ["moto", pytest.param("rclone", marks=pytest.mark.slow)], indirect=True)
def test_run_store_and_probe_on_s3(
    door: Door, store: str, runs: Path, s3_location: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUN, STORE and OUT in S3, each alone and all together, give the bits that they give from folders."""
    there = {"run": f"{s3_location}/runs/raptor", "store": f"{s3_location}/store"}
    here = {"run": str(runs / "raptor"), "store": store}
    for name, place in here.items():
        for info in FolderObjects(place).list():
            if not info.key.startswith("tensorboard/"):
                open_objects(there[name]).put(info.key, FolderObjects(place).get(info.key))
    cases = {
        f"{tmp_path}/here": here,
        f"{tmp_path}/run": {**here, "run": there["run"]},
        f"{tmp_path}/store": {**here, "store": there["store"]},
        f"{s3_location}/out/p": here,
        f"{s3_location}/probes/all": there,
    }
    results = []
    for out, places in cases.items():
        code, _, err = door(task="digits", **places, out=out, batch_size=8, epochs=2)
        assert code == ExitCode.OK, err
        found = read_result(open_objects(out))
        assert found.run == places["run"]
        results.append(dataclasses.replace(found, run=None))
    assert all(result == results[0] for result in results)
    code, again, _ = door(task="digits", **there, out=f"{s3_location}/probes/all", batch_size=8, epochs=2)
    assert (code, "there is nothing to do" in again) == (ExitCode.OK, True)
    table = ["--runs", f"{s3_location}/runs", "--probes", f"{s3_location}/probes", "--out", f"{s3_location}/table"]
    assert main(["table", *table, "--no-figures"]) == ExitCode.OK
    assert "digits" in capsys.readouterr().out
    assert {info.key for info in open_objects(f"{s3_location}/table").list()} == {"table.md", "table.csv"}


def test_default_places(door: Door, store: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options in ({}, {"run": runs / "raptor", "seed": 3, "label": "ours"}):
        assert door(task="digits", store=store, batch_size=8, epochs=1, **options)[0] == ExitCode.OK
    found = read_results()
    assert [place.removeprefix("data/probes/") for place in found] == [
        "tiny/raptor-digits-seed3",
        "tiny/teacher-digits-seed0",
    ]
    assert [result.label for result in found.values()] == ["ours", "fake_vit"]


def test_other_settings_in_the_same_place_are_refused(door: Door, store: str, tmp_path: Path) -> None:
    out = tmp_path / "probe"
    assert door(task="digits", store=store, out=out, batch_size=8, epochs=1)[0] == ExitCode.OK
    before = snapshot(out)
    code, _, err = door(task="digits", store=store, out=out, batch_size=8, epochs=2, seed=1, label="b")
    assert code == ExitCode.BAD_INPUT
    for part in (
        "holds another probe",
        "settings.n_epochs: that probe has 1, this command asks for 2",
        "seed: that probe has 0, this command asks for 1",
        "label: that probe has '', this command asks for 'b'",
    ):
        assert part in err, part
    assert snapshot(out) == before


def test_imagenet_with_a_named_teacher(door: Door, tmp_path: Path) -> None:
    images = write_imagenet(tmp_path / "imagenet")
    code, said, err = door(
        task="imagenet", images=images, teacher="fake_vit", out=tmp_path / "p", batch_size=8, epochs=1
    )
    assert code == ExitCode.OK, err
    assert "top-1 of imagenet on 15 samples, trained on 24" in said
    settings = json.loads((tmp_path / "p/config.json").read_text())["probe"]["settings"]
    assert (settings["n_epochs"], settings["learning_rate"], settings["clip_norm"]) == (1, 1e-4, 1.0)


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": ""}, "TASK is missing; expected one of imagenet, ade20k, nyuv2, digits"),
        ({"task": "coco"}, "TASK=coco is unknown; expected one of imagenet"),
        ({"task": "imagenet"}, "TEACHER is missing: give its name"),
        ({"task": "imagenet", "weights": "w.pth"}, "WEIGHTS=w.pth was given without TEACHER"),
        ({"task": "digits", "threads": 0, "seed": -1}, "THREADS=0: expected 1 or more\n  SEED=-1: expected 0 or more"),
        ({"task": "digits", "compute": "bfloat17"}, "COMPUTE=bfloat17: expected one of float32, tf32"),
        ({"task": "digits", "store": "nowhere"}, "nowhere is not a store"),
    ],
)
def test_what_is_typed_wrong(
    door: Door, options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = door(**options)
    assert code == ExitCode.BAD_INPUT
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_all_typed_values_that_are_wrong_are_listed_with_what_cannot_be_opened(door: Door, tmp_path: Path) -> None:
    wrong = {"epochs": 0, "batch_size": -1, "learning_rate": 0.0, "threads": 0, "seed": -2, "compute": "float8"}
    code, _, err = door(task="digits", store=tmp_path / "none", compat=True, **wrong)
    assert code == ExitCode.BAD_INPUT
    for name, value in wrong.items():
        assert f"{name.upper()}={value}: expected" in err, name
    for part in ("COMPAT=1: TASK=digits has no defect", f"{tmp_path}/none is not a store"):
        assert part in err, part
    assert err.count("cannot start") == 1
    code, _, err = door(task="coco", threads=0, device="abacus")
    assert code == ExitCode.BAD_INPUT
    for part in ("TASK=coco is unknown", "THREADS=0: expected 1 or more", "DEVICE=abacus is not a device"):
        assert part in err, part


def test_what_would_not_be_used_is_refused(door: Door, store: str, tmp_path: Path) -> None:
    code, _, err = door(task="digits", store=store, head="head.pth", out=tmp_path / "p")
    assert code == ExitCode.BAD_INPUT
    assert "HEAD=head.pth: the readout of this task begins with random values" in err
    code, _, err = door(task="ade20k", store=store, teacher="fake_vit", images="i", out=tmp_path / "p")
    assert code == ExitCode.BAD_INPUT
    assert f"STORE={store} would not be read" in err


def test_states_of_one_teacher_are_not_credited_to_another(door: Door, store: str, tmp_path: Path) -> None:
    """The same architecture with other weights, on a store that has the right shape and layers."""
    code, _, err = door(task="digits", store=store, teacher="fake_vit", weights="random:5", out=tmp_path / "p")
    assert code == ExitCode.BAD_INPUT
    for part in (f"{store}/train holds states of a fake_vit", f"{store}/val holds states", "teacher fake_vit has"):
        assert part in err, part
    assert not (tmp_path / "p").exists()


def test_no_run_no_teacher_and_more_are_listed_at_once(door: Door, store: str, tmp_path: Path) -> None:
    code, _, err = door(task="digits", store=tmp_path / "none", run=tmp_path / "no-run", out=tmp_path / "p")
    assert code == ExitCode.BAD_INPUT
    assert f"RUN={tmp_path}/no-run: " in err
    assert err.count(f"STORE={tmp_path}/none: {tmp_path}/none is not a store") == 1
    assert err.count("is not a store") == 1
    assert not (tmp_path / "p").exists()


def test_what_else_is_wrong_is_said_before_weights_are_fetched(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it at once, whatever task it is; a teacher is looked at as far as it goes without its weights."""

    def fetch(*_: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("pipeline.vit_models._fetch_pretrained", fetch)
    run = tmp_path / "no-run"
    for task, missing, head in (
        ("ade20k", "IMAGES is missing: give .../ADEChallengeData2016", True),
        ("nyuv2", "IMAGES is missing: give the folder that holds data/nyu2_train.csv", True),
        ("imagenet", "IMAGES is missing: give the folder that holds train/ and val/", False),
        ("digits", f"STORE={tmp_path}/none: ", True),
    ):
        given = {"store": tmp_path / "none"} if task == "digits" else {}
        code, _, err = door(task=task, teacher="test_vit", run=run, epochs=0, head="h.pth", **given)
        assert code == ExitCode.BAD_INPUT
        for part in (missing, f"RUN={run}: ", "EPOCHS=0: expected 1 or more"):
            assert err.count(part) == 1, (task, part, err)
        assert ("leave HEAD out" in err) == head
    for task in ("ade20k", "imagenet"):
        code, _, err = door(task=task, teacher="test_vitt")
        assert code == ExitCode.BAD_INPUT
        for part in ("IMAGES is missing", "there is no teacher 'test_vitt'; the nearest names are test_vit"):
            assert err.count(part) == 1, (task, part, err)


def test_a_task_says_what_is_wrong_beside_a_typed_value(door: Door, store: str, tmp_path: Path) -> None:
    """The backbone can be had, so that the task is asked too; what showed before it is said once."""
    code, _, err = door(task="digits", store=f"{store}/val", images="i", epochs=0, run=tmp_path / "no-run")
    assert code == ExitCode.BAD_INPUT
    for part in ("IMAGES=i: this task reads a store", "EPOCHS=0: expected", f"RUN={tmp_path}/no-run: "):
        assert err.count(part) == 1, err
    tree = tmp_path / "imagenet"
    (tree / "train/only").mkdir(parents=True)
    code, _, err = door(task="imagenet", images=tree, teacher="fake_vit", weights="random:0", seed=-1)
    assert code == ExitCode.BAD_INPUT
    for part in ("SEED=-1: expected 0 or more", "train has 1 class folder and no image", "has no val/ to"):
        assert err.count(part) == 1, err


def test_a_block_of_the_middle_and_another_teacher(door: Door, store: str, runs: Path, tmp_path: Path) -> None:
    code, _, err = door(
        task="digits", store=store, run=runs / "block", teacher="fake_vit", weights="random:5", out=tmp_path / "p"
    )
    assert code == ExitCode.BAD_INPUT
    for part in ("was trained on a teacher whose weights have digest", "begins at state 1", "ends at state 2"):
        assert part in err, part


def test_a_run_needs_no_teacher_beside_it(door: Door, store: str, runs: Path, tmp_path: Path) -> None:
    """It keeps its teacher's ends; the same teacher from elsewhere, with or without a head, gives the same result."""
    images = write_imagenet(tmp_path / "imagenet")
    options = {"task": "imagenet", "images": images, "run": runs / "raptor", "epochs": 1, "batch_size": 8}
    places: dict[str, dict[str, str]] = {
        "alone": {},
        "named": {"teacher": "fake_vit"},
        "stored": {"store": f"{store}/train"},
    }
    for name, given in places.items():
        code, _, err = door(**options, **given, out=tmp_path / name)
        assert code == ExitCode.OK, err
    alone, named, stored = (read_result(FolderObjects(tmp_path / name)) for name in places)
    assert alone == named == stored
    assert (alone.teacher, alone.label) == ("fake_vit", "Raptor k=2")
    code, _, err = door(**options, store=store, out=tmp_path / "p")  # on whose val it would be evaluated
    assert code == ExitCode.BAD_INPUT
    assert "label 1 is '1' there, 'n02102040' in IMAGES" in err
    assert err.count("cannot start") == 1


# ---------------------------------------------------------------- interrupted


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGINT, then SIGKILL to a real process; the same bytes as undisturbed."""
    images = write_imagenet(tmp_path / "imagenet", n_train=20)

    def start(out: Path) -> subprocess.Popen[bytes]:
        flags = {"task": "imagenet", "images": images, "teacher": "fake_vit", "device": "cpu", "threads": 1, "out": out}
        flags |= {"epochs": 10, "batch-size": 8}
        typed = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", "probe", *typed],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=240) == ExitCode.OK
    place, codes = tmp_path / "broken", []
    for number in (signal.SIGINT, signal.SIGKILL, None):
        process = start(place)
        if number is not None:
            deadline = time.monotonic() + 200
            while not (place / "config.json").exists() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.02)
            time.sleep(0.3)
            process.send_signal(number)
        codes.append(process.wait(timeout=240))
    assert codes[-1] == ExitCode.OK
    assert {name: data for name, data in snapshot(place).items() if name != ".lock"} == {
        name: data for name, data in snapshot(tmp_path / "whole").items() if name != ".lock"
    }

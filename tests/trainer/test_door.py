"""What a person meets: `python -m trainer train`, its errors, a finished run, a run of another config."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from infra.console import ExitCode, UserError, run_door
from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from storage_schemas.keys import INDEX_KEY, commit_key
from tests.trainer.tiny import tiny_teacher, write_tiny, write_tiny_pair
from trainer.__main__ import main
from trainer.commands.start import default_run
from trainer.data import HOLD_OUT_SHARE, first_samples, open_training_data, split_hold_out
from trainer.machine import Machine, torch_threads
from trainer.run_files import RunFiles

Door = Callable[..., tuple[int, str, str]]


@pytest.fixture
def door(capsys: pytest.CaptureFixture[str]) -> Door:
    """Runs the door and returns exit code, standard output and standard error."""

    def run(**options: object) -> tuple[int, str, str]:
        arguments = ["train", "--device", "cpu"]
        for name, value in options.items():
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        code = run_door(lambda: main(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_pair(tmp_path_factory.mktemp("store"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- a run


def test_whole_run_and_again(door: Door, store: str, tmp_path: Path) -> None:
    """It ends with losses, accuracy beside three baselines, R2, places and a next command; again does nothing."""
    run = tmp_path / "run"
    code, out, err = door(store=store, block="0-2", run=run, steps=30)
    assert code == ExitCode.OK, err
    assert "41 samples" in err
    assert "train 0-2 100%" in err
    for part in (
        *("loss: training", "untrained block", "teacher blocks 1 to 2 skipped", "block 0-2, rolled out"),
        *(
            "R2 of layer          1         2",
            "as published",
            "epsilon",
            f"{run}/block.safetensors",
            f"{run}/metrics.jsonl",
        ),
        *(f"make train BLOCK=2-3 STORE={store} DEVICE=cpu\n", f"tensorboard --logdir {tmp_path}\n"),
    ):
        assert part in out, part
    result = RunFiles(FolderObjects(run)).read_result()
    assert result is not None
    assert result["teacher_weights"] == tiny_teacher().core_digest  # by which probes name their teacher too
    before = snapshot(run)
    assert {"config.json", "metrics.jsonl", "block.safetensors", "result.json"} <= set(before)
    code, again, _ = door(store=store, block="0-2", run=run, steps=30)
    assert code == ExitCode.OK
    assert "finished; there is nothing to do" in again
    assert "R2 of layer          1         2" in again
    assert snapshot(run) == before


def test_another_config_is_refused_and_nothing_is_touched(door: Door, store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert door(store=store, block="0-2", run=run, steps=4)[0] == ExitCode.OK
    before = snapshot(run)
    code, _, err = door(store=store, block="1-3", run=run, steps=5, seed=1)
    assert code == ExitCode.BAD_INPUT == 2
    assert "holds another run" in err
    for line in (
        "train.spans: the run has ['0-2'], this command asks for ['1-3']",
        "train.n_steps: the run has 4, this command asks for 5",
        "train.seed: the run has 0, this command asks for 1",
    ):
        assert line in err
    assert snapshot(run) == before


def test_same_config_on_other_data_is_refused(door: Door, store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert door(store=store, block="0-2", run=run, steps=4)[0] == ExitCode.OK
    write_tiny(FolderObjects(tmp_path / "other/train"), tiny_teacher(), 41, seed=7)
    write_tiny(FolderObjects(tmp_path / "other/val"), tiny_teacher(), 18, seed=1)
    code, _, err = door(store=tmp_path / "other", block="0-2", run=run, steps=4)
    assert code == ExitCode.BAD_INPUT
    assert "data.train: the run has" in err
    assert "data.validation" not in err


def test_two_processes_cannot_share_a_run(door: Door, store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFiles(FolderObjects(run)).exclusive():
        code, _, err = door(store=store, block="0-2", run=run, steps=4)
        assert code == ExitCode.PROBLEMS
        assert "another process is training in" in err
    assert door(store=store, block="0-2", run=run, steps=4)[0] == ExitCode.OK


def test_default_run_names_store_block_and_seed() -> None:
    assert default_run("data/stores/digits", "0-7", 3) == "data/runs/digits/0-7-seed3"
    assert default_run("/x/imagenet/train/", "7-10", 0) == "data/runs/imagenet-train/7-10-seed0"


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("", r"BLOCK is missing: give a-b with 0 <= a < b <= 3: fake_vit has states 0 to 3"),
        ("2-0", r"BLOCK=2-0: expected a-b with 0 <= a < b <= 3"),
        ("2-2", r"BLOCK=2-2: expected a-b with 0 <= a < b <= 3"),
        ("0-4", r"BLOCK=0-4: expected a-b with 0 <= a < b <= 3: fake_vit has states 0 to 3"),
        ("a-b", r"BLOCK=a-b: expected"),
        ("-1-2", r"BLOCK=-1-2: expected"),
        ("0-7-9", r"BLOCK=0-7-9: expected"),
    ],
)
def test_block_that_cannot_be(store: str, block: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_training_data(store, block)


def test_wrong_block_has_exit_code_two_and_leaves_no_run(door: Door, store: str, tmp_path: Path) -> None:
    for block in ("7-0", "0-13"):
        code, out, err = door(store=store, block=block, run=tmp_path / "run")
        assert code == ExitCode.BAD_INPUT
        assert f"BLOCK={block}" in err
        assert "Traceback" not in err
        assert out == ""
    assert not (tmp_path / "run").exists()


def test_store_that_is_none(door: Door, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "missing"):
        code, _, err = door(store=place, block="0-2", run=tmp_path / "run")
        assert code == ExitCode.BAD_INPUT
        assert "is not a store" in err
        assert "make extract" in err


def test_every_problem_is_listed(tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path / "train"), tiny_teacher(), 21, seed=0, layers=(0, 3))
    write_tiny(FolderObjects(tmp_path / "val"), tiny_teacher(), 21, seed=1, layers=(0, 1, 2, 3))
    (tmp_path / "train" / commit_key(1)).unlink()
    with pytest.raises(UserError) as caught:
        open_training_data(str(tmp_path), "0-3", head=str(tmp_path / "no_head.pth"))
    message = str(caught.value)
    for part in (
        "no_head.pth",
        "lacks layers 1, 2; it has 0, 3",
        "2 of 3 shards are there",
        "PARTIAL=1",
        "layers: the",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu7", "not a device"), ("cuda:99", "usable GPUs"), ("meta", "not on meta"), ("mps", "not on mps")],
)
def test_device_that_is_not_there(device: str, message: str) -> None:
    with pytest.raises(UserError, match=f"DEVICE={device}.*{message}"):
        Machine.found(device)


def test_small_blocks_use_one_thread(door: Door, store: str, tmp_path: Path) -> None:
    """Whatever the machine: so a run is repeated bit for bit on another one; large ones use all cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert door(store=store, block="0-2", run=tmp_path / "run", steps=1)[0] == ExitCode.OK
        assert torch.get_num_threads() == 1
        assert torch_threads(768) == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)
    assert door(store=store, block="0-2", run=tmp_path / "other", threads=0)[0] == ExitCode.BAD_INPUT


def test_unknown_recipe_and_remote_run(door: Door, store: str, tmp_path: Path) -> None:
    code, _, err = door(store=store, block="0-2", run=tmp_path / "run", recipe="cifar")
    assert (code, "for stage 1 there are digits_stage1, imagenet_stage1" in err) == (ExitCode.BAD_INPUT, True)
    code, _, err = door(store=store, block="0-2", run="gopher://run")
    assert (code, "gopher://run" in err) == (ExitCode.BAD_INPUT, True)


def test_all_that_is_typed_wrong_is_listed_at_once(door: Door, store: str, tmp_path: Path) -> None:
    wrong = {"recipe": "cifar", "steps": 0, "seed": -1, "head": tmp_path / "no.pth", "device": "abacus"}
    wrong |= {"threads": 0, "micro_batch": 0, "workers": 0, "ray_address": "http://here:8265"}
    (tmp_path / "file").write_text("")
    code, _, err = door(store=store, block="0-9", blocks="0-2", at_once=2, **wrong, run="gopher://run")
    assert code == ExitCode.BAD_INPUT
    expected = (
        "RECIPE=cifar is unknown; for stage 1 there are digits_stage1, imagenet_stage1",
        "STEPS=0: expected 1 or more",
        "SEED=-1: expected 0 or more",
        "THREADS=0: expected 1 or more",
        "MICRO_BATCH=0: expected 1 or more",
        "WORKERS=0: expected 1 or more",
        "RAY_ADDRESS=http://here:8265 is a dashboard",
        "BLOCKS=0-2 is for BLOCK=all",
        "AT_ONCE=2 is for BLOCK=all",
        "BLOCK=0-9: expected a-b with 0 <= a < b <= 3",
        "DEVICE=abacus is not a device",
        "gopher://run",
        "no.pth",
    )
    assert [words for words in expected if words not in err] == []
    numbers = {"at_once": 0, "recipe": "cifar", "steps": 0, "micro_batch": 0, "device": "abacus"}
    expected = ("AT_ONCE=0: expected 1 or more", "RECIPE=cifar", "STEPS=0", "MICRO_BATCH=0", "DEVICE=abacus is not")
    for blocks, said in (
        ("0-9", "BLOCKS=0-9: expected a-b"),
        ("0-2,x", "BLOCKS=0-2,x: expected a-b"),
        (tmp_path / "none.json", "none.json is no file of make phases"),
    ):
        code, _, err = door(store=store, block="all", blocks=blocks, **numbers)
        assert code == ExitCode.BAD_INPUT
        assert [words for words in (*expected, said) if words not in err] == []


def test_run_that_cannot_be_a_folder(door: Door, store: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = door(store=store, block="0-2", run=tmp_path / "file" / "run")
    assert code == ExitCode.BAD_INPUT
    assert "cannot be written: Not a directory" in err


def test_damaged_store_stops_the_training_and_names_the_object(door: Door, tmp_path: Path) -> None:
    """Also mid-run: what was reached stays, and the same command goes on once the store is mended."""
    place = Path(write_tiny_pair(tmp_path / "store"))
    key = "train/layer_01/patches/c/2/0/0"
    damaged = bytearray(sound := (place / key).read_bytes())
    damaged[1000] ^= 1
    (place / key).write_bytes(damaged)
    code, _, err = door(store=place, block="0-2", run=tmp_path / "run", steps=4)
    assert code == ExitCode.PROBLEMS == 3
    assert key in err
    assert "Traceback" not in err
    (place / key).write_bytes(sound)
    assert door(store=place, block="0-2", run=tmp_path / "run", steps=4)[0] == ExitCode.OK


def test_head_from_a_file_gives_accuracy(door: Door, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    headless = dataclasses.replace(teacher, head=None)
    for split, n in (("train", 41), ("val", 18)):
        write_tiny(FolderObjects(tmp_path / "store" / split), teacher, n, seed=n, teacher_files=headless.to_files())
    assert teacher.head is not None
    save_file({k: v.contiguous() for k, v in teacher.head.state_dict().items()}, tmp_path / "head.safetensors")
    common = {"store": tmp_path / "store", "block": "0-2", "steps": 2}
    code, out, err = door(**common, run=tmp_path / "without")
    assert (code, "untrained block" in out) == (ExitCode.OK, False)
    assert "no accuracy, as the teacher has no head" in err
    code, out, _ = door(**common, run=tmp_path / "with", head=tmp_path / "head.safetensors")
    assert (code, "untrained block" in out) == (ExitCode.OK, True)
    code, _, err = door(**common, run=tmp_path / "with")
    assert code == ExitCode.BAD_INPUT
    assert "data.teacher: the run has" in err


# ---------------------------------------------------------------- unfinished stores, hold-out


def unfinished(tmp_path: Path, missing: tuple[int, ...]) -> dict[int, bytes]:
    """Take commits away from a store; returns them."""
    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 41, seed=0)
    taken = {}
    for shard in missing:
        taken[shard] = (tmp_path / commit_key(shard)).read_bytes()
        (tmp_path / commit_key(shard)).unlink()
    (tmp_path / INDEX_KEY).unlink()
    return taken


def test_unfinished_store_needs_partial_and_freezes_its_shards(door: Door, tmp_path: Path) -> None:
    place, run = tmp_path / "store", tmp_path / "run"
    taken = unfinished(place, (1, 3))
    code, _, err = door(store=place, block="0-2", run=run, steps=4)
    assert code == ExitCode.BAD_INPUT
    assert "4 of 6 shards are there" in err
    code, _, err = door(store=place, block="0-2", run=run, steps=4, partial=True)
    assert code == ExitCode.OK, err
    assert json.loads((run / "config.json").read_bytes())["run"]["data"]["shards"] == [0, 2, 4, 5]
    for shard, data in taken.items():  # the store has grown; the run has not
        (place / commit_key(shard)).write_bytes(data)
    code, out, _ = door(store=place, block="0-2", run=run, steps=4, partial=True)
    assert (code, "nothing to do" in out) == (ExitCode.OK, True)
    code, _, err = door(store=place, block="0-2", run=run, steps=4)
    assert code == ExitCode.BAD_INPUT
    assert "data.shards: the run has [0, 2, 4, 5], this command asks for 'all'" in err


def test_hold_out_is_whole_chunks_and_the_same_for_all(tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 41, seed=0)
    first, second = open_training_data(str(tmp_path), "0-2"), open_training_data(str(tmp_path), "1-3")
    assert np.array_equal(first.train.valid, second.train.valid)
    held, taking = first.validation.valid, first.train.valid
    assert not (held & taking).any()
    assert (held | taking).all()
    chunks = np.flatnonzero(held) // 4
    assert len(set(chunks.tolist())) == 1
    assert first.validated_on == "a hold-out of 2 % of the chunks"


def test_hold_out_share_and_draw() -> None:
    """Of 200 chunks four are held out; bad images are in neither part."""
    objects = MemoryObjects()
    write_tiny(objects, tiny_teacher(), 9, seed=0)
    store = open_store(objects)
    spec = dataclasses.replace(store.spec, n_samples=800)
    big = open_store(objects)
    big.document = dataclasses.replace(store.document, spec=spec)
    usable = np.ones(800, bool)
    usable[17] = False
    taking, held = split_hold_out(big, usable)
    assert len(set((np.flatnonzero(held) // 4).tolist())) == round(HOLD_OUT_SHARE * 200)
    assert np.array_equal(taking ^ held, usable)
    with pytest.raises(UserError, match="1 chunk with samples"):
        split_hold_out(big, np.arange(800) < 3)


def test_first_samples_are_the_first_valid_ones(store: str) -> None:
    val = open_store(f"{store}/val")
    assert np.flatnonzero(first_samples(val, 5).valid).tolist() == [0, 1, 2, 3, 4]
    assert first_samples(val, 500).n_valid == 18
    assert val.n_valid == 18

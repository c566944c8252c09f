"""Stage 2: what it begins with, what it refuses, what its run is; and BLOCK=all, whose runs it takes."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from infra.console import ExitCode, UserError, run_door
from infra.objects import FolderObjects, MemoryObjects
from tests.trainer.tiny import CPU, tiny_config, tiny_data, tiny_teacher, write_tiny, write_tiny_pair
from trainer.__main__ import main
from trainer.all_spans import Process
from trainer.commands.blocks import find_blocks
from trainer.commands.raptor import find_sources, source_problems
from trainer.commands.start import default_run, make_config, raptor_name
from trainer.config import TokenWeights
from trainer.data import TrainingData, open_training_data
from trainer.joint import Source, blocks_identity, joint_weights, read_blocks
from trainer.losses import mse
from trainer.raptor import Raptor
from trainer.run_files import RunFiles
from trainer.stream import Span
from trainer.train import make_model, train
from trainer.trained import Trained, read_trained
from trainer.validation import ValidationSet, measure_baselines, validate

SPANS = (Span(0, 1), Span(1, 3))
BLOCKS = "0-1,1-3"
Door = Callable[..., tuple[int, str, str]]


@pytest.fixture
def door(capsys: pytest.CaptureFixture[str]) -> Door:
    def run(command: str, **options: object) -> tuple[int, str, str]:
        arguments = [command, "--device", "cpu"]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, str(value)]
        code = run_door(lambda: main(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and below runs/ the finished runs of both blocks."""
    place = tmp_path_factory.mktemp("place")
    write_tiny_pair(place / "store")
    for span in SPANS:
        data = open_training_data(str(place / "store"), str(span))
        config = make_config(data, 1, "digits_stage1", 6, seed=0)
        run = RunFiles(FolderObjects(place / "runs" / f"{span}-seed0"))
        run.claim({"train": config.to_json(), "data": data.identity})
        assert train(config, data, run, machine=CPU) is not None
    return place


@pytest.fixture(scope="module")
def data(place: Path) -> TrainingData:
    return open_training_data(str(place / "store"), BLOCKS, variable="BLOCKS")


def sources(place: Path) -> list[Source]:
    return [Source(span=span, location=str(place / f"runs/{span}-seed0"), command=f"TRAIN {span}") for span in SPANS]


# ---------------------------------------------------------------- what it begins with


def test_the_joint_training_begins_with_the_blocks_and_an_empty_optimizer(
    place: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6: before step 1 every tensor is that of stage 1, and AdamW has seen nothing."""
    import trainer.gradient

    config = make_config(data, 2, "digits_stage2", 3, seed=5)
    assert config.loss == TokenWeights(cls=0.45, registers=0.10, patches=0.45)
    assert (config.spans, config.teacher_forcing_steps, config.seed) == (SPANS, 0, 5)
    blocks = read_blocks(sources(place), config, data)
    seen: list[tuple[dict[str, torch.Tensor], int]] = []
    step = trainer.gradient.clip_and_step

    def spy(optimizer: torch.optim.Optimizer, norm: float) -> object:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        seen.append(({str(i): p for i, p in enumerate(before)}, len(optimizer.state)))
        return step(optimizer, norm)

    monkeypatch.setattr(trainer.gradient, "clip_and_step", spy)
    run = RunFiles(MemoryObjects())
    assert train(config, data, run, machine=CPU, initial=joint_weights(blocks)) is not None
    first, n_moments = seen[0]
    model = make_model(config, data.train.spec)
    model.load_state_dict(joint_weights(blocks))
    expected = [value for block in blocks for value in block.raptor.blocks[0].state_dict().values()]
    assert len(first) == len(expected) == len(list(model.parameters()))
    assert sum(any(torch.equal(found, value) for value in expected) for found in first.values()) == len(expected)
    assert n_moments == 0
    assert seen[1][1] == len(expected)
    names = joint_weights(blocks)
    assert set(names) == set(model.state_dict())
    for index, span in enumerate(SPANS):
        alone = RunFiles(FolderObjects(place / f"runs/{span}-seed0")).read_weights()
        assert all(torch.equal(names[f"blocks.{index}.{name}"], value) for name, value in alone.items())


def test_a_single_block_can_be_trained_on_the_whole_depth(tmp_path: Path) -> None:
    """k = 1: the model is a block, and so are the names of its weights."""
    data = tiny_data(tmp_path, "0-3")
    config = tiny_config(spans=(Span(0, 3),), n_steps=2)
    run = RunFiles(FolderObjects(tmp_path / "0-3"))
    run.claim({"train": config.to_json(), "data": data.identity})
    assert train(config, data, run, machine=CPU) is not None
    block = read_trained(str(tmp_path / "0-3"))
    make_model(config, data.train.spec).load_state_dict(joint_weights([block]))


# ---------------------------------------------------------------- the door


def test_blocks_become_a_raptor_and_the_run_knows_them(door: Door, place: Path, tmp_path: Path) -> None:
    run = place / "runs/raptor-0-1-3-seed0"
    settings = {"blocks": BLOCKS, "store": place / "store", "recipe": "digits_stage2", "steps": 4, "run": run}
    code, out, err = door("raptor", **settings)
    assert code == ExitCode.OK, err
    for part in (
        *("Raptor 0-1, 1-3, rolled out", "before the first joint step", "R2 of layer          1         2"),
        "before the first joint step, on 18 samples\n",
        f"next        make probe TASK=imagenet RUN={run} STORE={place}/store DEVICE=cpu IMAGES=",
        "and         make table",
    ):
        assert part in out, part
    config = RunFiles(FolderObjects(run)).read_config()
    assert config is not None
    blocks = [read_trained(str(place / f"runs/{span}-seed0")) for span in SPANS]
    assert config["blocks"] == blocks_identity(blocks)
    assert [block["sha256"] for block in config["blocks"]] == [block.weights_digest for block in blocks]
    trained = read_trained(str(run))
    assert (trained.spans, trained.seed) == (SPANS, 0)
    code, again, _ = door("raptor", **settings)
    assert (code, "there is nothing to do" in again) == (ExitCode.OK, True)
    other = tmp_path / "1-3-seed0"
    other_config = {**json.loads((place / "runs/1-3-seed0/config.json").read_text())["run"]}
    data = open_training_data(str(place / "store"), "1-3")
    replaced = make_config(data, 1, "digits_stage1", 6, seed=1)
    other_run = RunFiles(FolderObjects(other))
    other_run.claim({**other_config, "train": replaced.to_json()})
    assert train(replaced, data, other_run, machine=CPU) is not None
    runs = f"{place}/runs/0-1-seed0,{other}"
    code, _, err = door("raptor", **settings, runs=runs)
    assert code == ExitCode.BAD_INPUT
    assert "blocks: the run has" in err


def test_every_block_that_does_not_fit_is_named_with_what_to_do(door: Door, place: Path, tmp_path: Path) -> None:
    code, _, err = door("raptor", blocks=BLOCKS, store=place / "store", run=tmp_path / "raptor")
    assert code == ExitCode.BAD_INPUT
    for span in SPANS:
        assert f"block {span}: {tmp_path}/{span}-seed0 holds no run: make train BLOCK={span} STORE=" in err
        assert f"RUN={tmp_path}/{span}-seed0" in err
    assert not (tmp_path / "raptor").exists()


def test_unfinished_foreign_and_misshapen_blocks_are_refused_together(place: Path, tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path / "other/train"), tiny_teacher(), 41, seed=7)
    write_tiny(FolderObjects(tmp_path / "other/val"), tiny_teacher(), 18, seed=8)
    other = open_training_data(str(tmp_path / "other"), "0-1")
    foreign = RunFiles(FolderObjects(tmp_path / "foreign"))
    config = make_config(other, 1, "digits_stage1", 2, seed=0)
    foreign.claim({"train": config.to_json(), "data": other.identity})
    assert train(config, other, foreign, machine=CPU) is not None
    ours = open_training_data(str(place / "store"), "1-3")
    begun = make_config(ours, 1, "digits_stage1", 150, seed=0)
    unfinished = RunFiles(FolderObjects(tmp_path / "unfinished"))
    unfinished.claim({"train": begun.to_json(), "data": ours.identity})
    steps = iter(range(1000))
    assert train(begun, ours, unfinished, machine=CPU, stop=lambda: next(steps) == 3) is None
    data = open_training_data(str(place / "store"), BLOCKS, variable="BLOCKS")
    joint = make_config(data, 2, "digits_stage2", 4, seed=0)
    asked = [
        Source(span=SPANS[0], location=str(tmp_path / "foreign"), command="TRAIN FIRST"),
        Source(span=SPANS[1], location=str(tmp_path / "unfinished"), command="TRAIN SECOND"),
    ]
    with pytest.raises(UserError) as caught:
        read_blocks(asked, joint, data)
    assert "was trained on another store" in str(caught.value)
    assert "TRAIN FIRST, or, where both hold the same images, OTHER_STORE=1" in str(caught.value)
    assert f"block 1-3: {tmp_path}/unfinished is not finished (saved at step 4 of 150): TRAIN SECOND" in str(
        caught.value
    )
    with pytest.raises(UserError, match="not finished") as caught:
        read_blocks(asked, joint, data, other_store=True)
    assert "another store" not in str(caught.value)
    import dataclasses

    with pytest.raises(UserError, match=r"another shape: n_heads: the run has 2, this command asks for 4"):
        read_blocks(sources(place), dataclasses.replace(joint, n_heads=4), data)
    swapped = [dataclasses.replace(s, location=t.location) for s, t in zip(sources(place), sources(place)[::-1])]
    with pytest.raises(UserError, match=r"block 0-1: .*1-3-seed0 is of 1-3: give a run of 0-1 in its place"):
        read_blocks(swapped, joint, data)


def test_all_blocks_are_checked_and_claimed_before_one_begins(
    door: Door, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished is not done again; the others are handed on; the summary has all, and the next command."""
    import trainer.commands.train_all as all_spans
    from trainer.all_spans import Outcome

    settings = {"block": "all", "blocks": BLOCKS, "store": place / "store", "recipe": "digits_stage1", "steps": 6}
    code, out, err = door("train", **settings, run=place / "runs")
    assert code == ExitCode.OK, err
    assert out.count("finished before") == 2
    name = f"make raptor BLOCKS={BLOCKS} STORE={place}/store DEVICE=cpu RUN={place}/runs/raptor-0-1-3-seed0"
    assert name in out
    code, _, err = door("train", **{**settings, "steps": 7}, run=place / "runs")
    assert code == ExitCode.BAD_INPUT
    assert err.count("train.n_steps: the run has 6, this command asks for 7") == 2
    asked = []

    def instead(jobs, launch, **_):  # type: ignore[no-untyped-def]
        asked.extend(jobs)
        return [Outcome(name=job.name, ended="failed", n_attempts=3, words="no luck") for job in jobs]

    monkeypatch.setattr(all_spans, "train_side_by_side", instead)
    code, out, err = door("train", **settings, seed=3, run=tmp_path / "runs")
    assert code == ExitCode.PROBLEMS
    assert "block 0-1 was given up after 3 attempts. It said:\nno luck" in err
    assert "next" not in out
    assert [job.name for job in asked] == ["1-3", "0-1"]  # the longest first
    for job in asked:
        config = job.run.read_config()
        assert config is not None
        assert job.arguments[0] == "train"
        handed_on = dict(zip(job.arguments[1::2], job.arguments[2::2]))
        assert handed_on["--block"] == job.name
        assert handed_on["--run"] == str(tmp_path / f"runs/{job.name}-seed3")
        assert handed_on["--seed"] == str(config["train"]["seed"]) == "3"


def s3_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("AWS_")}


class Here(Process):
    """A process that is this one: importing torch anew takes longer than the training."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        assert s3_variables(environment) == s3_variables(os.environ) != {}, "a real one could not reach the store"
        self._log, self._code = log, run_door(lambda: main(arguments))

    def __str__(self) -> str:
        return "this process"

    def poll(self) -> int | None:
        return self._code

    def words(self) -> str:
        return "see above"


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
def test_both_stages_on_s3(door: Door, s3_location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is trained by itself, the other by BLOCK=all; the Raptor begins with both."""
    monkeypatch.chdir(tmp_path)  # words of a process are local, wherever its RUN is
    monkeypatch.setattr("trainer.commands.train_all.Process", Here)
    store, runs = write_tiny_pair(f"{s3_location}/store"), f"{s3_location}/runs"
    settings = {"store": store, "recipe": "digits_stage1", "steps": 4}
    code, _, err = door("train", block="1-3", run=f"{runs}/1-3-seed0", **settings)
    assert code == ExitCode.OK, err
    raptor = {"blocks": BLOCKS, "store": store, "run": f"{runs}/raptor-0-1-3-seed0", "recipe": "digits_stage2"}
    code, _, err = door("raptor", **raptor, steps=3)
    assert code == ExitCode.BAD_INPUT
    command = f"make train BLOCK=0-1 STORE={store} RUN={runs}/0-1-seed0"
    assert f"block 0-1: {runs}/0-1-seed0 holds no run: {command}" in err
    code, out, err = door("train", block="all", blocks=BLOCKS, run=runs, threads=1, **settings)
    assert code == ExitCode.OK, err
    assert "1 blocks to train" in err
    assert f"make raptor BLOCKS={BLOCKS} STORE={store} DEVICE=cpu RUN={raptor['run']}" in out
    code, _, err = door("raptor", **raptor, steps=3)
    assert code == ExitCode.OK, err
    blocks = [read_trained(f"{runs}/{span}-seed0") for span in BLOCKS.split(",")]
    trained = read_trained(raptor["run"])
    assert trained.spans == SPANS
    assert [block["sha256"] for block in trained.config["blocks"]] == [block.weights_digest for block in blocks]


# ---------------------------------------------------------------- names and settings


def test_names_and_neighbours() -> None:
    assert raptor_name("0-7,7-10,10-12") == "raptor-0-7-10-12"
    assert raptor_name("0-12") == "raptor-0-12"
    place = default_run("data/stores/digits", raptor_name("0-7,7-12"), 1001)
    assert place == "data/runs/digits/raptor-0-7-12-seed1001"
    spans = [Span(0, 7), Span(7, 12)]
    found = find_sources(spans, place, "100,105", "", "data/stores/digits", own_place=False)
    assert [source.location for source in found] == ["data/runs/digits/0-7-seed100", "data/runs/digits/7-12-seed105"]
    assert [source.command for source in found] == [
        "make train BLOCK=0-7 SEED=100",
        "make train BLOCK=7-12 SEED=105",
    ]
    remote = find_sources(spans, "s3://bucket/runs/raptor", "0", "", "s3://bucket/digits", own_place=True)
    assert [source.location for source in remote] == ["s3://bucket/runs/0-7-seed0", "s3://bucket/runs/7-12-seed0"]
    assert source_problems(2, "100,105", "data/x,data/y") == []
    assert source_problems(2, "1,2,3", "data/x") == [
        "BLOCK_SEEDS=1,2,3: expected one number for all blocks, or 2",
        "RUNS names 1 runs, expected one for each of the 2 blocks",
    ]
    assert source_problems(2, "one", "") == ["BLOCK_SEEDS=one: expected one number for all blocks, or 2"]


def test_all_that_is_typed_wrong_is_listed_at_once(door: Door, place: Path, tmp_path: Path) -> None:
    wrong = {"recipe": "cifar", "steps": 0, "block_seeds": "1,2,3", "runs": "x", "head": tmp_path / "no.pth"}
    code, _, err = door("raptor", blocks="0-1,2-3", store=place / "store", seed=-1, **wrong)
    assert code == ExitCode.BAD_INPUT
    assert [words for words in (
        "RECIPE=cifar is unknown; for stage 2 there are",
        "STEPS=0: expected 1 or more",
        "SEED=-1: expected 0 or more",
        "BLOCK_SEEDS=1,2,3: expected one number for all blocks, or 2",
        "RUNS names 1 runs",
        "BLOCKS=0-1,2-3: ",
        "no.pth",
    ) if words not in err] == []  # fmt: skip


def test_replica_stands_for_published_seeds(door: Door, place: Path, tmp_path: Path) -> None:
    common = {"store": place / "store", "replica": 2}
    code, _, err = door("train", block="0-2", **common)
    assert (code, "published seeds for 0-4; 0-7" in err) == (ExitCode.BAD_INPUT, True)
    code, _, err = door("train", block="0-2", seed=1, **common)
    assert (code, "REPLICA stands for the seed" in err) == (ExitCode.BAD_INPUT, True)
    code, _, err = door("raptor", blocks="0-7,7-12", block_seeds="1", **common)
    assert (code, "REPLICA stands for the seeds" in err) == (ExitCode.BAD_INPUT, True)


def test_blocks_come_from_saved_phases(tmp_path: Path) -> None:
    store = "data/stores/digits"
    with pytest.raises(UserError, match=r"BLOCKS is missing.*no saved phases.*make phases K=3"):
        find_blocks("", store, phases=str(tmp_path))
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "k3.json").write_text(json.dumps({"blocks": ["0-7", "7-10", "10-12"]}))
    assert find_blocks("", store, phases=str(tmp_path)) == "0-7,7-10,10-12"
    assert find_blocks(str(folder / "k3.json"), store) == "0-7,7-10,10-12"
    assert find_blocks("0-7, 7-12", store) == "0-7,7-12"
    (folder / "k2.json").write_text(json.dumps({"blocks": None}))
    with pytest.raises(UserError, match=r"several phases; choose one:\n  BLOCKS=.*k2.json\n  BLOCKS=.*k3.json"):
        find_blocks("", store, phases=str(tmp_path))
    with pytest.raises(UserError, match=r"k2.json holds no contiguous spans"):
        find_blocks(str(folder / "k2.json"), store)
    with pytest.raises(UserError, match=r"none.json is no file of make phases"):
        find_blocks(str(folder / "none.json"), store)


def test_saved_phases_lie_where_make_phases_puts_them() -> None:
    from analysis.__main__ import default_out
    from trainer.commands.blocks import PHASES
    from trainer.commands.start import store_name

    for store in ("data/stores/digits", "/x/imagenet/train/", "s3://bucket/prefix"):
        assert default_out(store) == f"{PHASES}/{store_name(store)}"


# ---------------------------------------------------------------- accuracy of a Raptor


def test_a_raptor_that_is_the_teacher_has_the_teachers_accuracy(data: TrainingData) -> None:
    """D10: rolled out over the whole depth, then final norm and head; no teacher block is left to run."""

    class TeacherBlock(torch.nn.Module):
        def forward(self, x: torch.Tensor, layer: int) -> torch.Tensor:
            assert data.teacher is not None
            return data.teacher.run_blocks(x, layer - 1, layer)

    raptor = Raptor([TeacherBlock(), TeacherBlock()], SPANS)
    on = ValidationSet(store=data.validation, teacher=data.teacher, batch_size=5, lanes=4)
    found = validate(raptor, on, data.span, mse, machine=CPU)
    baselines = measure_baselines(raptor, on, data.span, machine=CPU)
    assert baselines is not None
    assert found.accuracy == baselines.teacher == baselines.untrained
    assert 0 < baselines.teacher < 1
    assert all(r2 > 1 - 1e-9 for r2 in found.r2["all"])
    wrong = Raptor([TeacherBlock(), torch.nn.Identity()], SPANS)
    wrong.blocks[1].forward = lambda x, layer: -x  # type: ignore[assignment,method-assign]
    spoiled = validate(wrong, on, data.span, mse, machine=CPU)
    assert spoiled.accuracy is not None
    assert spoiled.r2["all"][-1] < 0.5


# ---------------------------------------------------------------- finished runs as models


def test_a_finished_run_is_a_raptor_and_a_damaged_one_is_refused(place: Path, tmp_path: Path) -> None:
    import shutil

    def copied(name: str) -> Path:
        shutil.copytree(place / "runs/0-1-seed0", tmp_path / name)
        return tmp_path / name

    trained: Trained = read_trained(str(place / "runs/0-1-seed0"))
    assert (trained.spans, trained.seed, len(trained.raptor.blocks)) == ((Span(0, 1),), 0, 1)
    assert not trained.raptor.training
    assert not any(p.requires_grad for p in trained.raptor.parameters())
    with pytest.raises(UserError, match="holds no finished run"):
        read_trained(str(tmp_path / "nothing"))
    (copied("unfinished") / "result.json").unlink()
    with pytest.raises(UserError, match="holds no finished run"):
        read_trained(str(tmp_path / "unfinished"))
    weights = copied("flipped") / "block.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match="has sha256"):
        read_trained(str(tmp_path / "flipped"))
    (copied("no_config") / "config.json").unlink()
    with pytest.raises(UserError, match=r"has a result but no config.json"):
        read_trained(str(tmp_path / "no_config"))
    run = RunFiles(FolderObjects(copied("misshapen")))
    run.finish({"norm1.weight": torch.ones(3)}, {**trained.result})
    with pytest.raises(UserError, match="do not make a Raptor"):
        read_trained(str(tmp_path / "misshapen"))

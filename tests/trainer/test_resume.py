"""D7: a run that was interrupted and resumed equals one that was not, bit for bit: weights, optimizer, metrics."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.console import ExitCode, run_door
from infra.objects import FolderObjects, MemoryObjects, open_objects
from tests.trainer.ranks import start_process
from tests.trainer.tiny import CPU, tiny_config, tiny_data, write_tiny_pair
from trainer.__main__ import main
from trainer.config import TrainConfig
from trainer.data import TrainingData, open_training_data
from trainer.run_files import RunFiles
from trainer.train import train

TIMES = ("samples_per_s", "loader_wait")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return tiny_data(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def undisturbed(data: TrainingData) -> RunFiles:
    run = RunFiles(MemoryObjects())
    assert train(tiny_config(), data, run, machine=CPU) is not None
    return run


def metrics_of(run: RunFiles) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in run.read_metrics()]


def assert_same_run(found: RunFiles, expected: RunFiles) -> None:
    for name, value in expected.read_weights().items():
        assert torch.equal(found.read_weights()[name], value), name
    old, new = expected.newest_checkpoint(), found.newest_checkpoint()
    assert old is not None
    assert new is not None
    assert (new.step, new.state) == (old.step, old.state)
    for file, tensors in old.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(new.tensors[file][name], value), (file, name)
    assert metrics_of(found) == metrics_of(expected)
    assert found.read_result() == expected.read_result()


def test_stopping_after_every_step_changes_nothing(data: TrainingData, undisturbed: RunFiles) -> None:
    run = RunFiles(MemoryObjects())
    n_starts = 1
    while train(tiny_config(), data, run, machine=CPU, stop=lambda: True) is None:
        n_starts += 1
        assert n_starts <= 13
    assert n_starts == 13  # twelve steps, then the last validation
    assert_same_run(run, undisturbed)


class Killed(Exception):
    pass


def test_dying_between_last_validation_and_result_changes_nothing(
    data: TrainingData, undisturbed: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of the last validation was written already; it does not come twice."""
    run = RunFiles(MemoryObjects())

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "finish", die)
        with pytest.raises(Killed):
            train(tiny_config(), data, run, machine=CPU)
    assert "validation" in run.read_metrics()[-1]
    assert train(tiny_config(), data, run, machine=CPU) is not None
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("crashes", [(2,), (3,), (4, 2), (11, 1, 1), (7, 1, 4)])
def test_dying_at_any_step_changes_nothing(data: TrainingData, undisturbed: RunFiles, crashes: tuple[int, ...]) -> None:
    """Nothing is saved when it dies; the run goes on from the last checkpoint, every third step."""
    run = RunFiles(MemoryObjects())
    for n_steps in crashes:
        asked = 0

        def die(after: int = n_steps) -> bool:
            nonlocal asked
            asked += 1
            if asked == after:
                raise Killed
            return False

        with pytest.raises(Killed):
            train(tiny_config(), data, run, machine=CPU, stop=die)
    assert train(tiny_config(), data, run, machine=CPU) is not None
    assert_same_run(run, undisturbed)


def test_another_seed_is_another_run(data: TrainingData, undisturbed: RunFiles) -> None:
    """So that the equalities above mean something."""
    run = RunFiles(MemoryObjects())
    train(tiny_config(seed=1), data, run, machine=CPU)
    assert metrics_of(run) != metrics_of(undisturbed)
    weights = undisturbed.read_weights()
    assert not all(torch.equal(value, weights[name]) for name, value in run.read_weights().items())


def test_interrupted_last_validation_is_made_up_for(data: TrainingData, undisturbed: RunFiles) -> None:
    """Killed between the last checkpoint and the result: the rerun validates and finishes."""
    run = RunFiles(MemoryObjects())
    asked = 0

    def stop_at_the_end() -> bool:
        nonlocal asked
        asked += 1
        return asked == tiny_config().n_steps

    assert train(tiny_config(), data, run, machine=CPU, stop=stop_at_the_end) is None
    assert run.read_result() is None
    assert train(tiny_config(), data, run, machine=CPU) is not None
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_metrics_that_were_lost_do_not_stop_a_run(
    data: TrainingData, undisturbed: RunFiles, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even after the last step: the result's training loss comes from the checkpoint."""
    objects = MemoryObjects()
    run = RunFiles(objects)
    assert not train(tiny_config(), data, run, machine=CPU, stop=StopAfter(tiny_config().n_steps))
    if damage == "missing":
        objects.delete("metrics.jsonl")
    else:
        objects.put("metrics.jsonl", objects.get("metrics.jsonl")[:-30])
    assert train(tiny_config(), data, run, machine=CPU) is not None
    assert run.read_result() == undisturbed.read_result()
    kept = metrics_of(undisturbed)
    assert metrics_of(run) == (kept[-1:] if damage == "missing" else kept[:-2] + kept[-1:])
    said = capsys.readouterr().err
    assert "metrics.jsonl is missing" in said if damage == "missing" else "1 of 6 lines are damaged" in said


class StopAfter:
    """Says yes when it is asked for the n-th time."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


def train_slowly(store: str, place: str) -> None:
    """Eight steps of twelve, a checkpoint each three of them; then it waits to be killed."""
    run, data = RunFiles(open_objects(place)), open_training_data(store, "0-2")
    asked = itertools.count(1)
    train(tiny_config(), data, run, machine=CPU, stop=lambda: next(asked) > 8 and bool(time.sleep(600)))


def type_in(arguments: Sequence[str], said: str) -> None:
    """The door in this process, which ends with its exit code; what is said goes to a file."""
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(run_door(lambda: main(arguments)))


def test_kill_minus_nine(tmp_path: Path) -> None:
    """A real SIGKILL of a real process, after its second checkpoint and before its third."""
    store = write_tiny_pair(tmp_path / "store")
    run = RunFiles(FolderObjects(tmp_path / "run"))
    process = start_process(train_slowly, store, run.location)
    wait_for(lambda: (tmp_path / "run/checkpoints/000000006.json").exists(), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run.read_result() is None
    data = open_training_data(store, "0-2")
    assert train(tiny_config(), data, run, machine=CPU) is not None
    expected = RunFiles(FolderObjects(tmp_path / "undisturbed"))
    train(tiny_config(), data, expected, machine=CPU)
    assert_same_run(run, expected)


def test_sigterm_saves_and_exits_with_75(tmp_path: Path) -> None:
    """Through the door: TERM, exit 75, the same command again, exit 0 and the weights of an undisturbed run."""
    store = write_tiny_pair(tmp_path / "store")
    # fmt: off
    arguments = ["train", "--store", store, "--block", "0-2", "--steps", "4000", "--device", "cpu",
                 "--recipe", "digits_stage1", "--run", str(tmp_path / "run")]
    # fmt: on
    process = start_process(type_in, arguments, str(tmp_path / "said"))
    wait_for(lambda: any(tmp_path.glob("run/checkpoints/*.json")), process)
    process.terminate()
    process.join(240)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == ExitCode.INTERRUPTED == 75, said
    assert "everything is saved" in said
    run = RunFiles(FolderObjects(tmp_path / "run"))
    saved = run.newest_checkpoint()
    assert saved is not None
    assert 100 <= saved.step < 4000
    config = TrainConfig.from_json(run.read_config()["train"])
    assert config.n_steps == 4000
    data = open_training_data(store, "0-2")
    again = RunFiles(MemoryObjects())
    asked = 0

    def stop_there() -> bool:
        nonlocal asked
        asked += 1
        return asked == saved.step

    assert train(config, data, again, machine=CPU, stop=stop_there) is None
    expected = again.newest_checkpoint()
    assert expected is not None
    assert saved.state == expected.state
    for file, tensors in expected.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(saved.tensors[file][name], value), (file, name)


def wait_for(condition: Any, process: BaseProcess) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.exitcode is None, "the process ended by itself"
        assert time.monotonic() < deadline, "waited for four minutes"
        time.sleep(0.02)

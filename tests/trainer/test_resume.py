"""D7: a run that was interrupted and resumed equals one that was not, bit for bit: weights, optimizer, metrics."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.console import ExitCode
from infra.objects import FolderObjects, MemoryObjects
from tests.trainer.tiny import CPU, tiny_config, tiny_data, write_tiny_pair
from trainer.config import TrainConfig
from trainer.data import TrainingData, open_training_data
from trainer.run_files import RunFiles
from trainer.train import train

TIMES = ("samples_per_s", "loader_wait")
REPO = Path(__file__).parents[2]


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


SLOW_TRAINING = """
import sys, time, torch
torch.set_num_threads(1)
from infra.objects import FolderObjects
from tests.trainer.tiny import CPU, tiny_config
from trainer.data import open_training_data
from trainer.run_files import RunFiles
from trainer.train import train
data = open_training_data(sys.argv[1], "0-2")
train(tiny_config(), data, RunFiles(FolderObjects(sys.argv[2])), machine=CPU, stop=lambda: time.sleep(0.1))
"""


def test_kill_minus_nine(tmp_path: Path) -> None:
    """A real SIGKILL of a real process, somewhere after its second checkpoint."""
    store = write_tiny_pair(tmp_path / "store")
    run = RunFiles(FolderObjects(tmp_path / "run"))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TRAINING, store, run.location], cwd=REPO, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: (tmp_path / "run/checkpoints/000000006.json").exists(), process)
        time.sleep(0.15)
        process.kill()
    assert process.returncode == -signal.SIGKILL
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
    command = [sys.executable, "-m", "trainer", "train", "--store", store, "--block", "0-2", "--steps", "4000",
               "--recipe", "digits_stage1", "--run", str(tmp_path / "run")]
    # fmt: on
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for(lambda: any(tmp_path.glob("run/checkpoints/*.json")), process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED == 75, said
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


def wait_for(condition: Any, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline, "waited for two minutes"
        time.sleep(0.02)

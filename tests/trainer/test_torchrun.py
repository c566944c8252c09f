"""torchrun starts the same command several times; together they train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.objects import FolderObjects
from tests.trainer.tiny import write_tiny_pair
from trainer.run_files import RunFiles

REPO = Path(__file__).parents[2]
PYTHON = ("-m",)
# "--", as torchrun would take our --run for a short form of its own --run-path
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--")
N_STEPS = 200


def run_trainer(
    store: str, place: Path, how: tuple[str, ...] = PYTHON, steps: int = N_STEPS, **environment: str
) -> tuple[int, str]:
    what = ["--store", store, "--block", "0-2", "--recipe", "digits_stage1", "--steps", str(steps)]
    command = [sys.executable, *how, "trainer", "train", *what, "--run", str(place)]
    done = subprocess.run(
        command,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return done.returncode, done.stdout + done.stderr


def losses(place: Path) -> list[float]:
    return [line["loss"] for line in RunFiles(FolderObjects(place)).read_metrics() if "loss" in line]


@pytest.mark.slow
def test_two_processes_of_torchrun_train_what_one_trains(tmp_path: Path) -> None:
    store = write_tiny_pair(tmp_path / "store")
    code, said = run_trainer(store, tmp_path / "one")
    assert code == 0, said
    code, said = run_trainer(store, tmp_path / "two", TORCHRUN)
    assert code == 0, said
    assert said.count("This command took") == 1, "one of them reports"
    assert losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)  # 200 steps amplify rounding
    code, said = run_trainer(store, tmp_path / "two", TORCHRUN)
    assert code == 0, said
    assert "This run is finished" in said


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all(tmp_path: Path) -> None:
    """Another config in the RUN: the first one finds out, and nothing hangs."""
    store = write_tiny_pair(tmp_path / "store")
    assert run_trainer(store, tmp_path / "run")[0] == 0
    code, said = run_trainer(store, tmp_path / "run", TORCHRUN, steps=N_STEPS + 1)
    assert code != 0
    assert "n_steps: the run has 200, this command asks for 201" in said

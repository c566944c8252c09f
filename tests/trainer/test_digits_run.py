"""The whole story on the digits, through the doors that the Makefile calls: minutes, so not in the default run."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.objects import FolderObjects
from trainer.run_files import RunFiles

REPO = Path(__file__).parents[2]


@pytest.mark.slow
def test_block_0_7_keeps_97_percent_of_the_teachers_accuracy(tmp_path: Path) -> None:
    """Rolled out through the remaining teacher blocks; an untrained block and no block at all stay under half of it."""
    for command in (
        ["pipeline", "extract", "--no-ray", "--store", str(tmp_path / "digits")],
        ["trainer", "train", "--store", str(tmp_path / "digits"), "--block", "0-7", "--run", str(tmp_path / "run")],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=REPO, check=True, timeout=1800)
    result = RunFiles(FolderObjects(tmp_path / "run")).read_result()
    assert result is not None
    baselines = result["baselines"]
    assert baselines["teacher"] >= 0.97
    assert result["validation"]["accuracy"] >= 0.97 * baselines["teacher"]
    assert baselines["untrained"] < 0.5 * baselines["teacher"]
    assert baselines["skipping"] < 0.5 * baselines["teacher"]
    assert min(result["validation"]["r2"]["all"]) > 0.94

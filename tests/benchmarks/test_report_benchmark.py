"""The benchmark of a whole report makes one from nothing, and a command that fails is no number."""

from pathlib import Path

import pytest

from benchmarks import whole_report
from infra.console import JobError


@pytest.mark.slow
def test_quick_run_makes_every_section_and_leaves_nothing(tmp_path: Path) -> None:
    result = whole_report.run(whole_report.QUICK, tmp_path)
    (row,) = result.rows
    assert not any(tmp_path.iterdir())
    assert int(row["sections"]) >= 18  # those of a Raptor and of the teacher's head among them
    assert int(row["tables"]) >= 25
    assert result.goals[0].found == row["processor seconds"]


def test_a_command_has_its_own_seconds_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "spends.py").write_text(
        "import time\nx = bytearray(150_000_000)\nwhile time.process_time() < 0.4: pass\n"
    )
    (tmp_path / "fails.py").write_text("import sys\nprint('what went wrong')\nsys.exit(3)\n")
    used = whole_report.timed(["spends"])
    assert 0.4 <= used.cpu_s <= 10
    assert used.wall_s >= 0.3
    assert 150e6 < used.peak_nbytes < 300e6
    with pytest.raises(JobError, match=r"python -m fails ended with code 3:\n  what went wrong"):
        whole_report.timed(["fails"])

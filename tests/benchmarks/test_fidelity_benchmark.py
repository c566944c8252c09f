"""Paired trainings run from end to end, go on where they were, and are compared with each other."""

from pathlib import Path

import pytest

from benchmarks import fidelity


def test_pairs_are_trained_once_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fidelity.run(fidelity.QUICK, tmp_path)
    assert [(row["precision"], row["seed"]) for row in first.rows] == [("float32", 0), ("int8", 0)]
    assert first.rows[0]["difference"] == "+0.00000"
    whole, rounded = (one["found"]["r2"]["all"] for one in first.details["trained"])
    goals = {goal.what: goal.found for goal in first.goals}
    lost = abs(sum(rounded) - sum(whole)) / len(whole)
    assert goals["int8 against float32, mean difference of R2"] == pytest.approx(lost, abs=1e-12)
    assert 0 < lost < 1e-4, "the stores differ, but not by much"

    def again(*_: object, **__: object) -> None:
        raise AssertionError("trained before")

    monkeypatch.setattr(fidelity, "train", again)
    assert fidelity.run(fidelity.QUICK, tmp_path).rows == first.rows

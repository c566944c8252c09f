"""The table of precisions tells what rounding does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import precision


def test_error_of_a_layer_is_that_of_uniform_rounding() -> None:
    """int8 rounds to steps of largest / 127, float16 to 11 bits: their squared errors are known."""
    states = np.random.default_rng(0).uniform(-1, 1, (8, 400, 16)).astype(np.float32)
    step = 1 / 127  # the largest of 400 is close to 1
    found = precision.layer_error("int8", states)
    assert found.relative_mse == pytest.approx((step**2 / 12) / (1 / 3), rel=0.05)
    assert found.r2 == pytest.approx(1 - found.relative_mse, abs=1e-7)  # the mean is near zero
    assert found.worst == pytest.approx(step / 2 / np.sqrt(1 / 3), rel=0.02)
    assert precision.layer_error("float16", states).relative_mse < 1e-7
    assert precision.layer_error("float32", states).worst == 0


def test_table_has_every_precision_and_the_goal_of_int8(tmp_path: Path) -> None:
    result = precision.run(replace(precision.QUICK, n_digits=4))
    assert [row["precision"] for row in result.rows] == ["float16", "bfloat16", "int8"]
    (goal,) = result.goals
    assert goal.met
    assert goal.found > 1e-6, "int8 is not exact"
    assert len(result.details["digits_vit, int8"]) == 13
    assert "| int8 " in result.save(tmp_path).read_text()


def test_bytes_of_int8_at_vit_b_size() -> None:
    ratio = precision._sample_nbytes("int8", 16, 768) / precision._sample_nbytes("float16", 16, 768)
    assert ratio == (256 + 4) / 512 <= precision.MOST_BYTES

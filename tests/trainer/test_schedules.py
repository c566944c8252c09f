"""Learning rate and teacher-forcing weight, against the published numbers and by property."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.published import GOLDEN
from trainer.schedules import learning_rate, teacher_forcing_ratio, warmup_cosine

PUBLISHED = {"peak": 3e-4, "final": 1e-6, "warmup_steps": 10_000, "total_steps": 312_500}
GOLDENS = json.loads((GOLDEN / "published_numbers.json").read_text())["schedule"]


@pytest.mark.parametrize(
    ("index", "value"),
    [  # seeds.md 1.8
        (0, 0.0),
        (1, 3.0003e-8),
        (5000, 1.50015e-4),
        (9999, 3e-4),
        (10000, 3e-4),
        (78125, 2.641177e-4),
        (161250, 1.505e-4),
        (300000, 2.257970e-6),
        (312499, 1.0000000081e-6),
        (312500, 1e-6),
        (10**9, 1e-6),
    ],
)
def test_curve_has_the_golden_values(index, value):  # D1
    assert warmup_cosine(index, **PUBLISHED) == pytest.approx(value, rel=1e-6)


def test_curve_equals_the_published_code():  # D1; it stores float32
    for index, value in GOLDENS["published"].items():
        assert warmup_cosine(int(index), **PUBLISHED) == pytest.approx(value, rel=2e-7)
    for warmup_steps, values in GOLDENS["short"].items():
        ours = [
            warmup_cosine(i, peak=0.1, final=0.01, warmup_steps=int(warmup_steps), total_steps=12)
            for i in range(len(values))
        ]
        assert ours == pytest.approx(values, rel=2e-7)


def test_compat_uses_the_next_index():  # D2
    for step in (0, 1, 9_998, 9_999, 10_000, 312_498, 312_499, 400_000):
        assert learning_rate(step, **PUBLISHED, compat=True) == warmup_cosine(step + 1, **PUBLISHED)
        assert learning_rate(step, **PUBLISHED) == warmup_cosine(step, **PUBLISHED)
    assert learning_rate(0, **PUBLISHED) == 0.0
    assert learning_rate(0, **PUBLISHED, compat=True) == pytest.approx(3.0003e-8, rel=1e-4)


def test_published_training_used_these_rates():  # D2: recorded from their optimizer after each of their steps
    numbers = json.loads((GOLDEN / "published_numbers.json").read_text())["training"]
    rates = numbers["stage1 block 4-7 annealed mse"]["learning_rates"]
    ours = [
        learning_rate(step, peak=3e-3, final=1e-6, warmup_steps=8, total_steps=40, compat=True) for step in range(40)
    ]
    assert ours == pytest.approx(rates, rel=2e-7)


@given(warmup_steps=st.integers(0, 50), cosine_steps=st.integers(0, 50), index=st.integers(0, 120))
def test_curve_rises_then_falls_within_its_bounds(warmup_steps, cosine_steps, index):
    def at(i: int) -> float:
        return warmup_cosine(i, peak=1.0, final=0.1, warmup_steps=warmup_steps, total_steps=warmup_steps + cosine_steps)

    assert 0.0 <= at(index) <= 1.0
    if index + 1 < warmup_steps:
        assert at(index) < at(index + 1)
    if index >= warmup_steps:
        assert at(index) >= at(index + 1) >= 0.1


@pytest.mark.parametrize("wrong", [{"index": -1}, {"warmup_steps": -1}, {"warmup_steps": 13}])
def test_curve_refuses_numbers_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match="0 <= warmup_steps <= total_steps"):
        warmup_cosine(**({"index": 0, "peak": 1.0, "final": 0.0, "warmup_steps": 2, "total_steps": 12} | wrong))


def test_teacher_forcing_falls_in_a_line_to_zero():  # C12
    def ratio(step: int) -> float:
        return teacher_forcing_ratio(step, anneal_steps=int(0.25 * 312_500))

    assert ratio(0) == 1.0
    assert ratio(39_062) == pytest.approx(0.50000640, abs=1e-9)
    assert ratio(78_124) > 0.0
    assert ratio(78_125) == ratio(10**9) == 0.0


def test_teacher_forcing_stops_at_its_minimum_and_needs_no_phase():  # C12
    assert [teacher_forcing_ratio(step, anneal_steps=4, minimum=0.4) for step in range(6)] == [
        1,
        0.75,
        0.5,
        0.4,
        0.4,
        0.4,
    ]
    assert teacher_forcing_ratio(0, anneal_steps=0) == 0.0
    for wrong in ({"step": -1}, {"anneal_steps": -1}, {"minimum": 1.5}):
        with pytest.raises(ValueError, match="expected none negative and minimum at most 1"):
            teacher_forcing_ratio(**({"step": 0, "anneal_steps": 1, "minimum": 0.0} | wrong))

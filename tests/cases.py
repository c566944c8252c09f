"""Many cases of one test of which a few prove the behaviour: those run always, the others where there is time."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def one_in(n: int, *axes: Sequence[Any]) -> list[Any]:
    """The product of axes for `parametrize`: each n-th case runs always, the others are slow.

    Each value of each axis is in a case that runs always; else n must be another.
    """
    return [pytest.param(*case, marks=marks) for case, marks in _marked(n, axes)]


def one_param_in(n: int, *axes: Sequence[Any]) -> list[Any]:
    """The same for the params of a fixture, which are tuples."""
    return [pytest.param(case, marks=marks) for case, marks in _marked(n, axes)]


def _marked(n: int, axes: Sequence[Sequence[Any]]) -> list[tuple[tuple[Any, ...], Any]]:
    cases = list(product(*axes))
    kept = cases[::n]
    assert all(any(case[axis] == value for case in kept) for axis, values in enumerate(axes) for value in values)
    return [(case, () if place % n == 0 else pytest.mark.slow) for place, case in enumerate(cases)]

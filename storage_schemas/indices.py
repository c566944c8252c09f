"""Numbers as people hand them over: Python's or NumPy's integers, one or several, in any kind of sequence."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import SupportsIndex

import numpy as np

from storage_schemas.errors import SchemaError

#: One index, or several in order; NumPy's integers are as good as Python's.
Indices = SupportsIndex | Sequence[SupportsIndex] | np.ndarray


def as_indices(asked: object, what: str) -> np.ndarray:
    """Indices as one row of integers, not yet held against any range.

    Args:
        asked: `Indices`, or whatever was given in their place.
        what: One of them in errors: "sample".

    Returns:
        (n,) integers of the type they came in; Python's own where they are too large for NumPy's.

    Raises:
        TypeError: They are something else; says what, and what to give.
    """
    is_many = hasattr(asked, "__getitem__") and not isinstance(asked, str | bytes | dict)
    if not is_many and not hasattr(asked, "__index__"):
        raise TypeError(
            f"{what}s were given as {type(asked).__name__}, expected a number, or a list, range or array of numbers: "
            "they have an order"
        )
    values = np.atleast_1d(np.asarray(asked))
    if values.dtype.kind in "fO" and isinstance(asked, Sequence) and all(type(value) is int for value in asked):
        values = np.array(asked, object)  # too large for NumPy, which would make floats of some
    if values.ndim > 1:
        raise TypeError(f"{what}s were given as an array of shape {values.shape}, expected one axis")
    if values.size and values.dtype.kind not in "iu" and not all(type(value) is int for value in values):
        raise TypeError(
            f"{what}s are {values.dtype} values, expected {what} indices; np.flatnonzero makes them of masks"
        )
    return values


def parse_layers(text: str) -> tuple[int, ...]:
    """Read `0-7` or `0,6,12`, as LAYERS= takes them.

    Returns:
        Increasing.

    Raises:
        SchemaError: It is neither, or names a layer twice.
    """
    layers: tuple[int, ...] = ()
    if match := re.fullmatch(r"(\d{1,2})-(\d{1,2})", text):
        layers = tuple(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"\d{1,2}(,\d{1,2})*", text):
        layers = tuple(sorted(int(part) for part in text.split(",")))
    if not layers:
        raise SchemaError(f"LAYERS={text}", ["expected a range such as 0-7, or a list such as 0,6,12"])
    if repeated := [a for a, b in pairwise(layers) if a == b]:
        raise SchemaError(f"LAYERS={text}", [f"{repeated[0]} is there more than once; expected each layer once"])
    return layers


def layer_runs(layers: Sequence[int]) -> list[list[int]]:
    """0, 1, 2, 5 as [0, 1, 2] and [5]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def layer_ranges(layers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0 to 2, 5`."""
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in layer_runs(layers))


def named_layers(layers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `layers 0 to 2, 5`; 5 as `layer 5`."""
    return f"{'layer' if len(layers) == 1 else 'layers'} {layer_ranges(layers)}"

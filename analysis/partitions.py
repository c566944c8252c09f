"""Partitions of layers: segments and groups, how they are shown, and others drawn at random to compare with."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

MIN_SIZE = 2

Segment = tuple[int, int]
"""Rows start to stop - 1 of a matrix over layers 1 to L: the layers that the block of span start-stop produces."""

Groups = Sequence[Sequence[int]]
"""Rows of each part, in order, the parts ordered by their first row; contiguous or not."""

_Drawn = TypeVar("_Drawn")


def groups_of(segments: Sequence[Segment]) -> list[list[int]]:
    """Half-open segments as groups of rows."""
    return [list(range(start, stop)) for start, stop in segments]


def segments_of(groups: Groups) -> list[Segment] | None:
    """Groups of rows as half-open segments; None where one is not contiguous."""
    runs = [(group[0], group[-1] + 1) for group in groups]
    return runs if all(stop - start == len(group) for (start, stop), group in zip(runs, groups)) else None


def spans_text(groups: Groups) -> str:
    """As BLOCKS= takes them, 0-7,7-10,10-12, spans that share their end states; else layers, joined by + in a group."""
    segments = segments_of(groups)
    if segments is not None:
        return ",".join(f"{start}-{stop}" for start, stop in segments)
    return " | ".join("+".join(str(row + 1) for row in group) for group in groups)


def n_contiguous(n_layers: int, k: int, min_size: int = MIN_SIZE) -> int:
    """How many ways there are to cut so many layers into k contiguous segments."""
    slack = n_layers - k * (min_size - 1)  # after each segment gave up all but one of its least layers
    return math.comb(slack - 1, k - 1) if slack >= k else 0


def random_contiguous(groups: Groups, n: int, *, seed: int = 0, min_size: int = MIN_SIZE) -> list[list[list[int]]]:
    """Other ways to cut the same layers into as many contiguous groups, drawn evenly, no two alike.

    Args:
        groups: The tested ones, which are never among the drawn.
        n: How many; fewer come where there are no more.
        seed: Of the draw.
        min_size: Layers of the smallest group allowed.
    """
    k, n_layers = len(groups), sum(map(len, groups))
    rng, tested = np.random.default_rng(seed), segments_of(groups)

    def draw() -> tuple[Segment, ...]:
        inner = np.sort(rng.choice(n_layers - k * (min_size - 1) - 1, k - 1, replace=False)) + 1
        cuts = [0, *(inner + np.arange(1, k) * (min_size - 1)).tolist(), n_layers]
        return tuple(itertools.pairwise(cuts))

    is_one = tested is not None and min(map(len, groups)) >= min_size
    n_others = n_contiguous(n_layers, k, min_size) - is_one
    found = _distinct(draw, min(n, n_others), None if tested is None else tuple(tested))
    return [groups_of(segments) for segments in found]


def random_permuted(groups: Groups, n: int, *, seed: int = 0) -> list[list[list[int]]]:
    """Groups of the same sizes with the layers permuted, drawn evenly, no two alike.

    Args:
        groups: The tested ones, which are never among the drawn.
        n: How many; fewer come where there are no more.
        seed: Of the draw.
    """
    sizes = [len(group) for group in groups]
    rng = np.random.default_rng(seed)

    def draw() -> tuple[tuple[int, ...], ...]:
        layers = iter(rng.permutation(sum(sizes)).tolist())
        return tuple(sorted(tuple(sorted(itertools.islice(layers, size))) for size in sizes))

    n_labelled = math.factorial(sum(sizes)) // math.prod(map(math.factorial, sizes))
    n_others = n_labelled // math.prod(math.factorial(sizes.count(size)) for size in set(sizes)) - 1
    found = _distinct(draw, min(n, n_others), tuple(map(tuple, groups)))
    return [[list(group) for group in drawn] for drawn in found]


def _distinct(draw: Callable[[], _Drawn], n: int, besides: _Drawn | None) -> list[_Drawn]:
    found: dict[_Drawn, None] = {}
    while len(found) < n:
        drawn = draw()
        if drawn != besides:
            found[drawn] = None
    return list(found)

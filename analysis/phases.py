"""Phases: the depth of a teacher cut into runs of layers that one block each can serve.

Two ways from a matrix of distances between layers to groups of them: the reference's recursion over exact maximum cuts
with a threshold epsilon, and the best contiguous segments for a given number k. Rows of a matrix are layers 1 to L
(layer 0 is the output of no teacher block), indices are from 0; the half-open segment (a, b) of rows is the span a-b of
states: the block that takes state a and produces a+1 to b.

Source: KempnerInstitute/raptor, max-cut notebook (seeds.md 1.12); arXiv:2512.19941, Figures 2 and 3.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from analysis.partitions import MIN_SIZE, Segment

DEFAULT_OBJECTIVE = "normalised_association"
#: Layers whose maximum cut is found by trying all: 2^29 candidates take seconds, each further layer doubles them.
MAX_CUT_LAYERS = 30

_TIE = 1e-12  # of the total distance: what rounding may add to equal cuts
_LOW_BITS = 15


@dataclass(frozen=True, kw_only=True)
class EpsilonRange:
    """What the recursion gives for every epsilon in [start, stop), absolute."""

    start: float
    stop: float
    groups: list[list[int]]


@dataclass(frozen=True)
class _Cluster:
    """A cluster of the recursion and, where it can be cut, its two sides."""

    members: tuple[int, ...]
    cut: float = 0.0
    sides: tuple["_Cluster", ...] = ()


def max_cut(distance: Float[np.ndarray, "layer layer"]) -> tuple[float, list[int]]:
    """The largest total distance between two sides that some layers can be cut into; exact.

    All 2^(n-1) candidates are tried: 0.1 s for 24 layers, some seconds for 30.

    Args:
        distance: Symmetric, not negative, zero diagonal.

    Returns:
        The weight of the cut, and the side without layer 0, in order. Of equal cuts the first in binary order, layer 1
        being the lowest bit. A weight of zero comes with an empty side.

    Raises:
        ValueError: It is no matrix of distances, or has more than 30 layers.
    """
    weights = _checked(distance)
    if len(weights) > MAX_CUT_LAYERS:
        raise ValueError(
            f"the maximum cut of {len(weights)} layers is not searched; expected at most {MAX_CUT_LAYERS}. Contiguous "
            "segments have no such limit: contiguous_segments, make phases K=3"
        )
    if len(weights) < 2:
        return 0.0, []
    best, best_mask, tie = 0.0, 0, _TIE * weights.sum()
    for high_mask, table in _cuts_by_low_mask(weights):
        if table.max() > best + tie:
            best = float(table.max())
            best_mask = (high_mask * len(table)) + int(np.argmax(table >= best - tie))
    return best, [layer for layer in range(1, len(weights)) if best_mask >> (layer - 1) & 1]


def _cuts_by_low_mask(
    weights: Float64[np.ndarray, "layer layer"],
) -> Iterator[tuple[int, Float64[np.ndarray, " mask"]]]:
    """Weights of all cuts, in binary order: for each choice of the high layers, those of all choices of the low ones.

    A layer v that joins a side adds its distances to all and takes away, twice, those to the layers of that side. So a
    table of 2^15 cuts, which stays in the processor's cache, takes one addition from the table with one layer less.
    """
    free, degree = weights[1:, 1:], weights.sum(axis=0)[1:]
    n_low = min(len(free), _LOW_BITS)
    lows = (np.arange(2**n_low)[:, None] >> np.arange(n_low) & 1).astype(np.float64)
    first = np.zeros(1)
    for v in range(n_low):
        first = np.concatenate([first, first + degree[v] - 2 * lows[: len(first), :v] @ free[v, :v]])
    joining = [degree[v] - 2 * lows @ free[v, :n_low] for v in range(n_low, len(free))]

    def tables(table: Float64[np.ndarray, " mask"], chosen: list[int], v: int) -> Iterator[tuple[int, np.ndarray]]:
        if v < n_low:
            yield sum(1 << (u - n_low) for u in chosen), table
            return
        yield from tables(table, chosen, v - 1)
        yield from tables(table + (joining[v - n_low] - 2 * free[v, chosen].sum()), [*chosen, v], v - 1)

    yield from tables(first, [], len(free) - 1)


def epsilon_recursion(
    distance: Float[np.ndarray, "layer layer"], epsilon: float, min_size: int = MIN_SIZE
) -> list[list[int]]:
    """Cut the layers in two by their maximum cut, and each side again, as long as a cut weighs more than epsilon.

    The reference's recursion: sides need not be contiguous, and a cluster of fewer than 2 min_size layers is not cut
    (one that is cut may still leave a smaller side). It visits the clusters in the order of their gains, those of the
    cuts that made them; as a cluster's cut never weighs more than its parent's, the order changes nothing.

    Args:
        distance: Rows are layers 1 to L; symmetric, not negative, zero diagonal.
        epsilon: Absolute; the reference gives it as a share of `total_distance`, such as 0.10.
        min_size: Half of the smallest number of layers that is cut.

    Returns:
        Groups of rows from 0, each in order, ordered by their first.

    Raises:
        ValueError: Lists everything that is wrong with the arguments.
    """
    problems = [] if math.isfinite(epsilon) and epsilon >= 0 else [f"epsilon is {epsilon}, expected 0 or more"]
    weights = _checked(distance, [*problems, *_min_size_problems(min_size)])
    return _groups(_grow(weights, tuple(range(len(weights))), epsilon, min_size), epsilon)


def epsilon_ranges(distance: Float[np.ndarray, "layer layer"], min_size: int = MIN_SIZE) -> list[EpsilonRange]:
    """Everything that the recursion can give, from one group to most, with the epsilons that give it."""
    weights = _checked(distance, _min_size_problems(min_size))
    root = _grow(weights, tuple(range(len(weights))), 0.0, min_size)
    ends = [math.inf, *sorted(set(_cuts(root)), reverse=True), 0.0]
    return [
        EpsilonRange(start=start, stop=stop, groups=_groups(root, start)) for stop, start in itertools.pairwise(ends)
    ]


def total_distance(distance: Float[np.ndarray, "layer layer"]) -> float:
    """Sum over the pairs of layers, each counted once; epsilons are given as shares of it."""
    return float(np.sum(distance, dtype=np.float64) / 2)


def contiguous_segments(
    distance: Float[np.ndarray, "layer layer"],
    k: int,
    objective: str = DEFAULT_OBJECTIVE,
    min_size: int = MIN_SIZE,
) -> list[Segment]:
    """The k contiguous segments of the layers with the largest score, by dynamic programming in O(k L^2).

    Args:
        distance: Rows are layers 1 to L; symmetric, not negative, zero diagonal.
        k: Number of segments.
        objective: One of `OBJECTIVES`.
        min_size: Layers of the smallest segment allowed.

    Returns:
        Half-open (start, stop) in order, from 0: (0, 7) is layers 1 to 7, the span 0-7. Of equal ones that with the
        earliest cuts.

    Raises:
        ValueError: Lists everything that is wrong with the arguments; or the objective is not defined there.
    """
    problems = partition_problems(len(distance), k, objective, min_size)
    weights = _checked(distance, problems)
    scores = _segment_scores(weights, objective, min_size)
    n_layers = len(weights)
    best = np.full((k + 1, n_layers + 1), -np.inf)  # of m segments that cover the layers from a start to the end
    best[0, n_layers] = 0.0
    next_cut = np.zeros((k + 1, n_layers + 1), int)
    for m in range(1, k + 1):
        candidates = scores + best[m - 1]  # (start, stop)
        best[m] = candidates.max(axis=1)
        next_cut[m] = np.argmax(candidates >= best[m][:, None] - _TIE * np.abs(best[m][:, None]), axis=1)
    cuts = [0]
    for m in range(k, 0, -1):
        cuts.append(int(next_cut[m, cuts[-1]]))
    return list(itertools.pairwise(cuts))


def partition_score(
    distance: Float[np.ndarray, "layer layer"], groups: Sequence[Sequence[int]], objective: str = DEFAULT_OBJECTIVE
) -> float:
    """What a partition of the layers scores, contiguous or not; more is better.

    Raises:
        ValueError: As `contiguous_segments`.
    """
    weights = _checked(distance, _objective_problems(objective))
    return sum(_group_score(weights, np.asarray(group), objective) for group in groups)


def partition_problems(n_layers: int, k: int, objective: str, min_size: int = MIN_SIZE) -> list[str]:
    """What keeps so many layers from being cut so, in words."""
    problems = [*_objective_problems(objective), *_min_size_problems(min_size)]
    if k < 1:
        problems.append(f"k is {k}, expected at least 1 segment")
    elif n_layers < k * min_size:
        problems.append(
            f"{n_layers} layers cannot be cut into {k} segments of at least {min_size}: that takes {k * min_size} "
            f"layers, so k is at most {n_layers // max(1, min_size)}"
        )
    return problems


def _within_cut(within: float, _: float, n: int, n_layers: int) -> float:
    return -within / 2


def _within_per_layer(within: float, _: float, n: int, n_layers: int) -> float:
    return -within / (2 * n)


def _within_mean(within: float, _: float, n: int, n_layers: int) -> float:
    return -within / (n * (n - 1)) if n > 1 else 0.0


def _association(within: float, to_all: float, n: int, n_layers: int) -> float:
    similarity = n * n_layers - to_all
    return (n * n - within) / similarity if similarity > 0 else math.nan


#: Score of a group of n of the L layers from the sums of distances within it and from it to all, over ordered pairs; a
#: partition's is the sum over its groups. "cut": minus the distance within, which maximises that across;
#: "cut_per_layer": each group's divided by its size; "mean_distance": minus the mean within; "normalised_association":
#: the share of a group's similarity 1 - distance, the diagonal included, that lies within it (of the published splits).
OBJECTIVES: dict[str, Callable[[float, float, int, int], float]] = {
    "normalised_association": _association,
    "cut": _within_cut,
    "cut_per_layer": _within_per_layer,
    "mean_distance": _within_mean,
}


def _group_score(
    weights: Float64[np.ndarray, "layer layer"], members: Int64[np.ndarray, " member"], objective: str
) -> float:
    rows = weights[members]
    score = OBJECTIVES[objective](float(rows[:, members].sum()), float(rows.sum()), len(members), len(weights))
    if math.isnan(score):
        raise ValueError(
            f"{objective} is not defined: layers {', '.join(str(layer + 1) for layer in members)} have no similarity "
            f"with all, {len(members) * len(weights) - rows.sum():.3g} in sum. Take another objective, such as cut"
        )
    return score


def _segment_scores(
    weights: Float64[np.ndarray, "layer layer"], objective: str, min_size: int
) -> Float64[np.ndarray, "start stop"]:
    """Scores of all half-open segments, -inf where they are shorter than allowed."""
    n_layers = len(weights)
    scores = np.full((n_layers + 1, n_layers + 1), -np.inf)
    for start in range(n_layers):
        for stop in range(start + min_size, n_layers + 1):
            scores[start, stop] = _group_score(weights, np.arange(start, stop), objective)
    return scores


def _grow(
    weights: Float64[np.ndarray, "layer layer"], members: tuple[int, ...], epsilon: float, min_size: int
) -> _Cluster:
    """A cluster with all that it is cut into where epsilon is no more than this."""
    if len(members) < 2 * min_size:
        return _Cluster(members)
    cut, side = max_cut(weights[np.ix_(members, members)])
    if cut <= epsilon:
        return _Cluster(members)
    taken = tuple(members[i] for i in side)
    left = tuple(member for member in members if member not in taken)
    sides = tuple(_grow(weights, part, epsilon, min_size) for part in (left, taken))
    return _Cluster(members, cut, sides)


def _groups(cluster: _Cluster, epsilon: float) -> list[list[int]]:
    if not cluster.sides or cluster.cut <= epsilon:
        return [list(cluster.members)]
    return sorted(group for side in cluster.sides for group in _groups(side, epsilon))


def _cuts(cluster: _Cluster) -> Iterator[float]:
    if cluster.sides:
        yield cluster.cut
        for side in cluster.sides:
            yield from _cuts(side)


def _checked(distance: Float[np.ndarray, "layer layer"], problems: Sequence[str] = ()) -> Float64[np.ndarray, "l l"]:
    """The matrix in float64, exactly symmetric with a zero diagonal; a ValueError lists the problems and its own."""
    matrix = np.asarray(distance, np.float64)
    found = [*problems, *_matrix_problems(matrix)]
    if found:
        raise ValueError("\n  ".join(["these layers cannot be cut:", *found]))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _matrix_problems(matrix: np.ndarray) -> list[str]:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        return [f"the distances have shape {matrix.shape}, expected (layer, layer)"]
    if not np.isfinite(matrix).all():
        return ["the distances hold NaN or infinity"]
    problems = []
    if (matrix < 0).any():
        problems.append(f"the distances hold {matrix.min():.3g}, expected 0 or more")
    if np.abs(matrix - matrix.T).max() > 1e-8 * np.abs(matrix).max():
        problems.append(f"the distances are not symmetric: they differ by up to {np.abs(matrix - matrix.T).max():.3g}")
    if np.abs(np.diag(matrix)).max() > 1e-6:
        problems.append(f"the diagonal holds {np.abs(np.diag(matrix)).max():.3g}, expected 0: give 1 - similarity")
    return problems


def _objective_problems(objective: str) -> list[str]:
    return [] if objective in OBJECTIVES else [f"objective is {objective!r}, expected one of {', '.join(OBJECTIVES)}"]


def _min_size_problems(min_size: int) -> list[str]:
    return [] if min_size >= 1 else [f"min_size is {min_size}, expected at least 1"]

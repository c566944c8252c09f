"""The phases of a teacher with all that they are compared with: found, as a table, as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from analysis.distances import LayerDistances
from analysis.partitions import Groups, groups_of, n_contiguous, random_contiguous, random_permuted, spans_text
from analysis.phases import (
    MAX_CUT_LAYERS,
    MIN_SIZE,
    EpsilonRange,
    contiguous_segments,
    epsilon_ranges,
    epsilon_recursion,
    partition_score,
    total_distance,
)

N_CONTROLS = 10
_CONTROL_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A partition of the layers, rows from 0, and what it scores."""

    groups: Groups
    score: float


@dataclass(frozen=True, kw_only=True)
class Phases:
    """What was found on one matrix of distances.

    Attributes:
        distance: Rows are layers 1 to L.
        objective: Of all scores.
        by_epsilon: Whether `chosen` comes from the recursion, not from the best contiguous segments.
        chosen: What BLOCKS= is made of.
        recursion: The recursion's groups at the epsilon that was asked for, if one was.
        ranges: All that the recursion gives; empty with more layers than its exact cuts are searched for.
        controls: Random partitions into as many blocks, by kind.
    """

    distance: Float64[np.ndarray, "layer layer"]
    objective: str
    by_epsilon: bool
    chosen: Scored
    recursion: Scored | None
    ranges: Sequence[EpsilonRange]
    controls: dict[str, list[Scored]]


def find_phases(
    distance: Float64[np.ndarray, "layer layer"], k: int | None, epsilon: float | None, objective: str
) -> Phases:
    """Cut the layers into k contiguous segments, or where no k is given as the recursion does at epsilon.

    Args:
        distance: Rows are layers 1 to L.
        k: Number of blocks.
        epsilon: As a share of the total distance.
        objective: Of the contiguous segments, and of all scores.

    Raises:
        ValueError: As `contiguous_segments` and `epsilon_recursion`.
    """

    def scored(groups: Groups) -> Scored:
        return Scored(groups=groups, score=partition_score(distance, groups, objective))

    recursion = None
    if epsilon is not None:
        recursion = scored(epsilon_recursion(distance, epsilon * total_distance(distance)))
    chosen = recursion if k is None else scored(groups_of(contiguous_segments(distance, k, objective)))
    if chosen is None:
        raise ValueError("give k or epsilon")
    drawn = {
        "random contiguous": random_contiguous(chosen.groups, N_CONTROLS, seed=_CONTROL_SEED),
        "random permuted": random_permuted(chosen.groups, N_CONTROLS, seed=_CONTROL_SEED),
    }
    return Phases(
        distance=distance,
        objective=objective,
        by_epsilon=k is None,
        chosen=chosen,
        recursion=recursion,
        ranges=epsilon_ranges(distance) if len(distance) <= MAX_CUT_LAYERS else [],
        controls={kind: [scored(groups) for groups in partitions] for kind, partitions in drawn.items()},
    )


def even_score(phases: Phases) -> float:
    """The best score, by as many contiguous segments, of a depth with the same similarities that moves evenly.

    Each distance is the mean of all between layers as far apart, so that no place is a better cut than its neighbours
    but for the ends. The best of all partitions beats random ones on such a depth too; only what it has above this is
    due to blocks. Layers that are all alike score 1 by the normalised association. NaN where it is not defined.
    """
    n, even = len(phases.distance), np.zeros_like(phases.distance)
    for apart in range(1, n):
        mean = np.diagonal(phases.distance, apart).mean()
        even += np.diag(np.full(n - apart, mean), apart) + np.diag(np.full(n - apart, mean), -apart)
    try:
        segments = contiguous_segments(even, len(phases.chosen.groups), phases.objective)
        return partition_score(even, groups_of(segments), phases.objective)
    except ValueError:  # an objective that is not defined on these distances
        return math.nan


def phases_table(phases: Phases) -> str:
    """Blocks, scores and what the recursion gives, as text."""
    return "\n".join([*_block_lines(phases), "", *_score_lines(phases), "", *_recursion_lines(phases)])


def phases_json(phases: Phases, measured: LayerDistances) -> dict[str, Any]:
    """The same as JSON values; layers by their numbers, epsilons as shares of the total distance."""
    total = total_distance(phases.distance)
    spans = spans_text(phases.chosen.groups)
    return {
        "n_images": measured.n_images,
        "kinds": list(measured.kinds),
        "layers": list(measured.layers),
        "objective": phases.objective,
        "min_size": MIN_SIZE,
        "chosen_by": "epsilon" if phases.by_epsilon else "k",
        "n_blocks": len(phases.chosen.groups),
        "blocks": spans.split(",") if "|" not in spans else None,
        **_partition_json(phases.chosen),
        "recursion": None if phases.recursion is None else _partition_json(phases.recursion),
        "controls": {kind: [_partition_json(one) for one in found] for kind, found in phases.controls.items()},
        "control_seed": _CONTROL_SEED,
        "total_distance": total,
        "epsilon_ranges": [
            {
                "from": found.start / total,
                "below": None if np.isinf(found.stop) else found.stop / total,
                "layers": _layers(found.groups),
            }
            for found in phases.ranges
        ],
    }


def _layers(groups: Groups) -> list[list[int]]:
    return [[row + 1 for row in group] for group in groups]


def _partition_json(found: Scored) -> dict[str, Any]:
    return {"groups": _layers(found.groups), "score": found.score}


def _block_lines(phases: Phases) -> list[str]:
    lines = ["block  span    layers  mean distance within  to all others"]
    for i, group in enumerate(phases.chosen.groups, start=1):
        rows = phases.distance[list(group)]
        others = np.delete(rows, group, axis=1)
        pairs = len(group) * (len(group) - 1)
        within = f"{rows[:, list(group)].sum() / pairs:.3f}" if pairs else "-"
        to_others = f"{others.mean():.3f}" if others.size else "-"
        lines.append(f"{i:<7d}{spans_text([group]):<8s}{len(group):<8d}{within:<22s}{to_others}")
    return lines


def _score_lines(phases: Phases) -> list[str]:
    n_ways = n_contiguous(len(phases.distance), len(phases.chosen.groups))
    how = "as the recursion gives them" if phases.by_epsilon else f"the best of {n_ways:,} contiguous partitions"
    lines = [
        f"{phases.objective.replace('_', ' ')} (more is better)",
        f"  {phases.chosen.score:9.4f}  {spans_text(phases.chosen.groups)}: {how}",
    ]
    if phases.recursion is not None and not phases.by_epsilon:
        lines.append(
            f"  {phases.recursion.score:9.4f}  {spans_text(phases.recursion.groups)}: the recursion, at EPSILON"
        )
    for kind, found in phases.controls.items():
        scores = [one.score for one in found]
        if scores:
            spread = f" ± {np.std(scores, ddof=1):.4f}" if len(scores) > 1 else ""
            lines.append(f"  {np.mean(scores):9.4f}{spread}  {len(scores)} {kind}, the best of them {max(scores):.4f}")
        else:
            lines.append(f"          -  {kind}: there is no other one of this size")
    return lines


def _recursion_lines(phases: Phases) -> list[str]:
    total = total_distance(phases.distance)
    if not phases.ranges:
        return [f"epsilon recursion: not searched with more than {MAX_CUT_LAYERS} layers"]
    lines = [f"epsilon recursion (EPSILON, as a share of the total distance {total:.2f})"]
    for found in phases.ranges:
        below = "and more" if np.isinf(found.stop) else f"to {found.stop / total:.4f}"
        n = len(found.groups)
        lines.append(
            f"  {found.start / total:.4f} {below:<10s} {n} block{'s' if n > 1 else ' '}  {spans_text(found.groups)}"
        )
    return lines

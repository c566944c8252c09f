"""Learning rate of a probe, as a pure function of the iteration."""

import math

WARMUP_START = 0.01
FLOOR = 0.01


def probe_learning_rate(
    iteration: int, *, base: float, schedule: str, n_iterations: int, warmup_iterations: int = 100
) -> float:
    """The rate of iteration `iteration`, counted from 0.

    "constant" is `base` throughout. "warmup_cosine" rises in a straight line from 1 % of base at iteration 0 to base at
    `warmup_iterations`, then falls along half a cosine to 1 % of base, which it would reach at `n_iterations`: what
    torch's LinearLR(start_factor=0.01), CosineAnnealingLR(eta_min=0.01 base), joined by SequentialLR, give.

    Args:
        iteration: From 0.
        base: Learning rate of the recipe.
        schedule: "constant" or "warmup_cosine".
        n_iterations: Of the whole training.
        warmup_iterations: Of the straight line; one that is longer than the training is cut off.

    Raises:
        ValueError: The iteration is negative, or the schedule is unknown.

    Source: seeds.md 1.11.
    """
    if iteration < 0 or schedule not in ("constant", "warmup_cosine"):
        raise ValueError(f"iteration {iteration} of schedule {schedule!r}: expected 0 or more, constant, warmup_cosine")
    if schedule == "constant":
        return base
    if iteration < warmup_iterations:
        return base * (WARMUP_START + (1 - WARMUP_START) * iteration / warmup_iterations)
    n_falling = max(n_iterations - warmup_iterations, 1)
    progress = min((iteration - warmup_iterations) / n_falling, 1.0)
    return base * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)

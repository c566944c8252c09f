"""Learning rate and teacher-forcing weight as pure functions of the step.

Nothing here holds state: resuming at a step needs the step only.
"""

import math


def warmup_cosine(index: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """The learning-rate curve: linear from 0 to peak, then half a cosine down to final.

    Indices 0 .. warmup_steps - 1 rise from 0 to peak, both included; the cosine begins at peak again and would reach
    final at total_steps; from there on it stays at final.

    Args:
        index: Place on the curve, 0 or more.
        peak: Published 3e-4.
        final: Published 1e-6.
        warmup_steps: Published 10,000; 0 for none.
        total_steps: Published 312,500 = 20 "epochs" of 1,000,000 // 64.

    Raises:
        ValueError: The numbers do not fit together; names them.

    Source: seeds.md 1.8; KempnerInstitute/raptor:raptor/scheduler.py.
    """
    if index < 0 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"index {index}, warmup_steps {warmup_steps}, total_steps {total_steps}: "
            "expected index >= 0 and 0 <= warmup_steps <= total_steps"
        )
    if index >= total_steps:
        return final
    if index < warmup_steps:
        return peak * index / max(warmup_steps - 1, 1)
    progress = (index - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))


def learning_rate(
    step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int, compat: bool = False
) -> float:
    """Learning rate of the optimizer's step `step`, counted from 0.

    Args:
        step: The step about to be taken.
        peak: And the rest: as for `warmup_cosine`.
        compat: The published loop moves its scheduler before its optimizer, so that step n uses index n + 1 and never
            the rate 0. True does the same; False uses index n.
    """
    index = step + 1 if compat else step
    return warmup_cosine(index, peak=peak, final=final, warmup_steps=warmup_steps, total_steps=total_steps)


def teacher_forcing_ratio(step: int, *, anneal_steps: int, minimum: float = 0.0) -> float:
    """Weight of the teacher-forced loss at a step: 1 at step 0, falling in a straight line to `minimum`.

    Args:
        step: Counted from 0.
        anneal_steps: Steps until the line would reach 0; published int(0.25 * 312,500) = 78,125. 0 means that there is
            no such phase: `minimum` from the first step (the published code divides by zero).
        minimum: Floor in [0, 1]; published 0.

    Raises:
        ValueError: A negative step or anneal_steps, or a minimum outside [0, 1].

    Source: seeds.md 1.7.
    """
    if step < 0 or anneal_steps < 0 or not 0.0 <= minimum <= 1.0:
        raise ValueError(
            f"step {step}, anneal_steps {anneal_steps}, minimum {minimum}: expected none negative and minimum at most 1"
        )
    if anneal_steps == 0:
        return minimum
    return max(minimum, 1.0 - step / anneal_steps)

"""Whether a quantity rises or falls over a training, tap by tap, and where it turns: what one sentence would hide."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from analysis.training.records import EpochRecord, curves_of

#: Share of the way from the first value to the peak that must be lost again for a turn to be one.
LEAST_RETREAT = 0.05
#: A peak within this last share of the epochs is no turn, but noise at the end.
_END = 0.1

#: What the paper says of a scalar over training: it rises (1) or falls (-1).
STATED = {
    "effective_rank": 1,
    "stable_rank": 1,
    "participation_ratio": 1,
    "entropy": 1,
    "flatness": 1,
    "anisotropy": -1,
}


@dataclass(frozen=True, kw_only=True)
class Trend:
    """One curve over epochs.

    Attributes:
        first: Value at the first epoch.
        last: Value at the last epoch.
        sign: Of last - first: 1 rises, -1 falls, 0 neither.
        peak: Its extreme in the direction that was asked about.
        peak_epoch: Where that is; the first of equal ones.
        retreat: (peak - last) / (peak - first): 0 where the end is the peak, 1 where all was lost again; 0 for a curve
            that never left its first value.
        turned: It retreats by LEAST_RETREAT or more, from a peak before the last tenth of the epochs.
        dip_epoch: Where it is farthest on the wrong side of its first value, though it ends on the right one; None
            where that is less than LEAST_RETREAT of the way from the first value to the peak.
    """

    first: float
    last: float
    sign: int
    peak: float
    peak_epoch: int
    retreat: float
    turned: bool
    dip_epoch: int | None


def trend(epochs: Sequence[int], values: Float[np.ndarray, " epoch"], direction: int = 1) -> Trend:
    """Of one curve.

    Args:
        epochs: Ascending.
        values: At each.
        direction: 1 asks how it rises, so that the peak is its largest value; -1 how it falls.

    Raises:
        ValueError: Fewer than two epochs, values that are not finite, another direction.
    """
    if len(epochs) != len(values) or len(epochs) < 2 or not np.isfinite(values).all() or direction not in (1, -1):
        raise ValueError(
            f"{len(values)} values at {len(epochs)} epochs, direction {direction}: expected two or more finite values, "
            "and 1 or -1"
        )
    at = int(np.argmax(direction * values))
    way, lost = values[at] - values[0], values[at] - values[-1]
    retreat = float(lost / way) if way else 0.0
    if not way and lost:  # it has only ever gone the other way
        retreat = 1.0
    low = int(np.argmin(direction * values))
    dipped = direction * (values[-1] - values[0]) > 0 and (values[0] - values[low]) / way >= LEAST_RETREAT
    before_the_end = epochs[at] <= epochs[-1] - _END * (epochs[-1] - epochs[0])
    return Trend(
        first=float(values[0]),
        last=float(values[-1]),
        sign=int(np.sign(values[-1] - values[0])),
        peak=float(values[at]),
        peak_epoch=epochs[at],
        retreat=retreat,
        turned=bool(retreat >= LEAST_RETREAT and before_the_end),
        dip_epoch=epochs[low] if dipped else None,
    )


def trends(records: Sequence[EpochRecord]) -> dict[str, dict[str, Trend]]:
    """By scalar and tap, asked about in the direction that the paper states; taps without values are left out."""
    epochs = [one.epoch for one in records]
    return {
        scalar: {
            tap: trend(epochs, values, direction)
            for tap, values in curves_of(records, scalar).items()
            if np.isfinite(values).all()
        }
        for scalar, direction in STATED.items()
    }


def turned_everywhere(found: dict[str, dict[str, Trend]]) -> list[str]:
    """Taps whose ranks and anisotropy have all turned: there the paper's sentence is wrong, whatever is looked at."""
    scalars = ("effective_rank", "stable_rank", "participation_ratio", "anisotropy")
    return [tap for tap in found[scalars[0]] if all(tap in found[s] and found[s][tap].turned for s in scalars)]


@dataclass(frozen=True, kw_only=True)
class Lead:
    """Which tap is first in a scalar at the end, and since which epoch without a break."""

    tap: str
    since: int


def lead(records: Sequence[EpochRecord], scalar: str, direction: int = 1) -> Lead:
    """The tap with the highest value (direction 1) or the lowest (-1) at the last epoch."""
    curves = {tap: values for tap, values in curves_of(records, scalar).items() if np.isfinite(values).all()}
    taps = list(curves)
    first_of = [taps[i] for i in np.argmax(direction * np.array(list(curves.values())), axis=0)]
    since = len(records) - 1
    while since and first_of[since - 1] == first_of[-1]:
        since -= 1
    return Lead(tap=first_of[-1], since=records[since].epoch)

"""Per-channel moments that merge: count, mean, M2 (sum of squared deviations), min, max, in float64."""

from dataclasses import dataclass

import numpy as np

from storage_schemas.keys import STATISTIC_NAMES


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of the valid samples' float32 states before rounding.

    Attributes:
        count: Values seen per channel, (layer, kind, dim); a token kind counts every token.
        mean: Their mean.
        m2: Sum of squared deviations from the mean; variance = m2 / count.
        min: Smallest value; +inf where count is 0.
        max: Largest value; -inf where count is 0.
    """

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Statistics":
        """Of no values."""
        return cls(
            count=np.zeros(shape),
            mean=np.zeros(shape),
            m2=np.zeros(shape),
            min=np.full(shape, np.inf),
            max=np.full(shape, -np.inf),
        )

    @property
    def variance(self) -> np.ndarray:
        """Population variance; NaN where nothing was seen."""
        with np.errstate(invalid="ignore"):
            return self.m2 / self.count

    def to_array(self) -> np.ndarray:
        """(layer, kind, statistic, dim) float64, as a shard stores it."""
        return np.stack([self.count, self.mean, self.m2, self.min, self.max], axis=-2)

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Statistics":
        """Undo `to_array`."""
        assert array.shape[-2] == len(STATISTIC_NAMES)
        count, mean, m2, low, high = np.moveaxis(array, -2, 0)
        return cls(count=count, mean=mean, m2=m2, min=low, max=high)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Moments of both sets together (Chan, Golub and LeVeque 1979); stable where the mean is large."""
    count = a.count + b.count
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(count > 0, b.count / count, 0.0)
    delta = b.mean - a.mean
    return Statistics(
        count=count,
        mean=a.mean + delta * share,
        m2=a.m2 + b.m2 + delta * delta * a.count * share,
        min=np.minimum(a.min, b.min),
        max=np.maximum(a.max, b.max),
    )

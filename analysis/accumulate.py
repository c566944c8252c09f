"""Means and spreads that grow batch by batch, in any split and over any number of workers, and what they refuse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Float64


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and spread of a quantity over rows.

    Attributes:
        n: How many rows.
        mean: NaN where n is 0.
        std: Over rows, divided by n - 1; NaN where n is below 2.
    """

    n: int
    mean: Float64[np.ndarray, "..."]
    std: Float64[np.ndarray, "..."]

    @property
    def standard_error(self) -> Float64[np.ndarray, "..."]:
        """Of the mean, as if rows were independent."""
        return self.std / np.sqrt(max(self.n, 1))


class MomentsAccumulator:
    """Count, mean and sum of squared deviations of arrays of one shape, in float64: 16 bytes an element.

    Source: Chan, Golub, LeVeque 1979; unlike sums of squares it loses nothing where the mean is large.
    """

    def __init__(self, *shape: int) -> None:
        self.n = 0
        self._mean = np.zeros(shape)
        self._m2 = np.zeros(shape)

    def update(self, values: Float[np.ndarray, "row ..."]) -> None:
        """Count rows.

        Raises:
            ValueError: Rows of another shape.
        """
        if values.shape[1:] != self._mean.shape:
            raise ValueError(f"rows have shape {values.shape[1:]}, expected {self._mean.shape}")
        if len(values):
            mean = values.mean(axis=0, dtype=np.float64)
            self._add(len(values), mean, ((values - mean) ** 2).sum(axis=0))

    def merge(self, other: Self) -> None:
        """Count what another has counted."""
        if other.n:
            self._add(other.n, other._mean, other._m2)

    def result(self) -> Moments:
        undefined = np.full(self._mean.shape, np.nan)
        return Moments(
            n=self.n,
            mean=self._mean.copy() if self.n else undefined,
            std=np.sqrt(self._m2 / (self.n - 1)) if self.n > 1 else undefined,
        )

    def _add(self, n: int, mean: np.ndarray, m2: np.ndarray) -> None:
        total = self.n + n
        away = mean - self._mean
        self._mean = self._mean + away * (n / total)
        self._m2 = self._m2 + m2 + away**2 * (self.n * n / total)
        self.n = total


def finite_mean(values: Float[np.ndarray, "..."]) -> float:
    """Mean of those that are not NaN; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def check_finite(
    states: Float[np.ndarray, "row layer *rest"], layers: Sequence[int] | None = None, what: str = "states"
) -> None:
    """Refuse NaN and infinities: one such row would make every mean it enters undefined.

    Args:
        states: Of any rows.
        layers: Names of the second axis; None for 0, 1, ...
        what: Their name in the message.

    Raises:
        ValueError: Names the layers and how many rows of each.
    """
    # A sum is finite unless a summand is not, or it overflows: then the slow way decides.
    if np.isfinite(states.sum(dtype=np.float64)):
        return
    bad = (~np.isfinite(states)).any(axis=tuple(range(2, states.ndim))).sum(axis=0)
    if bad.any():
        _raise_of_layers(bad, layers, f"{what} hold NaN or infinite values", len(states))


def unit_vectors(
    states: Float[np.ndarray, "row layer *rest dim"], layers: Sequence[int] | None = None
) -> tuple[Float64[np.ndarray, "row layer *rest dim"], Float64[np.ndarray, "row layer *rest"]]:
    """Directions and norms of states, in float64.

    Raises:
        ValueError: States with NaN or infinite values, or that are zero and so have no direction; names the layers.
    """
    check_finite(states, layers)
    wide = states.astype(np.float64)
    norms = np.sqrt(np.einsum("...d,...d->...", wide, wide))
    if not norms.all():
        zeros = (norms == 0).reshape(*norms.shape[:2], -1).any(axis=2).sum(axis=0)
        _raise_of_layers(zeros, layers, "states are zero in all channels, so that they have no direction", len(states))
    wide /= norms[..., None]
    return wide, norms


def _raise_of_layers(counts: np.ndarray, layers: Sequence[int] | None, what: str, n_rows: int) -> None:
    names = range(len(counts)) if layers is None else layers
    found = [f"layer {layer}: {n:,} of {n_rows:,} rows" for layer, n in zip(names, counts.tolist()) if n]
    raise ValueError(f"{what}: {'; '.join(found)}")

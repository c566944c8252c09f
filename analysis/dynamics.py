"""Depth as time: how states move over the unit sphere from layer to layer.

x is a token's state, u(x) = x / |x|; states with a norm of zero have no direction and are refused. Norms grow with
depth, so all but `norm` is measured on directions. Source: the Raptor paper (block-recurrent dynamics); its coherence
formula is not published, so both readings are here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Float64, Int64

from analysis.accumulate import Moments, MomentsAccumulator, unit_vectors


def angles_between(
    a: Float[np.ndarray, "*batch dim"], b: Float[np.ndarray, "*batch dim"]
) -> Float64[np.ndarray, "*batch"]:
    """Angle between unit vectors, radians, 0 to pi: 2 atan2(|a - b|, |a + b|).

    Keeps its digits near 0 and pi, where arccos of a cosine loses half of them, and has no cosine above 1 to clamp.
    """
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Means and spreads over images, each image being the mean over its tokens of one kind.

    Attributes:
        to_final: Cosine between the direction at each layer and at the last: (layer,), 1 at the last.
        norm: Length of the states: (layer,).
        speed: Angle between the directions at l and l + 1, radians: (layer - 1,), entry l of the step from l.
        state_coherence: Length of the mean direction of an image's tokens, 0 to 1, which is their mean cosine to it:
            (layer,). 1 for one token.
        update_coherence: Length of the mean over tokens of the directions of their updates u(x_l+1) - u(x_l), 0 to 1:
            (layer - 1,). A token that does not move has no direction and counts as zero.
    """

    to_final: Moments
    norm: Moments
    speed: Moments
    state_coherence: Moments
    update_coherence: Moments


class DynamicsAccumulator:
    """Dynamics of the tokens of one kind, summed over images.

    Args:
        layers: Of the states, in order, two or more; only their number counts, and their names in messages.

    Raises:
        ValueError: One layer, which goes nowhere.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        n = len(layers)
        if n < 2:
            raise ValueError(f"dynamics of {n} layers; expected 2 or more")
        self._layers = tuple(layers)
        self._parts = {
            "to_final": MomentsAccumulator(n),
            "norm": MomentsAccumulator(n),
            "speed": MomentsAccumulator(n - 1),
            "state_coherence": MomentsAccumulator(n),
            "update_coherence": MomentsAccumulator(n - 1),
        }

    def update(self, states: Float[np.ndarray, "row layer token dim"]) -> None:
        """Count images.

        Raises:
            ValueError: States that are zero or not finite; names the layers. No token.
        """
        if states.shape[2] == 0:
            raise ValueError("states have no tokens of this kind")
        units, norms = unit_vectors(states, self._layers)
        speed = angles_between(units[:, :-1], units[:, 1:]).mean(axis=2)  # before the moves: less memory at a time
        moves = np.diff(units, axis=1)
        lengths = np.linalg.norm(moves, axis=-1)
        directions = moves / np.where(lengths > 0, lengths, 1)[..., None]
        values = {
            "to_final": np.einsum("rltd,rtd->rlt", units, units[:, -1]).clip(-1, 1).mean(axis=2),
            "norm": norms.mean(axis=2),
            "speed": speed,
            "state_coherence": np.linalg.norm(units.mean(axis=2), axis=-1),
            "update_coherence": np.linalg.norm(directions.mean(axis=2), axis=-1),
        }
        for name, of_rows in values.items():
            self._parts[name].update(of_rows)

    def merge(self, other: Self) -> None:
        for name, part in self._parts.items():
            part.merge(other._parts[name])

    def result(self) -> Dynamics:
        return Dynamics(**{name: part.result() for name, part in self._parts.items()})


def angular_updates(
    states: Float[np.ndarray, "row layer token dim"], layers: Sequence[int] | None = None
) -> Float64[np.ndarray, "row step token dim"]:
    """u(x_l+1) - u(x_l): what the ranks of updates are taken of, see `analysis.spectra.CovarianceAccumulator`."""
    return np.diff(unit_vectors(states, layers)[0], axis=1)


@dataclass(frozen=True, kw_only=True)
class UpdateRanks:
    """Ranks of a matrix of updates, rows tokens and columns channels; NaN where nothing moves.

    Attributes:
        stable: Sum of squared singular values over the largest squared one.
        effective: exp of the entropy of the singular values over their sum (Roy, Vetterli 2007).
        effective_squared: The same of squared singular values.
    """

    stable: float
    effective: float
    effective_squared: float


def update_ranks(squared_singular_values: Float[np.ndarray, " direction"]) -> UpdateRanks:
    """From the eigenvalues of U'U, in any order and scale; those below zero count as zero."""
    values = np.maximum(squared_singular_values.astype(np.float64), 0)
    # Rounding leaves zeros at 1e-16 of the largest, whose square roots would be 1e-8 of it, each.
    values = np.where(values > values.max(initial=0) * len(values) * np.finfo(np.float64).eps, values, 0)
    if not values.any():
        return UpdateRanks(stable=np.nan, effective=np.nan, effective_squared=np.nan)
    return UpdateRanks(
        stable=float(values.sum() / values.max()),
        effective=_exp_entropy(np.sqrt(values)),
        effective_squared=_exp_entropy(values),
    )


def _exp_entropy(values: np.ndarray) -> float:
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def speed_phases(speeds: Float[np.ndarray, " step"], n_phases: int, least: int = 1) -> tuple[int, ...]:
    """First steps of the phases that explain the speeds best: within each they scatter least about their mean.

    Exact dynamic programme over the sum of squared deviations, (n_phases steps^2) operations.

    Args:
        speeds: Of each step l -> l + 1.
        n_phases: How many phases.
        least: Steps of a phase at least.

    Returns:
        n_phases - 1 indices into `speeds`, ascending; index i is where a phase begins.

    Raises:
        ValueError: More phases than there are steps for, or speeds that are not finite.
    """
    n = len(speeds)
    if n_phases < 1 or least < 1 or n_phases * least > n or not np.isfinite(speeds).all():
        raise ValueError(f"{n} steps are not cut into {n_phases} phases of {least} or more, of finite speeds")
    sums = np.concatenate([[0.0], np.cumsum(speeds - speeds.mean())])
    squares = np.concatenate([[0.0], np.cumsum((speeds - speeds.mean()) ** 2)])

    def scatter(start: int, stop: int) -> float:
        return float(squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / (stop - start))

    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for k in range(1, n_phases + 1):
        for stop in range(k * least, n + 1):
            starts = [s for s in range((k - 1) * least, stop - least + 1) if (k - 1, s) in best]
            if starts:
                best[k, stop] = min((best[k - 1, s][0] + scatter(s, stop), s) for s in starts)
    cuts, stop = [], n
    for k in range(n_phases, 1, -1):
        stop = best[k, stop][1]
        cuts.append(stop)
    return tuple(reversed(cuts))


#: Radians below which directions are one: states are float32 values, whose rounding turns them by more.
_ONE_DIRECTION = 1e-9


class ClassDirections:
    """Sums of the directions of each class at each layer: the first step to `Basins`. 8 layer class dim bytes."""

    def __init__(self, n_layers: int, n_classes: int, dim: int) -> None:
        self.counts = np.zeros(n_classes, np.int64)
        self._sums = np.zeros((n_classes, n_layers, dim))

    def update(self, states: Float[np.ndarray, "row layer dim"], labels: Int64[np.ndarray, " row"]) -> None:
        """Count images with their classes, 0 to n_classes - 1."""
        units, _ = unit_vectors(states)
        np.add.at(self._sums, labels, units)
        self.counts += np.bincount(labels, minlength=len(self.counts))

    def merge(self, other: Self) -> None:
        self._sums += other._sums
        self.counts += other.counts

    def result(self) -> Float64[np.ndarray, "class layer dim"]:
        """Mean direction of each class, of length 1; NaN for a class without images or whose directions cancel."""
        lengths = np.linalg.norm(self._sums, axis=-1, keepdims=True)
        return self._sums / np.where(lengths > 0, lengths, np.nan)


@dataclass(frozen=True, kw_only=True)
class Basins:
    """How far classes keep apart on the sphere, per layer.

    Attributes:
        within: Angle between a direction and the mean direction of its class, radians: mean and spread over images.
        between: Mean angle between the mean directions of two classes, radians: (layer,).
        accuracy: Share of images whose nearest mean direction is that of their own class: (layer,).
        n_classes: Classes with images.
    """

    within: Moments
    between: Float64[np.ndarray, " layer"]
    accuracy: Moments
    n_classes: int

    @property
    def separation(self) -> Float64[np.ndarray, " layer"]:
        """Within over between; small where classes are compact and apart, NaN where all have one direction."""
        undefined = np.full(len(self.between), np.nan)
        return np.divide(self.within.mean, self.between, out=undefined, where=self.between > _ONE_DIRECTION)


class BasinAccumulator:
    """Angles and nearest directions of images, given mean directions that other images have made.

    Args:
        directions: Of ClassDirections; classes with NaN take no part.

    Raises:
        ValueError: Fewer than two classes.
    """

    def __init__(self, directions: Float64[np.ndarray, "class layer dim"]) -> None:
        self._known = np.isfinite(directions).all(axis=(1, 2))
        if self._known.sum() < 2:
            raise ValueError(f"{self._known.sum()} classes have images; expected 2 or more")
        self._directions = np.nan_to_num(directions)
        self._within = MomentsAccumulator(directions.shape[1])
        self._accuracy = MomentsAccumulator(directions.shape[1])

    def update(self, states: Float[np.ndarray, "row layer dim"], labels: Int64[np.ndarray, " row"]) -> None:
        """Count images; those of classes without a direction are left out."""
        known = self._known[labels]
        units, own = unit_vectors(states[known])[0], labels[known]
        cosines = np.einsum("rld,cld->rlc", units, self._directions, optimize=True)
        cosines[:, :, ~self._known] = -np.inf
        self._within.update(angles_between(units, self._directions[own]))
        self._accuracy.update((cosines.argmax(axis=2) == own[:, None]).astype(np.float64))

    def merge(self, other: Self) -> None:
        self._within.merge(other._within)
        self._accuracy.merge(other._accuracy)

    def result(self) -> Basins:
        n_layers = self._directions.shape[1]
        return Basins(
            within=self._within.result(),
            between=np.array([_mean_angle(self._directions[self._known, layer]) for layer in range(n_layers)]),
            accuracy=self._accuracy.result(),
            n_classes=int(self._known.sum()),
        )


def _mean_angle(units: Float64[np.ndarray, "cls dim"]) -> float:
    """Mean angle over all pairs; those of one class at a time are held, as a thousand classes make half a million.

    From chords alone, 2 asin(|a - b| / 2), a third of the time of `angles_between`: 1e-8 radians off near pi.
    """
    total, differences = 0.0, np.empty_like(units)
    for i in range(len(units) - 1):
        away = np.subtract(units[i + 1 :], units[i], out=differences[i + 1 :])
        chords = np.sqrt(np.einsum("cd,cd->c", away, away))
        total += float(2 * np.arcsin(np.minimum(chords / 2, 1)).sum())
    return total / (len(units) * (len(units) - 1) / 2)

"""Spectra of covariances: how many directions the states of a layer fill, and how evenly.

Eigenvalues l_i of the covariance, p_i = l_i / sum(l). Source: Transformer Geometry Observatory (Kapil, Upla 2026),
whose names are kept. Always exp(entropy) = effective rank, 1 / anisotropy = stable rank, and
1 <= stable rank <= participation ratio <= effective rank <= D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Float64

from analysis.accumulate import check_finite

#: Least eigenvalue in the spectral flatness, as published.
FLATNESS_FLOOR = 1e-12
#: Channels of a map of a covariance: of more the eye sees noise, and a page grows by megabytes.
MOST_CHANNELS = 128
#: Singular values that are kept and shown of a spectrum, as published.
N_SINGULAR = 50


@dataclass(frozen=True, kw_only=True)
class SpectralScalars:
    """Six numbers of one spectrum; all NaN where every eigenvalue is zero: constant features have no directions.

    Attributes:
        effective_rank: exp(entropy), 1 to D.
        stable_rank: sum(l) / max(l), 1 to D.
        participation_ratio: sum(l)^2 / sum(l^2), 1 to D.
        entropy: -sum(p ln p), nats, 0 to ln D.
        flatness: Geometric over arithmetic mean of max(l, 1e-12), 0 to 1. The only one that depends on scale.
        anisotropy: max(l) / sum(l), 1/D to 1.
    """

    effective_rank: float
    stable_rank: float
    participation_ratio: float
    entropy: float
    flatness: float
    anisotropy: float


def spectral_scalars(eigenvalues: Float[np.ndarray, " direction"]) -> SpectralScalars:
    """The six scalars. Negative eigenvalues, which rounding makes, count as zero.

    Raises:
        ValueError: No eigenvalue, or one that is not finite.
    """
    if not eigenvalues.size or not np.isfinite(eigenvalues).all():
        raise ValueError(f"expected finite eigenvalues, found {eigenvalues.tolist()[:5]}")
    values = np.maximum(eigenvalues.astype(np.float64), 0)
    total, largest = values.sum(), values.max()
    if total <= 0:
        nothing = float("nan")
        return SpectralScalars(**dict.fromkeys(SpectralScalars.__dataclass_fields__, nothing))
    shares = values / total
    shares = shares[shares > 0]  # the quotient of a subnormal number may be none
    entropy = float(-(shares * np.log(shares)).sum())
    floored = np.maximum(values, FLATNESS_FLOOR)
    return SpectralScalars(
        effective_rank=float(np.exp(entropy)),
        stable_rank=float(total / largest),
        participation_ratio=float(1 / (shares**2).sum()),
        entropy=entropy,
        flatness=float(np.exp(np.log(floored).mean()) / floored.mean()),
        anisotropy=float(largest / total),
    )


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """Second moments of the vectors of each layer.

    Attributes:
        n: Vectors.
        mean: Of each channel.
        covariance: About the mean, divided by n - 1; or about zero, divided by n.
    """

    n: int
    mean: Float64[np.ndarray, "layer dim"]
    covariance: Float64[np.ndarray, "layer dim dim"]

    def eigenvalues(self) -> Float64[np.ndarray, "layer dim"]:
        """Descending, those below zero set to zero."""
        return np.maximum(np.linalg.eigvalsh(self.covariance)[:, ::-1], 0)

    def scalars(self) -> tuple[SpectralScalars, ...]:
        """Of each layer."""
        return tuple(map(spectral_scalars, self.eigenvalues()))


class CovarianceAccumulator:
    """Count, mean and sum of products of deviations, in float64: 8 layer dim (dim + 1) bytes, 61 MB for ViT-B/14.

    Batches are centred before they are multiplied, and merged as Chan, Golub, LeVeque 1979, so that a mean far from
    zero costs no digits, as sum(xx') - n mean mean' would.
    """

    def __init__(self, n_layers: int, dim: int) -> None:
        self.n = 0
        self._mean = np.zeros((n_layers, dim))
        self._products = np.zeros((n_layers, dim, dim))

    def update(self, states: Float[np.ndarray, "row layer *token dim"]) -> None:
        """Count vectors: rows, or all tokens of all rows.

        Raises:
            ValueError: NaN or infinite values; names the layers. Another number of layers or channels.
        """
        n_layers, dim = self._mean.shape
        if states.shape[1] != n_layers or states.shape[-1] != dim:
            raise ValueError(f"states have shape {states.shape}, expected {n_layers} layers and {dim} channels")
        check_finite(states)
        if not states.size:
            return
        vectors = np.moveaxis(states, 1, 0).reshape(n_layers, -1, dim).astype(np.float64)
        mean = vectors.mean(axis=1)
        vectors -= mean[:, None]
        self._add(vectors.shape[1], mean, np.swapaxes(vectors, 1, 2) @ vectors)

    def merge(self, other: Self) -> None:
        """Count what another has counted."""
        if other.n:
            self._add(other.n, other._mean, other._products)

    def result(self, *, centred: bool = True) -> Covariances:
        """Covariances; about zero instead of the mean if not centred.

        Raises:
            ValueError: Fewer vectors than it takes: 2, or 1 if not centred.
        """
        if self.n < 1 + centred:
            raise ValueError(f"covariance of {self.n} vectors; expected {1 + centred} or more")
        if centred:
            return Covariances(n=self.n, mean=self._mean.copy(), covariance=_symmetric(self._products) / (self.n - 1))
        about_zero = self._products / self.n + self._mean[:, :, None] * self._mean[:, None, :]
        return Covariances(n=self.n, mean=self._mean.copy(), covariance=_symmetric(about_zero))

    def _add(self, n: int, mean: np.ndarray, products: np.ndarray) -> None:
        total = self.n + n
        away = mean - self._mean
        self._products += products
        if self.n:
            self._products += away[:, :, None] * away[:, None, :] * (self.n * n / total)
        self._mean = self._mean + away * (n / total)
        self.n = total


def _symmetric(matrices: np.ndarray) -> np.ndarray:
    return (matrices + np.swapaxes(matrices, 1, 2)) / 2


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Curves of one spectrum.

    Attributes:
        singular_values: Square roots of the eigenvalues: singular values of the centred data over sqrt(n - 1).
        decay: Each over the first.
        explained: Share of each eigenvalue; they sum to 1.
    """

    singular_values: Float64[np.ndarray, " direction"]
    decay: Float64[np.ndarray, " direction"]
    explained: Float64[np.ndarray, " direction"]


def spectrum(eigenvalues: Float[np.ndarray, " direction"]) -> Spectrum:
    """Curves from eigenvalues in any order; NaN where all are zero."""
    values = np.sort(np.maximum(eigenvalues.astype(np.float64), 0))[::-1]
    singular = np.sqrt(values)
    undefined = np.full(len(values), np.nan)
    has_any = bool(len(values)) and values[0] > 0
    return Spectrum(
        singular_values=singular,
        decay=singular / singular[0] if has_any else undefined,
        explained=values / values.sum() if has_any else undefined,
    )


def covariance_maps(found: Covariances, chosen: Sequence[int]) -> tuple[list[Float64[np.ndarray, "shown shown"]], int]:
    """Covariances of some layers over their mean variance, channels in one order, and how many channels are shown.

    Args:
        found: Of all layers.
        chosen: Places of layers.

    Returns:
        For each, C[i, j] / (trace(C) / dim) of at most 128 channels, those of most variance at the last layer and in
        that order; NaN where nothing varies.
    """
    variances = np.diagonal(found.covariance[-1])
    order = np.argsort(-variances, kind="stable")[:MOST_CHANNELS]
    maps = []
    for i in chosen:
        mean = float(np.trace(found.covariance[i])) / len(variances)
        part = found.covariance[i][np.ix_(order, order)]
        maps.append(part / mean if mean > 0 else np.full_like(part, np.nan))
    return maps, len(order)


def expected_participation_ratio(dim: int, n: int) -> float:
    """Participation ratio of n independent isotropic Gaussian vectors of dim channels: dim / (1 + dim / n).

    From the second moment 1 + dim / n of the Marchenko-Pastur law. About what a tap of few rows can reach, where one of
    many rows reaches dim: an expectation, no bound. Spectra of different numbers of rows are to be compared against it.

    Raises:
        ValueError: dim or n below 1.
    """
    if dim < 1 or n < 1:
        raise ValueError(f"dim {dim} and n {n}; expected both 1 or more")
    return dim / (1 + dim / n)

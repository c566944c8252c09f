"""The way of tokens through depth, drawn on one plane for all checkpoints of a training.

The plane is spanned by the two principal directions of the vectors of the last checkpoint, over images and taps, so
that the ways of all checkpoints have the same axes. The patch embedding has no CLS token, row 0 of it is a patch: so
the CLS token's way begins with the positions.

Source: Transformer Geometry Observatory (Kapil, Upla 2026), which uses a randomised PCA; this one is exact.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Two directions through a point.

    Attributes:
        origin: Mean of what it was fitted to.
        axes: Orthonormal; the largest entry of each is positive, so that the same vectors give the same plane.
        explained: Share of the variance along each, in [0, 1].
    """

    origin: Float64[np.ndarray, " dim"]
    axes: Float64[np.ndarray, "2 dim"]
    explained: Float64[np.ndarray, "2"]

    def project(self, states: Float[np.ndarray, "*batch dim"]) -> Float64[np.ndarray, "*batch 2"]:
        """Coordinates in the plane, in the units of the states."""
        return (states.astype(np.float64) - self.origin) @ self.axes.T


def fit_plane(states: Float[np.ndarray, "*batch dim"]) -> Plane:
    """The plane that holds the most variance of all these vectors: their first two principal components, in float64.

    Raises:
        ValueError: Fewer than three vectors, one channel, values that are not finite, or vectors that are all the same.
    """
    dim = states.shape[-1]
    vectors = states.reshape(-1, dim).astype(np.float64) if states.size else np.zeros((0, dim))
    if len(vectors) < 3 or dim < 2 or not np.isfinite(vectors).all():
        raise ValueError(f"{len(vectors)} vectors of {dim} channels: expected 3 or more finite ones of 2 or more")
    origin = vectors.mean(axis=0)
    centred = vectors - origin
    values, directions = np.linalg.eigh(centred.T @ centred / (len(vectors) - 1))
    total = values.clip(0).sum()
    if total <= 0:
        raise ValueError("the vectors are all the same: they span no plane")
    axes = directions[:, [-1, -2]].T
    largest = axes[np.arange(2), np.abs(axes).argmax(axis=1)]
    return Plane(origin=origin, axes=axes * np.sign(largest)[:, None], explained=values[[-1, -2]].clip(0) / total)

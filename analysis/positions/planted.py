"""Data whose labels sit in sets of patches: Assumption 1 of Jelassi et al., and its control without any sets.

D patches of d values; the sets S_1..S_L partition them, C each. One set, drawn evenly, carries the label y in the
direction w*; every other patch carries a false sign, +1 or -1, with probability q. Only patches of one set agree.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Assumption 1.

    Attributes:
        sets: Number of the set of each patch; sets have one size.
        dim: Values of a patch, d.
        q: Probability that a patch outside of the label's set carries a sign, one half for each sign.
        sigma: Standard deviation of the noise along each axis; None is 1 / sqrt(d), as in Assumption 2.

    Raises:
        ValueError: What makes no such data; all problems at once.
    """

    sets: tuple[int, ...]
    dim: int
    q: float
    sigma: float | None = None

    def __post_init__(self) -> None:
        sizes = np.bincount(self.sets) if self.sets and min(self.sets) >= 0 else np.zeros(1)
        problems = []
        if len(sizes) < 2 or len(set(sizes.tolist())) != 1 or sizes[0] < 2:
            problems.append(f"sets have {sizes.tolist()} patches, expected two or more sets of one size, 2 or more")
        if self.dim < 2:
            problems.append(f"dim is {self.dim}, expected 2 or more: noise lies across the direction of the label")
        if not 0 <= self.q <= 1:
            problems.append(f"q is {self.q}, expected a probability")
        if self.sigma is not None and not 0 <= self.sigma < math.inf:
            problems.append(f"sigma is {self.sigma}, expected 0 or more")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def n_patches(self) -> int:
        """D."""
        return len(self.sets)

    @property
    def set_size(self) -> int:
        """C."""
        return self.sets.count(self.sets[0])

    @property
    def noise(self) -> float:
        """Sigma, with its default filled in."""
        return 1 / math.sqrt(self.dim) if self.sigma is None else self.sigma


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples.

    Attributes:
        x: Patches.
        y: Labels, -1 or 1.
        signal: Number of the set that carries the label; -1 where there is none.
        direction: w*, of length 1.
    """

    x: Float32[np.ndarray, "sample patch dim"]
    y: Float32[np.ndarray, " sample"]
    signal: Int64[np.ndarray, " sample"]
    direction: Float64[np.ndarray, " dim"]


def even_sets(n_patches: int, set_size: int, *, seed: int | None = None) -> tuple[int, ...]:
    """Sets of neighbouring numbers; with a seed, of patches drawn at random: nothing in the model knows of places."""
    sets = np.arange(n_patches) // set_size
    return tuple((sets if seed is None else np.random.default_rng(seed).permutation(sets)).tolist())


def grid_sets(side: int, set_side: int) -> tuple[int, ...]:
    """Square sets on a square grid of patches in row order: figure 1b has four of 2 x 2 on 4 x 4."""
    rows, columns = np.indices((side, side)) // set_side
    return tuple((rows * (side // set_side) + columns).ravel().tolist())


def draw_direction(dim: int, rng: np.random.Generator) -> Float64[np.ndarray, " dim"]:
    """A direction of length 1, all equally likely: w*."""
    drawn = rng.standard_normal(dim)
    return drawn / np.linalg.norm(drawn)


def draw_planted(
    setup: Planted, n: int, rng: np.random.Generator, direction: Float64[np.ndarray, " dim"] | None = None
) -> Drawn:
    """Samples of Assumption 1.

    X_j = y w* + xi_j for j in the drawn set, delta_j w* + xi_j for others, delta_j = 1 and -1 with probability q / 2
    each, else 0; xi_j ~ N(0, sigma² (I - w* w*ᵀ)). y is -1 or 1, evenly.

    Args:
        setup: Sizes and sets.
        n: Number of samples.
        rng: Draws everything.
        direction: w*; None draws one. Another one over the same sets is what transfer is about.
    """
    w = draw_direction(setup.dim, rng) if direction is None else direction
    sets = np.asarray(setup.sets)
    y = rng.choice([-1.0, 1.0], n)
    signal = rng.integers(0, sets.max() + 1, n)
    chance = rng.random((n, setup.n_patches))
    false_signs = np.where(chance < setup.q / 2, 1.0, np.where(chance < setup.q, -1.0, 0.0))
    along = np.where(sets[None, :] == signal[:, None], y[:, None], false_signs)
    noise = setup.noise * rng.standard_normal((n, setup.n_patches, setup.dim))
    x = noise + (along - noise @ w)[..., None] * w
    return Drawn(x=x.astype(np.float32), y=y.astype(np.float32), signal=signal.astype(np.int64), direction=w)


def planted_label(
    x: Float[np.ndarray, "sample patch dim"], sets: tuple[int, ...], direction: Float[np.ndarray, " dim"]
) -> Float64[np.ndarray, " sample"]:
    """f*(X) = sum over sets of Threshold_{0.9 C}(sum of <w*, X_i> in it), where Threshold_c(z) = z if |z| > c else 0.

    Its sign is y as long as no other set carries C equal false signs, of which there are q^C of each two.
    """
    along = np.asarray(x, dtype=np.float64) @ direction
    sums = along @ (np.asarray(sets)[:, None] == np.arange(max(sets) + 1)).astype(np.float64)
    most = 0.9 * sets.count(sets[0])
    return np.where(np.abs(sums) > most, sums, 0.0).sum(axis=1)


def draw_gaussian(
    n_patches: int, dim: int, n: int, rng: np.random.Generator, direction: Float64[np.ndarray, " dim"] | None = None
) -> Drawn:
    """The control: i.i.d. Gaussian patches, labelled by a cubic convolution of one layer that knows no sets.

    y = sign(sum_j <w*, X_j>³); X_j ~ N(0, I).
    """
    w = draw_direction(dim, rng) if direction is None else direction
    x = rng.standard_normal((n, n_patches, dim))
    y = np.sign(((x @ w) ** 3).sum(axis=1))
    return Drawn(x=x.astype(np.float32), y=y.astype(np.float32), signal=np.full(n, -1), direction=w)

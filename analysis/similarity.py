"""How similar the layers of one model, or of two, are: cosines and centred kernel alignment (CKA).

Linear CKA of representations X (row, p) and Y (row, q) is HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X',
L = Y Y'. Two estimators of HSIC, n rows:

- HSIC0, biased: sum of (H K H) * (H L H) / (n - 1)^2, H = 1 - 11'/n (Kornblith et al. 2019);
- HSIC1, unbiased: [tr(K~ L~) + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2 1'K~L~1 / (n-2)] / (n (n-3)), K~ with zeroed diagonal,
  n >= 4 (Song et al. 2012).

Minibatch CKA (Nguyen et al. 2021; Raghu et al. 2021 with 10 batches of 1,024) sums HSIC1 over batches and takes the
ratio last. Each layer's kernel is made once a batch, and all pairs of layers are then one matrix product of the kernels
as vectors; a loop over pairs makes each kernel once for every pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Float64

from analysis.accumulate import Moments, MomentsAccumulator, check_finite, unit_vectors

#: Rows of a batch, as in Raghu et al. 2021.
BATCH_ROWS = 1024
#: HSIC1 divides by n - 3.
LEAST_ROWS = 4
#: Share of the mean square that a variance of float32 features can have and still be more than rounding in float64.
NOTHING = 1e-24


@dataclass(frozen=True, kw_only=True)
class Cka:
    """CKA between each two layers.

    Attributes:
        values: Symmetric with a unit diagonal; NaN in row and column of a layer whose features are constant over the
            rows, so that the ratio is 0 / 0. HSIC1 may be below 0, and so may CKA of unrelated layers; for few rows it
            may exceed 1.
        n_rows: Rows that were counted.
        n_batches: In so many batches.
        n_dropped: Rows left out, of batches with fewer than LEAST_ROWS.
    """

    values: Float64[np.ndarray, "layer layer"]
    n_rows: int
    n_batches: int
    n_dropped: int


def dropped_text(found: Cka) -> str:
    """For after a number of images: how many more were left out; empty if none was."""
    return f" and {found.n_dropped:,} left out, of batches below {LEAST_ROWS}" if found.n_dropped else ""


def linear_kernels(
    states: Float[np.ndarray, "row layer dim"], out: Float64[np.ndarray, "layer row row"] | None = None
) -> Float64[np.ndarray, "layer row row"]:
    """X X' of each layer, of features centred over the rows, in float64: 8 layer row^2 bytes.

    Centring changes no HSIC, and keeps the digits that a large common mean would cost.

    Args:
        states: Of one batch.
        out: Where to put them.
    """
    n, n_layers, _ = states.shape
    kernels = np.empty((n_layers, n, n)) if out is None else out
    for layer in range(n_layers):
        x = states[:, layer].astype(np.float64)
        x -= x.mean(axis=0)
        np.matmul(x, x.T, out=kernels[layer])
    return kernels


def hsic0(kernels: Float64[np.ndarray, "layer row row"]) -> Float64[np.ndarray, "layer layer"]:
    """Biased HSIC between each two kernels; it is positive even where there is no relation.

    Raises:
        ValueError: Fewer than 2 rows.
    """
    n = kernels.shape[-1]
    if n < 2:
        raise ValueError(f"HSIC0 of {n} rows; expected 2 or more")
    centred = kernels - kernels.mean(axis=-1, keepdims=True)
    centred -= centred.mean(axis=-2, keepdims=True)
    flat = centred.reshape(len(kernels), -1)
    return flat @ flat.T / (n - 1) ** 2


def hsic1(
    kernels: Float64[np.ndarray, "layer row row"], others: Float64[np.ndarray, "other row row"] | None = None
) -> Float64[np.ndarray, "layer other"]:
    """Unbiased HSIC between each two kernels. Sets the diagonals of the kernels to zero.

    Args:
        kernels: Of one batch.
        others: Of the same rows, that each of the first is compared with; None compares these with themselves.

    Raises:
        ValueError: Fewer than 4 rows.
    """
    sums = _without_diagonal(kernels)
    beside, sums_beside = (kernels, sums) if others is None else (others, _without_diagonal(others))
    n = kernels.shape[-1]
    products = kernels.reshape(len(kernels), -1) @ beside.reshape(len(beside), -1).T
    products += np.outer(sums.sum(axis=-1), sums_beside.sum(axis=-1)) / ((n - 1) * (n - 2))
    products -= 2 / (n - 2) * (sums @ sums_beside.T)
    return products / (n * (n - 3))


def own_hsic1(kernels: Float64[np.ndarray, "layer row row"]) -> Float64[np.ndarray, " layer"]:
    """The diagonal of `hsic1`, alone. Sets the diagonals of the kernels to zero.

    Raises:
        ValueError: Fewer than 4 rows.
    """
    sums = _without_diagonal(kernels)
    n = kernels.shape[-1]
    products = np.einsum("lij,lij->l", kernels, kernels) + sums.sum(axis=-1) ** 2 / ((n - 1) * (n - 2))
    return (products - 2 / (n - 2) * (sums**2).sum(axis=-1)) / (n * (n - 3))


def _without_diagonal(kernels: Float64[np.ndarray, "layer row row"]) -> Float64[np.ndarray, "layer row"]:
    """Set the diagonals to zero; sums of the rows."""
    n = kernels.shape[-1]
    if n < LEAST_ROWS:
        raise ValueError(f"the unbiased HSIC divides by rows - 3: {n} rows, expected {LEAST_ROWS} or more in a batch")
    diagonal = np.arange(n)
    kernels[:, diagonal, diagonal] = 0
    return kernels.sum(axis=-1)


def ratio(hsic: Float64[np.ndarray, "layer layer"]) -> Float64[np.ndarray, "layer layer"]:
    """CKA from HSIC of all pairs; NaN where a layer's own is not positive."""
    own = np.diagonal(hsic)
    scale = np.sqrt(np.where(own > 0, own, np.nan))
    values = hsic / np.outer(scale, scale)
    return (values + values.T) / 2


class CkaAccumulator:
    """Minibatch CKA between all layers of one or more models. One `update` is one minibatch.

    Sums over batches are kept, weighted with the rows of each, so that a short last batch counts as it should; equal
    batches give the published sum. Merging is exact: it adds sums. Memory: 8 layer (layer + row^2) bytes; 13 layers and
    1,024 rows take 109 MB.

    Args:
        n_layers: Of all models together.
    """

    def __init__(self, n_layers: int) -> None:
        self._sums = np.zeros((n_layers, n_layers))
        self._variance, self._square = np.zeros(n_layers), np.zeros(n_layers)
        self.n_rows = self.n_batches = self.n_dropped = 0

    def update(self, *models: Float[np.ndarray, "row layer dim"]) -> None:
        """Count one minibatch.

        Args:
            models: States of each model for the same rows; layers and dim may differ.

        Raises:
            ValueError: NaN or infinite values; names the layers. Models with different rows, or other layers than this
                was made for.
        """
        n = len(models[0])
        found = [model.shape[1] for model in models]
        if any(len(model) != n for model in models) or sum(found) != len(self._sums):
            shapes = ", ".join(str(model.shape) for model in models)
            raise ValueError(f"models have shapes {shapes}, expected the same rows and {len(self._sums)} layers in all")
        for model in models:
            check_finite(model)
        if n < LEAST_ROWS:
            self.n_dropped += n
            return
        kernels, squares = np.empty((len(self._sums), n, n)), np.empty(len(self._sums))
        for model, stop in zip(models, np.cumsum(found).tolist()):
            mine = slice(stop - model.shape[1], stop)
            linear_kernels(model, kernels[mine])
            squares[mine] = np.einsum("rld,rld->l", model, model, dtype=np.float64)
        self.update_kernels(kernels, squares)

    def update_kernels(
        self, kernels: Float64[np.ndarray, "layer row row"], squares: Float64[np.ndarray, " layer"]
    ) -> None:
        """Count one minibatch by its kernels, for whoever cannot hold the features of all layers at a time.

        Args:
            kernels: As `linear_kernels`, of centred features; their diagonals are set to zero.
            squares: Sum of squares of each layer's features before they were centred.

        Raises:
            ValueError: Fewer than 4 rows, or values that are not finite.
        """
        check_finite(kernels[None], what="kernels")
        n = kernels.shape[-1]
        self._square += squares
        self._variance += np.einsum("lii->l", kernels)
        self._sums += n * hsic1(kernels)
        self.n_rows += n
        self.n_batches += 1

    def merge(self, other: Self) -> None:
        """Count what another has counted, on other rows."""
        self._sums += other._sums
        self._variance += other._variance
        self._square += other._square
        self.n_rows += other.n_rows
        self.n_batches += other.n_batches
        self.n_dropped += other.n_dropped

    def result(self) -> Cka:
        """The ratio of the sums.

        Raises:
            ValueError: No batch had enough rows.
        """
        if not self.n_batches:
            raise ValueError(
                f"CKA of {self.n_dropped} rows in batches of fewer than {LEAST_ROWS}: the unbiased HSIC is not defined"
            )
        hsic = self._sums.copy()
        constant = self._variance <= NOTHING * self._square
        hsic[constant, constant] = 0
        return Cka(values=ratio(hsic), n_rows=self.n_rows, n_batches=self.n_batches, n_dropped=self.n_dropped)


def minibatch_cka(
    *models: Float[np.ndarray, "row layer dim"],
    batch_rows: int = BATCH_ROWS,
    n_rows: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Cka:
    """Minibatch CKA between all layers of arrays that are held in memory.

    Args:
        models: States of each for the same rows; the result's layers are those of all, one model after the other.
        batch_rows: Rows of a batch; all rows make it the full unbiased CKA.
        n_rows: So many of the rows, drawn without replacement, for each repeat; None for all.
        repeats: Draws whose sums are added up; Raghu et al. take 20 of 10,240 rows.
        seed: Of the draws; with one repeat of all rows they stay in order.
    """
    n = len(models[0])
    taken = n if n_rows is None else n_rows
    if not 0 < taken <= n:
        raise ValueError(f"n_rows={n_rows}; expected 1 to {n}, the rows there are")
    sums = CkaAccumulator(sum(model.shape[1] for model in models))
    random = np.random.default_rng(seed)
    for _ in range(repeats):
        order = np.arange(n) if repeats == 1 and taken == n else random.permutation(n)[:taken]
        for rows in _runs(order, batch_rows):
            sums.update(*(model[rows] for model in models))
    return sums.result()


def _runs(order: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), length):
        yield order[start : start + length]


class CosineAccumulator:
    """Mean over rows of the cosine between the states of each two layers.

    Args:
        n_layers: Of the first model.
        n_others: Of a second one, whose layers are then the columns; None compares the first with itself.
        layers: Names for messages.
    """

    def __init__(self, n_layers: int, n_others: int | None = None, layers: Sequence[int] | None = None) -> None:
        self._moments = MomentsAccumulator(n_layers, n_layers if n_others is None else n_others)
        self._layers = layers

    def update(
        self,
        states: Float[np.ndarray, "row layer *token dim"],
        others: Float[np.ndarray, "row other *token dim"] | None = None,
    ) -> None:
        """Count rows; where states have tokens, each row is the mean over its tokens.

        Raises:
            ValueError: States that are zero or not finite, of other shapes, or of models with different dim.
        """
        units, _ = unit_vectors(states, self._layers)
        beside = units if others is None else unit_vectors(others)[0]
        if units.shape[-1] != beside.shape[-1]:
            raise ValueError(f"states have {units.shape[-1]} and {beside.shape[-1]} channels; cosines need the same")
        cosines = np.einsum("rltd,rmtd->rlm", _with_tokens(units), _with_tokens(beside), optimize=True)
        self._moments.update(np.clip(cosines / _n_tokens(units), -1, 1))

    def merge(self, other: Self) -> None:
        self._moments.merge(other._moments)

    def result(self) -> Moments:
        """Mean (layer, layer) in [-1, 1] and its spread over rows."""
        return self._moments.result()


def _with_tokens(units: np.ndarray) -> np.ndarray:
    return units.reshape(*units.shape[:2], _n_tokens(units), units.shape[-1])  # -1 cannot be told of no rows


def _n_tokens(units: np.ndarray) -> int:
    return int(np.prod(units.shape[2:-1]))

"""Where tokens look like the image: CKA between one token and the pixels of one patch, for all pairs.

Source: Raghu et al. 2021, figures 9 and 10. Minibatch CKA with the unbiased HSIC, as between layers.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Float64

from analysis.accumulate import check_finite, finite_mean
from analysis.similarity import NOTHING, hsic1, linear_kernels, own_hsic1


@dataclass(frozen=True, kw_only=True)
class Localisation:
    """CKA between tokens and patches of the image.

    Attributes:
        cka: NaN for a patch whose pixels, or a token whose states, are the same in all images.
        n_rows: Images.
    """

    cka: Float64[np.ndarray, "token patch"]
    n_rows: int

    @property
    def nearest(self) -> Float64[np.ndarray, " token"]:
        """The patch that each token resembles most; NaN for a token without CKA."""
        known = np.isfinite(self.cka).any(axis=1)
        found = np.full(len(self.cka), np.nan)
        found[known] = np.nanargmax(self.cka[known], axis=1)
        return found

    def own_share(self) -> float:
        """Share of tokens that resemble their own patch most, among those whose own patch has a CKA.

        The tokens must be the patches' own, in their order. Chance is 1 / patches.
        """
        own = np.isfinite(np.diagonal(self.cka))
        return float((self.nearest[own] == np.flatnonzero(own)).mean()) if own.any() else float("nan")

    def contrast(self) -> float:
        """Mean CKA of a token with its own patch, less that with the others."""
        own = np.diagonal(self.cka)
        others = self.cka[~np.eye(len(self.cka), dtype=bool)]
        return finite_mean(own) - finite_mean(others)


class LocalisationAccumulator:
    """Minibatch CKA of each token with each patch; one `update` is one minibatch, as in `CkaAccumulator`.

    Memory: 8 (token + patch) row^2 bytes: 268 MB for ViT-B/14 and 256 rows.
    """

    def __init__(self, n_tokens: int, n_patches: int) -> None:
        self._cross = np.zeros((n_tokens, n_patches))
        self._own, self._variance, self._square = (np.zeros(n_tokens + n_patches) for _ in range(3))
        self.n_rows = 0

    def update(self, tokens: Float[np.ndarray, "row token dim"], pixels: Float[np.ndarray, "row patch value"]) -> None:
        """Count one minibatch.

        Raises:
            ValueError: Fewer than 4 rows, values that are not finite, or other shapes than this was made for.
        """
        n, n_tokens = tokens.shape[:2]
        if len(pixels) != n or (n_tokens, pixels.shape[1]) != self._cross.shape:
            raise ValueError(
                f"tokens {tokens.shape} and pixels {pixels.shape}; expected the same rows, and {self._cross.shape} of "
                "tokens and patches"
            )
        check_finite(tokens, what="tokens")
        check_finite(pixels, what="pixels")
        kernels = np.empty((len(self._own), n, n))
        for part, values in ((kernels[:n_tokens], tokens), (kernels[n_tokens:], pixels)):
            linear_kernels(values, part)
        self._variance += np.einsum("lii->l", kernels)
        self._square += np.concatenate([np.einsum("rtd,rtd->t", v, v, dtype=np.float64) for v in (tokens, pixels)])
        self._cross += n * hsic1(kernels[:n_tokens], kernels[n_tokens:])
        self._own += n * own_hsic1(kernels)
        self.n_rows += n

    def merge(self, other: Self) -> None:
        """Count what another has counted, on other rows."""
        self._cross += other._cross
        self._own += other._own
        self._variance += other._variance
        self._square += other._square
        self.n_rows += other.n_rows

    def result(self) -> Localisation:
        """The ratio of the sums.

        Raises:
            ValueError: Nothing was counted.
        """
        if not self.n_rows:
            raise ValueError("localisation of no images")
        own = np.where((self._own > 0) & (self._variance > NOTHING * self._square), self._own, np.nan)
        tokens, patches = np.split(np.sqrt(own), [len(self._cross)])
        return Localisation(cka=self._cross / np.outer(tokens, patches), n_rows=self.n_rows)

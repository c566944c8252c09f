"""Depth as a linear system: one operator K for all steps of a span, x_l+1 = K x_l, and how far its powers predict.

K = Y X' (X X' + r I)^-1, columns of X and Y being consecutive states (dynamic mode decomposition). Beside K^p stand
what bounds it: a map from the first state to the p-th fitted for that p alone, and no map at all. Source: Dynamic Mode
Decomposition along Depth in Vision Transformers, arXiv 2605.07556, of which the abstract was read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex128, Float, Float64

from analysis.accumulate import unit_vectors

#: Ridge, as a share of the mean square of a channel.
RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class LinearSpan:
    """One operator over the states start to stop.

    Attributes:
        start: First state.
        stop: Last state.
        n_fitted: Images that all operators were fitted to; with fewer than channels they are mostly the ridge's.
        operator: K.
        by_power: Mean cosine on other images of K^p x_start to x_start+p, p = 1 to stop - start.
        by_endpoint: The same of the map that was fitted from x_start to x_start+p alone.
        by_identity: Of x_start itself.
    """

    start: int
    stop: int
    n_fitted: int
    operator: Float64[np.ndarray, "dim dim"]
    by_power: Float64[np.ndarray, " power"]
    by_endpoint: Float64[np.ndarray, " power"]
    by_identity: Float64[np.ndarray, " power"]

    def eigenvalues(self) -> Complex128[np.ndarray, " dim"]:
        """Of K, largest modulus first: below 1 a direction dies away, at 1 it stays, above it grows."""
        found = np.linalg.eigvals(self.operator).astype(np.complex128)
        return found[np.argsort(-np.abs(found), kind="stable")]


def fit_operator(
    before: Float[np.ndarray, "row dim"], after: Float[np.ndarray, "row dim"], ridge: int | float = RIDGE
) -> Float64[np.ndarray, "dim dim"]:
    """K with after = K before in the least squares, in float64.

    Args:
        before: States.
        after: What they became.
        ridge: r over the mean square of a channel of `before`; 0 takes the pseudo-inverse.

    Raises:
        ValueError: Other shapes, no row, a ridge below 0, or values that are not finite.
    """
    if before.shape != after.shape or not len(before) or ridge < 0:
        raise ValueError(f"states {before.shape} and {after.shape}, ridge {ridge}; expected one shape, rows, 0 or more")
    x, y = before.astype(np.float64), after.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("states hold NaN or infinite values")
    if ridge == 0:
        return np.linalg.lstsq(x, y, rcond=None)[0].T
    gram = x.T @ x
    gram[np.diag_indices(len(gram))] += ridge * np.trace(gram) / len(gram)
    return np.linalg.solve(gram, x.T @ y).T


def linear_span(
    fitted: Float[np.ndarray, "row layer dim"],
    tested: Float[np.ndarray, "other layer dim"],
    start: int,
    stop: int,
    ridge: int | float = RIDGE,
) -> LinearSpan:
    """Fit K to the steps of a span, and predict from its first state. K takes 8 dim^2 bytes.

    Args:
        fitted: One token of each image, at all layers: what K is fitted to.
        tested: Of other images, on which it is judged.
        start: First state of the span.
        stop: Last state.
        ridge: Of `fit_operator`.

    Raises:
        ValueError: A span without a step, or beyond the layers; no image; states without direction.
    """
    if not 0 <= start < stop < fitted.shape[1]:
        raise ValueError(f"span {start}-{stop}; expected a step or more within states 0 to {fitted.shape[1] - 1}")
    dim = fitted.shape[2]
    operator = fit_operator(
        fitted[:, start:stop].reshape(-1, dim), fitted[:, start + 1 : stop + 1].reshape(-1, dim), ridge
    )
    first = tested[:, start].astype(np.float64)
    predicted, by_power, by_endpoint, by_identity = first, [], [], []
    for layer in range(start + 1, stop + 1):
        predicted = predicted @ operator.T
        alone = fit_operator(fitted[:, start], fitted[:, layer], ridge)
        by_power.append(_cosine(predicted, tested[:, layer]))
        by_endpoint.append(_cosine(first @ alone.T, tested[:, layer]))
        by_identity.append(_cosine(first, tested[:, layer]))
    return LinearSpan(
        start=start,
        stop=stop,
        n_fitted=len(fitted),
        operator=operator,
        by_power=np.array(by_power),
        by_endpoint=np.array(by_endpoint),
        by_identity=np.array(by_identity),
    )


def linear_windows(
    fitted: Float[np.ndarray, "row layer dim"], tested: Float[np.ndarray, "other layer dim"], length: int
) -> Sequence[LinearSpan]:
    """The operator of every span of so many steps."""
    return [linear_span(fitted, tested, start, start + length) for start in range(fitted.shape[1] - length)]


def _cosine(found: np.ndarray, true: np.ndarray) -> float:
    a, b = (unit_vectors(one[:, None])[0][:, 0] for one in (found, true))
    return float(np.einsum("rd,rd->r", a, b).clip(-1, 1).mean())

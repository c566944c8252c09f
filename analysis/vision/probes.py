"""Linear probes by ridge regression: what a token, or a mean of tokens, tells of the class, in closed form.

With X (row, dim) and targets Y in {-1, +1} (row, class), both less their means: W = (X'X + s I)^-1 X'Y. Few images of
each class are fitted; the strength s is the best of several on other images of the training set, and the accuracy is
that on images that neither has seen. Source: Raghu et al. 2021, section 5 and appendix F (10 images of each class).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from analysis.accumulate import check_finite

#: Of the mean squared singular value of the centred rows.
STRENGTHS = tuple(float(one) for one in np.logspace(-6, 2, 9))


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Scores of the classes: x @ weights + bias; any number of probes at once in the axes before."""

    weights: Float64[np.ndarray, "*probe dim cls"]
    bias: Float64[np.ndarray, "*probe cls"]

    def scores(self, x: Float[np.ndarray, "*probe row dim"]) -> Float64[np.ndarray, "*probe row cls"]:
        return x.astype(np.float64) @ self.weights + self.bias[..., None, :]


def sign_targets(labels: Int64[np.ndarray, " row"], n_classes: int) -> Float64[np.ndarray, "row cls"]:
    """+1 at each row's class, -1 elsewhere."""
    return 2.0 * np.eye(n_classes)[labels] - 1


def ridge_path(
    x: Float[np.ndarray, "*probe row dim"], targets: Float64[np.ndarray, "row cls"], strengths: Sequence[float]
) -> Iterator[Ridge]:
    """One fit for each strength, from one decomposition; made one by one, as one may take 8 probe dim class bytes.

    Args:
        x: Rows to fit; further axes before them are probes of their own, with the same targets.
        targets: Such as `sign_targets`.
        strengths: s in units of mean squared singular value of the centred rows, so that they mean the same for layers
            of any norm. 0 is the least-norm solution without penalty, which interpolates where rows <= dim.

    Raises:
        ValueError: No rows, values that are not finite, or a strength below 0.
    """
    if not len(targets) or min(strengths, default=0.0) < 0:
        raise ValueError(f"{len(targets)} rows and strengths {list(strengths)}; expected rows, and 0 or more")
    check_finite(x.reshape(-1, 1, *x.shape[-2:]), what="states")
    wide = x.astype(np.float64)
    centre, middle = wide.mean(axis=-2, keepdims=True), targets.mean(axis=0)
    left, singular, right = np.linalg.svd(wide - centre, full_matrices=False)
    along = np.swapaxes(left, -1, -2) @ (targets - middle)
    squares = singular**2
    unit = squares.mean(axis=-1, keepdims=True)
    # Directions that rounding alone gives, such as the one that centring takes, count as nothing.
    real = singular > singular[..., :1] * max(wide.shape[-2:]) * np.finfo(np.float64).eps

    def fit(strength: float) -> Ridge:
        below = squares + strength * unit
        factor = np.divide(singular, below, out=np.zeros_like(singular), where=real & (below > 0))
        weights = np.swapaxes(right, -1, -2) @ (factor[..., None] * along)
        return Ridge(weights=weights, bias=middle - (centre @ weights)[..., 0, :])

    return (fit(strength) for strength in strengths)


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Rows of a training set by what they are for: ascending, no row twice.

    Attributes:
        fit: The first few of each class.
        tune: The next few, that the strength is chosen on.
    """

    fit: Int64[np.ndarray, " shot"]
    tune: Int64[np.ndarray, " other"]


def few_shots(labels: Int64[np.ndarray, " row"], n_shots: int) -> Shots:
    """The first rows of each class to fit, and as many of the next to choose the strength on; classes may have fewer.

    A class with fewer than 2 n_shots rows gives half of them, rounded up, to the fit.

    Args:
        labels: -1 for none.
        n_shots: Of each class.

    Raises:
        ValueError: Fewer than two classes, or none with two rows.
    """
    fit, tune = [], []
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        n_fit = min(n_shots, -(-len(rows) // 2))
        fit += rows[:n_fit].tolist()
        tune += rows[n_fit : n_fit + n_shots].tolist()
    if (n_classes := len(np.unique(labels[fit]))) < 2 or not tune:
        found = f"{n_classes} classes, {len(fit)} images to fit and {len(tune)} to tune on"
        raise ValueError(f"{found}; expected 2 classes or more, and two images of one of them")
    return Shots(fit=np.array(sorted(fit)), tune=np.array(sorted(tune)))


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What probes found.

    Attributes:
        accuracy: On rows that were neither fitted nor tuned on.
        strength: That was chosen.
    """

    accuracy: Float64[np.ndarray, " probe"]
    strength: Float64[np.ndarray, " probe"]


def probe(
    train: Float[np.ndarray, "row probe dim"],
    train_labels: Int64[np.ndarray, " row"],
    shots: Shots,
    test: Float[np.ndarray, "other probe dim"],
    test_labels: Int64[np.ndarray, " other"],
    n_classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> Probed:
    """Fit a probe to each representation, tune it, and count how often it is right.

    Ties between strengths go to the largest. Memory: 8 probe (row dim + dim class + row class) bytes a few times over.

    Args:
        train: Representations of the training rows.
        train_labels: Their classes, 0 to n_classes - 1.
        shots: Which of them are fitted and tuned on.
        test: The same representations of the test rows.
        test_labels: Their classes.
        n_classes: How many there are.
        strengths: As ridge_path.
    """
    fitted, tuned, tested = (np.swapaxes(one, 0, 1) for one in (train[shots.fit], train[shots.tune], test))
    ordered = sorted(strengths)
    right, accuracies = [], []
    for fit in ridge_path(fitted, sign_targets(train_labels[shots.fit], n_classes), ordered):
        right.append((fit.scores(tuned).argmax(axis=-1) == train_labels[shots.tune]).mean(axis=-1))
        accuracies.append((fit.scores(tested).argmax(axis=-1) == test_labels).mean(axis=-1))
    best = len(ordered) - 1 - np.argmax(right[::-1], axis=0)
    each = np.arange(len(best))
    return Probed(accuracy=np.array(accuracies)[best, each], strength=np.asarray(ordered)[best])

"""What a linear rule reaches on the planted data: fitted by logistic regression, and by adding up, exactly.

Theorem 3.1 of Jelassi et al.: any generalised linear model errs with probability 1/8 at least, as false signs of all
the patches that it adds up drown the few that agree.
"""

import numpy as np
from jaxtyping import Float64

from analysis.positions.planted import Drawn, Planted

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def linear_error(
    train: Drawn, test: Drawn, strengths: tuple[float, ...] = STRENGTHS
) -> Float64[np.ndarray, " strength"]:
    """Error on other samples of logistic regression on all D d values, for each inverse strength of its L2 penalty.

    No link of a generalised linear model matters to its sign, so that this is one of all of them.
    """
    from sklearn.linear_model import LogisticRegression  # seconds of import

    flat, other = train.x.reshape(len(train.x), -1), test.x.reshape(len(test.x), -1)
    errors = []
    for strength in strengths:
        fitted = LogisticRegression(C=strength, max_iter=500).fit(flat, train.y)
        errors.append(float((fitted.predict(other) != test.y).mean()))
    return np.array(errors)


def sum_rule_error(setup: Planted) -> float:
    """Error of sign(sum_j <w*, X_j>), with a fair coin on 0: the linear rule that knows w* and treats patches alike.

    P(C + sum of D - C false signs < 0) + P(= 0) / 2, by convolution of their distributions.
    """
    n = setup.n_patches - setup.set_size
    of_sum = np.ones(1)
    for _ in range(n):
        of_sum = np.convolve(of_sum, [setup.q / 2, 1 - setup.q, setup.q / 2])
    values = np.arange(-n, n + 1) + setup.set_size
    return float(of_sum[values < 0].sum() + of_sum[values == 0].sum() / 2)

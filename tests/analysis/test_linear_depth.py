"""Depth as a linear system: a planted one is recovered, and what is not linear is not called so."""

import numpy as np
import pytest

from analysis.linear_depth import fit_operator, linear_span, linear_windows

DIM, LAYERS = 6, 7


def operator(seed: int = 0, scale: float = 0.9) -> np.ndarray:
    return scale * np.linalg.qr(np.random.default_rng(seed).standard_normal((DIM, DIM)))[0]


def system(matrix: np.ndarray, rows: int = 40, seed: int = 1) -> np.ndarray:
    states = [np.random.default_rng(seed).standard_normal((rows, DIM))]
    for _ in range(LAYERS - 1):
        states.append(states[-1] @ matrix.T)
    return np.stack(states, axis=1)


def test_a_linear_system_is_recovered_with_its_eigenvalues_and_powers() -> None:
    matrix = operator() @ np.diag([1.0, 1.0, 0.5, 0.9, 0.2, 0.7])
    states = system(matrix)
    found = fit_operator(states[:, :-1].reshape(-1, DIM), states[:, 1:].reshape(-1, DIM), ridge=0)
    np.testing.assert_allclose(found, matrix, atol=1e-10)
    for power in range(1, LAYERS):
        np.testing.assert_allclose(np.linalg.matrix_power(found, power) @ states[:, 0].T, states[:, power].T, atol=1e-9)
    span = linear_span(states, system(matrix, seed=2), 0, LAYERS - 1, ridge=0)
    np.testing.assert_allclose(span.by_power, 1, atol=1e-10)
    np.testing.assert_allclose(span.by_endpoint, 1, atol=1e-8)
    assert (span.by_identity < 0.9).all()
    expected = np.linalg.eigvals(matrix)
    np.testing.assert_allclose(np.abs(span.eigenvalues()), np.sort(np.abs(expected))[::-1], atol=1e-9)
    for value in expected:
        assert np.abs(span.eigenvalues() - value).min() < 1e-9


def test_a_rotation_has_moduli_of_one() -> None:
    span = linear_span(system(operator(scale=1.0)), system(operator(scale=1.0), seed=5), 1, 4, ridge=0)
    np.testing.assert_allclose(np.abs(span.eigenvalues()), 1, atol=1e-9)


def test_blocks_that_do_nothing_are_the_identity() -> None:
    states = system(np.eye(DIM))
    span = linear_span(states, states, 0, 3)
    np.testing.assert_allclose(span.by_identity, 1, atol=1e-12)
    np.testing.assert_allclose(span.by_power, 1, atol=1e-6)
    np.testing.assert_allclose(np.abs(span.eigenvalues()), 1, atol=1e-3)


def test_two_operators_in_turn_are_no_one_operator() -> None:
    """Each step by itself is linear; powers of one operator do not reach where the endpoint map does."""
    one, other = operator(3, 1.0), operator(4, 1.0)
    states = {}
    for seed in (1, 2):
        path = [np.random.default_rng(seed).standard_normal((60, DIM))]
        for matrix in (one, other, one, other):
            path.append(path[-1] @ matrix.T)
        states[seed] = np.stack(path, axis=1)
    span = linear_span(states[1], states[2], 0, 4, ridge=0)
    np.testing.assert_allclose(span.by_endpoint, 1, atol=1e-8)
    assert span.by_power[-1] < 0.8
    steps = linear_windows(states[1], states[2], 1)
    assert [(one.start, one.stop) for one in steps] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert min(one.by_power[0] for one in steps) > 1 - 1e-6


def test_images_that_were_fitted_are_not_those_that_judge() -> None:
    """As many channels as images fit anything; on other images that is worth nothing."""
    random = np.random.default_rng(0)
    noise = random.standard_normal((2, DIM, 3, DIM))
    span = linear_span(noise[0], noise[1], 0, 2, ridge=0)
    assert np.abs(span.by_endpoint).max() < 0.7
    itself = linear_span(noise[0], noise[0], 0, 2, ridge=0)
    np.testing.assert_allclose(itself.by_endpoint, 1, atol=1e-9)


def test_the_ridge_has_its_closed_form() -> None:
    random = np.random.default_rng(7)
    x, y = random.standard_normal((2, 30, DIM))
    r = 0.3 * (x**2).sum() / DIM
    expected = y.T @ x @ np.linalg.inv(x.T @ x + r * np.eye(DIM))
    np.testing.assert_allclose(fit_operator(x, y, ridge=0.3), expected, atol=1e-12)


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (-1, 2), (3, LAYERS)])
def test_spans_that_are_none_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"span {start}-{stop}; expected a step or more within states 0 to 6"):
        linear_span(system(operator()), system(operator()), start, stop)


def test_bad_states_are_refused() -> None:
    states = system(operator())
    with pytest.raises(ValueError, match="ridge -1; expected"):
        fit_operator(states[:, 0], states[:, 1], ridge=-1)
    with pytest.raises(ValueError, match="expected one shape, rows"):
        fit_operator(states[:0, 0], states[:0, 1])
    states[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_operator(states[:, 1], states[:, 2])

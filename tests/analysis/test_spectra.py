"""Spectra: golden vectors, identities, numpy's covariance for any split and a large mean, the sample-size control."""

import itertools
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from analysis.spectra import (
    CovarianceAccumulator,
    covariance_maps,
    expected_participation_ratio,
    spectral_scalars,
    spectrum,
)

DIM = 6


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_golden_spectrum():
    found = spectral_scalars(np.array([1, 4, 1, 2]))
    assert found.entropy == pytest.approx(1.2130076, abs=1e-7)
    assert found.effective_rank == pytest.approx(3.3635857, abs=1e-7)
    assert found.stable_rank == 2
    assert found.participation_ratio == pytest.approx(2.9090909, abs=1e-7)
    assert found.flatness == pytest.approx(0.8408964, abs=1e-7)
    assert found.anisotropy == 0.5


@pytest.mark.parametrize("dim", [1, 2, 384])
def test_isotropic_spectrum(dim):
    found = spectral_scalars(np.full(dim, 0.7))
    expected = [dim, dim, dim, np.log(dim), 1, 1 / dim]
    np.testing.assert_allclose(astuple(found), expected, rtol=1e-12)


def test_spectrum_of_rank_one():
    found = spectral_scalars(np.array([1.0, 0, 0, 0]))
    np.testing.assert_allclose(astuple(found), [1, 1, 1, 0, 4e-9, 1], rtol=1e-6)


@example([2.0, 5e-324])
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12).filter(lambda values: max(values) > 1e-3))
def test_identities_and_order(values):
    found = spectral_scalars(np.array(values))
    assert found.effective_rank == pytest.approx(np.exp(found.entropy))
    assert found.stable_rank == pytest.approx(1 / found.anisotropy)
    in_order = [1, found.stable_rank, found.participation_ratio, found.effective_rank, len(values)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(in_order))
    assert 0 <= found.flatness <= 1 + 1e-12


def test_negative_rounding_counts_as_zero_and_no_variance_is_undefined():
    assert spectral_scalars(np.array([2.0, 1.0, -1e-17])).stable_rank == pytest.approx(1.5)
    assert np.isnan(astuple(spectral_scalars(np.zeros(3)))).all()
    with pytest.raises(ValueError, match="expected finite"):
        spectral_scalars(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="expected finite"):
        spectral_scalars(np.array([]))


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(0, 50), st.booleans())
def test_any_split_over_workers_is_numpys_covariance(cuts, seed, with_tokens):
    states = (normal(30, 2, *((3,) if with_tokens else ()), DIM, seed=seed) * 2 + 1).astype(np.float32)
    parts = [CovarianceAccumulator(2, DIM) for _ in range(3)]
    for i, rows in enumerate(np.split(np.arange(30), sorted(cuts))):
        parts[i % 3].update(states[rows])
    for part in parts[1:]:
        parts[0].merge(part)
    found, about_zero = parts[0].result(), parts[0].result(centred=False)
    for layer in range(2):
        vectors = states[:, layer].reshape(-1, DIM).astype(np.float64)
        np.testing.assert_allclose(found.covariance[layer], np.cov(vectors.T), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.mean[layer], vectors.mean(axis=0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(about_zero.covariance[layer], vectors.T @ vectors / len(vectors), rtol=1e-6)
    assert found.n == (90 if with_tokens else 30)


def test_a_mean_a_billion_times_the_spread_loses_no_digits():
    states = normal(500, 1, 3)
    far = states + 1e9
    sums = CovarianceAccumulator(1, 3)
    for rows in np.split(far, 7 * [0] + [100, 250]):
        sums.update(rows)
    np.testing.assert_allclose(sums.result().covariance[0], np.cov((far[:, 0] - 1e9).T), rtol=1e-6, atol=1e-8)
    naive = far[:, 0].T @ far[:, 0] - 500 * np.outer(far[:, 0].mean(axis=0), far[:, 0].mean(axis=0))
    assert np.abs(naive / 499 - np.cov(states[:, 0].T)).max() > 1


def test_rotation_and_scale_change_no_scalar_but_flatness():
    states = normal(200, 1, DIM) * np.array([5, 3, 2, 1, 1, 0.5])
    turn = np.linalg.qr(normal(DIM, DIM, seed=1))[0]
    found = []
    for one in (states, states @ turn, 1e4 * states):
        sums = CovarianceAccumulator(1, DIM)
        sums.update(one)
        found.append(astuple(sums.result().scalars()[0]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-9)


def test_spectrum_is_that_of_the_centred_data():
    states = normal(50, 1, DIM) * np.arange(1, DIM + 1) + 4
    sums = CovarianceAccumulator(1, DIM)
    sums.update(states)
    found = spectrum(sums.result().eigenvalues()[0])
    centred = states[:, 0] - states[:, 0].mean(axis=0)
    np.testing.assert_allclose(found.singular_values, np.linalg.svd(centred, compute_uv=False) / np.sqrt(49))
    assert found.decay[0] == 1
    np.testing.assert_allclose(found.decay, found.singular_values / found.singular_values[0])
    assert found.explained.sum() == pytest.approx(1)
    assert (np.diff(found.explained) <= 0).all()


def test_no_variance_has_no_decay():
    found = spectrum(np.zeros(3))
    assert np.isnan(found.decay).all()
    assert np.isnan(found.explained).all()
    np.testing.assert_array_equal(found.singular_values, 0)


def test_maps_of_covariances_have_the_channels_of_most_variance_in_one_order(monkeypatch):
    monkeypatch.setattr("analysis.spectra.MOST_CHANNELS", 3)
    scale = np.array([[1, 1, 1, 1, 1, 1], [1, 6, 2, 9, 4, 3]], float)
    states = (normal(400, 2, DIM) * scale).astype(np.float32)  # as states are: their sums in float64 are exact
    states[:, 0] = states[:1, 0]  # the first layer is the same for all
    sums = CovarianceAccumulator(2, DIM)
    sums.update(states)
    (constant, last), n_shown = covariance_maps(sums.result(), [0, 1])
    assert n_shown == 3
    assert np.isnan(constant).all()
    expected = np.cov(states[:, 1], rowvar=False)
    order = [3, 1, 4]
    np.testing.assert_allclose(last, expected[np.ix_(order, order)] / np.diagonal(expected).mean(), rtol=1e-9)


def test_few_rows_fill_fewer_directions_as_predicted():
    """D = 384, as published for CLS_Final: 1,000 rows against many; the prediction is that of Marchenko and Pastur."""
    dim = 384
    found = {}
    for n in (1_000, 20_000):
        sums = CovarianceAccumulator(1, dim)
        sums.update(normal(n, 1, dim))
        found[n] = sums.result().scalars()[0]
        assert found[n].participation_ratio == pytest.approx(expected_participation_ratio(dim, n), rel=0.01)
    assert found[1_000].effective_rank < 0.9 * found[20_000].effective_rank
    assert expected_participation_ratio(dim, 197_000) == pytest.approx(384, rel=0.002)
    with pytest.raises(ValueError, match="expected both 1 or more"):
        expected_participation_ratio(0, 5)


def test_bad_states_are_refused():
    sums = CovarianceAccumulator(2, DIM)
    states = normal(5, 2, DIM)
    states[3, 1, 2] = np.nan
    with pytest.raises(ValueError, match="layer 1: 1 of 5 rows"):
        sums.update(states)
    with pytest.raises(ValueError, match="expected 2 layers and 6 channels"):
        sums.update(normal(5, 3, DIM))
    with pytest.raises(ValueError, match="covariance of 0 vectors; expected 2 or more"):
        sums.result()
    sums.update(normal(1, 2, DIM))
    with pytest.raises(ValueError, match="covariance of 1 vectors; expected 2 or more"):
        sums.result()
    assert sums.result(centred=False).n == 1

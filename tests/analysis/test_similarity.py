"""CKA and cosines: closed forms, the definition pair by pair, any split into workers, and what has no value."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.similarity import (
    CkaAccumulator,
    CosineAccumulator,
    hsic0,
    hsic1,
    linear_kernels,
    minibatch_cka,
    ratio,
)

N, DIM = 24, 5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(dim: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(normal(dim, dim, seed=seed))[0]


def full_cka(*layers: np.ndarray) -> np.ndarray:
    return minibatch_cka(*(layer[:, None] for layer in layers), batch_rows=len(layers[0])).values


def biased_cka(*layers: np.ndarray) -> np.ndarray:
    return ratio(hsic0(np.concatenate([linear_kernels(layer[:, None]) for layer in layers])))


def u_statistic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """HSIC by its definition: mean over ordered quadruples of distinct rows (Song et al. 2012, equation 4)."""
    quadruples = list(itertools.permutations(range(len(k)), 4))
    return float(np.mean([k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in quadruples]))


def test_unbiased_hsic_is_the_u_statistic_over_quadruples():
    x, y = normal(6, 3), normal(6, 4, seed=1)
    kernels = np.stack([x @ x.T, y @ y.T])
    expected = [[u_statistic(a, b) for b in kernels] for a in kernels]
    np.testing.assert_allclose(hsic1(kernels.copy()), expected, rtol=1e-12)


def test_centring_changes_no_unbiased_hsic():
    x = normal(9, 4) + 3
    raw = (x @ x.T)[None]
    np.testing.assert_allclose(hsic1(linear_kernels(x[:, None])), hsic1(raw.copy()), rtol=1e-10)


@pytest.mark.parametrize("cka", [full_cka, biased_cka])
def test_rotated_and_scaled_features_are_the_same(cka):
    x = normal(N, DIM)
    np.testing.assert_allclose(cka(x, x @ rotation(DIM), -3.5 * x, x + 7), np.ones((4, 4)), atol=1e-10)


def test_biased_cka_is_its_linear_form():
    x, y = normal(N, 4), normal(N, 7, seed=1)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    expected = np.sum((y.T @ x) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert biased_cka(x, y)[0, 1] == pytest.approx(expected, rel=1e-12)


def test_unrelated_features_have_no_unbiased_hsic_on_average_and_a_biased_one():
    found = []
    for seed in range(200):
        kernels = linear_kernels(np.stack([normal(8, 20, seed=2 * seed), normal(8, 20, seed=2 * seed + 1)], axis=1))
        found.append((hsic0(kernels)[0, 1], hsic1(kernels)[0, 1]))
    biased, unbiased = np.array(found).T
    assert abs(unbiased.mean()) < 3 * unbiased.std() / np.sqrt(len(found))
    assert biased.mean() > 20 * abs(unbiased.mean())


def test_unrelated_features_have_cka_near_zero():
    assert abs(minibatch_cka(normal(2048, 1, 30), normal(2048, 1, 40, seed=1), batch_rows=128).values[0, 1]) < 0.02


def by_pairs(states: np.ndarray, batch_rows: int) -> np.ndarray:
    """The straightforward loop: every pair, every batch, both kernels each time; sums first, ratio last."""
    n_layers = states.shape[1]
    out = np.empty((n_layers, n_layers))

    def hsic(x: np.ndarray, y: np.ndarray) -> float:
        n = len(x)
        k, l = x @ x.T, y @ y.T  # noqa: E741
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        one = np.ones(n)
        total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    for i, j in itertools.product(range(n_layers), repeat=2):
        sums = np.zeros(3)
        for start in range(0, len(states), batch_rows):
            x, y = states[start : start + batch_rows, i], states[start : start + batch_rows, j]
            sums += [hsic(x, y), hsic(x, x), hsic(y, y)]
        out[i, j] = sums[0] / np.sqrt(sums[1] * sums[2])
    return out


def test_minibatch_cka_is_the_loop_over_pairs_and_batches():
    states = normal(48, 4, DIM) @ normal(DIM, DIM, seed=1) + normal(48, 1, DIM, seed=2)
    found = minibatch_cka(states, batch_rows=12)
    np.testing.assert_allclose(found.values, by_pairs(states, 12), atol=1e-12)
    assert (found.n_rows, found.n_batches, found.n_dropped) == (48, 4, 0)


def test_one_batch_of_all_rows_is_the_full_unbiased_cka():
    states = normal(30, 3, DIM) + normal(30, 1, DIM, seed=1)
    np.testing.assert_allclose(
        minibatch_cka(states, batch_rows=30).values, ratio(hsic1(linear_kernels(states))), atol=1e-14
    )


def test_a_published_draw_takes_rows_without_replacement_and_is_repeatable():
    states = normal(60, 2, DIM)
    first = minibatch_cka(states, batch_rows=10, n_rows=40, repeats=3, seed=5)
    assert (first.n_rows, first.n_batches) == (120, 12)
    again = minibatch_cka(states, batch_rows=10, n_rows=40, repeats=3, seed=5)
    np.testing.assert_array_equal(first.values, again.values)
    assert first.values[0, 1] != minibatch_cka(states, batch_rows=10, n_rows=40, repeats=3, seed=6).values[0, 1]
    with pytest.raises(ValueError, match="expected 1 to 60"):
        minibatch_cka(states, n_rows=61)


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(0, 100))
def test_any_deal_of_batches_to_workers_is_one_pass(workers, seed):
    states = (normal(6 * 7, 3, DIM, seed=seed) + normal(6 * 7, 1, DIM, seed=seed + 1)).astype(np.float32)
    parts = [CkaAccumulator(3) for _ in range(4)]
    for batch, worker in enumerate(workers):
        parts[worker].update(states[7 * batch : 7 * batch + 7])
    for part in parts[1:]:
        parts[0].merge(part)
    np.testing.assert_allclose(
        parts[0].result().values, minibatch_cka(states.astype(np.float64), batch_rows=7).values, rtol=1e-6, atol=1e-12
    )


def test_layers_of_models_of_other_width_are_compared():
    x, y = normal(40, 3, DIM), normal(40, 2, 9, seed=1)
    y[:, 1, :DIM] = x[:, 2] @ rotation(DIM)
    y[:, 1, DIM:] = 0
    found = minibatch_cka(x, y, batch_rows=20).values
    assert found.shape == (5, 5)
    assert found[2, 4] == pytest.approx(1)
    np.testing.assert_allclose(found[:3, :3], minibatch_cka(x, batch_rows=20).values, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e6 + 1 / 3])
def test_constant_features_have_no_cka_and_leave_the_others(value):
    states = normal(32, 3, DIM).astype(np.float32)
    states[:, 1] = np.float32(value)
    found = minibatch_cka(states, batch_rows=16).values
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_allclose(found[::2, ::2], minibatch_cka(states[:, ::2], batch_rows=16).values, atol=1e-12)


def test_a_small_variance_about_a_large_mean_is_not_constant():
    states = normal(32, 2, DIM)
    states[:, 1] = states[:, 0] * 1e-3 + 1000
    assert minibatch_cka(states, batch_rows=16).values[0, 1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_batches_below_four_rows_are_refused_or_left_out(n):
    with pytest.raises(ValueError, match=f"rows - 3: {n} rows, expected 4 or more"):
        hsic1(np.ones((2, n, n)))
    with pytest.raises(ValueError, match=f"CKA of {n} rows in batches of fewer than 4"):
        minibatch_cka(normal(n, 2, DIM))
    found = minibatch_cka(normal(8 + n, 2, DIM), batch_rows=8)
    assert (found.n_rows, found.n_dropped) == (8, n)
    np.testing.assert_array_equal(found.values, minibatch_cka(normal(8 + n, 2, DIM)[:8], batch_rows=8).values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulator", [CkaAccumulator, CosineAccumulator])
def test_undefined_values_are_refused_with_their_layers(bad, accumulator):
    states = normal(8, 3, DIM)
    states[[2, 5], 1, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite values: layer 1: 2 of 8 rows"):
        accumulator(3).update(states)


def test_models_with_other_rows_are_refused():
    with pytest.raises(ValueError, match="expected the same rows and 5 layers in all"):
        CkaAccumulator(5).update(normal(8, 3, DIM), normal(7, 2, DIM))


def test_one_layer_is_similar_to_itself():
    np.testing.assert_allclose(minibatch_cka(normal(8, 1, DIM)).values, [[1]])


def cosines_by_pairs(states: np.ndarray) -> np.ndarray:
    units = states / np.linalg.norm(states, axis=-1, keepdims=True)
    return np.array(
        [
            [np.mean(np.sum(units[:, i] * units[:, j], axis=-1)) for j in range(states.shape[1])]
            for i in range(states.shape[1])
        ]
    )


@given(st.lists(st.integers(0, 20), max_size=4), st.booleans())
@settings(max_examples=30)
def test_cosines_of_any_split_are_their_definition(cuts, with_tokens):
    states = normal(20, 3, *((4,) if with_tokens else ()), DIM).astype(np.float32)
    parts = [CosineAccumulator(3), CosineAccumulator(3)]
    for i, rows in enumerate(np.split(np.arange(20), sorted(cuts))):
        parts[i % 2].update(states[rows])
    parts[0].merge(parts[1])
    found = parts[0].result()
    wide = states.astype(np.float64)
    np.testing.assert_allclose(found.mean, cosines_by_pairs(wide), rtol=1e-6, atol=1e-9)
    per_row = np.array([cosines_by_pairs(row[None]) for row in wide])
    np.testing.assert_allclose(found.std, per_row.std(axis=0, ddof=1), rtol=1e-6, atol=1e-9)
    assert found.n == 20


def test_identical_layers_are_all_ones():
    """A model whose blocks change nothing: by any measure its layers are one, however many it has (E9)."""
    states = np.repeat(normal(16, 1, DIM), 7, axis=1)
    cosines = CosineAccumulator(7)
    cosines.update(states)
    np.testing.assert_allclose(cosines.result().mean, np.ones((7, 7)), atol=1e-12)
    np.testing.assert_allclose(minibatch_cka(states).values, np.ones((7, 7)), atol=1e-12)


def test_two_models_have_a_matrix_of_their_layers():
    x = normal(10, 3, DIM)
    both = CosineAccumulator(3, 2)
    both.update(x, -x[:, 1:])
    np.testing.assert_allclose(both.result().mean, -cosines_by_pairs(x)[:, 1:], atol=1e-12)
    with pytest.raises(ValueError, match="have 5 and 6 channels"):
        both.update(x, normal(10, 2, 6))


def test_states_without_direction_are_refused():
    states = normal(8, 3, DIM)
    states[3, 2] = 0
    with pytest.raises(ValueError, match="no direction: layer 12: 1 of 8 rows"):
        CosineAccumulator(3, layers=(10, 11, 12)).update(states)


def test_one_image_has_a_mean_and_no_spread():
    one = CosineAccumulator(2)
    one.update(normal(1, 2, DIM))
    assert np.isfinite(one.result().mean).all()
    assert np.isnan(one.result().std).all()

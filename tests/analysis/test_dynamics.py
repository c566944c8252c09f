"""Depth as time: planted rotations, phases, ranks and classes come back; chunks and workers change nothing."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.dynamics import (
    BasinAccumulator,
    ClassDirections,
    DynamicsAccumulator,
    angles_between,
    angular_updates,
    speed_phases,
    update_ranks,
)
from analysis.spectra import CovarianceAccumulator

DIM = 6


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def measured(states: np.ndarray):
    sums = DynamicsAccumulator(range(states.shape[1]))
    sums.update(states)
    return sums.result()


def turning(angle: float, n_layers: int, growth: float = 1.0) -> np.ndarray:
    """Tokens that turn by one angle per layer in one plane: (1, layer, 1, DIM)."""
    angles = angle * np.arange(n_layers)
    out = np.zeros((1, n_layers, 1, DIM))
    out[0, :, 0, 1], out[0, :, 0, 4] = np.cos(angles), np.sin(angles)
    return out * growth ** np.arange(n_layers)[:, None, None]


@pytest.mark.parametrize("angle", [1e-9, 0.01, 0.3, 1.0])
def test_a_fixed_rotation_is_the_speed(angle):
    found = measured(turning(angle, 4, growth=1.7))
    np.testing.assert_allclose(found.speed.mean, [angle] * 3, rtol=1e-6)
    np.testing.assert_allclose(found.to_final.mean, np.cos(angle * np.array([3, 2, 1, 0])), atol=1e-12)
    np.testing.assert_allclose(found.norm.mean, 1.7 ** np.arange(4))


def test_nothing_moves_and_everything_turns_round():
    still = measured(np.repeat(normal(5, 1, 3, DIM), 4, axis=1))
    np.testing.assert_array_equal(still.speed.mean, 0)
    np.testing.assert_array_equal(still.update_coherence.mean, 0)
    np.testing.assert_allclose(still.to_final.mean, 1)
    back = normal(5, 1, 3, DIM) * np.array([1, -1, 1])[:, None, None]
    np.testing.assert_allclose(measured(back).speed.mean, np.pi)
    np.testing.assert_allclose(measured(back).to_final.mean, [1, -1, 1])


def test_the_last_layer_is_its_own_and_scale_and_rotation_change_nothing():
    states = normal(7, 5, 3, DIM)
    plain = measured(states)
    assert plain.to_final.mean[-1] == pytest.approx(1, abs=1e-15)
    turn = np.linalg.qr(normal(DIM, DIM, seed=1))[0]
    scales = np.exp(normal(1, 5, 1, 1, seed=2))
    other = measured(states @ turn * scales)
    for name in ("to_final", "speed", "state_coherence", "update_coherence"):
        np.testing.assert_allclose(getattr(other, name).mean, getattr(plain, name).mean, rtol=1e-12, atol=1e-14)


def test_the_way_is_no_shorter_than_from_end_to_end():
    states = normal(20, 6, 1, DIM)
    ends = measured(states[:, [0, -1]]).speed
    assert measured(states).speed.mean.sum() >= ends.mean[0]


def test_angles_keep_their_digits_at_both_ends():
    a = np.array([1.0, 0.0])
    for angle in (1e-12, 1e-6, np.pi / 2, np.pi - 1e-6):
        b = np.array([np.cos(angle), np.sin(angle)])
        assert angles_between(a, b) == pytest.approx(angle, rel=1e-4)
    assert angles_between(a, a) == 0
    assert angles_between(a, -a) == pytest.approx(np.pi)


def test_speed_keeps_its_digits_at_both_ends():
    for angle in (1e-9, np.pi - 1e-7):
        found = measured(np.array([[[[1.0, 0.0]], [[np.cos(angle), np.sin(angle)]]]])).speed.mean[0]
        assert found == pytest.approx(angle, rel=1e-6)
        assert np.pi - found == pytest.approx(np.pi - angle, rel=1e-6)


def test_coherence_of_same_and_opposite_and_independent_tokens():
    one = normal(4, 2, 1, DIM)
    same = measured(np.repeat(one, 8, axis=2))
    np.testing.assert_allclose(same.state_coherence.mean, 1)
    np.testing.assert_allclose(same.update_coherence.mean, 1)
    pairs = measured(np.concatenate([one, -one], axis=2))
    np.testing.assert_allclose(pairs.state_coherence.mean, 0, atol=1e-15)
    np.testing.assert_allclose(pairs.update_coherence.mean, 0, atol=1e-15)
    n = 400
    apart = measured(normal(30, 2, n, 50))
    np.testing.assert_allclose(apart.state_coherence.mean, 1 / np.sqrt(n), rtol=0.05)


def test_state_coherence_is_the_mean_cosine_to_the_mean_direction():
    states = normal(3, 2, 9, DIM) + 1
    units = states / np.linalg.norm(states, axis=-1, keepdims=True)
    middle = units.mean(axis=2, keepdims=True)
    middle /= np.linalg.norm(middle, axis=-1, keepdims=True)
    expected = (units * middle).sum(axis=-1).mean(axis=2).mean(axis=0)
    np.testing.assert_allclose(measured(states).state_coherence.mean, expected)


@given(st.lists(st.integers(0, 15), max_size=4), st.integers(0, 50))
def test_any_split_over_workers_equals_all_at_once(cuts, seed):
    states = (normal(15, 4, 3, DIM, seed=seed) + 0.5).astype(np.float32)
    parts = [DynamicsAccumulator(range(4)) for _ in range(2)]
    for i, rows in enumerate(np.split(np.arange(15), sorted(cuts))):
        parts[i % 2].update(states[rows])
    parts[0].merge(parts[1])
    found, expected = parts[0].result(), measured(states.astype(np.float64))
    for name in vars(expected):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.n == other.n == 15
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-6)
        np.testing.assert_allclose(one.std, other.std, rtol=1e-6, atol=1e-12)


def test_what_has_no_dynamics_is_refused():
    with pytest.raises(ValueError, match="1 layers; expected 2 or more"):
        DynamicsAccumulator([5])
    with pytest.raises(ValueError, match="no tokens"):
        measured(normal(3, 2, 0, DIM))
    states = normal(3, 2, 1, DIM)
    states[1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite values: layer 1: 1 of 3 rows"):
        measured(states)
    states[1, 1] = 0
    with pytest.raises(ValueError, match="no direction: layer 1: 1 of 3 rows"):
        measured(states)


def test_one_image_has_means_and_no_spread():
    found = measured(normal(1, 3, 2, DIM))
    assert np.isfinite(found.speed.mean).all()
    assert np.isnan(found.speed.std).all()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_equal_singular_values_have_their_number_as_rank(rank):
    values = np.concatenate([np.full(rank, 2.5), np.zeros(DIM - rank)])
    found = update_ranks(values)
    for one in (found.stable, found.effective, found.effective_squared):
        assert one == pytest.approx(rank)
    scaled = update_ranks(values * 1e-9)
    assert scaled.effective == pytest.approx(found.effective)


def test_ranks_of_a_planted_matrix_through_its_products():
    """U of rank 3 in 6 channels, singular values 3, 2, 1: from U'U, as the accumulator has it, with rounding."""
    left, _ = np.linalg.qr(normal(40, 3))
    right, _ = np.linalg.qr(normal(DIM, 3, seed=1))
    u = left * [3, 2, 1] @ right.T
    sums = CovarianceAccumulator(1, DIM)
    sums.update(u[:, None])
    found = update_ranks(sums.result(centred=False).eigenvalues()[0])
    assert found.stable == pytest.approx(14 / 9)
    shares = np.array([3, 2, 1]) / 6
    assert found.effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    squares = np.array([9, 4, 1]) / 14
    assert found.effective_squared == pytest.approx(np.exp(-(squares * np.log(squares)).sum()))


def test_updates_that_are_zero_have_no_rank():
    found = update_ranks(np.zeros(4))
    assert np.isnan([found.stable, found.effective, found.effective_squared]).all()


@given(st.integers(0, 1000))
def test_ranks_are_ordered(seed):
    found = update_ranks(np.exp(normal(8, seed=seed) * 3))
    assert 1 <= found.stable <= found.effective_squared + 1e-12 <= found.effective + 2e-12
    assert found.effective <= 8 + 1e-9


def test_updates_are_differences_of_directions():
    states = normal(4, 3, 2, DIM)
    units = states / np.linalg.norm(states, axis=-1, keepdims=True)
    np.testing.assert_allclose(angular_updates(states), units[:, 1:] - units[:, :-1])


@pytest.mark.parametrize("starts", [(7, 10), (2, 3, 9), (6,), ()])
def test_planted_speeds_are_cut_where_they_change(starts):
    edges = [0, *starts, 12]
    levels = [0.1, 0.5, 0.2, 0.9]
    speeds = np.concatenate([np.full(b - a, level) for (a, b), level in zip(itertools.pairwise(edges), levels)])
    assert speed_phases(speeds + 0.02 * normal(12), len(starts) + 1) == starts


@given(st.integers(3, 8), st.integers(1, 3), st.integers(1, 2), st.integers(0, 100))
def test_speed_phases_equal_the_best_of_all_cuts(n, k, least, seed):
    speeds = normal(n, seed=seed)
    if k * least > n:
        with pytest.raises(ValueError, match="are not cut into"):
            speed_phases(speeds, k, least)
        return

    def scatter(cuts: tuple[int, ...]) -> float:
        return sum(((part - part.mean()) ** 2).sum() for part in np.split(speeds, cuts))

    valid = [
        cuts
        for cuts in itertools.combinations(range(1, n), k - 1)
        if min(b - a for a, b in itertools.pairwise((0, *cuts, n))) >= least
    ]
    assert scatter(speed_phases(speeds, k, least)) == pytest.approx(min(map(scatter, valid)), abs=1e-12)


def classes(n: int, angle: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of three classes at fixed angles about three orthogonal directions, the angle growing with the layer."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    states = np.zeros((n, 2, 40))
    for layer in range(2):
        away = random.standard_normal((n, 37))
        away /= np.linalg.norm(away, axis=1, keepdims=True)
        states[np.arange(n), layer, labels] = np.cos(angle * (layer + 1))
        states[:, layer, 3:] = np.sin(angle * (layer + 1)) * away
    return states * random.uniform(0.5, 2, (n, 2, 1)), labels


def basins(states: np.ndarray, labels: np.ndarray, other: tuple[np.ndarray, np.ndarray] | None = None):
    fit = ClassDirections(states.shape[1], int(labels.max()) + 1, states.shape[2])
    fit.update(states, labels)
    sums = BasinAccumulator(fit.result())
    sums.update(*(other or (states, labels)))
    return sums.result()


def test_planted_classes_have_their_angles_and_are_found():
    found = basins(*classes(6000, 0.2), classes(300, 0.2, seed=1))
    np.testing.assert_allclose(found.within.mean, [0.2, 0.4], atol=5e-3)
    np.testing.assert_allclose(found.between, np.pi / 2, atol=0.02)
    np.testing.assert_allclose(found.separation, np.array([0.2, 0.4]) / (np.pi / 2), rtol=0.03)
    np.testing.assert_array_equal(found.accuracy.mean, 1)
    assert (found.n_classes, found.accuracy.n) == (3, 300)


def test_shuffled_labels_are_at_chance():
    states, labels = classes(3000, 0.2)
    shuffled = np.random.default_rng(5).permutation(labels)
    found = basins(states[:2000], shuffled[:2000], (states[2000:], shuffled[2000:]))
    np.testing.assert_allclose(found.accuracy.mean, 1 / 3, atol=3 * np.sqrt(2 / 9 / 1000))


def test_basins_of_workers_are_those_of_one():
    states, labels = classes(60, 0.3)
    whole = basins(states, labels)
    fits = [ClassDirections(2, 3, 40) for _ in range(2)]
    fits[0].update(states[:11], labels[:11])
    fits[1].update(states[11:], labels[11:])
    fits[0].merge(fits[1])
    sums = [BasinAccumulator(fits[0].result()) for _ in range(2)]
    sums[0].update(states[:50], labels[:50])
    sums[1].update(states[50:], labels[50:])
    sums[0].merge(sums[1])
    np.testing.assert_allclose(sums[0].result().within.mean, whole.within.mean, rtol=1e-12)
    np.testing.assert_allclose(sums[0].result().accuracy.mean, whole.accuracy.mean, rtol=1e-12)
    np.testing.assert_allclose(sums[0].result().between, whole.between, rtol=1e-12)


def test_a_class_without_images_takes_no_part():
    states, labels = classes(60, 0.3)
    fit = ClassDirections(2, 5, 40)
    fit.update(states[labels != 1], labels[labels != 1])
    assert np.isnan(fit.result()[[1, 3, 4]]).all()
    sums = BasinAccumulator(fit.result())
    sums.update(states, labels)
    assert (sums.result().n_classes, sums.result().within.n) == (2, 40)
    with pytest.raises(ValueError, match="1 classes have images"):
        BasinAccumulator(fit.result()[:2])


def many_classes(n_classes: int = 200) -> BasinAccumulator:
    fit = ClassDirections(3, n_classes, 64)
    fit.update(normal(n_classes, 3, 64), np.arange(n_classes))
    sums = BasinAccumulator(fit.result())
    sums.update(normal(n_classes, 3, 64, seed=1), np.arange(n_classes))
    return sums


def test_the_angle_between_classes_is_that_of_all_pairs():
    units = normal(200, 3, 64)
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    a, b = np.triu_indices(200, 1)
    expected = angles_between(units[a], units[b]).mean(axis=0)
    np.testing.assert_allclose(many_classes().result().between, expected, rtol=1e-12)


def test_all_pairs_of_classes_are_never_held():
    """200 classes have 19,900 pairs: 31 MB of differences. What is held is twice the directions of one layer."""
    sums = many_classes()
    sums.result()
    tracemalloc.start()
    try:
        sums.result()
        assert tracemalloc.get_traced_memory()[1] < 3 * 8 * 200 * 64
    finally:
        tracemalloc.stop()


def test_classes_of_one_direction_have_no_separation():
    """As CLS at layer 0: the same in all images."""
    states, labels = classes(60, 0.3)
    states[:, 0] = np.float32(0.1)
    found = basins(states.astype(np.float32), labels)
    assert np.isnan(found.separation[0])
    assert found.separation[1] == pytest.approx(found.within.mean[1] / found.between[1])

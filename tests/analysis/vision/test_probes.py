"""Ridge probes against the normal equations, and what they find where a signal was planted or taken away."""

import numpy as np
import pytest

from analysis.page import Origin
from analysis.vision.measure import probe_layers
from analysis.vision.probe_section import probe_section
from analysis.vision.probes import Shots, few_shots, probe, ridge_path, sign_targets
from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.from_arrays import write_store
from storage_schemas.samples import Sample
from tests.stores import make_spec, planted_states, write_planted

N_CLASSES = 4


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def labels_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_CLASSES, n)


@pytest.mark.parametrize(("n", "dim"), [(40, 6), (10, 30)])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 50.0])
def test_it_solves_the_normal_equations(n, dim, strength):
    x, targets = normal(n, dim) + 5, sign_targets(labels_of(n), N_CLASSES)
    (fit,) = ridge_path(x, targets, [strength])
    centred = x - x.mean(axis=0)
    penalty = strength * (np.linalg.svd(centred, compute_uv=False) ** 2).mean()
    expected = np.linalg.solve(
        centred.T @ centred + penalty * np.eye(dim), centred.T @ (targets - targets.mean(axis=0))
    )
    np.testing.assert_allclose(fit.weights, expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(fit.scores(x).mean(axis=0), targets.mean(axis=0), atol=1e-10)


def test_a_bias_is_not_shrunk():
    """Moving all rows by a constant moves no score, however strong the penalty."""
    x, targets = normal(20, 5), sign_targets(labels_of(20), N_CLASSES)
    here, moved = (next(ridge_path(rows, targets, [10.0])).scores(rows) for rows in (x, x + 100))
    np.testing.assert_allclose(here, moved, atol=1e-9)


def test_without_penalty_fewer_rows_than_channels_are_interpolated():
    x, targets = normal(10, 30), sign_targets(labels_of(10), N_CLASSES)
    none, least = ridge_path(x, targets, [0.0, 1e-12])
    np.testing.assert_allclose(none.scores(x), targets, atol=1e-10)
    np.testing.assert_allclose(least.scores(x), targets, atol=1e-6)
    np.testing.assert_allclose(none.weights, least.weights, atol=1e-6)


def test_targets_are_plus_one_at_the_class_and_minus_one_elsewhere():
    np.testing.assert_array_equal(sign_targets(np.array([1, 0]), 3), [[-1, 1, -1], [1, -1, -1]])


def test_probes_side_by_side_are_probes_one_by_one():
    x, targets = normal(3, 20, 5), sign_targets(labels_of(20), N_CLASSES)
    together = list(ridge_path(x, targets, [0.1, 2.0]))
    for i in range(3):
        for fit, alone in zip(together, ridge_path(x[i], targets, [0.1, 2.0])):
            np.testing.assert_allclose(fit.weights[i], alone.weights, rtol=1e-10)


def test_the_same_states_for_all_images_tell_nothing_and_are_no_error():
    (fit,) = ridge_path(np.ones((12, 5)), sign_targets(labels_of(12), N_CLASSES), [0.0])
    np.testing.assert_array_equal(fit.weights, 0)


def planted(n: int, token: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three tokens of which one leans to its class's direction."""
    labels = labels_of(n, seed)
    states = normal(n, 3, 16, seed=seed + 1)
    states[:, token] += 4 * normal(N_CLASSES, 16, seed=99)[labels]
    return states.astype(np.float32), labels


def test_a_signal_in_one_token_is_found_by_its_probe_alone():
    train, labels = planted(200, 1, 0)
    test, test_labels = planted(400, 1, 50)
    found = probe(train, labels, few_shots(labels, 10), test, test_labels, N_CLASSES)
    assert found.accuracy[1] > 0.95
    assert found.accuracy[[0, 2]].max() < 0.4  # chance is 0.25


@pytest.mark.parametrize(
    ("has_cls", "pooled"),
    [(True, ["cls", "mean of all", "mean of all but the first"]), (False, ["mean of all"])],
)
def test_the_mean_without_the_first_token_is_there_where_that_is_cls(tmp_path, has_cls, pooled):
    write_planted(FolderObjects(tmp_path), make_spec(has_cls=has_cls, n_registers=0, layers=(0, 1)))
    found = probe_layers(open_store(str(tmp_path)), None, 21, seed=0, n_shots=2)
    assert list(found.pooled) == pooled
    assert found.patches.shape == (2, 6)


@pytest.mark.parametrize(
    ("limit", "shots", "n_fit", "judged"), [(200, 10, 30, True), (36, 6, 18, False), (4, 0, 2, False)]
)
def test_every_class_gives_as_many_shots_and_fewer_are_not_judged(tmp_path, limit, shots, n_fit, judged):
    """The third class begins late: the first rows have none of it."""
    spec = make_spec(n_samples=120, n_registers=0, layers=(0, 1))
    labels = [*[0, 1] * 40, *[2] * 40]
    samples = [Sample(sample_id=f"{i}.png", label=one, class_name="x", nbytes=9) for i, one in enumerate(labels)]
    write_store(FolderObjects(tmp_path), spec, samples, lambda rows: planted_states(spec, rows))
    found = probe_layers(open_store(str(tmp_path)), None, limit, seed=0)
    assert (found.least_shots, found.n_fit, found.n_test) == (shots, n_fit, min(limit, 120 - 2 * n_fit))
    text = probe_section(found, Origin(data="here", n_images=120, seed=0, command="make report")).text
    assert [f"here one has {shots}" in line for line in text] == [not judged] * 2
    assert ["This " in line for line in text] == [judged] * 2


def test_shuffled_labels_leave_chance():
    """On average: where classes lie apart, one shuffle gives each of them some class or other, and may be lucky."""
    train, labels = planted(200, 0, 0)
    test, test_labels = planted(200, 0, 50)
    random = np.random.default_rng(3)
    found = []
    for _ in range(80):
        shuffled = random.permutation(labels)
        found.append(probe(train, shuffled, few_shots(shuffled, 20), test, test_labels, N_CLASSES, (1.0,)).accuracy)
    np.testing.assert_allclose(np.mean(found, axis=0), 0.25, atol=0.06)
    assert probe(train, labels, few_shots(labels, 20), test, test_labels, N_CLASSES).accuracy[0] > 0.95


@pytest.mark.parametrize(("right_one", "strength"), [(0, 0.0), (1, 1e9)])
def test_the_strength_is_the_one_that_is_best_on_rows_of_its_own(right_one, strength):
    """A weak channel tells all of the fitted rows, a strong one most: without penalty the first decides, with much of
    it the second. Which of the two is right elsewhere, the rows for tuning tell."""
    labels = np.arange(40) % 2
    signs = 2.0 * labels - 1
    often = np.where(np.arange(40) % 10 < 2, -signs, signs)
    train = np.stack([0.01 * signs, 10 * often], axis=1)[:, None]
    shots = Shots(fit=np.arange(20), tune=np.arange(20, 40))
    train[20:, 0, 1 - right_one] = np.where(np.arange(20) % 4 < 2, 1, -1) * [0.01, 10][1 - right_one]
    train[20:, 0, right_one] = signs[20:] * [0.01, 10][right_one]
    found = probe(train, labels, shots, train[20:], labels[20:], 2, strengths=(1e9, 0.0))
    assert found.strength[0] == strength
    assert found.accuracy[0] == 1


def test_ties_between_strengths_go_to_the_largest():
    train, labels = planted(200, 0, 0)
    test, test_labels = planted(50, 0, 50)
    found = probe(train, labels, few_shots(labels, 10), test, test_labels, N_CLASSES, strengths=(1e9, 0.0, 1.0))
    assert found.strength[0] == 1e9
    assert found.accuracy[0] == 1


def test_shots_are_the_first_of_each_class_and_disjoint():
    labels = np.array([0, 1, -1, 0, 0, 1, 0, 1, 0, 1, 2])
    found = few_shots(labels, 2)
    np.testing.assert_array_equal(found.fit, [0, 1, 3, 5, 10])
    np.testing.assert_array_equal(found.tune, [4, 6, 7, 9])


def test_a_class_of_few_images_gives_half_of_them():
    found = few_shots(np.array([0, 0, 0, 1, 1]), 10)
    np.testing.assert_array_equal(found.fit, [0, 1, 3])
    np.testing.assert_array_equal(found.tune, [2, 4])


@pytest.mark.parametrize("labels", [[0, 0, 0], [-1, -1], [0, 1]])
def test_too_few_labels_are_refused(labels):
    with pytest.raises(ValueError, match="expected 2 classes or more, and two images of one of them"):
        few_shots(np.array(labels), 3)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 rows and strengths"):
        ridge_path(np.zeros((0, 3)), np.zeros((0, 2)), [1.0])
    with pytest.raises(ValueError, match="expected rows, and 0 or more"):
        ridge_path(np.ones((3, 3)), np.ones((3, 2)), [-1.0])
    bad = np.ones((3, 3))
    bad[1, 1] = np.inf
    with pytest.raises(ValueError, match="states hold NaN or infinite values"):
        ridge_path(bad, np.ones((3, 2)), [1.0])
    assert Shots(fit=np.arange(2), tune=np.arange(2)).fit.tolist() == [0, 1]

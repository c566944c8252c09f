"""Moments that merge: equal to one pass over everything in float64, in any grouping, also where the mean is large."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.objects import MemoryObjects
from storage_schemas import open_store
from storage_schemas.from_arrays import split_kinds, write_store
from storage_schemas.keys import commit_key, shard_object_keys
from storage_schemas.statistics import Statistics, merge
from tests.stores import make_samples, make_spec, planted_states, write_planted

NAMES = ("count", "mean", "m2", "min", "max")


def moments(values: np.ndarray) -> Statistics:
    """One shot over (value, dim)."""
    if not len(values):
        return Statistics.empty(values.shape[1:])
    mean = values.mean(axis=0)
    return Statistics(
        count=np.full(values.shape[1:], float(len(values))),
        mean=mean,
        m2=((values - mean) ** 2).sum(axis=0),
        min=values.min(axis=0),
        max=values.max(axis=0),
    )


def assert_close(found: Statistics, expected: Statistics, rtol: float = 1e-12, scale: float = 0.0) -> None:
    """Relative to each value, or, for M2, to the squares that its deviations come from: scale is their size."""
    for name in ("count", "min", "max"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.mean, expected.mean, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=rtol, atol=rtol * scale * found.count.max())


cuts = st.lists(st.integers(0, 60), max_size=5)


@given(st.integers(0, 2**32), cuts, st.sampled_from([0.0, 1.0, 1e3]))
def test_merging_any_parts_equals_one_shot(seed, places, offset):
    values = np.random.default_rng(seed).standard_normal((60, 3)) + offset
    parts = [moments(part) for part in np.split(values, sorted(places))]
    assert_close(reduce(merge, parts), moments(values), scale=1 + offset)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=3, max_size=3), st.sampled_from([0.0, 1e6]))
def test_merging_is_associative_and_commutes(seed, lengths, offset):
    rng = np.random.default_rng(seed)
    a, b, c = (moments(rng.standard_normal((n, 4)) + offset) for n in lengths)
    scale = (1 + offset) * 1e-2  # the sizes that cancel are those of the mean times a deviation
    assert_close(merge(merge(a, b), c), merge(a, merge(b, c)), scale=scale)
    assert_close(merge(a, b), merge(b, a), scale=scale)


def test_a_large_mean_does_not_eat_the_variance():
    """Sum of squares minus square of sums would lose all of it: the mean is 1e8 times the deviation."""
    values = 1e8 + np.random.default_rng(0).standard_normal((4096, 8))
    merged = reduce(merge, [moments(part) for part in np.split(values, 64)])
    exact = moments((values - 1e8).astype(np.longdouble)).variance.astype(float)  # the shift is exact
    np.testing.assert_allclose(merged.variance, exact, rtol=1e-8)
    naive = (values**2).mean(axis=0) - values.mean(axis=0) ** 2
    assert np.abs(naive / exact - 1).max() > 0.1, "the naive way should fail here, or this test proves nothing"


@given(st.integers(0, 2**32))
def test_nothing_is_neutral(seed):
    some = moments(np.random.default_rng(seed).standard_normal((5, 3)) * 1e5)
    nothing = Statistics.empty((3,))
    for merged in (merge(some, nothing), merge(nothing, some)):
        for name in NAMES:
            np.testing.assert_array_equal(getattr(merged, name), getattr(some, name))
    twice = merge(nothing, nothing)
    assert twice.count.tolist() == [0, 0, 0]
    assert np.isnan(twice.variance).all()
    assert (twice.min == np.inf).all()
    assert (twice.max == -np.inf).all()


def test_arrays_are_undone():
    some = moments(np.random.default_rng(0).standard_normal((5, 2, 4, 3)))
    array = some.to_array()
    assert array.shape == (2, 4, 5, 3)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(Statistics.from_array(array), name), getattr(some, name))


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 300.0]))
def test_a_store_has_the_statistics_of_its_states_before_rounding(seed, samples_per_chunk, offset):
    """Equal to one shot over all valid samples to 1e-12 of their size, however the store is cut into shards."""
    spec = make_spec(n_samples=13, samples_per_chunk=samples_per_chunk, samples_per_shard=4)
    states = (np.random.default_rng(seed).standard_normal((13, 3, 9, 8)) + offset).astype(np.float32)
    objects = MemoryObjects()
    write_store(
        objects,
        spec,
        make_samples(13),
        lambda rows: states[rows.start : rows.stop],
        bad_images={0: "empty", 9: "empty"},
    )
    valid = [i for i in range(13) if i not in (0, 9)]
    found = open_store(objects).statistics
    for i in range(3):
        for j, values in enumerate(split_kinds(spec, states[valid][:, i]).values()):
            expected = moments(values.astype(np.float64).reshape(-1, 8))
            here = Statistics(**{name: getattr(found, name)[i, j] for name in NAMES})
            assert_close(here, expected, scale=1 + offset)


def test_the_order_of_commits_cannot_show():
    """A store whose shards were committed in another order has the same bytes, so the same statistics, bit for bit."""
    first, second = MemoryObjects(), MemoryObjects()
    write_planted(first, make_spec())
    for info in sorted(first.list(), key=lambda info: info.key, reverse=True):
        second.put(info.key, first.get(info.key))
    a, b = open_store(first).statistics, open_store(second).statistics
    for name in NAMES:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_statistics_are_those_of_one_shot_whatever_order_shards_were_committed_in(precision):
    """Means of a thousand deviations, shards committed in random orders: within 1e-12, and every bit alike."""
    spec, whole = make_spec(n_samples=100, samples_per_shard=4, precision=precision), MemoryObjects()
    states = (np.random.default_rng(0).standard_normal((100, 3, 9, 8)) + 1e3).astype(np.float32)
    write_store(whole, spec, make_samples(100), lambda rows: states[rows.start : rows.stop], bad_images={50: "empty"})
    found = []
    for seed in range(3):
        objects = MemoryObjects()
        for key in create_only(whole):
            objects.put(key, whole.get(key))
        for shard in np.random.default_rng(seed).permutation(spec.n_shards).tolist():
            for key in (*shard_object_keys(spec, shard), commit_key(shard)):
                objects.put(key, whole.get(key))
            if shard % 5 == 0:
                assert open_store(objects).statistics.count[0, 0, 0] > 0, "a part is pooled as well"
        found.append(open_store(objects).statistics)
    assert {statistics.to_array().tobytes() for statistics in found} == {found[0].to_array().tobytes()}
    valid = [i for i in range(100) if i != 50]
    for i in range(3):
        for j, values in enumerate(split_kinds(spec, states[valid][:, i]).values()):
            exact = moments(values.astype(np.longdouble).reshape(-1, 8))
            for name in NAMES:
                here, there = getattr(found[0], name)[i, j], getattr(exact, name).astype(np.float64)
                np.testing.assert_allclose(here, there, rtol=1e-12, err_msg=f"{name} of {spec.token_kinds[j]}")


def create_only(objects: MemoryObjects) -> list[str]:
    """Keys of what is there before the first shard."""
    keys = [info.key for info in objects.list()]
    return [key for key in keys if "/c/" not in key and not key.startswith(("commits/", "index"))]


def test_shards_without_valid_samples_count_nothing():
    spec, objects = make_spec(), MemoryObjects()
    write_planted(objects, spec, dict.fromkeys(range(8, 16), "empty"))
    store = open_store(objects)
    assert store.shard_statistics(1).count.sum() == 0
    valid = planted_states(spec, range(21))[[*range(8), *range(16, 21)]]
    assert store.statistics.count[0].tolist() == [[13] * 8, [26] * 8, [78] * 8, [13] * 8]
    np.testing.assert_allclose(store.statistics.mean[:, 0], valid[:, :, 0].mean(axis=0, dtype=np.float64), rtol=1e-12)


def test_variance_in_closed_form():
    values = np.array([[1.0], [2.0], [3.0], [4.0]])
    assert moments(values).variance == pytest.approx(1.25)
    merged = merge(moments(values[:1]), moments(values[1:]))
    assert (merged.mean[0], merged.m2[0], merged.variance[0]) == (2.5, 5.0, 1.25)

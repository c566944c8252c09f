"""What a micro-batch contributes to its shard, against one-shot float64; and states that cannot be stored."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.states import StateError, check_head_input, merge_reduced, reduce_micro_batch
from storage_schemas.from_arrays import split_kinds
from storage_schemas.keys import array_path
from storage_schemas.precision import restore_patches, round_patches
from storage_schemas.spec import PRECISIONS, StoreSpec
from storage_schemas.statistics import Statistics
from tests import examples
from tests.stores import make_spec


def random_states(n: int, spec: StoreSpec, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    """(sample, layer, token, dim), with heavy tails and a scale of its own for every channel."""
    rng = np.random.default_rng(seed)
    shape = (n, len(spec.layers), spec.n_tokens, spec.dim)
    scale = 10.0 ** rng.uniform(-2, 2, spec.dim)
    return (rng.standard_t(3, shape) * scale + offset).astype(np.float32)


def reduce_in_parts(spec: StoreSpec, states: np.ndarray, valid: np.ndarray, ends: list[int]):
    """Stored kinds, (kind -> (sample, layer, ...)), and the merged reductions of consecutive micro-batches."""
    stored: dict[str, list[np.ndarray]] = {kind: [] for kind in spec.array_kinds}
    parts = []
    for start, stop in zip([0, *ends], [*ends, len(states)]):
        batch = [torch.from_numpy(states[start:stop, i].copy()) for i in range(len(spec.layers))]
        rows = np.flatnonzero(valid[start:stop])
        index = None if len(rows) == stop - start else torch.from_numpy(rows)
        layers, reduced = reduce_micro_batch(spec, batch, index)
        parts.append(reduced)
        for kind in spec.array_kinds:
            stored[kind].append(np.stack([layer[kind].numpy() for layer in layers], axis=1))
    statistics, fidelity = merge_reduced(spec, parts)
    return {kind: np.concatenate(arrays) for kind, arrays in stored.items()}, statistics, fidelity


def one_shot(spec: StoreSpec, states: np.ndarray, valid: np.ndarray) -> Statistics:
    """Moments of all valid rows at once, in float64."""
    made = Statistics.empty((len(spec.layers), len(spec.token_kinds), spec.dim))
    for j, (kind, values) in enumerate(split_kinds(spec, states).items()):
        del kind
        rows = np.moveaxis(values[valid], 1, 0).reshape(len(spec.layers), -1, spec.dim).astype(np.float64)
        made.count[:, j], made.mean[:, j] = rows.shape[1], rows.mean(axis=1)
        made.m2[:, j] = ((rows - rows.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        made.min[:, j], made.max[:, j] = rows.min(axis=1), rows.max(axis=1)
    return made


def assert_same_moments(found: Statistics, expected: Statistics) -> None:
    assert np.array_equal(found.count, expected.count)
    assert np.array_equal(found.min, expected.min)
    assert np.array_equal(found.max, expected.max)
    # of a mean near zero the rounding of what was summed is the measure
    scale = np.sqrt(expected.m2 / expected.count + expected.mean**2)
    assert np.all(np.abs(found.mean - expected.mean) <= 1e-12 * scale)
    # a channel far from zero has lost digits before anybody squares: those of its mean, times its spread
    lost = 1e-15 * np.sqrt(expected.m2 * expected.count) * np.abs(expected.mean)
    assert np.all(np.abs(found.m2 - expected.m2) <= 1e-12 * expected.m2 + lost)


@settings(max_examples=examples.of(25))
@given(data=st.data())
def test_any_split_and_any_mask_give_the_moments_of_one_shot(data: st.DataObject) -> None:
    spec = make_spec(
        has_cls=data.draw(st.booleans()),
        n_registers=data.draw(st.integers(0, 2)),
        precision=data.draw(st.sampled_from(PRECISIONS)),
        dim=data.draw(st.integers(1, 9)),
    )
    n = data.draw(st.integers(1, 9))
    ends = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    states = random_states(n, spec, seed=data.draw(st.integers(0, 99)), offset=data.draw(st.sampled_from([0.0, 300.0])))
    stored, statistics, fidelity = reduce_in_parts(spec, states, valid, ends)
    kinds = split_kinds(spec, states)
    kinds["patches"], scale = round_patches(spec.precision, kinds["patches"])
    if scale is not None:
        kinds["patches_scale"] = scale
    for kind, values in stored.items():
        if kind == "patch_mean":  # one rounding to float32 apart at most
            np.testing.assert_allclose(values, kinds[kind], rtol=2e-7, atol=1e-6)
        else:
            assert values.dtype == kinds[kind].dtype
            assert np.array_equal(values, kinds[kind]), kind
    if not valid.any():
        assert statistics.count.max() == 0
        assert fidelity == {}
        return
    expected = one_shot(spec, states, valid)
    j = spec.token_kinds.index("patch_mean")  # of the means as stored, which are given above
    means = np.moveaxis(stored["patch_mean"][valid], 1, 0).astype(np.float64)
    expected.mean[:, j] = means.mean(axis=1)
    expected.m2[:, j] = ((means - means.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    expected.min[:, j], expected.max[:, j] = means.min(axis=1), means.max(axis=1)
    assert_same_moments(statistics, expected)


def test_a_mean_a_hundred_million_times_the_spread_leaves_eight_digits() -> None:
    """Sums of squares would leave none."""
    spec = make_spec(precision="float32")
    states = random_states(8, spec, offset=1e6)
    _, statistics, _ = reduce_in_parts(spec, states, np.ones(8, bool), [3, 5])
    j = spec.token_kinds.index("patches")
    expected = one_shot(spec, states, np.ones(8, bool))
    np.testing.assert_allclose(statistics.m2[:, j], expected.m2[:, j], rtol=1e-8)


def test_states_of_invalid_rows_count_nowhere_and_stop_nothing() -> None:
    spec = make_spec()
    states = random_states(6, spec)
    valid = np.array([True, False, True, True, False, True])
    clean = reduce_in_parts(spec, states, valid, [4])
    states[~valid] = [[[np.nan]]]
    states[4] = 1e30
    _, statistics, fidelity = reduce_in_parts(spec, states, valid, [4])
    assert np.array_equal(statistics.to_array(), clean[1].to_array())
    assert fidelity == clean[2]


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_fidelity_is_the_closed_form(precision: str) -> None:
    spec = make_spec(precision=precision)
    states = random_states(7, spec, offset=5.0)
    valid = np.array([1, 1, 0, 1, 1, 1, 1], bool)
    _, _, fidelity = reduce_in_parts(spec, states, valid, [2, 6])
    patches = split_kinds(spec, states)["patches"][valid]
    assert set(fidelity) == {array_path(layer, "patches") for layer in spec.layers}
    for i, layer in enumerate(spec.layers):
        exact = patches[:, i].reshape(-1, spec.dim).astype(np.float64)
        stored, scale = round_patches(precision, patches[:, i])
        error = restore_patches(precision, stored, scale).reshape(-1, spec.dim) - exact
        found = fidelity[array_path(layer, "patches")]
        deviations = ((exact - exact.mean(axis=0)) ** 2).sum()
        assert found.relative_mse == pytest.approx((error**2).sum() / (exact**2).sum(), rel=1e-5)
        assert 1 - found.r2 == pytest.approx((error**2).sum() / deviations, rel=1e-5)
        assert found.worst == np.abs(error).max()
        assert found.worst > 0


def test_fidelity_of_values_that_float16_holds_is_perfect_and_of_known_errors_is_known() -> None:
    spec = make_spec(layers=(0,), dim=1, has_cls=False, n_registers=0, grid=(1, 2))
    exact = np.array([1.0, 3.0], np.float32).reshape(1, 1, 2, 1)
    _, _, fidelity = reduce_in_parts(spec, exact, np.ones(1, bool), [])
    assert (fidelity["layer_00/patches"].relative_mse, fidelity["layer_00/patches"].r2) == (0.0, 1.0)
    # between 2048 and 4096 float16 has even numbers only: 2049 becomes 2048 (ties to even), 2051 becomes 2052
    known = np.array([2049.0, 2051.0], np.float32).reshape(1, 1, 2, 1)
    _, _, fidelity = reduce_in_parts(spec, known, np.ones(1, bool), [])
    found = fidelity["layer_00/patches"]
    assert found.relative_mse == pytest.approx(2 / (2049**2 + 2051**2), rel=1e-6)
    assert found.r2 == pytest.approx(1 - 2 / 2, abs=1e-6)  # deviations from 2050: 1 and 1
    assert found.worst == 1.0


@pytest.mark.parametrize("kind", ["cls", "registers", "patches"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_named(kind: str, value: float) -> None:
    spec = make_spec(layers=(0, 3, 7))
    states = random_states(4, spec)
    token = {"cls": 0, "registers": 2, "patches": 5}[kind]
    states[2, 1, token, 6] = value
    with pytest.raises(StateError, match=rf"layer 3, {kind}, channel 6: {abs(value):g}"):
        reduce_in_parts(spec, states, np.ones(4, bool), [])


def test_what_float16_cannot_hold_is_named_and_float32_holds_it() -> None:
    spec = make_spec(layers=(0, 3, 7))
    states = random_states(4, spec)
    states[:, :, :, 2] = 65504.0  # the largest float16
    reduce_in_parts(spec, states, np.ones(4, bool), [2])
    states[3, 2, 4, 2] = -70000.0
    with pytest.raises(StateError, match=r"largest 65504.*layer 7, patches, channel 2: 70000.*PRECISION=float32"):
        reduce_in_parts(spec, states, np.ones(4, bool), [2])
    reduce_in_parts(make_spec(layers=(0, 3, 7), precision="float32"), states, np.ones(4, bool), [2])
    states[3, 2, 4, 2] = 0.0
    states[3, 2, 0, 2] = 70000.0  # CLS is kept as float32
    reduce_in_parts(spec, states, np.ones(4, bool), [2])


def test_many_bad_channels_are_counted_and_the_first_are_named() -> None:
    spec = make_spec()
    states = random_states(2, spec)
    states[0, :, 6] = np.nan
    with pytest.raises(StateError, match=r"layer 0, patches, channel 4: nan; and \d+ more"):
        reduce_in_parts(spec, states, np.ones(2, bool), [])


@pytest.mark.parametrize(("dim", "precision"), [(8, "float16"), (37, "bfloat16"), (384, "float16"), (384, "int8")])
def test_bits_do_not_depend_on_torchs_threads(dim: int, precision: str) -> None:
    spec = make_spec(dim=dim, grid=(9, 11), precision=precision)
    states, valid = random_states(12, spec), np.ones(12, bool)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            stored, statistics, fidelity = reduce_in_parts(spec, states, valid, [5])
            found.append(({kind: v.tobytes() for kind, v in stored.items()}, statistics.to_array().tobytes(), fidelity))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_head_input_that_is_not_finite_is_named(value: float) -> None:
    head_input = torch.zeros(4, 16)
    check_head_input(head_input, None)
    head_input[2, 5] = value
    with pytest.raises(StateError, match=rf"head_input, channel 5: {value:g}"):
        check_head_input(head_input, None)
    check_head_input(head_input, torch.tensor([0, 1, 3]))  # of a bad image

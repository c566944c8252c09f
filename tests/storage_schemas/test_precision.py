"""Rounding of patches: to the nearest value that there is, ties to even, and back."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from storage_schemas.errors import SchemaError
from storage_schemas.precision import LARGEST, restore_patches, round_patches
from storage_schemas.spec import PRECISIONS

states = arrays(
    np.float32,
    array_shapes(min_dims=3, max_dims=3, max_side=5),
    elements=st.floats(-(2.0**15), 2.0**15, width=32, allow_subnormal=True),
)


@given(states)
def test_bfloat16_is_that_of_another_library(patches):
    stored, scale = round_patches("bfloat16", patches)
    assert scale is None
    np.testing.assert_array_equal(stored, patches.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(
        restore_patches("bfloat16", stored), patches.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


@given(states)
def test_int8_is_the_nearest_multiple_of_its_scale(patches):
    stored, scale = round_patches("int8", patches)
    assert stored.dtype == np.int8
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, np.abs(patches).max(axis=1) / np.float32(127))
    restored = restore_patches("int8", stored, scale)
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored, stored * scale[:, None, :])
    # half a step, and what float32 arithmetic adds where states are subnormal
    half = scale[:, None, :].astype(np.float64) * (0.5 + 1e-5) + 127 * 2.0**-150
    assert (np.abs(restored.astype(np.float64) - patches) <= half).all()


def test_int8_in_numbers():
    patches = np.array([[[127.0, -2.0, 0.0, 1e-3], [-63.5, 0.5, 0.0, -5e-4], [0.5, 1.0, 0.0, 0.0]]], np.float32)
    stored, scale = round_patches("int8", patches)
    np.testing.assert_array_equal(scale, np.array([[1.0, 2 / 127, 0.0, 1e-3 / 127]], np.float32))
    np.testing.assert_array_equal(stored[0], [[127, -127, 0, 127], [-64, 32, 0, -64], [0, 64, 0, 0]])
    np.testing.assert_array_equal(restore_patches("int8", stored, scale)[0, :, 2], 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_restored_rounds_to_the_same_again(precision):
    patches = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float32)
    stored, scale = round_patches(precision, patches)
    again, _ = round_patches(precision, restore_patches(precision, stored, scale))
    np.testing.assert_array_equal(again, stored)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_state_too_large_is_named(precision):
    patches = np.ones((1, 2, 3), np.float32)
    patches[0, 1, 2] = -LARGEST[precision]
    stored, _ = round_patches(precision, patches)
    assert restore_patches(precision, stored)[0, 1, 2] == patches[0, 1, 2]
    patches[0, 1, 2] = np.nextafter(patches[0, 1, 2], np.float32(-np.inf))
    with pytest.raises(SchemaError, match=f"does not fit {precision}"):
        round_patches(precision, patches)
    patches[0, 1, 2] = np.nan
    with pytest.raises(SchemaError, match="nan does not fit"):
        round_patches(precision, patches)

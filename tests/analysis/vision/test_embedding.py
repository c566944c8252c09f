"""Pixels back from state 0, and state 0 of changed pixels, against the teacher's own embedding."""

import numpy as np
import pytest
import torch

from analysis.vision.embedding import move_pixels, patch_convolution, seen_pixels
from infra.console import UserError
from pipeline.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits_vit")


def images(teacher, n: int, seed: int = 0) -> torch.Tensor:
    height, width = teacher.pixel_size
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 3, height, width)).astype(np.float32))


def patches_of(teacher, pixels: torch.Tensor) -> np.ndarray:
    """Values of each patch, channel by channel and row by row, less their mean over images."""
    rows, columns = teacher.grid
    height, width = (side // n for side, n in zip(teacher.pixel_size, teacher.grid))
    cut = pixels.reshape(len(pixels), 3, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    flat = cut.reshape(len(pixels), rows * columns, -1).double().numpy()
    return flat - flat.mean(axis=0)


def test_pixels_come_back_from_state_0(teacher):
    pixels = images(teacher, 7)
    found = seen_pixels(teacher, teacher.embed(pixels)[:, teacher.n_prefix :].numpy())
    assert found.n_seen == found.values.shape[-1] == 48
    np.testing.assert_allclose(found.values, patches_of(teacher, pixels), atol=1e-4)


def test_rounded_to_float16_they_come_back_within_its_error(teacher):
    pixels = images(teacher, 7)
    rounded = teacher.embed(pixels)[:, teacher.n_prefix :].numpy().astype(np.float16)
    error = seen_pixels(teacher, rounded).values - patches_of(teacher, pixels)
    assert 1e-8 < (error**2).mean() < 1e-6  # of pixels of variance 1; 1.2e-7 seen


def test_of_few_channels_what_the_embedding_sees_comes_back():
    """test_vit has 64 channels for 768 values: least squares gives the part of the pixels that makes the same state."""
    teacher = load_teacher("test_vit", "random:0", image_size=32)
    pixels = images(teacher, 6)
    found = seen_pixels(teacher, teacher.embed(pixels)[:, teacher.n_prefix :].numpy())
    assert (found.n_seen, found.values.shape) == (64, (6, 4, 768))
    weight = patch_convolution(teacher).weight.detach().double().reshape(64, -1).numpy()
    np.testing.assert_allclose(found.values @ weight.T, patches_of(teacher, pixels) @ weight.T, atol=1e-4)
    assert (found.values**2).sum() < 0.2 * (patches_of(teacher, pixels) ** 2).sum()


def test_moved_pixels_are_the_embedding_of_the_moved_image(teacher):
    pixels, change = images(teacher, 3), images(teacher, 3, seed=1)
    moved = move_pixels(teacher, teacher.embed(pixels), change)
    np.testing.assert_allclose(moved.detach().numpy(), teacher.embed(pixels + change).numpy(), atol=1e-5)


def test_states_that_another_embedding_made_are_refused(teacher):
    states = np.random.default_rng(0).standard_normal((20, 64, 64))
    with pytest.raises(UserError, match="state 0 of digits_vit is not what its patch embedding makes of pixels"):
        seen_pixels(teacher, states)


def test_a_norm_before_the_first_block_is_refused():
    with pytest.raises(UserError, match="has a norm between patch embedding and first block"):
        patch_convolution(load_teacher("vit_xsmall_patch16_clip_224", "random:0", image_size=32))

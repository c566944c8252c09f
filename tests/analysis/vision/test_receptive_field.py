"""Fields of maps whose support is known, and of a teacher against its own gradient from the pixels on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from analysis.vision.receptive_field import ReceptiveField, gradient_field, teacher_fields
from pipeline.teacher import load_teacher


def at_the_centre(model: nn.Module, pixels: torch.Tensor, draws: torch.Tensor | None = None) -> np.ndarray:
    leaf = pixels.clone().requires_grad_(True)
    return gradient_field(model(leaf)[:, :, 5, 6], leaf, draws)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_one_convolution_sees_its_kernel(k):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, k, padding=k // 2)
    field = at_the_centre(convolution, torch.randn(2, 3, 11, 13))
    half = k // 2
    seen = np.zeros((11, 13), dtype=bool)
    seen[5 - half : 6 + half, 6 - half : 7 + half] = True
    np.testing.assert_array_equal(field > 0, seen)
    expected = 2 * convolution.weight.detach().abs().sum(dim=1).mean(dim=0)  # rows are summed, channels averaged
    np.testing.assert_allclose(field[seen].reshape(k, k), expected.numpy(), rtol=1e-5)


def test_the_identity_sees_its_own_pixel():
    field = at_the_centre(nn.Identity(), torch.randn(2, 3, 11, 13))
    assert field[5, 6] == 2
    assert field.sum() == 2


def test_drawn_channels_average_to_all_of_them():
    torch.manual_seed(0)
    convolution, pixels = nn.Conv2d(3, 4, 3, padding=1), torch.randn(3, 3, 11, 13)
    every = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]])  # each row of the batch draws each channel once
    np.testing.assert_allclose(
        at_the_centre(convolution, pixels, every), at_the_centre(convolution, pixels), rtol=1e-6, atol=1e-12
    )


def test_shares_and_distances_are_those_of_known_fields():
    spot = np.zeros((8, 8))
    spot[4:6, 4:6] = 0.25
    one = ReceptiveField(field=spot, place=(5, 5), cell=(2, 2))
    assert one.own_share == 1
    assert one.reach == pytest.approx(np.hypot(0.5, 0.5))
    flat = ReceptiveField(field=np.full((8, 8), 3.0), place=(5, 5), cell=(2, 2))
    assert flat.own_share == pytest.approx(4 / 64)
    assert flat.reach == pytest.approx(flat.flat_reach)
    away = np.zeros((8, 8))
    away[0, 4] = 7
    assert ReceptiveField(field=away, place=(5, 5), cell=(2, 2)).own_share == 0
    assert ReceptiveField(field=away, place=(0.5, 5), cell=(2, 2)).reach == pytest.approx(0.5)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("test_vit", "random:0", image_size=48)


def test_it_is_the_gradient_from_the_pixels_on(teacher):
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = teacher_fields(teacher, teacher.embed(pixels), n_draws=2, seed=4, batch_rows=3)
    draws = torch.randint(teacher.dim, (2, 3), generator=torch.Generator().manual_seed(4))
    leaf = pixels.clone().requires_grad_(True)
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda m, a, out: states.append(out)) for block in teacher.model.blocks]
    with torch.enable_grad():
        teacher.model.forward_features(leaf)
    for hook in hooks:
        hook.remove()
    centre = teacher.n_prefix + 4  # of 3 x 3 patches
    for one, state in zip(found.sums, states, strict=True):
        np.testing.assert_allclose(one.field, gradient_field(state[:, centre], leaf, draws) / 3, rtol=1e-3, atol=1e-7)
    assert found.sums[0].place == (24, 24)
    assert (found.n_images, found.n_draws, len(found.branches)) == (3, 2, 6)


def test_blocks_that_add_nothing_see_their_own_patch(teacher):
    still = load_teacher("test_vit", "random:0", image_size=48)
    for block in still.model.blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(last.weight)
    found = teacher_fields(still, still.embed(torch.randn(2, 3, 48, 48)), n_draws=1, seed=0)
    for one in found.sums:
        assert one.own_share == 1
        assert (one.field > 0).sum() == 16 * 16


def test_batches_change_nothing_but_the_draws(teacher):
    """All images alike and one channel for all: any split gives one field."""
    x = teacher.embed(torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))).expand(4, -1, -1)
    small = replace(teacher, dim=1)  # draws channel 0 each time
    seen: list[int] = []
    whole = teacher_fields(small, x, n_draws=1, seed=0)
    split = teacher_fields(small, x, n_draws=1, seed=0, batch_rows=1, progress=seen.append)
    assert seen == [1, 1, 1, 1]
    for a, b in zip(whole.sums, split.sums):
        np.testing.assert_allclose(a.field, b.field, rtol=1e-4, atol=1e-9)

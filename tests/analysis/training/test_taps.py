"""Taps of a small ViT, the fixed choices of images, the plane of ways: order, shapes, planted motion."""

import numpy as np
import pytest
import torch

from analysis.training.paths import fit_plane
from analysis.training.taps import TapSpectra, fixed_subset, tap_names, tap_states
from infra.console import UserError


@pytest.fixture(scope="module")
def vit():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=6, depth=3, num_heads=2, reg_tokens=2).eval()


@pytest.fixture(scope="module")
def states(vit):
    return tap_states(vit, torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def test_taps_are_in_order_and_have_their_tokens(states):
    assert list(states) == tap_names(3)
    shapes = [tuple(one.shape) for one in states.values()]
    assert shapes == [(5, 4, 6), *[(5, 7, 6)] * 4, (5, 1, 6)]  # four patches; with CLS and registers seven


def test_each_tap_is_what_the_model_computes_there(vit, states):
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patches = vit.patch_embed(pixels)
        x = vit._pos_embed(patches)
        torch.testing.assert_close(states["Layer_00_PatchEmbed"], patches)
        torch.testing.assert_close(states["Layer_00_PosEmbed"], x)
        for i, block in enumerate(vit.blocks, 1):
            x = block(x)
            torch.testing.assert_close(states[f"Layer_{i:02d}_Block{i:02d}"], x)
        torch.testing.assert_close(states["Layer_04_CLS_Final"], vit.norm(x)[:, :1])
    assert not vit.norm._forward_hooks
    assert not vit.pos_drop._forward_pre_hooks


def test_the_patch_embedding_has_no_cls_token(vit, states):
    """Row 0 of it is the first patch: with the positions of that patch it is token 3 of the next tap, not token 0."""
    moved = states["Layer_00_PatchEmbed"] + vit.pos_embed[:, 3:]
    torch.testing.assert_close(moved, states["Layer_00_PosEmbed"][:, 3:])


def test_a_model_without_the_places_is_refused(vit):
    with pytest.raises(UserError, match=r"Linear has no patch_embed, pos_drop, blocks, norm, cls_token"):
        tap_states(torch.nn.Linear(2, 2), torch.zeros(1, 3, 8, 8))


def test_spectra_pool_all_tokens_and_merge(states):
    both = TapSpectra(tap_names(3), 6)
    both.update(states)
    parts = [TapSpectra(tap_names(3), 6) for _ in range(2)]
    for part, rows in zip(parts, (slice(0, 2), slice(2, None))):
        part.update({name: one[rows] for name, one in states.items()})
    parts[0].merge(parts[1])
    assert both.n_vectors() == parts[0].n_vectors() == {name: 5 * one.shape[1] for name, one in states.items()}
    for name, one in states.items():
        values = np.linalg.eigvalsh(np.cov(one.reshape(-1, 6).double().numpy().T))
        expected = values.sum() / values.max()
        assert both.scalars()[name].stable_rank == pytest.approx(expected, rel=1e-6)
        assert parts[0].scalars()[name].stable_rank == pytest.approx(expected, rel=1e-6)
        np.testing.assert_allclose(both.singular_values(3)[name] ** 2, values[::-1][:3], rtol=1e-6)


def test_the_fixed_choices_are_numpys_and_may_share_images():
    first, second = fixed_subset(5_000, 1_000, 2025), fixed_subset(5_000, 100, 2026)
    assert first[:5].tolist() == np.random.default_rng(2025).permutation(5_000)[:5].tolist() == GOLDEN_2025
    assert second[:5].tolist() == GOLDEN_2026
    assert len(set(first.tolist())) == 1_000
    assert len(set(first.tolist()) & set(second.tolist())) == 17  # disjoint they are not
    assert sorted(fixed_subset(7, 1_000, 2025).tolist()) == list(range(7))


GOLDEN_2025 = [477, 4029, 1155, 4753, 4354]
GOLDEN_2026 = [2463, 4146, 2127, 2547, 1985]


def test_planted_motion_in_a_plane_is_found_again_up_to_rotation_and_sign():
    rng = np.random.default_rng(0)
    motion = rng.standard_normal((40, 7, 2)) * [5, 2]
    axes = np.linalg.qr(rng.standard_normal((6, 2)))[0].T
    states = motion @ axes + 3.0
    plane = fit_plane(states + 1e-6 * rng.standard_normal(states.shape))
    assert plane.explained.sum() == pytest.approx(1, abs=1e-9)
    assert plane.explained[0] > plane.explained[1]
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-12)
    found, true = plane.project(states).reshape(-1, 2), motion.reshape(-1, 2)
    centred = true - true.mean(axis=0)
    turn = np.linalg.lstsq(found, centred, rcond=None)[0]
    np.testing.assert_allclose(turn @ turn.T, np.eye(2), atol=1e-5)  # a rotation or reflection, no stretch
    np.testing.assert_allclose(found @ turn, centred, atol=1e-4)


def test_the_mean_way_is_the_way_of_the_mean_and_the_plane_is_the_same_each_time():
    states = np.random.default_rng(1).standard_normal((9, 4, 5)).astype(np.float32)
    plane, again = fit_plane(states), fit_plane(states[::-1])
    np.testing.assert_allclose(plane.project(states).mean(axis=0), plane.project(states.mean(axis=0)), atol=1e-6)
    np.testing.assert_allclose(plane.axes, again.axes, atol=1e-9)
    assert (plane.axes[np.arange(2), np.abs(plane.axes).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (np.zeros((2, 5)), "expected 3 or more"),
        (np.zeros((5, 1)), "of 2 or more"),
        (np.full((5, 3), np.nan), "finite"),
        (np.ones((5, 3)), "all the same"),
    ],
)
def test_what_spans_no_plane_is_refused(states, expected):
    with pytest.raises(ValueError, match=expected):
        fit_plane(states)

"""Attention distances at golden values, attention that makes the block's own output, branches at their known ratio."""

import numpy as np
import pytest
import torch
from timm.layers.attention import Attention

from analysis.attention import attention_of, attention_reach, branch_ratios, look, patch_distances
from analysis.interventions import token_kinds
from analysis.page import Origin
from analysis.report_models import attention_sections
from infra.console import UserError
from pipeline.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits_vit")


@pytest.fixture(scope="module")
def x(teacher):
    side = teacher.image_size
    return teacher.embed(torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3, side, side))).float())


@pytest.mark.parametrize(
    ("grid", "patch", "expected"),
    [((2, 2), 1, 0.8536), ((7, 7), 32, 115.5029), ((14, 14), 16, 116.4922), ((16, 16), 14, 116.5651)],
)
def test_uniform_attention_has_its_golden_distance(grid, patch, expected):
    n = grid[0] * grid[1]
    found = attention_reach(np.full((1, 1, n, n), 1 / n), grid, (patch, patch))
    assert found.distance[0, 0] == pytest.approx(expected, abs=5e-5)
    assert found.elsewhere[0, 0] == pytest.approx(0)


def test_attention_to_oneself_has_no_distance():
    found = attention_reach(np.eye(12)[None, None], (3, 4), (8, 8))
    assert found.distance[0, 0] == 0


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 2), (2, 1)])
def test_attention_at_one_offset_has_its_distance(down, right):
    """Patches whose target lies outside look at themselves, and are counted out of the expected mean."""
    grid, size = (5, 6), (4.0, 8.0)
    attention = np.eye(30)
    moved = 0
    for row in range(5 - down):
        for column in range(6 - right):
            query, key = row * 6 + column, (row + down) * 6 + column + right
            attention[query] = 0
            attention[query, key] = 1
            moved += 1
    found = attention_reach(attention[None, None], grid, size)
    assert found.distance[0, 0] == pytest.approx(np.hypot(4 * down, 8 * right) * moved / 30)


def test_other_tokens_are_left_out_and_rows_sum_to_one_again():
    rng = np.random.default_rng(3)
    among = rng.random((2, 3, 4, 4))
    among /= among.sum(axis=-1, keepdims=True)
    with_cls = np.zeros((2, 3, 6, 6))
    with_cls[:, :, 2:, 2:] = 0.7 * among
    with_cls[:, :, 2:, 0], with_cls[:, :, 2:, 1] = 0.2, 0.1
    with_cls[:, :, :2, 0] = 1
    found, expected = (attention_reach(one, (2, 2), (1, 1)) for one in (with_cls, among))
    np.testing.assert_allclose(found.distance, expected.distance)
    np.testing.assert_allclose(found.elsewhere, 0.3)


def test_attention_that_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="expected at least 9 queries and keys"):
        attention_reach(np.ones((1, 1, 4, 4)) / 4, (3, 3), (1, 1))
    away = np.zeros((1, 1, 5, 5))
    away[..., 0] = 1
    with pytest.raises(ValueError, match="no distance"):
        attention_reach(away, (2, 2), (1, 1))


def test_distances_of_a_grid_that_is_not_square():
    found = patch_distances((1, 3), (5, 2))
    np.testing.assert_array_equal(found, [[0, 2, 4], [2, 0, 2], [4, 2, 0]])


def test_attention_times_values_is_the_blocks_own_output(teacher, x):
    for block in teacher.model.blocks[:2]:
        attention = attention_of(block, x)
        np.testing.assert_allclose(attention.sum(-1).numpy(), 1, rtol=1e-5)
        normed = block.norm1(x)
        values = block.attn.qkv(normed).chunk(3, dim=-1)[2].reshape(*x.shape[:2], teacher.n_heads, -1).transpose(1, 2)
        mixed = (attention @ values).transpose(1, 2).reshape(x.shape)
        np.testing.assert_allclose(block.attn.proj(mixed).numpy(), block.attn(normed).numpy(), atol=1e-5)


def test_other_blocks_are_refused():
    with pytest.raises(UserError, match="a block of Linear; expected timm's Attention"):
        attention_of(torch.nn.Linear(4, 4), torch.zeros(1, 2, 4))


class Branch(torch.nn.Module):
    """A block whose branches are its input, scaled."""

    def __init__(self, attention: float, mlp: float) -> None:
        super().__init__()
        same = torch.nn.Identity()
        self.norm1 = self.norm2 = self.ls1 = self.ls2 = same
        self.attn, self.mlp = (lambda z: attention * z), (lambda z: mlp * z)


@pytest.mark.parametrize("c", [0.5, 2.0, -4.0])
def test_a_branch_scaled_by_c_has_its_ratio_over_c(c):
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    first, second, _ = branch_ratios(Branch(c, 0.25), x)
    np.testing.assert_allclose(first.numpy(), 1 / abs(c), rtol=1e-5)
    np.testing.assert_allclose(second.numpy(), 4, rtol=1e-5)


def test_branches_add_up_to_the_block(teacher, x):
    for i in range(2):
        *_, out = branch_ratios(teacher.model.blocks[i], x)
        np.testing.assert_allclose(out.detach().numpy(), teacher.run_blocks(x, i, i + 1).detach().numpy(), atol=1e-4)


def test_batches_change_nothing_and_kinds_are_their_tokens(teacher, x):
    kinds = token_kinds(has_cls=True, n_registers=teacher.n_registers, n_patches=teacher.n_patches)
    seen: list[int] = []
    one, whole = look(teacher, x, kinds, batch_rows=2, progress=seen.append), look(teacher, x, kinds)
    assert seen == [2, 2, 1]
    assert whole.distance.mean.shape == (12, teacher.n_heads)
    for a, b in ((one.distance, whole.distance), (one.attention_ratio["cls"], whole.attention_ratio["cls"])):
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-4)
        assert a.n == 5
    first = attention_reach(attention_of(teacher.model.blocks[0], x).detach().numpy(), teacher.grid, (4, 4))
    np.testing.assert_allclose(whole.distance.mean[0], first.distance.mean(axis=0), rtol=1e-5)
    ratio = branch_ratios(teacher.model.blocks[0], x)[0].detach().numpy()
    np.testing.assert_allclose(whole.attention_ratio["registers"].mean[0], ratio[:, 1:5].mean(), rtol=1e-5)


def test_patches_that_look_at_no_patch_leave_the_section_out(teacher, x, monkeypatch, capsys):
    def sink(block, state):
        attention = torch.zeros(len(state), teacher.n_heads, state.shape[1], state.shape[1])
        attention[..., 0] = 1
        return attention

    monkeypatch.setattr("analysis.attention.attention_of", sink)
    origin = Origin(data="here", n_images=5, seed=None, command="make report")
    assert attention_sections(teacher, x, origin) == []
    assert "no attention distances: block 1 of digits_vit: a patch gives all" in capsys.readouterr().err


def test_timms_attention_is_the_one_that_is_read(teacher):
    assert type(teacher.model.blocks[0].attn) is Attention

"""All sub-layers in their order, as plain timm code computes them, and their CKA in any split of the work."""

import numpy as np
import pytest
import torch

from analysis.similarity import CkaAccumulator, linear_kernels, minibatch_cka
from analysis.vision.taps import PARTS, tap_names, tapped, token_kernel, update_sub_layers
from infra.console import UserError
from pipeline.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher():
    """With LayerScale and a register, without CLS."""
    return load_teacher("test_vit2", "random:0", image_size=32)


@pytest.fixture(scope="module")
def x(teacher):
    pixels = np.random.default_rng(0).standard_normal((12, 3, 32, 32)).astype(np.float32)
    return teacher.embed(torch.from_numpy(pixels))


def test_names_are_complete_and_in_order():
    assert tap_names(1) == [
        "embedded",
        *("block 1 norm1", "block 1 attention", "block 1 sum1"),
        *("block 1 norm2", "block 1 hidden", "block 1 mlp", "block 1 sum2"),
        "final norm",
    ]
    assert len(tap_names(12)) == 86  # Raghu et al. have about 75 for ViT-B/32


@torch.no_grad()
def test_each_is_what_plain_timm_code_gives(teacher, x):
    block = teacher.model.blocks[1]
    with tapped(block) as found:
        out = teacher.run_blocks(x, 1, 2)
    assert tuple(found) == PARTS
    normed = block.norm1(x)
    added = block.ls1(block.attn(normed))
    middle = x + added
    again = block.norm2(middle)
    hidden = block.mlp.norm(block.mlp.act(block.mlp.fc1(again)))
    last = block.ls2(block.mlp.fc2(hidden))
    expected = (normed, added, middle, again, hidden, last, middle + last)
    for part, one in zip(PARTS, expected, strict=True):
        np.testing.assert_allclose(found[part].numpy(), one.numpy(), atol=1e-6, err_msg=part)
    np.testing.assert_array_equal(found["sum2"].numpy(), out.numpy())
    assert hidden.shape[-1] == 192


def test_hooks_are_gone_afterwards(teacher, x):
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in teacher.model.modules())
    with pytest.raises(RuntimeError, match="inside"), tapped(teacher.model.blocks[0]):
        raise RuntimeError("inside")
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in teacher.model.modules())
    assert before == after


class Backwards(torch.nn.Module):
    """The parts of a block, run in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop_path1, self.drop_path2 = (torch.nn.Identity() for _ in range(4))
        self.mlp = torch.nn.Module()
        self.mlp.fc2 = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop_path2(self.mlp.fc2(self.norm2(x)))
        return self.drop_path1(self.norm1(x))


def test_other_blocks_are_refused():
    lacking = r"of a Linear: it has no norm1, drop_path1, norm2, drop_path2, mlp\.fc2"
    with pytest.raises(UserError, match=lacking), tapped(torch.nn.Linear(2, 2)):
        pass
    block, order = Backwards(), "a Backwards runs sum1, norm2, hidden, mlp, norm1, attention, sum2; expected"
    with pytest.raises(UserError, match=order), tapped(block):
        block(torch.zeros(1, 2))


def flat_taps(teacher, x: torch.Tensor) -> list[np.ndarray]:
    """All sub-layers with all tokens of an image as one vector."""
    taps, state = [x], x
    with torch.no_grad():
        for i, block in enumerate(teacher.model.blocks):
            with tapped(block) as found:
                state = teacher.run_blocks(state, i, i + 1)
            taps += list(found.values())
        taps.append(teacher.final_norm(state))
    return [one.reshape(len(x), 1, -1).numpy() for one in taps]


def test_it_is_cka_of_all_tokens_flattened(teacher, x):
    sums = CkaAccumulator(len(tap_names(8)))
    seen: list[int] = []
    for part in x.split(6):
        update_sub_layers(sums, teacher, part, rows_at_once=4, progress=seen.append)
    found = sums.result()
    assert len(seen) == 2 * 8
    np.testing.assert_allclose(found.values, minibatch_cka(*flat_taps(teacher, x), batch_rows=6).values, atol=1e-5)
    np.testing.assert_array_equal(found.values, found.values.T)
    np.testing.assert_allclose(np.diagonal(found.values), 1, rtol=1e-12)
    assert (found.n_rows, found.n_batches) == (12, 2)


def test_a_kernel_of_tokens_is_that_of_them_flattened(monkeypatch):
    states = np.random.default_rng(1).standard_normal((5, 7, 3)) + 10
    expected = linear_kernels(states.reshape(5, 1, -1))[0]
    for nbytes in (1, 8 * 5 * 3 * 2, 10**9):  # one token, two, and all at a time
        monkeypatch.setattr("analysis.vision.taps._GROUP_NBYTES", nbytes)
        kernel, square = token_kernel(states)
        np.testing.assert_allclose(kernel, expected, atol=1e-10)
        assert square == pytest.approx((states**2).sum())


def test_kernels_are_refused_where_their_features_would_be():
    with pytest.raises(ValueError, match="3 rows, expected 4 or more"):
        CkaAccumulator(2).update_kernels(np.ones((2, 3, 3)), np.ones(2))
    with pytest.raises(ValueError, match="kernels hold NaN or infinite values"):
        CkaAccumulator(2).update_kernels(np.full((2, 4, 4), np.nan), np.ones(2))

"""Losses by hand and by property."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.published import seeded
from tests.trainer.shapes import unchecked_shapes
from trainer.losses import cosine, mse, mse_cosine, token_weighted


def one_token_each(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, :, None].expand(1, len(values), 2)


def test_mse_by_hand():  # C8
    pred = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert mse(pred, torch.zeros(1, 2, 2)).item() == (1 + 4 + 9 + 16) / 4


def test_weighted_by_hand():  # C8
    # CLS off by 1, two registers off by 2 and 4, three patches off by 3, 3 and 6
    pred, target = one_token_each(1, 2, 4, 3, 3, 6), one_token_each(0, 0, 0, 0, 0, 0)
    loss = token_weighted(cls=0.5, registers=0.25, patches=2, n_registers=2)
    assert loss(pred, target).item() == 0.5 * 1 + 0.25 * (4 + 16) / 2 + 2.0 * (9 + 9 + 36) / 3


@given(n_registers=st.integers(0, 6), n_patches=st.integers(1, 12), has_cls=st.booleans(), seed=st.integers(0, 99))
def test_weights_by_token_share_are_the_plain_mse(n_registers, n_patches, has_cls, seed):  # C8
    n_tokens = has_cls + n_registers + n_patches
    pred, target = seeded(seed, 2, n_tokens, 3), seeded(seed + 100, 2, n_tokens, 3)
    loss = token_weighted(
        cls=has_cls / n_tokens,
        registers=n_registers / n_tokens,
        patches=n_patches / n_tokens,
        n_registers=n_registers,
        has_cls=has_cls,
    )
    torch.testing.assert_close(loss(pred, target), mse(pred, target), rtol=1e-5, atol=1e-6)


def test_published_token_shares_are_the_plain_mse():  # C8
    pred, target = seeded(1, 2, 261, 8), seeded(2, 2, 261, 8)
    loss = token_weighted(cls=1 / 261, registers=4 / 261, patches=256 / 261)
    torch.testing.assert_close(loss(pred, target), mse(pred, target), rtol=1e-5, atol=0)


def test_teacher_without_registers_loses_only_that_term():
    pred, target = one_token_each(1, 2, 4), one_token_each(0, 0, 0)
    assert token_weighted(cls=0.34, registers=0.33, patches=0.5, n_registers=0)(pred, target).item() == pytest.approx(
        0.34 * 1 + 0.5 * (4 + 16) / 2
    )


def test_weighted_wants_patches_behind_its_prefix():
    loss = token_weighted(cls=1.0, registers=1.0, patches=1.0)
    with pytest.raises(ValueError, match="1 CLS, 4 register and some patch tokens, but the states have 5 tokens"):
        loss(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match=r"registers is -0\.1"):
        token_weighted(cls=1.0, registers=-0.1, patches=1.0)


def test_weighted_travels_to_workers():
    loss = token_weighted(cls=0.34, registers=0.33, patches=0.33)
    assert pickle.loads(pickle.dumps(loss)) == loss  # noqa: S301


def test_cosine_by_hand():  # C13
    pred = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    target = torch.tensor([[[6.0, 8.0], [0.0, 5.0]]])
    assert cosine(pred, target).item() == pytest.approx(-(1.0 + 0.0) / 2)
    assert cosine(-pred, target).item() == pytest.approx(0.5)


@pytest.mark.parametrize("loss", [cosine, mse_cosine])
def test_minimising_raises_the_cosine(loss):  # C13
    pred, target = seeded(1, 2, 5, 8).requires_grad_(), seeded(2, 2, 5, 8)

    def mean_cosine() -> float:
        return torch.cosine_similarity(pred.detach(), target, dim=-1).mean().item()

    before = mean_cosine()
    optimizer = torch.optim.SGD([pred], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        loss(pred, target).backward()
        optimizer.step()
    assert mean_cosine() > before + 0.1


def test_mse_cosine_is_half_of_each():
    pred, target = seeded(1, 2, 5, 8), seeded(2, 2, 5, 8)
    similarity = torch.cosine_similarity(pred, target, dim=-1).mean()
    torch.testing.assert_close(mse_cosine(pred, target), 0.5 * mse(pred, target) - 0.5 * similarity)


@pytest.mark.parametrize("loss", [mse, cosine, mse_cosine])
def test_half_precision_is_compared_in_float32(loss):
    pred, target = seeded(1, 2, 50, 64).bfloat16(), seeded(2, 2, 50, 64).half()
    assert loss(pred, target).dtype == torch.float32
    assert torch.equal(loss(pred, target), loss(pred.float(), target.float()))
    assert loss(pred.double(), target).dtype == torch.float64


def test_shapes_are_never_broadcast():
    with unchecked_shapes(), pytest.raises(ValueError, match=r"\(2, 5, 8\), target \(1, 5, 8\)"):
        mse(torch.zeros(2, 5, 8), torch.zeros(1, 5, 8))

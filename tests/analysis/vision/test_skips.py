"""A block without skips is its layers one after the other, and what that does to a model."""

import numpy as np
import pytest
import torch

from analysis.interventions import token_kinds
from analysis.similarity import minibatch_cka
from analysis.vision.skips import WithoutSkips, ablate_skips, crossing_cka
from infra.console import UserError
from pipeline.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits_vit")


@pytest.fixture(scope="module")
def x(teacher):
    pixels = np.random.default_rng(0).standard_normal((12, 3, 32, 32)).astype(np.float32)
    return teacher.embed(torch.from_numpy(pixels))


@pytest.fixture(scope="module")
def kinds(teacher):
    return token_kinds(has_cls=True, n_registers=teacher.n_registers, n_patches=teacher.n_patches)


@torch.no_grad()
def test_it_is_the_composition_of_the_branches(x):
    scaled = load_teacher("test_vit2", "random:0", image_size=32)  # LayerScale included
    state = scaled.embed(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    block = scaled.model.blocks[0]
    attended = block.ls1(block.attn(block.norm1(state)))
    expected = block.ls2(block.mlp(block.norm2(attended)))
    np.testing.assert_array_equal(WithoutSkips(block)(state).numpy(), expected.numpy())
    whole = block(state)
    middle = state + attended
    np.testing.assert_allclose(whole.numpy(), (middle + block.ls2(block.mlp(block.norm2(middle)))).numpy(), atol=1e-6)


def test_its_weights_are_the_blocks_own_and_learn(teacher, x):
    block = load_teacher("test_vit", "random:0", image_size=32).model.blocks[0].requires_grad_(True)
    without = WithoutSkips(block)
    without(torch.randn(2, 5, 64)).sum().backward()
    assert {id(one) for one in without.parameters()} == {id(one) for one in block.parameters()}
    assert block.attn.qkv.weight.grad.abs().sum() > 0


def test_other_blocks_are_refused():
    with pytest.raises(UserError, match="from a Linear: it has no norm1, attn, ls1, norm2, mlp, ls2"):
        WithoutSkips(torch.nn.Linear(2, 2))


def test_cka_across_a_block_is_that_of_the_states_on_both_sides():
    cka = np.arange(16.0).reshape(4, 4)
    assert crossing_cka(cka, 0) == np.mean([1, 2, 3])
    assert crossing_cka(cka, 1) == np.mean([6, 7])  # state 1 against 2 and 3; state 0 is left out
    assert crossing_cka(cka, 2) == np.mean([7, 11])
    cka[1, 2] = np.nan
    assert crossing_cka(cka, 1) == 7


def test_a_model_is_run_whole_and_without_each_blocks_skips(teacher, x, kinds):
    labels = teacher.logits(teacher.run_blocks(x, 0, 12)).argmax(dim=1).numpy()
    labels[0] = (labels[0] + 1) % 10  # wrong on one of twelve
    labels[1] = -1  # of which one has no label
    seen: list[int] = []
    found = ablate_skips(teacher, x, labels, {"cls": kinds["cls"]}, batch_rows=6, progress=seen.append)
    assert len(seen) == 13
    assert found.clean_accuracy == pytest.approx(10 / 11)
    assert found.accuracy is not None
    assert found.accuracy.shape == (12,)
    assert found.accuracy.mean() < 0.6
    states = [x]
    with torch.no_grad():
        for i in range(12):
            block = teacher.model.blocks[i]
            states.append(WithoutSkips(block)(states[-1]) if i == 4 else teacher.run_blocks(states[-1], i, i + 1))
    cls = torch.stack([state[:, 0] for state in states], dim=1).numpy()
    np.testing.assert_allclose(found.cka[4], minibatch_cka(cls, batch_rows=6).values, atol=1e-5)
    np.testing.assert_allclose(found.cka[4][:5, :5], found.clean_cka[:5, :5], atol=1e-5)  # before it nothing changes
    without, clean = found.crossing()
    assert without[4] == pytest.approx(crossing_cka(found.cka[4], 4))
    assert clean[4] == pytest.approx(crossing_cka(found.clean_cka, 4))


def test_without_labels_there_is_no_accuracy(teacher, x, kinds):
    found = ablate_skips(teacher, x[:6], np.full(6, -1), kinds)
    assert found.accuracy is None
    assert found.clean_accuracy is None

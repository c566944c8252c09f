"""Teacher forcing, roll-out and their mix on planted models; noise; the measured epsilon."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from storage_schemas.spec import Span
from tests.trainer.published import seeded, seeded_block, seeded_raptor
from tests.trainer.shapes import unchecked_shapes
from trainer.block import Block
from trainer.checkpoint import import_reference
from trainer.losses import cosine, mse, mse_cosine, token_weighted
from trainer.objectives import annealed_loss, brh_error, rollout_loss, teacher_forced_loss
from trainer.raptor import Raptor, rollout

WEIGHTED = token_weighted(cls=0.34, registers=0.33, patches=0.33)
OBJECTIVES = [teacher_forced_loss, rollout_loss]


def make_block(seed: int = 0) -> Block:
    block = Block(16, 2)
    block.load_state_dict(import_reference(seeded_block(seed, 16)))
    return block


def make_raptor(seed: int = 0) -> Raptor:
    raptor = Raptor([Block(16, 2) for _ in range(3)], [Span(0, 7), Span(7, 10), Span(10, 12)])
    raptor.load_state_dict(import_reference(seeded_raptor(seed, 16, 3)))
    return raptor


class Recorder:
    """An identity model that keeps what it was asked."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.layers: list[int] = []

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        self.inputs.append(x)
        self.layers.append(layer)
        return x


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("loss", "perfect"), [(mse, 0.0), (WEIGHTED, 0.0), (cosine, -1.0), (mse_cosine, -0.5)])
def test_teacher_that_is_the_model_gives_the_perfect_loss(objective, loss, perfect):  # C9, C10
    raptor = make_raptor()
    states = raptor.rollout(seeded(1, 2, 7, 16), 0, 12).detach()
    assert objective(raptor, states, 0, loss).item() == pytest.approx(perfect, abs=1e-6)
    assert objective(raptor, states + 0.1 * seeded(2, *states.shape), 0, loss).item() > perfect + 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_states_begin_at_start(objective):
    """One layer off shows, as the depth scales differ and other blocks are asked."""
    raptor = make_raptor()
    states = rollout(raptor, seeded(1, 2, 7, 16), 5, 9).detach()
    assert objective(raptor, states, 5, mse).item() == 0.0
    assert objective(raptor, states, 6, mse).item() > 1e-6
    recorder = Recorder()
    objective(recorder, states, 5, mse)
    assert recorder.layers == [6, 7, 8, 9]


def test_rollout_uses_its_own_predictions_and_teacher_forcing_the_teachers():  # C9, C10
    block, states = make_block(), seeded(1, 2, 4, 7, 16)
    own, expected_rollout, expected_forced = states[:, 0], [], []
    for i in range(3):
        expected_forced.append(mse(block(states[:, i], i + 3), states[:, i + 1]))
        own = block(own, i + 3)
        expected_rollout.append(mse(own, states[:, i + 1]))
    torch.testing.assert_close(rollout_loss(block, states, 2, mse), sum(expected_rollout) / 3)
    torch.testing.assert_close(teacher_forced_loss(block, states, 2, mse), sum(expected_forced) / 3)
    assert abs(rollout_loss(block, states, 2, mse) - teacher_forced_loss(block, states, 2, mse)) > 1e-3


@pytest.mark.parametrize("loss", [mse, cosine, mse_cosine, WEIGHTED])
def test_one_step_is_the_same_both_ways(loss):  # C9
    block, states = make_block(), seeded(1, 2, 2, 7, 16)
    assert torch.equal(rollout_loss(block, states, 4, loss), teacher_forced_loss(block, states, 4, loss))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_is_the_finite_difference(objective):  # C9: a detached prediction would miss most of it
    block, states = make_block().double(), seeded(1, 2, 5, 7, 16).double()
    objective(block, states, 0, mse).backward()
    directions = [seeded(10 + i, *p.shape).double() for i, p in enumerate(block.parameters())]
    slope = sum((p.grad * d).sum().item() for p, d in zip(block.parameters(), directions))
    values = []
    for shift in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(block.parameters(), directions):
                p += shift * d
            values.append(objective(block, states, 0, mse).item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("model", [make_block(), make_raptor()], ids=["block", "raptor"])
@pytest.mark.parametrize("loss", [mse, mse_cosine, WEIGHTED])
def test_teacher_forcing_is_one_flattened_batch_in_any_order(model, loss):  # C10
    states = seeded(1, 3, 13, 7, 16)
    inputs, targets = states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)
    layers = torch.arange(1, 13).repeat(3)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    flattened = loss(model(inputs[order], layers[order]), targets[order])
    torch.testing.assert_close(teacher_forced_loss(model, states, 0, loss), flattened, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_noise_is_bitwise_the_clean_path(objective):  # C11
    recorder, states = Recorder(), seeded(1, 2, 4, 7, 16)
    before = torch.get_rng_state()
    objective(recorder, states, 0, mse, noise=0.0)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"
    expected = states[:, :3].unbind(1) if objective is teacher_forced_loss else [states[:, 0]] * 3
    assert all(torch.equal(seen, true) for seen, true in zip(recorder.inputs, expected, strict=True))


@pytest.mark.parametrize("one_for_all", [True, False], ids=["one generator", "one a sample, as training has"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_has_the_stated_size_on_every_input(objective, one_for_all):  # C11
    recorder, states = Recorder(), seeded(1, 8, 4, 50, 64)
    draws = [torch.Generator().manual_seed(seed) for seed in range(8)]
    objective(recorder, states, 0, mse, noise=0.25, generator=draws[0] if one_for_all else draws)
    clean = (
        [states[:, i] for i in range(3)] if objective is teacher_forced_loss else [states[:, 0], *recorder.inputs[:2]]
    )
    noises = [seen - true for seen, true in zip(recorder.inputs, clean, strict=True)]
    for noise in noises:  # 25,600 draws: the standard deviation is known to 0.45 %
        assert noise.std().item() == pytest.approx(0.25, rel=0.02)
        assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert torch.corrcoef(torch.stack([n.flatten() for n in noises])).fill_diagonal_(0).abs().max() < 0.03


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_comes_from_the_generator_and_changes_no_input(objective):  # C11
    block, states = make_block(), seeded(1, 2, 4, 7, 16)
    kept, before = states.clone(), torch.get_rng_state()

    def noisy(seed: int) -> Tensor:
        return objective(block, states, 0, mse, noise=0.1, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(noisy(0), noisy(0))
    assert not torch.equal(noisy(0), noisy(1))
    assert torch.equal(states, kept)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_keeps_its_noise_whatever_else_is_in_the_batch():  # C11
    """With a generator for each sample, a batch may be cut anywhere."""
    states = seeded(1, 4, 4, 7, 16)

    def inputs(rows: slice) -> Tensor:
        recorder, draws = Recorder(), [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)[rows]]
        annealed_loss(recorder, states[rows], 0, mse, 0.5, noise=0.1, generator=draws)
        return torch.stack(recorder.inputs)

    whole = inputs(slice(0, 4))
    assert torch.equal(torch.cat([inputs(slice(0, 3)), inputs(slice(3, 4))], dim=1), whole)
    assert not torch.equal(whole[0, 0] - states[0, 0], whole[0, 1] - states[1, 0])
    with pytest.raises(ValueError, match="1 generators for 4 samples"):
        annealed_loss(Recorder(), states, 0, mse, 0.5, noise=0.1, generator=[torch.Generator()])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("make_model", [make_block, make_raptor])
def test_mix_is_the_weighted_sum_with_its_gradient(ratio, make_model: Callable):
    model, states = make_model().double(), seeded(1, 2, 6, 7, 16).double()
    expected = ratio * teacher_forced_loss(model, states, 5, WEIGHTED)
    expected = expected + (1 - ratio) * rollout_loss(model, states, 5, WEIGHTED)
    mixed = annealed_loss(model, states, 5, WEIGHTED, ratio)
    torch.testing.assert_close(mixed, expected)
    parameters = [
        p
        for p, g in zip(
            model.parameters(),
            torch.autograd.grad(expected, list(model.parameters()), allow_unused=True, retain_graph=True),
        )
        if g is not None
    ]
    for ours, plain in zip(torch.autograd.grad(mixed, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("ratio", "calls"), [(1.0, 7), (0.5, 13), (0.0, 7)])
def test_mix_computes_nothing_twice_and_nothing_without_weight(ratio, calls):
    recorder = Recorder()
    annealed_loss(recorder, seeded(1, 2, 8, 7, 4), 0, mse, ratio, noise=0.1)
    assert len(recorder.layers) == calls


def test_wrong_arguments_are_named():
    states = seeded(1, 2, 3, 7, 16)
    with pytest.raises(ValueError, match=r"teacher_forcing is 1\.5"):
        annealed_loss(Recorder(), states, 0, mse, 1.5)
    with pytest.raises(ValueError, match="noise is -1"):
        rollout_loss(Recorder(), states, 0, mse, noise=-1.0)
    with pytest.raises(ValueError, match="states hold 1 layer"):
        rollout_loss(Recorder(), states[:, :1], 0, mse)
    with pytest.raises(ValueError, match="states hold 1 layer"):
        teacher_forced_loss(Recorder(), states[:, :1], 0, mse)
    with (
        unchecked_shapes(),
        pytest.raises(ValueError, match=r"predicted has shape \(2, 2, 7, 16\), states \(2, 3, 7, 16\)"),
    ):
        brh_error(states[:, :2], states)


@pytest.mark.parametrize("objective", [*OBJECTIVES, annealed_loss])
def test_objectives_read_nothing_back_from_the_device(objective):
    """Fake tensors have no values, so that whatever waits for one raises."""
    with FakeTensorMode():
        raptor = Raptor([Block(16, 2) for _ in range(2)], [Span(0, 2), Span(2, 5)])
        states = torch.empty(2, 6, 7, 16)
        weight = {"teacher_forcing": 0.5} if objective is annealed_loss else {}
        objective(raptor, states, 0, WEIGHTED, noise=0.1, **weight).backward()


def test_epsilon_by_hand():  # C14
    states = torch.zeros(2, 2, 2, 2)
    predicted = states.clone()
    predicted[0, 1] = torch.tensor([[1.0, 2.0], [2.0, 4.0]])  # Frobenius norm 5
    predicted[1, 1] = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert brh_error(predicted, states).tolist() == [0.0, 3.0]


def test_epsilon_is_zero_on_the_planted_model_and_grows_along_a_line_away_from_it():  # C14
    raptor = make_raptor()
    states = raptor.rollout(seeded(1, 3, 7, 16), 0, 12).detach()
    assert torch.equal(brh_error(raptor.rollout(states[:, 0], 0, 12), states), torch.zeros(13))
    other = make_raptor(50).rollout(states[:, 0], 0, 12).detach()
    full = brh_error(other, states)
    assert full[0] == 0
    assert (full[1:] > 0).all()
    for share in (0.25, 0.5, 0.75):
        between = states + share * (other - states)
        torch.testing.assert_close(brh_error(between, states), share * full, rtol=1e-4, atol=1e-5)


def test_epsilon_obeys_the_triangle():  # C14
    a, b, c = (seeded(i, 4, 3, 7, 16) for i in range(3))
    assert (brh_error(a, c) <= brh_error(a, b) + brh_error(b, c)).all()
    assert torch.equal(brh_error(a, b), brh_error(b, a))

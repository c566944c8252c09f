"""Routing, tied weights, roll-out."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from storage_schemas.spec import Span
from tests.trainer.published import seeded, seeded_raptor
from tests.trainer.shapes import unchecked_shapes
from trainer.block import Block
from trainer.checkpoint import import_reference
from trainer.losses import mse
from trainer.objectives import rollout_loss
from trainer.raptor import Raptor, rollout

RAPTOR3 = [Span(0, 7), Span(7, 10), Span(10, 12)]


class AddOne(nn.Module):
    """Adds a power of ten of its own, so that a state tells which block ran how often."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor, layer: int | Tensor) -> Tensor:
        return x + self.unit


def counting_raptor(spans: list[Span]) -> Raptor:
    return Raptor([AddOne(100**i) for i in range(len(spans))], spans)


def make_raptor(seed: int = 0) -> Raptor:
    raptor = Raptor([Block(32, 4) for _ in RAPTOR3], RAPTOR3)
    raptor.load_state_dict(import_reference(seeded_raptor(seed, 32, 3)))
    return raptor


@pytest.mark.parametrize(
    ("spans", "owners"),
    [  # seeds.md 1.6: thresholds [7], [7, 10] and [4, 7, 10], a threshold belonging to the block before it
        (["0-7", "7-12"], [0] * 7 + [1] * 5),
        (["0-7", "7-10", "10-12"], [0] * 7 + [1] * 3 + [2] * 2),
        (["0-4", "4-7", "7-10", "10-12"], [0] * 4 + [1] * 3 + [2] * 3 + [3] * 2),
    ],
)
def test_routing_table(spans, owners):  # C6
    raptor = counting_raptor([Span.parse(span) for span in spans])
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert [raptor.block_index(layer) for layer in range(1, 13)] == owners
    assert [raptor(x, layer).item() for layer in range(1, 13)] == [100**owner for owner in owners]
    assert raptor.rollout(x, 0, 12)[0, -1].item() == sum(100**owner for owner in owners)


@given(st.sets(st.integers(0, 60), min_size=2, max_size=8).map(sorted), st.data())
def test_each_layer_has_exactly_the_block_whose_span_produces_it(borders, data):  # C6
    spans = [Span(a, b) for a, b in itertools.pairwise(borders)]
    raptor = counting_raptor(spans)
    layer = data.draw(st.integers(borders[0] + 1, borders[-1]))
    assert [spans.index(s) for s in spans if s.start < layer <= s.stop] == [raptor.block_index(layer)]
    assert raptor.span == Span(borders[0], borders[-1])


@pytest.mark.parametrize("layers", [[1, 12, 8, 7, 11, 10], [3, 3, 3, 3, 3, 3], [9, 8, 9, 10, 8, 8]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_layer_per_sample_runs_each_sample_through_its_own_block(layers, dtype):
    raptor, x = make_raptor(), seeded(1, 6, 9, 32)
    together = raptor(x, torch.tensor(layers, dtype=dtype))
    alone = torch.cat([raptor(x[i : i + 1], layer) for i, layer in enumerate(layers)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_mixed_layers_give_every_block_its_gradient():
    raptor, x = make_raptor(), seeded(1, 4, 9, 32).requires_grad_()
    raptor(x, torch.tensor([8, 1, 12, 2])).square().mean().backward()
    mixed, mixed_input = {name: p.grad for name, p in raptor.named_parameters()}, x.grad
    raptor.zero_grad()
    x.grad = None
    (sum(raptor(x[i : i + 1], layer).square().mean() for i, layer in enumerate((8, 1, 12, 2))) / 4).backward()
    for name, p in raptor.named_parameters():
        torch.testing.assert_close(mixed[name], p.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed_input, x.grad, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_rollout_is_the_sum_over_untied_copies():  # C7
    block = Block(32, 4)
    block.load_state_dict(import_reference({k[9:]: v for k, v in seeded_raptor(5, 32, 1).items()}))
    copies = nn.ModuleList([copy.deepcopy(block) for _ in range(4)])
    states = seeded(1, 2, 5, 9, 32)
    rollout_loss(block, states, 3, mse).backward()
    x, losses = states[:, 0], []
    for step, untied in enumerate(copies):
        x = untied(x, step + 4)
        losses.append(mse(x, states[:, step + 1]))
    torch.stack(losses).mean().backward()
    for name, tied in block.named_parameters():
        untied = sum(dict(c.named_parameters())[name].grad for c in copies)
        torch.testing.assert_close(tied.grad, untied, rtol=1e-4, atol=1e-6)


def test_rollout_feeds_predictions_back_and_keeps_the_first_state():
    raptor, x = make_raptor(), seeded(1, 2, 9, 32)
    states = raptor.rollout(x, 6, 11)
    assert states.shape == (2, 6, 9, 32)
    assert torch.equal(states[:, 0], x)
    for i, layer in enumerate(range(7, 12)):
        assert torch.equal(states[:, i + 1], raptor(states[:, i], layer))
    assert torch.equal(raptor.rollout(x, 4, 4), x[:, None])
    assert torch.equal(rollout(raptor.blocks[1], x, 7, 10), raptor.rollout(x, 7, 10))


def test_gradients_run_through_the_whole_rollout():
    raptor, x = make_raptor(), seeded(1, 2, 9, 32).requires_grad_()
    (through,) = torch.autograd.grad(raptor.rollout(x, 6, 9)[:, -1].sum(), x)
    (stepwise,) = torch.autograd.grad(raptor(raptor(raptor(x, 7), 8), 9).sum(), x)
    assert torch.equal(through, stepwise)
    assert through.abs().max() > 0


def test_rollout_of_half_precision_states_under_autocast():
    raptor, x = make_raptor(), seeded(1, 2, 9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert raptor.rollout(x.bfloat16(), 0, 3).dtype == torch.float32


@pytest.mark.parametrize("layer", [0, 13])
def test_layers_outside_the_spans_are_refused(layer):
    raptor, x = counting_raptor(RAPTOR3), torch.zeros(2, 1, 1)
    with pytest.raises(ValueError, match=rf"layer {layer}: its spans 0-7, 7-10, 10-12 produce layers 1 to 12"):
        raptor(x, layer)
    with pytest.raises(ValueError, match="produce layers 1 to 12"):
        raptor(x, torch.tensor([1, layer]))
    with pytest.raises(ValueError, match=r"cannot roll out from state 3 to 13: choose them in 0-12"):
        raptor.rollout(x, 3, 13)
    with pytest.raises(ValueError, match="cannot roll out from state 5 to 4"):
        raptor.rollout(x, 5, 4)


def test_layer_tensor_of_the_wrong_shape_is_refused():
    with unchecked_shapes(), pytest.raises(ValueError, match=r"layer has shape \(3,\) for a batch of 2"):
        counting_raptor(RAPTOR3)(torch.zeros(2, 1, 1), torch.ones(3))


def test_spans_that_make_no_depth_are_all_listed():
    with pytest.raises(ValueError, match="is followed by") as error:
        Raptor([AddOne(1)], [Span(0, 4), Span(5, 7), Span(6, 12)])
    assert "1 blocks for 3 spans" in str(error.value)
    assert "span 0-4 is followed by 5-7: the next one must begin at state 4" in str(error.value)
    assert "span 5-7 is followed by 6-12: the next one must begin at state 7" in str(error.value)
    with pytest.raises(ValueError, match="no span"):
        Raptor([], [])

"""One step of AdamW in closed form; clipping by global norm."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from trainer.block import Block
from trainer.optimizer import LightAdamW, clip_and_step, make_optimizer, set_learning_rate


def linear(gradient: float = 0.5) -> nn.Linear:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 4.0)
    for p in layer.parameters():
        p.grad = torch.full_like(p, gradient)
    return layer


def test_one_step_in_closed_form_decays_the_bias_too():  # D3
    layer = linear()
    make_optimizer(layer, learning_rate=0.01, weight_decay=0.1).step()
    # bias-corrected, the first step has m = g and v = g^2
    move = 0.01 * 0.5 / (0.5 + 1e-8)
    assert layer.weight.detach().flatten().tolist() == pytest.approx([2.0 * (1 - 0.01 * 0.1) - move] * 4, rel=1e-6)
    assert layer.bias.tolist() == pytest.approx([4.0 * (1 - 0.01 * 0.1) - move] * 2, rel=1e-6)


def test_two_steps_use_the_default_betas():  # D3
    layer = linear(0.5)
    # steps of 1: of smaller ones, a value near 4 would not show another beta
    optimizer = make_optimizer(layer, learning_rate=1.0, weight_decay=0.0)
    optimizer.step()
    layer.bias.grad.fill_(-0.25)
    optimizer.step()
    m = (0.9 * 0.1 * 0.5 + 0.1 * -0.25) / (1 - 0.9**2)
    v = (0.999 * 0.001 * 0.25 + 0.001 * 0.0625) / (1 - 0.999**2)
    assert layer.bias.tolist() == pytest.approx([4.0 - 1.0 - m / v**0.5] * 2, rel=1e-6)


def test_bias_can_be_left_out_of_the_decay():  # D3
    layer = linear()
    make_optimizer(layer, learning_rate=0.01, weight_decay=0.1, decay_matrices_only=True).step()
    assert layer.weight[0, 0].item() == pytest.approx(2.0 * (1 - 0.001) - 0.01, rel=1e-6)
    assert layer.bias[0].item() == pytest.approx(4.0 - 0.01, rel=1e-6)


def test_all_parameters_of_a_block_are_in_exactly_one_group():  # D3
    block = Block(8, 2)
    names = {p: name for name, p in block.named_parameters()}
    (everything,) = make_optimizer(block).param_groups
    assert {names[p] for p in everything["params"]} == set(names.values())
    assert everything["weight_decay"] == 1e-4
    decayed, free = make_optimizer(block, decay_matrices_only=True).param_groups
    matrices = {"attention.qkv_weight", "attention.out.weight", "mlp.expand.weight", "mlp.contract.weight"}
    assert {names[p] for p in decayed["params"]} == matrices
    assert {names[p] for p in free["params"]} == set(names.values()) - matrices
    assert free["weight_decay"] == 0.0


def test_learning_rate_reaches_every_group():
    optimizer = make_optimizer(Block(8, 2), decay_matrices_only=True)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize(("size", "kept"), [(100.0, 1.0), (1.0001, 1.0), (0.5, 0.5)])
def test_gradients_are_clipped_to_a_global_norm_of_one(size, kept):  # D4
    layer = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in layer.parameters()])
    for p in layer.parameters():  # six equal numbers over two tensors: one norm over both
        p.grad = torch.full_like(p, size / 6**0.5)
    norm = clip_and_step(optimizer, max_norm=1.0)
    moved = before - torch.cat([p.detach().flatten() for p in layer.parameters()])
    assert norm.item() == pytest.approx(size, rel=1e-5)
    assert moved.norm().item() == pytest.approx(kept, rel=1e-4)


def test_gradients_below_the_norm_are_untouched():  # D4
    layer = linear(0.25)
    clip_and_step(torch.optim.SGD(layer.parameters(), lr=1.0), max_norm=1.0)
    assert layer.weight.grad.unique().tolist() == [0.25]


@pytest.mark.parametrize("fused", [False, True])
def test_without_the_compiler_it_is_torchs_own_to_the_bit(fused):
    """Steps, states and a state that goes over from one to the other."""
    layers = [nn.Linear(3, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    light = LightAdamW(layers[0].parameters(), lr=0.1, weight_decay=0.1, fused=fused)
    own = torch.optim.AdamW(layers[1].parameters(), lr=0.1, weight_decay=0.1, fused=fused)
    x = torch.randn(5, 3)
    for step in range(6):
        for layer, optimizer in zip(layers, (light, own)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        assert all(map(torch.equal, layers[0].parameters(), layers[1].parameters()))
        mine, theirs = light.state_dict(), own.state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        for key, values in theirs["state"].items():
            assert all(torch.equal(value, mine["state"][key][name]) for name, value in values.items())
        if step == 3:
            light.load_state_dict(theirs)
            own.load_state_dict(mine)
    assert not any(parameter.requires_grad and parameter.grad_fn for parameter in layers[0].parameters())


_TRAIN = """
import sys
import torch
from trainer.block import Block
from trainer.optimizer import clip_and_step, make_optimizer

block = Block(8, 2)
optimizer = make_optimizer(block)
block(torch.randn(2, 3, 8), 1).sum().backward()
clip_and_step(optimizer)
optimizer.zero_grad(set_to_none=True)
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules, "a step was taken, and the compiler came with it"
"""


def test_a_step_does_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", _TRAIN], check=True, timeout=280)

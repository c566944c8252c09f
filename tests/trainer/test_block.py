"""The block: its size, its parts in closed form, its start, its errors, and what makes it fast."""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.trainer.published import seeded, seeded_block
from tests.trainer.shapes import unchecked_shapes
from trainer.block import Attention, Block, DepthScales, Mlp
from trainer.checkpoint import import_reference


def make_block(seed: int = 0, dim: int = 32, n_heads: int = 4, **options: bool) -> Block:
    block = Block(dim, n_heads, **options)
    block.load_state_dict(import_reference(seeded_block(seed, dim, **options)))
    return block


def relative_change(block: Block, layer: int) -> float:
    x = seeded(1, 2, 20, block.dim)
    with torch.no_grad():
        return ((block(x, layer) - x).norm() / x.norm()).item()


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4])
def test_parameter_count_at_vit_b_size(n_blocks):  # C1
    with torch.device("meta"):
        blocks = nn.ModuleList([Block(768, 12) for _ in range(n_blocks)])
    expected = {1: 9_490_976, 2: 18_981_952, 3: 28_472_928, 4: 37_963_904}[n_blocks]
    assert sum(p.numel() for p in blocks.parameters()) == expected


def test_attention_is_softmax_of_scaled_products():  # C2
    attention = Attention(128, 2)  # 64 channels per head: scale 1/8
    x = seeded(1, 3, 7, 128)
    nn.init.normal_(attention.qkv_bias)
    query, key, value = (
        p.reshape(3, 7, 2, 64) for p in F.linear(x, attention.qkv_weight, attention.qkv_bias).chunk(3, dim=-1)
    )
    weights = torch.softmax(torch.einsum("bqhc,bkhc->bhqk", query, key) / 8, dim=-1)
    expected = attention.out(torch.einsum("bhqk,bkhc->bqhc", weights, value).reshape(3, 7, 128))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


def test_fused_and_plain_attention_agree():  # C2
    block, x = make_block(), seeded(1, 2, 69, 32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where no fused kernel takes our layout
        fused = block(x, 3)
    with sdpa_kernel(SDPBackend.MATH):
        plain = block(x, 3)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_swiglu_gates_with_its_first_half():  # C3
    mlp = Mlp(1, 1, swiglu=True)
    weights = {
        "expand.weight": [[2.0], [-3.0]],
        "expand.bias": [0.5, 0.25],
        "contract.weight": [[7.0]],
        "contract.bias": [0.125],
    }
    mlp.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    x = 0.75
    gate, value = 2.0 * x + 0.5, -3.0 * x + 0.25
    expected = 7.0 * (gate / (1.0 + math.exp(-gate))) * value + 0.125
    assert mlp(torch.tensor([[[x]]])).item() == pytest.approx(expected, rel=1e-6)


def test_swiglu_keeps_the_whole_hidden_width_and_gelu_needs_no_second_half():
    assert Block(12, 2).mlp.expand.out_features == 96
    assert Block(12, 2, swiglu=False).mlp.expand.out_features == 48


def test_new_block_is_nearly_the_identity():  # C4
    torch.manual_seed(0)
    assert 0 < relative_change(Block(768, 12, depth_scaling=False), 12) < 1e-4
    assert 1e-4 < relative_change(Block(768, 12), 12) < 1e-2


def test_layer_scale_multiplies_each_branch():  # C4
    block, x = make_block(depth_scaling=False), seeded(1, 2, 9, 32)
    with torch.no_grad():
        after_attention = x + block.attention_scale * block.attention(block.attention_norm(x))
        block.mlp_scale.zero_()
        torch.testing.assert_close(block(x, 1), after_attention)
        block.attention_scale.zero_()
        assert torch.equal(block(x, 1), x)


def test_depth_mlp_with_a_zero_last_layer_is_no_depth_mlp():  # C5
    scaled, plain, x = make_block(3), make_block(3, depth_scaling=False), seeded(1, 2, 9, 32)
    plain.load_state_dict({n: w for n, w in scaled.state_dict().items() if not n.startswith("depth")})
    nn.init.zeros_(scaled.depth.leave.weight)
    nn.init.zeros_(scaled.depth.leave.bias)
    assert torch.equal(scaled(x, 5), plain(x, 5))


def test_depth_scales_follow_their_formula():  # C5
    depth = DepthScales(4)
    with torch.no_grad():
        depth.leave.weight.normal_()
        hidden = [5.0 * w + b for w, b in zip(depth.enter.weight[:, 0].tolist(), depth.enter.bias.tolist())]
        hidden = [h / (1.0 + math.exp(-h)) for h in hidden]
        expected = [
            1.0 + b + sum(w * h for w, h in zip(row, hidden))
            for row, b in zip(depth.leave.weight.tolist(), depth.leave.bias.tolist())
        ]
    s1, s2, s3 = depth(5)
    torch.testing.assert_close(torch.cat([s1, s2, s3], dim=-1).flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_each_depth_scale_has_its_place():  # C5
    block, x = make_block(4), seeded(1, 2, 9, 32)
    s1, s2, s3 = block.depth(9)
    with torch.no_grad():
        y = x + s1 * (block.attention_scale * block.attention(block.attention_norm(x)))
        y = y + s2 * (block.mlp_scale * block.mlp(block.mlp_norm(y)))
        torch.testing.assert_close(block(x, 9), s3 * y)
        block.attention_scale.zero_()
        block.mlp_scale.zero_()
        assert torch.equal(block(x, 9), s3 * x), "the third scale multiplies the residual stream itself"


def test_layer_changes_the_output_with_depth_scaling_only():  # C5
    x = seeded(1, 2, 9, 32)
    scaled, plain = make_block(), make_block(depth_scaling=False)
    assert (scaled(x, 1) - scaled(x, 12)).abs().max() > 1e-3
    assert torch.equal(plain(x, 1), plain(x, 12))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_layer_per_sample_equals_layer_by_layer(dtype):
    block, x = make_block(), seeded(1, 3, 9, 32)
    together = block(x, torch.tensor([2, 11, 5], dtype=dtype))
    alone = torch.cat([block(x[i : i + 1], layer) for i, layer in enumerate((2, 11, 5))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "n_heads"), [(30, 4), (0, 1), (8, 0)])
def test_heads_must_divide_channels(dim, n_heads):
    with pytest.raises(ValueError, match=f"{dim} channels cannot have {n_heads} heads"):
        Block(dim, n_heads)


def test_mlp_needs_a_hidden_channel():
    with pytest.raises(ValueError, match="no hidden channel"):
        Block(8, 2, mlp_ratio=0.1)


def test_wrong_arguments_are_named():
    block = Block(32, 4)
    with unchecked_shapes():
        with pytest.raises(ValueError, match=r"\(2, 9, 16\); this block takes \(batch, token, 32\)"):
            block(torch.zeros(2, 9, 16), 1)
        with pytest.raises(ValueError, match=r"this block takes \(batch, token, 32\)"):
            block(torch.zeros(9, 32), 1)
        with pytest.raises(ValueError, match=r"layer has shape \(3,\) for a batch of 2"):
            block(torch.zeros(2, 9, 32), torch.ones(3))
        with pytest.raises(ValueError, match=r"layer has shape \(\) for a batch of 2"):
            block(torch.zeros(2, 9, 32), torch.tensor(1))
        with pytest.raises(ValueError, match="layer is 0, but a block produces layer 1 or later"):
            block(torch.zeros(2, 9, 32), 0)


@pytest.mark.parametrize("layer", [3, "tensor"])
def test_forward_and_backward_read_nothing_back_from_the_device(layer):
    """Fake tensors have no values, so that whatever waits for one raises."""
    with FakeTensorMode():
        block, x = Block(32, 4), torch.empty(2, 9, 32)
        layer = torch.empty(2) if layer == "tensor" else layer
        block(x, layer).sum().backward()
        with pytest.raises(DataDependentOutputException):
            x.max().item()


def test_autocast_computes_in_bfloat16_but_keeps_stream_and_scales_in_float32():
    block, x = make_block(), seeded(1, 2, 9, 32)
    exact = block(x, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = block(x, 7)
        assert block.attention(block.attention_norm(x)).dtype == torch.bfloat16
    assert fast.dtype == torch.float32
    assert 0 < (fast - exact).norm() / exact.norm() < 1e-2
    with torch.no_grad():
        block.attention_scale.zero_()
        block.mlp_scale.zero_()
    exact = block.depth(7)[2] * x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block(x, 7), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whole_block_in_another_precision(dtype):
    block, x = make_block().to(dtype), seeded(1, 2, 9, 32).to(dtype)
    assert block(x, 3).dtype == dtype
    torch.testing.assert_close(block(x, 3).float(), make_block()(x.float(), 3), rtol=5e-2, atol=5e-2)


def test_traces_whole_and_compiles_at_most_twice_for_all_layers():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    block, x = make_block(), seeded(1, 2, 9, 32)
    with unchecked_shapes():
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        for layer in range(1, 13):
            assert torch.equal(compiled(x, layer), block(x, layer))
        assert counter.frame_count <= 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(compiled(x, 3), block(x, 3))
        torch.testing.assert_close(compiled(x, torch.tensor([2, 5])), block(x, torch.tensor([2, 5])))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # inductor imports it
def test_inductor_gives_the_same_outputs_and_gradients():
    block, x = make_block(), seeded(1, 2, 9, 32)
    with unchecked_shapes():
        compiled = torch.compile(block, fullgraph=True)
        for layer in (1, 2, 12):
            grads = [
                torch.autograd.grad(model(x, layer).square().mean(), list(block.parameters()))
                for model in (block, compiled)
            ]
            for plain, fused in zip(*grads):
                torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)

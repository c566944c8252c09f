"""One weight-tied block of a Raptor: a transformer block whose branches are scaled by the depth it stands at.

Written from the description in arXiv:2512.19941 (section 3 and appendix A.3); equal to KempnerInstitute/raptor:
raptor/block.py given the same weights (tests/golden/PROVENANCE.md).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

DEPTH_WIDTH = 16  # hidden units of the depth MLP
DEPTH_INIT_STD = 1e-4


class Block(nn.Module):
    """Takes state layer - 1 of the residual stream to state layer.

    With s1, s2, s3 the three channel scales that the depth MLP gives for the target layer:

        x <- x + s1 * attention_scale * attention(norm(x))
        x <- x + s2 * mlp_scale * mlp(norm(x))
        return s3 * x

    Close to the identity when new. Under autocast the residual stream and the three scales stay in float32: bfloat16
    would round s3, which begins within 1 % of 1, to steps of 0.4 to 0.8 %.

    Args:
        dim: Channels per token.
        n_heads: Attention heads; divides dim.
        mlp_ratio: Hidden channels of the MLP per channel. SwiGLU keeps all of them (no factor 2/3).
        layer_scale_init: Start value of the per-channel scale of both branches.
        depth_scaling: Whether the target layer enters, through s1, s2 and s3.
        swiglu: SiLU-gated MLP (the first half gates the second) instead of GELU.

    Raises:
        ValueError: dim, n_heads or mlp_ratio do not fit together.

    Source: seeds.md 1.5; 9,490,976 parameters at dim 768.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        mlp_ratio: float | int = 4.0,
        layer_scale_init: float = 1e-5,
        depth_scaling: bool = True,
        swiglu: bool = True,
    ) -> None:
        super().__init__()
        if dim < 1 or n_heads < 1 or dim % n_heads:
            raise ValueError(f"a block of {dim} channels cannot have {n_heads} heads: choose n_heads that divides dim")
        hidden = int(dim * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio {mlp_ratio} leaves no hidden channel at dim {dim}: choose at least {1 / dim}")
        self.arguments: dict[str, Any] = {
            "dim": dim,
            "n_heads": n_heads,
            "mlp_ratio": mlp_ratio,
            "layer_scale_init": layer_scale_init,
            "depth_scaling": depth_scaling,
            "swiglu": swiglu,
        }
        self.dim = dim
        # Parts are made in the order of the published code, so that one seed gives both the same weights.
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, n_heads)
        self.attention_scale = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, swiglu)
        self.mlp_scale = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.depth = DepthScales(dim) if depth_scaling else None

    def forward(
        self, x: Float[Tensor, "batch token dim"], layer: int | Num[Tensor, " batch"]
    ) -> Float[Tensor, "batch token dim"]:
        """Predict state `layer` from state `layer - 1`.

        Never waits for the device; a layer tensor is therefore not checked for its values.

        Args:
            x: State layer - 1, tokens in the teacher's order.
            layer: Target layer, 1 or more: one for the batch, or one per sample.

        Raises:
            ValueError: x or layer has the wrong shape, or an integer layer is below 1.
        """
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; this block takes (batch, token, {self.dim})")
        if isinstance(layer, Tensor):
            if layer.shape != x.shape[:1]:
                raise ValueError(
                    f"layer has shape {tuple(layer.shape)} for a batch of {x.shape[0]}: "
                    f"give one integer, or a tensor of shape ({x.shape[0]},)"
                )
        elif layer < 1:
            raise ValueError(f"layer is {layer}, but a block produces layer 1 or later: give the target, not the input")
        if self.depth is None:
            x = x + self.attention_scale * self.attention(self.attention_norm(x))
            return x + self.mlp_scale * self.mlp(self.mlp_norm(x))
        s1, s2, s3 = self.depth(layer)
        x = x + s1 * self.attention_scale * self.attention(self.attention_norm(x))
        x = x + s2 * self.mlp_scale * self.mlp(self.mlp_norm(x))
        return s3 * x


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection, through torch's fused kernels."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.out = nn.Linear(dim, dim)
        self.qkv_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.qkv_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.qkv_weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        packed = F.linear(x, self.qkv_weight, self.qkv_bias)
        heads = packed.unflatten(-1, (3, self.n_heads, -1))  # batch token 3 head channel
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around SwiGLU (the first half of the hidden channels gates the second) or GELU."""

    def __init__(self, dim: int, hidden: int, swiglu: bool) -> None:
        super().__init__()
        self.swiglu = swiglu
        self.expand = nn.Linear(dim, 2 * hidden if swiglu else hidden)
        self.contract = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        hidden = self.expand(x)
        if not self.swiglu:
            return self.contract(F.gelu(hidden))
        gate, value = hidden.chunk(2, dim=-1)
        return self.contract(F.silu(gate) * value)


class DepthScales(nn.Module):
    """From the target layer, as it is (not normalised), three scales per channel around 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.enter = nn.Linear(1, DEPTH_WIDTH)
        self.leave = nn.Linear(DEPTH_WIDTH, 3 * dim)
        nn.init.normal_(self.leave.weight, std=DEPTH_INIT_STD)
        nn.init.normal_(self.leave.bias, std=DEPTH_INIT_STD)

    def forward(self, layer: int | Num[Tensor, " batch"]) -> tuple[Float[Tensor, "_ 1 dim"], ...]:
        """Scales s1, s2, s3 of shape (batch, 1, dim), or (1, 1, dim) where one integer serves the whole batch."""
        weight = self.enter.weight
        if isinstance(layer, Tensor):
            depth = layer.to(device=weight.device, dtype=weight.dtype, non_blocking=True).reshape(-1, 1, 1)
        else:
            depth = torch.full((1, 1, 1), float(layer), device=weight.device, dtype=weight.dtype)
        with torch.autocast(device_type=weight.device.type, enabled=False):
            scales = self.leave(F.silu(self.enter(depth))) + 1
        return scales.chunk(3, dim=-1)

"""A small ViT of one class token and patches, with ordinary attention or with attention that depends on places alone.

Source: Jelassi et al. 2022, Definition 3.2. Positional attention has queries and keys of the position embeddings P and
values of the tokens: S = softmax(P W_Q (P W_K)ᵀ / sqrt(head dim)), the same for every image. Nothing else of the model
sees P, while the ordinary ViT adds P to its tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

ATTENTIONS = ("ordinary", "positional")

_FIRST_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class VitSize:
    """Sizes of a small ViT.

    Attributes:
        grid: Rows and columns of patches.
        patch_dim: Values of a patch.
        n_classes: Of the readout.
        dim: Channels.
        depth: Blocks.
        heads: Of each block's attention.
    """

    grid: tuple[int, int]
    patch_dim: int
    n_classes: int
    dim: int = 48
    depth: int = 2
    heads: int = 3

    @property
    def n_patches(self) -> int:
        """Rows times columns."""
        return self.grid[0] * self.grid[1]


class PositionalAttention(nn.Module):
    """Definition 3.2 with several heads: where a token looks depends on its place and on no image.

    Args:
        positions: P, shared with the other blocks: (token, dim). Its encodings are normalised as tokens are before
            ordinary attention.
        dim: Channels.
        heads: Number of heads.
    """

    def __init__(self, positions: nn.Parameter, dim: int, heads: int) -> None:
        super().__init__()
        self.positions, self.heads = positions, heads
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def weights(self) -> Float[torch.Tensor, "head query key"]:
        """S of each head; rows sum to 1."""
        normed = self.norm(self.positions)
        n_tokens, dim = normed.shape
        q, k = (layer(normed).reshape(n_tokens, self.heads, -1).transpose(0, 1) for layer in (self.query, self.key))
        return (q @ k.transpose(1, 2) / math.sqrt(dim // self.heads)).softmax(dim=-1)

    def forward(self, x: Float[torch.Tensor, "row token dim"], **_: Any) -> Float[torch.Tensor, "row token dim"]:
        """S V, each head its own part of the channels; linear in x. A timm block's masks mean nothing here."""
        values = self.value(x).reshape(*x.shape[:2], self.heads, -1)
        mixed = torch.einsum("hqk,bkhc->bqhc", self.weights(), values)
        return self.proj(mixed.reshape(x.shape))


class SmallVit(nn.Module):
    """Linear embedding of patches, a class token, timm's pre-norm blocks, a linear readout.

    The readout sees [final-norm CLS; mean of final-norm patches], as those of this project's teachers do.

    Args:
        size: Sizes.
        attention: One of ATTENTIONS.
        seed: Of the first weights.

    Raises:
        ValueError: Another attention, or channels that the heads do not share evenly.
    """

    def __init__(self, size: VitSize, attention: str, seed: int) -> None:
        super().__init__()
        if attention not in ATTENTIONS or size.dim % size.heads:
            raise ValueError(
                f"attention is {attention!r}, expected one of {', '.join(ATTENTIONS)}; {size.dim} channels for "
                f"{size.heads} heads, expected as many for each"
            )
        self.size, self.attention = size, attention
        with torch.random.fork_rng(devices=[]):  # timm draws from torch's global generator
            torch.manual_seed(seed)
            self.embed = nn.Linear(size.patch_dim, size.dim)
            self.cls = nn.Parameter(torch.zeros(1, 1, size.dim))
            self.positions = nn.Parameter(torch.zeros(1 + size.n_patches, size.dim))
            trunc_normal_(self.positions, std=_FIRST_STD)
            self.blocks = nn.ModuleList(self._block() for _ in range(size.depth))
            self.norm = nn.LayerNorm(size.dim, eps=1e-6)
            self.head = nn.Linear(2 * size.dim, size.n_classes)
            self.apply(_first_weights)
            # As small as positions: one of a single pixel would else be many times as long as its position.
            trunc_normal_(self.embed.weight, std=_FIRST_STD)
            trunc_normal_(self.cls, std=_FIRST_STD)

    def _block(self) -> nn.Module:
        block = Block(self.size.dim, num_heads=self.size.heads, qkv_bias=True)
        if self.attention == "positional":
            block.attn = PositionalAttention(self.positions, self.size.dim, self.size.heads)
        return block

    @property
    def patch_positions(self) -> Float32[torch.Tensor, "patch dim"]:
        """P of the patches, apart from the graph."""
        return self.positions.detach()[1:].cpu().clone()

    def forward(self, patches: Float[torch.Tensor, "row patch value"]) -> Float[torch.Tensor, "row class"]:
        """Logits."""
        x = self.embed(patches)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        if self.attention == "ordinary":
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=-1))


def _first_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def cut_patches(
    pixels: Float[torch.Tensor, "row channel height width"], side: int
) -> Float[torch.Tensor, "row patch value"]:
    """Square patches in row order, each its pixels of all channels.

    Raises:
        ValueError: Images that the side does not divide.
    """
    n, channels, height, width = pixels.shape
    if height % side or width % side:
        raise ValueError(f"images of {height} x {width} px are not cut into patches of {side} px")
    cut = pixels.reshape(n, channels, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, height // side * (width // side), channels * side * side)

"""What a ViT's blocks look at and what their branches add: attention distances and norm ratios.

Source: Raghu et al. 2021, sections 4 and 5. Attention is computed from states, so a store's state 0 and its teacher are
enough: no images. Rows and columns of CLS and registers are left out and the rest of each row is scaled to sum to 1;
what was left out is reported, as the paper says nothing of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analysis.accumulate import Moments, MomentsAccumulator
from infra.console import UserError
from pipeline.light_timm import Attention
from pipeline.teacher import Teacher

# A timm block. As an nn.Module, each of its attributes would be "Tensor | Module" to a type checker.
Block = Any


def patch_distances(grid: tuple[int, int], patch_size: tuple[float, float]) -> Float64[np.ndarray, "patch patch"]:
    """Distance between the centres of each two patches, in the unit of `patch_size` (height, width): px."""
    rows, columns = np.indices(grid).reshape(2, -1) * np.array(patch_size)[:, None]
    return np.hypot(rows[:, None] - rows, columns[:, None] - columns)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far heads look.

    Attributes:
        distance: Mean over query patches of the distance to what they look at, weighted by attention.
        elsewhere: Share of their attention that goes to tokens before the first patch.
    """

    distance: Float64[np.ndarray, "row head"]
    elsewhere: Float64[np.ndarray, "row head"]


def attention_reach(
    attention: Float[np.ndarray, "row head query key"], grid: tuple[int, int], patch_size: tuple[float, float]
) -> Reach:
    """sum_j A_ij |i - j| over patches, rows scaled to sum to 1 over patches, mean over i.

    Args:
        attention: Rows sum to 1; the last tokens are the patches, row by row of the grid.
        grid: Rows and columns of patches.
        patch_size: Height and width of one.

    Raises:
        ValueError: Fewer tokens than patches, or a patch that looks at no patch at all.
    """
    n_patches = grid[0] * grid[1]
    first = attention.shape[-1] - n_patches
    if first < 0 or attention.shape[-2] != attention.shape[-1]:
        raise ValueError(f"attention has shape {attention.shape}, expected at least {n_patches} queries and keys")
    among = attention[:, :, first:, first:].astype(np.float64)
    kept = among.sum(axis=-1)
    if not (kept > 0).all():
        raise ValueError("a patch gives all of its attention to tokens that are no patches: it has no distance")
    distances = np.einsum("rhqk,qk->rhq", among, patch_distances(grid, patch_size)) / kept
    return Reach(distance=distances.mean(axis=-1), elsewhere=1 - kept.mean(axis=-1))


def attention_of(block: Block, x: Float[Tensor, "row token dim"]) -> Float[Tensor, "row head query key"]:
    """softmax(q k' / sqrt(head dim)) of a timm block, from the state that enters it.

    Raises:
        UserError: A block of another kind, whose attention is not of that form: rotary, windowed or a Raptor's.
    """
    attention = getattr(block, "attn", None)
    if type(attention) is not Attention:
        found = type(block if attention is None else attention).__name__
        raise UserError(f"attention cannot be read of a block of {found}; expected timm's Attention")
    normed = block.norm1(x)
    shape = (*normed.shape[:2], 3, attention.num_heads, attention.head_dim)
    q, k, _ = attention.qkv(normed).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    products = attention.q_norm(q) * attention.scale @ attention.k_norm(k).transpose(-2, -1)
    return products.softmax(dim=-1)


def branch_ratios(
    block: Block, x: Float[Tensor, "row token dim"]
) -> tuple[Float[Tensor, "row token"], Float[Tensor, "row token"], Float[Tensor, "row token dim"]]:
    """|z| / |f(z)| of the attention branch and of the MLP branch, and the state that leaves the block.

    z is what the skip connection carries and f(z) what the branch adds, LayerScale included.
    """
    first = block.ls1(block.attn(block.norm1(x)))
    middle = x + first
    second = block.ls2(block.mlp(block.norm2(middle)))
    return (
        x.norm(dim=-1) / first.norm(dim=-1),
        middle.norm(dim=-1) / second.norm(dim=-1),
        middle + second,
    )


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Per block, means and spreads over images.

    Attributes:
        distance: px: (block, head).
        elsewhere: Share of attention on CLS and registers: (block, head).
        attention_ratio: |z| / |attention(z)| by token kind: (block,).
        mlp_ratio: |z| / |mlp(z)| by token kind: (block,).
    """

    distance: Moments
    elsewhere: Moments
    attention_ratio: Mapping[str, Moments]
    mlp_ratio: Mapping[str, Moments]


@torch.no_grad()
def look(
    teacher: Teacher,
    x: Float[Tensor, "row token dim"],
    kinds: Mapping[str, slice],
    *,
    batch_rows: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Looks:
    """Follow states from 0 through a teacher's blocks and measure each.

    Memory: the attention of a batch, 4 batch head token^2 bytes, twice; 105 MB for ViT-B/14.

    Args:
        teacher: Of timm's ordinary blocks.
        x: State 0.
        kinds: Where the tokens of each kind lie.
        batch_rows: Rows at a time.
        progress: Told the number of rows after each batch.

    Raises:
        UserError: Blocks of another kind, or a patch that looks at no patch at all.
    """
    n_blocks, heads = teacher.n_layers - 1, teacher.n_heads
    size = (teacher.pixel_size[0] / teacher.grid[0], teacher.pixel_size[1] / teacher.grid[1])
    distance, elsewhere = MomentsAccumulator(n_blocks, heads), MomentsAccumulator(n_blocks, heads)
    ratios = {(name, kind): MomentsAccumulator(n_blocks) for name in ("attention", "mlp") for kind in kinds}
    for start in range(0, len(x), batch_rows):
        state = x[start : start + batch_rows].to(teacher.device)
        reaches, of_branches = [], []
        for block in teacher.model.blocks:
            try:
                reaches.append(attention_reach(attention_of(block, state).float().cpu().numpy(), teacher.grid, size))
            except ValueError as error:
                raise UserError(f"block {len(reaches) + 1} of {teacher.name}: {error}") from error
            *both, state = branch_ratios(block, state)
            of_branches.append([one.double().cpu().numpy() for one in both])
        distance.update(np.stack([reach.distance for reach in reaches], axis=1))
        elsewhere.update(np.stack([reach.elsewhere for reach in reaches], axis=1))
        for i, name in enumerate(("attention", "mlp")):
            of_tokens = np.stack([of_block[i] for of_block in of_branches], axis=1)
            for kind, tokens in kinds.items():
                ratios[name, kind].update(of_tokens[:, :, tokens].mean(axis=2))
        if progress is not None:
            progress(len(state))
    return Looks(
        distance=distance.result(),
        elsewhere=elsewhere.result(),
        attention_ratio={kind: ratios["attention", kind].result() for kind in kinds},
        mlp_ratio={kind: ratios["mlp", kind].result() for kind in kinds},
    )

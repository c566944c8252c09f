"""Weights of a ViT-S/14 with registers in Meta's naming, and pixels, from seeds: tests/golden/PROVENANCE.md, "DINOv2".

The golden keeps only what Meta's code made of them, at a few places.
"""

import functools
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"

DIM, DEPTH, N_CLASSES = 384, 12, 10
SIZES = (70, 224)  # px
TOKENS = (0, 1, 4, 5, 6, -1)  # CLS, two registers, the first two patches and the last
CHANNEL_STRIDE = 16


def meta_shapes(dim: int = DIM, depth: int = DEPTH) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Meta's dinov2_vits14_reg, positions for 37 x 37 patches and CLS."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "mask_token": (1, dim),
        "register_tokens": (1, 4, dim),
        "pos_embed": (1, 37 * 37 + 1, dim),
        "patch_embed.proj.weight": (dim, 3, 14, 14),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for block in range(depth):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in _block_shapes(dim).items()}
    return shapes


@functools.cache
def meta_state(dim: int = DIM, depth: int = DEPTH) -> dict[str, Tensor]:
    """Float32 weights, each name from a seed of its own; large enough that every block changes the residual stream.

    Made once: copy before you change.
    """
    return {name: _seeded(name, shape) for name, shape in meta_shapes(dim, depth).items()}


def linear_head_state(dim: int = DIM) -> dict[str, Tensor]:
    """A classifier of [CLS; patch mean] with the names of Meta's published linear heads."""
    return {"weight": _normal("head.weight", (N_CLASSES, 2 * dim)) * 0.05, "bias": _normal("head.bias", (N_CLASSES,))}


def pixels(size: int) -> Tensor:
    """Two normalised images of `size` px."""
    return _normal(f"pixels {size}", (2, 3, size, size))


def sample(states: Tensor) -> Tensor:
    """The places that the golden keeps of (batch, layer, token, dim)."""
    return states[:, :, list(TOKENS), ::CHANNEL_STRIDE]


def _block_shapes(dim: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.qkv.bias": (3 * dim,),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "ls1.gamma": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.fc1.weight": (4 * dim, dim),
        "mlp.fc1.bias": (4 * dim,),
        "mlp.fc2.weight": (dim, 4 * dim),
        "mlp.fc2.bias": (dim,),
        "ls2.gamma": (dim,),
    }


def _seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    around_one = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
    scale = 0.5 if name.endswith(("_embed", "_token", "_tokens")) else 0.05
    return _normal(name, shape) * (0.2 if around_one else scale) + float(around_one)


def _normal(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32; NumPy keeps RandomState's stream the same for ever."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

"""Weights and inputs from seeds, as tests/golden/PROVENANCE.md defines them: the goldens keep only what came out."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"


def seeded(seed: int, *shape: int) -> Tensor:
    """Standard normal float32; NumPy keeps RandomState's stream the same for ever."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def block_shapes(dim: int, *, swiglu: bool = True, depth_scaling: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published block, mlp_ratio 4."""
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.in_proj_weight": (3 * dim, dim),
        "attn.in_proj_bias": (3 * dim,),
        "attn.out_proj.weight": (dim, dim),
        "attn.out_proj.bias": (dim,),
        "ls1.gamma": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
        "mlp.0.weight": ((8 if swiglu else 4) * dim, dim),
        "mlp.0.bias": ((8 if swiglu else 4) * dim,),
        "mlp.2.weight": (dim, 4 * dim),
        "mlp.2.bias": (dim,),
        "ls2.gamma": (dim,),
    }
    if depth_scaling:
        shapes |= {"t_proj.0.weight": (16, 1), "t_proj.0.bias": (16,)}
        shapes |= {"t_proj.2.weight": (3 * dim, 16), "t_proj.2.bias": (3 * dim,)}
    return shapes


def seeded_block(seed: int, dim: int, *, swiglu: bool = True, depth_scaling: bool = True) -> dict[str, Tensor]:
    """A published block's state dict, every weight far enough from its start value to change the output."""
    random = np.random.RandomState(seed)
    weights = {}
    for name, shape in sorted(block_shapes(dim, swiglu=swiglu, depth_scaling=depth_scaling).items()):
        values = random.standard_normal(shape)
        if name.startswith("t_proj.2"):
            values *= 0.02
        elif name.endswith("gamma"):
            values = 0.3 + 0.1 * values
        elif name in ("norm1.weight", "norm2.weight"):
            values = 1.0 + 0.1 * values
        elif len(shape) == 2:
            values /= np.sqrt(shape[1])
        else:
            values *= 0.1
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


def seeded_raptor(seed: int, dim: int, n_blocks: int) -> dict[str, Tensor]:
    """A published Raptor's state dict; block i has the seed after block i - 1's."""
    return {
        f"blocks.{index}.{name}": value
        for index in range(n_blocks)
        for name, value in seeded_block(seed + index, dim).items()
    }

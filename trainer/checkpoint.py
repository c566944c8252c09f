"""Weights in and out of files. Nothing here runs pickled code, whatever a file holds."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from infra.weights import WeightsError, read_weights
from trainer.block import DEPTH_WIDTH

# ---------------------------------------------------------------- files


def load_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, onto the CPU.

    Args:
        path: As for `infra.weights.read_weights`: a .safetensors, .pt, .pth or .bin file here, or at s3:// or another
            address.

    Raises:
        WeightsError: There is none, or it is damaged; it holds something else than tensors by name, or is a pickled
            module as the published trainer saves it; then it says how to save its state dict where it was made.
    """
    return _checked_state_dict(read_weights(path), str(path))


def _checked_state_dict(loaded: object, title: str) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise WeightsError(title, [f"holds a {type(loaded).__name__}, expected a state dict: tensors by name"])
    problems = _value_problems(loaded)
    if problems:
        raise WeightsError(title, problems)
    return dict(loaded)


def _value_problems(state_dict: Mapping) -> list[str]:
    return [
        f"{name!r} holds a {type(value).__name__}, expected a tensor"
        for name, value in state_dict.items()
        if not isinstance(value, Tensor)
    ]


def _number_problems(state_dict: Mapping) -> list[str]:
    """Tensors whose numbers no training has left behind."""
    problems = []
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            problems.append(f"{name!r} holds {value.dtype}, expected floating-point numbers")
        elif isinstance(value, Tensor) and not bool(value.isfinite().all()):
            problems.append(f"{name!r} holds NaN or infinity in {int((~value.isfinite()).sum()):,} places")
    return problems


# ---------------------------------------------------------------- the published names

REFERENCE_NAMES = {
    "norm1.weight": "attention_norm.weight",
    "norm1.bias": "attention_norm.bias",
    "attn.in_proj_weight": "attention.qkv_weight",
    "attn.in_proj_bias": "attention.qkv_bias",
    "attn.out_proj.weight": "attention.out.weight",
    "attn.out_proj.bias": "attention.out.bias",
    "ls1.gamma": "attention_scale",
    "norm2.weight": "mlp_norm.weight",
    "norm2.bias": "mlp_norm.bias",
    "mlp.0.weight": "mlp.expand.weight",
    "mlp.0.bias": "mlp.expand.bias",
    "mlp.2.weight": "mlp.contract.weight",
    "mlp.2.bias": "mlp.contract.bias",
    "ls2.gamma": "mlp_scale",
}
REFERENCE_DEPTH_NAMES = {  # all or none: a block without depth scaling has no t_proj
    "t_proj.0.weight": "depth.enter.weight",
    "t_proj.0.bias": "depth.enter.bias",
    "t_proj.2.weight": "depth.leave.weight",
    "t_proj.2.bias": "depth.leave.bias",
}


def import_reference(state_dict: Mapping[str, object]) -> dict[str, Tensor]:
    """Rename the published code's weights to ours.

    Args:
        state_dict: Of a published stage-1 block, or of a published Raptor, whose names begin with "blocks.N.".

    Returns:
        The same tensors, not copied, for `Block.load_state_dict` or `Raptor.load_state_dict`. The number of heads is
        not in the weights: published blocks have one per 64 channels.

    Raises:
        TypeError: A whole module was given, not its state dict.
        WeightsError: Lists every unknown name, missing name, missing block, wrong shape, and value that is no tensor of
            finite floating-point numbers.

    Source: seeds.md 1.5, 1.6; KempnerInstitute/raptor:raptor/block.py, raptor/raptor.py.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"import_reference takes a state dict, not a {type(state_dict).__name__}: pass its .state_dict()"
        )
    blocks, problems = _split_blocks(state_dict)
    problems += _value_problems(state_dict) + _number_problems(state_dict)
    imported: dict[str, Tensor] = {}
    for prefix, weights in blocks.items():
        names = REFERENCE_NAMES | (REFERENCE_DEPTH_NAMES if _has_depth(weights) else {})
        problems += [f"unknown name {prefix + name!r}" for name in weights if name not in names]
        problems += [f"missing name {prefix + name!r}" for name in names if name not in weights]
        problems += _shape_problems(prefix, weights)
        imported |= {prefix + names[name]: value for name, value in weights.items() if name in names}
    if problems:
        raise WeightsError("not the weights of a published block or Raptor", problems)
    return imported


def _split_blocks(state_dict: Mapping[str, object]) -> tuple[dict[str, dict], list[str]]:
    """Weights by block prefix, "" for a single block, and what does not fit that."""
    if not any(str(name).startswith("blocks.") for name in state_dict):
        return {"": dict(state_dict)}, []
    by_index: dict[int, dict[str, object]] = {}
    problems = []
    for name, value in state_dict.items():
        match = re.fullmatch(r"blocks\.(0|[1-9]\d{0,3})\.(.+)", str(name))
        if match is None:
            problems.append(f"unknown name {name!r}")
        else:
            by_index.setdefault(int(match[1]), {})[match[2]] = value
    n_blocks = max(by_index, default=-1) + 1
    problems += [
        f"missing block {index}: no name begins with 'blocks.{index}.'"
        for index in range(n_blocks)
        if index not in by_index
    ]
    return {f"blocks.{index}.": by_index[index] for index in sorted(by_index)}, problems


def _has_depth(weights: Mapping[str, object]) -> bool:
    return any(str(name).startswith("t_proj.") for name in weights)


def _shape_problems(prefix: str, weights: Mapping[str, object]) -> list[str]:
    """Shapes that no block has, judged by the channels of norm1 and the hidden channels of the MLP's second layer."""
    shapes = {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
    norm, contract, expand = (shapes.get(name, ()) for name in ("norm1.weight", "mlp.2.weight", "mlp.0.weight"))
    if len(norm) != 1 or len(contract) != 2:
        return [
            f"{prefix + name!r} has shape {shape}, expected {n_axes} axes"
            for name, shape, n_axes in (("norm1.weight", norm, 1), ("mlp.2.weight", contract, 2))
            if name in shapes and len(shape) != n_axes
        ]
    dim, hidden = norm[0], contract[1]
    expanded = hidden if expand[:1] == (hidden,) else 2 * hidden  # GELU, else SwiGLU
    expected = dict.fromkeys(REFERENCE_NAMES, (dim,)) | {
        "attn.in_proj_weight": (3 * dim, dim),
        "attn.in_proj_bias": (3 * dim,),
        "attn.out_proj.weight": (dim, dim),
        "mlp.0.weight": (expanded, dim),
        "mlp.0.bias": (expanded,),
        "mlp.2.weight": (dim, hidden),
        "t_proj.0.weight": (DEPTH_WIDTH, 1),
        "t_proj.0.bias": (DEPTH_WIDTH,),
        "t_proj.2.weight": (3 * dim, DEPTH_WIDTH),
        "t_proj.2.bias": (3 * dim,),
    }
    return [
        f"{prefix + name!r} has shape {shape}, expected {expected[name]}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]

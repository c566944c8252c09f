"""Weights of others: state dicts, out of whatever their training scripts put around them, and linear heads."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from infra.weights import WeightsError, read_weights

# Where training scripts nest the weights inside a checkpoint, most wanted first.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
# What wrappers of the model put before each name.
_PREFIXES = ("module.", "_orig_mod.", "backbone.")

# Of Meta's larger heads: CLS of so many last layers, and the mean patch of the last one.
_HEAD_LAYERS = 4

_MAX_NAMED = 4  # names spelled out per kind of mismatch


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a weights file by name, on the CPU, unwrapped from training checkpoints.

    Args:
        path: As for `infra.weights.read_weights`: a file here, or at s3:// or another address.

    Raises:
        WeightsError: As read_weights; or it holds no tensors.
    """
    loaded = read_weights(path)
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise WeightsError(f"{path} holds no state dict (names -> tensors), but {_describe(loaded)}")
    state = {str(name): tensor for name, tensor in loaded.items()}
    for prefix in _PREFIXES:
        within = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        state = within or state
    return state


def read_linear_head(path: str, n_features: int) -> nn.Linear:
    """A linear classifier from a file that holds one weight and at most one bias, under any prefix.

    Args:
        path: As for read_state_dict; Meta's published `..._linear_head.pth` files fit.
        n_features: Values it must read: twice the teacher's channels.

    Raises:
        WeightsError: As read_state_dict; or the file holds no single linear layer of that width.
    """
    state = read_state_dict(path)
    weights = [tensor for name, tensor in state.items() if re.fullmatch(r"(.*\.)?weight", name)]
    biases = [tensor for name, tensor in state.items() if re.fullmatch(r"(.*\.)?bias", name)]
    found = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in list(state.items())[:_MAX_NAMED])
    if len(weights) != 1 or weights[0].ndim != 2 or len(biases) > 1 or len(state) != 1 + len(biases):
        raise WeightsError(
            f"{path} is no linear head: expected one weight (classes, {n_features}) and a bias, found {found}"
        )
    weight = weights[0]
    if weight.shape[1] == n_features // 2 * (_HEAD_LAYERS + 1):
        raise WeightsError(
            f"{path} is a head on {_HEAD_LAYERS} layers: its weight reads {weight.shape[1]:,} values, CLS tokens of "
            f"the last {_HEAD_LAYERS} and the mean of the patches; expected one on the last layer alone, which reads "
            f"{n_features:,}. Meta publishes both: give the file ..._linear_head.pth, not ..._linear4_head.pth"
        )
    if weight.shape[1] != n_features or any(bias.shape != weight.shape[:1] for bias in biases):
        raise WeightsError(
            f"{path} does not fit: expected a weight of (classes, {n_features}), which reads [final-norm CLS; mean of "
            f"final-norm patches], found {found}"
        )
    return make_linear(weight, biases[0] if biases else None)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A frozen linear layer of given float32 values; without a bias it adds zeros."""
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": torch.zeros(len(weight)) if bias is None else bias})
    return head.requires_grad_(False).eval()


def explain_mismatch(error: Exception) -> str:
    """What `load_state_dict` disliked, in a line: how many names are missing, unexpected or of another shape."""
    text = str(error)
    parts = []
    for kind in ("Missing", "Unexpected"):
        found = re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. ?$", text, re.MULTILINE)
        if found:
            names = [name.strip('" ') for name in found[1].split(",")]
            parts.append(f"{len(names)} {kind.lower()} ({_shorten(names)})")
    shapes = re.findall(r"size mismatch for (\S+): .*?shape (?:torch\.Size\()?(\[.*?\])\)?.*?(\[.*?\])", text)
    if shapes:
        told = [f"{name} is {theirs} in the file, {ours} in the teacher" for name, theirs, ours in shapes]
        parts.append(f"{len(shapes)} of another shape ({_shorten(told, '; ')})")
    return ", ".join(parts) or f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _describe(loaded: Any) -> str:
    if isinstance(loaded, Mapping):
        return f"a mapping of {_shorten([str(name) for name in loaded]) or 'nothing'}"
    return f"a {type(loaded).__name__}"


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _shorten(names: list[str], separator: str = ", ") -> str:
    rest = len(names) - _MAX_NAMED
    return separator.join(names[:_MAX_NAMED]) + (f"{separator}and {rest:,} more" if rest > 0 else "")

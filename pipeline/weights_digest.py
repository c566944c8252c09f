"""A teacher's weights as bytes, and the digests that tell one teacher from another."""

import hashlib
from collections.abc import Mapping

import torch
from jaxtyping import UInt8
from safetensors.torch import save as save_safetensors
from torch import nn

from pipeline.vit_models import Model

# Weights that depend on the image size.
_OF_THE_GRID = ("pos_embed",)


def weights_digest_of(model: Model, head: nn.Linear | None) -> str:
    """As Teacher.weights_digest."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if head is not None:
        state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return _digest(state)


def core_digest_of(model: Model) -> str:
    """As Teacher.core_digest."""
    return _digest({name: tensor for name, tensor in model.state_dict().items() if name not in _OF_THE_GRID})


def to_safetensors(module: nn.Module) -> bytes:
    """Its weights, contiguous, as a safetensors file."""
    return save_safetensors({name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()})


def _digest(state: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        sha.update(_bytes_of(tensor).numpy().data)
    return sha.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> UInt8[torch.Tensor, "byte"]:
    return tensor.reshape(-1).view(torch.uint8)

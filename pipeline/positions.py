"""Position embeddings at any grid of patches: kept as the weights file has them, resampled to what images need.

A store's teacher sees images of one size, and its weights hold positions resampled to that. Resampling them once more
for larger images would blur them, so a teacher keeps the originals beside its weights, as `positions.safetensors`.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float32
from torch import nn

from pipeline.light_timm import resample_abs_pos_embed

Positions = Float32[torch.Tensor, "row column dim"]

_NAME = "pos_embed"


def positions_of(model: Any) -> Positions | None:
    """The position embeddings of a model's patches; None if it has none, or adds them otherwise (rotary)."""
    embedded = getattr(model, _NAME, None)
    if embedded is None or embedded.ndim != 3:
        return None
    rows, columns = model.patch_embed.grid_size
    if embedded.shape[1] < rows * columns:
        return None
    return embedded.detach()[0, -rows * columns :].reshape(rows, columns, -1).float().cpu().clone()


def original_positions(state: Mapping[str, torch.Tensor], model: Any) -> Positions | None:
    """A weights file's own positions, if the model that was made of it has them resampled.

    Args:
        state: The file's, in any naming.
        model: With its weights loaded.

    Returns:
        None if they were used as they are, or if the file's cannot be told for sure: its grid is taken to be square,
        and what it resamples to must be what the model has.
    """
    ours = positions_of(model)
    raw = [tensor for name, tensor in state.items() if name.rpartition(".")[2] == _NAME and tensor.ndim == 3]
    if ours is None or len(raw) != 1:
        return None
    side = isqrt(raw[0].shape[1])  # prefix tokens are far fewer than another row
    own = raw[0][0, raw[0].shape[1] - side * side :].reshape(side, side, -1).float()
    if own.shape[:2] == ours.shape[:2] or own.shape[2] != ours.shape[2]:
        return None
    return own.clone() if torch.equal(resampled(own, ours.shape[0], ours.shape[1]), ours) else None


def positions_before(own: Any, model: Any) -> Positions | None:
    """Those of `own`, if the model has them resampled: the same weights, for images of the model's own size."""
    first, second = positions_of(own), positions_of(model)
    if first is None or second is None or first.shape[:2] == second.shape[:2]:
        return None
    return first if torch.equal(resampled(first, second.shape[0], second.shape[1]), second) else None


def resampled(positions: Positions, rows: int, columns: int) -> Float32[torch.Tensor, "new_row new_column dim"]:
    """Positions of another grid: bicubic with antialiasing; the same grid gets them as they are."""
    dim = positions.shape[2]
    flat = positions.reshape(1, -1, dim)
    new = resample_abs_pos_embed(
        flat, new_size=[rows, columns], old_size=list(positions.shape[:2]), num_prefix_tokens=0
    )
    return new.reshape(rows, columns, dim)


def resize_model(model: Any, pixel_size: tuple[int, int], positions: Positions | None = None) -> None:
    """Let a model see images of another size, in place.

    Args:
        model: A timm ViT, or one of ours.
        pixel_size: Height and width, px.
        positions: To be resampled; None for the model's own.
    """
    own = positions_of(model) if positions is None else positions
    model.set_input_size(img_size=pixel_size)
    if own is not None:
        embedded = model.pos_embed.detach().clone()
        rows, columns = model.patch_embed.grid_size
        embedded[0, -rows * columns :] = resampled(own, rows, columns).reshape(rows * columns, -1)
        model.pos_embed = nn.Parameter(embedded, requires_grad=False)

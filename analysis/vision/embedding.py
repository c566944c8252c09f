"""The patch embedding both ways: image patches back from state 0, and what a change of pixels does to it.

A store keeps states and no images. State 0 of a patch is W p + b and its position, so that its deviation from the mean
over images, at each place, is W times that of its pixels. Where the embedding has as many channels as a patch has
values (768 for 588 in ViT-B/14), W inverts and the pixels come back, normalised as the teacher saw them; of other
teachers those directions of them that it sees at all.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from infra.console import UserError
from pipeline.teacher import Teacher

#: Singular values of W below this share of the first are not inverted: float16 rounds states to 5e-4.
LEAST_SINGULAR = 1e-3
#: Share of state 0's variance that may lie outside of what W gives; int8 leaves 3e-4.
MOST_REST = 1e-2


@dataclass(frozen=True, kw_only=True)
class SeenPixels:
    """Pixels of patches, less their mean over images.

    Attributes:
        values: In the teacher's normalised units, channel by channel, row by row within a patch.
        n_seen: Directions of a patch's values that the embedding sees, and that came back.
    """

    values: Float64[np.ndarray, "row patch value"]
    n_seen: int


def patch_convolution(teacher: Teacher) -> nn.Conv2d:
    """The convolution that makes patches into tokens.

    Raises:
        UserError: State 0 is not an affine map of the pixels: there is a norm after it, or patches overlap.
    """
    model = teacher.model
    convolution = getattr(getattr(model, "patch_embed", None), "proj", None)
    after = [getattr(model, "norm_pre", None), getattr(getattr(model, "patch_embed", None), "norm", None)]
    if not isinstance(convolution, nn.Conv2d) or convolution.kernel_size != convolution.stride:
        raise UserError(f"{teacher.name} has no patch embedding that is one convolution of patches side by side")
    if any(one is not None and not isinstance(one, nn.Identity) for one in after):
        raise UserError(f"{teacher.name} has a norm between patch embedding and first block: pixels are not in state 0")
    return convolution


def seen_pixels(teacher: Teacher, patches: Float[np.ndarray, "row patch dim"]) -> SeenPixels:
    """Pixels from state 0, by least squares: pinv(W) (state - mean over rows).

    Args:
        teacher: Whose embedding made them.
        patches: State 0 of patches.

    Raises:
        UserError: Another kind of embedding, or states that it did not make.
    """
    weight = patch_convolution(teacher).weight.detach().double().cpu().numpy()
    weight = weight.reshape(len(weight), -1)
    left, singular, right = np.linalg.svd(weight, full_matrices=False)
    seen = singular > LEAST_SINGULAR * singular[0]
    away = patches.astype(np.float64)
    away -= away.mean(axis=0)
    inside = away @ left
    rest = (away**2).sum() - (inside**2).sum()
    if rest > MOST_REST * (away**2).sum():
        raise UserError(f"state 0 of {teacher.name} is not what its patch embedding makes of pixels")
    return SeenPixels(values=inside[..., seen] / singular[seen] @ right[seen], n_seen=int(seen.sum()))


def move_pixels(
    teacher: Teacher, x: Float[Tensor, "row token dim"], change: Float[Tensor, "row 3 height width"]
) -> Float[Tensor, "row token dim"]:
    """State 0 if the pixels had been others by so much: exact, as the embedding is affine; gradients flow to `change`.

    Args:
        teacher: Whose embedding it is.
        x: State 0.
        change: Of the normalised pixels.

    Raises:
        UserError: As patch_convolution.
    """
    convolution = patch_convolution(teacher)
    moved = nn.functional.conv2d(change, convolution.weight, stride=convolution.stride)
    return torch.cat([x[:, : teacher.n_prefix], x[:, teacher.n_prefix :] + moved.flatten(2).transpose(1, 2)], dim=1)

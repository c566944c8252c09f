"""A linear readout of patches, and the maps of classes that it makes."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

#: No class: the pixel teaches nothing and is not counted.
IGNORED = 255

#: Images whose scores of every pixel are held at once.
AT_A_TIME = 4


class PatchReadout(nn.Module):
    """One linear map from a patch to class scores.

    Args:
        dim: Channels of a patch token.
        n_classes: Scores to make; 150 for ADE20K.

    Source: seeds.md 1.11.
    """

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, n_classes)

    def forward(self, patches: Float[Tensor, "batch rows columns dim"]) -> Float[Tensor, "batch label rows columns"]:
        """Scores on the grid of patches."""
        return self.linear(patches).permute(0, 3, 1, 2)


def to_pixels(
    logits: Float[Tensor, "batch label rows columns"], size: tuple[int, int]
) -> Float[Tensor, "batch label height width"]:
    """Scores of every pixel, bilinear between the centres of patches."""
    return functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def segmentation_loss(
    logits: Float[Tensor, "batch label rows columns"], labels: Integer[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the labelled pixels; ignored ones add nothing. Without any labelled pixel it is 0.

    Scores of all pixels are made for a few images at a time, and once more for the gradient: 150 classes at 518 x 518
    px are 161 MB an image and copy, 20 GB for a batch of 32 at once.

    Args:
        logits: Scores on any grid; enlarged to the pixels.
        labels: Classes, or IGNORED.
    """
    size = (labels.shape[1], labels.shape[2])

    def total(part: Tensor, of: Tensor) -> Tensor:
        return functional.cross_entropy(to_pixels(part, size), of.long(), ignore_index=IGNORED, reduction="sum")

    parts = zip(logits.split(AT_A_TIME), labels.split(AT_A_TIME))
    totals = [checkpoint(total, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(totals).sum() / (labels != IGNORED).sum().clamp(min=1)

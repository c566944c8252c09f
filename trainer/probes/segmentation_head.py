"""A linear classifier of patches, and the maps of classes that it makes."""

from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional

#: No class: the pixel teaches nothing and is not counted.
IGNORED = 255


class PatchClassifier(nn.Module):
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
    logits: Float[Tensor, "batch label height width"], labels: Integer[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the labelled pixels; ignored ones add nothing. Without any labelled pixel it is 0."""
    total = functional.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)

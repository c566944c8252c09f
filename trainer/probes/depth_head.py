"""The linear depth probe: scores of depth bins for every quarter of a patch."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

#: Grid cells per patch and side.
UPSAMPLING = 4


class DepthHead(nn.Module):
    """A 1x1 convolution from [patch; CLS] to scores of depth bins, four times as fine as the patches.

    Features are enlarged bilinearly and then convolved in the published code. A 1x1 convolution and weights that sum to
    1 may change places, so scores are made on the patches and enlarged: the same numbers, a sixteenth of the products,
    and for ViT-B a sixth of the memory.

    Args:
        dim: Channels of a token.
        n_bins: Scores to make.

    Source: seeds.md 1.11; KempnerInstitute/raptor:raptor/nyud_probes/classifier.py.
    """

    def __init__(self, dim: int, n_bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, n_bins, kernel_size=1)

    def forward(
        self, features: Float[Tensor, "batch channel rows columns"]
    ) -> Float[Tensor, "batch bin fine_rows fine_columns"]:
        """Scores of bins from [patch; CLS] on the grid of patches."""
        coarse = self.conv(features)
        return functional.interpolate(coarse, scale_factor=UPSAMPLING, mode="bilinear", align_corners=False)

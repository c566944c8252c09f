"""Depth as classes: bins of equal width, and the depth that scores of bins stand for."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

#: The bin of a pixel whose depth is unknown; no bin has this number.
NO_BIN = -1


@dataclass(frozen=True, kw_only=True)
class DepthBins:
    """Bins (edge, next edge], the first with both ends.

    Attributes:
        n_bins: How many.
        minimum: First edge, m.
        maximum: Last edge, m.

    Source: seeds.md 1.11.
    """

    n_bins: int = 256
    minimum: float = 0.001
    maximum: float = 10.0

    def edges(self, device: torch.device | str = "cpu") -> Float[Tensor, " edge"]:
        """n_bins + 1 depths, m."""
        return torch.linspace(self.minimum, self.maximum, self.n_bins + 1, device=device)

    def centres(self, device: torch.device | str = "cpu") -> Float[Tensor, " bin"]:
        """Middle of each bin, m."""
        edges = self.edges(device)
        return 0.5 * (edges[:-1] + edges[1:])

    def is_known(self, depth: Float[Tensor, "*pixels"]) -> Bool[Tensor, "*pixels"]:
        """Where a depth is finite, above 0 and within the bins; 0 is what a sensor writes that saw nothing."""
        return torch.isfinite(depth) & (depth > 0) & (depth >= self.minimum) & (depth <= self.maximum)

    def index(self, depth: Float[Tensor, "*pixels"], *, unknown: int = NO_BIN) -> Int64[Tensor, "*pixels"]:
        """The bin that a depth in m lies in; `unknown` where it is not known.

        A depth on an inner edge belongs to the bin below it, the minimum to the first bin (where the published code has
        the bin -1).
        """
        bins = torch.bucketize(depth, self.edges(depth.device)) - 1
        return torch.where(self.is_known(depth), bins.clamp(0, self.n_bins - 1), unknown)

    def decode(self, logits: Float[Tensor, "batch bin rows columns"]) -> Float[Tensor, "batch rows columns"]:
        """Mean depth in m of the bins' centres under the softmax of the scores."""
        return torch.einsum("nbrc,b->nrc", logits.float().softmax(dim=1), self.centres(logits.device))

"""The error of depth maps over a whole test set."""

import math

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from trainer.probes.depth_bins import DepthBins

#: Size of NYUv2's images, px: height and width.
NYU_SIZE = (480, 640)
#: Rows and columns of a 480 x 640 px depth map that count; outside of them the sensor saw little.
EIGEN_ROWS = slice(45, 471)
EIGEN_COLUMNS = slice(41, 601)


def counted_pixels(depth: Float[Tensor, "batch 480 640"], bins: DepthBins) -> Bool[Tensor, "batch 480 640"]:
    """Pixels that count in the error: inside the Eigen crop, with a known depth; at most 426 x 560 of an image.

    Raises:
        ValueError: The maps have another size, for which that crop means nothing.

    Source: seeds.md 1.11.
    """
    if tuple(depth.shape[1:]) != NYU_SIZE:
        raise ValueError(f"depth maps are {list(depth.shape[1:])} px; the Eigen crop is defined for {list(NYU_SIZE)}")
    inside = torch.zeros_like(depth, dtype=torch.bool)
    inside[:, EIGEN_ROWS, EIGEN_COLUMNS] = True
    return inside & bins.is_known(depth)


class SquaredErrors:
    """Squared errors pooled over pixels, whichever image they are of; fed batch by batch, merged by adding.

    Attributes:
        total: Sum of squared errors, m^2.
        n_pixels: How many.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.total: Float64[Tensor, ""] = torch.zeros((), dtype=torch.float64, device=device)
        self.n_pixels: Int64[Tensor, ""] = torch.zeros((), dtype=torch.int64, device=device)

    def add(
        self,
        predicted: Float[Tensor, "batch height width"],
        depth: Float[Tensor, "batch height width"],
        counted: Bool[Tensor, "batch height width"],
    ) -> None:
        """Count the pixels where `counted`; does not wait for the device."""
        squares = (predicted.double() - depth.double()) ** 2
        self.total += torch.where(counted, squares, 0.0).sum()
        self.n_pixels += counted.sum()

    def merge(self, other: "SquaredErrors") -> None:
        """Add what another one counted."""
        self.total += other.total.to(self.total.device)
        self.n_pixels += other.n_pixels.to(self.n_pixels.device)

    def rmse(self) -> float:
        """Root of the mean, m; NaN if no pixel was counted."""
        n_pixels = int(self.n_pixels)
        return math.sqrt(float(self.total) / n_pixels) if n_pixels else math.nan

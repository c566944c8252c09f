"""Zeros around an image until patches fit, and maps brought back to the image without shift."""

from dataclasses import dataclass

from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Rows and columns that are added around an image of one size.

    Attributes:
        size: Height and width of the image, px.
        multiple: Side of a patch, px: what height and width become multiples of.

    Source: KempnerInstitute/raptor:raptor/nyud_probes/trainer.py (where the odd one goes).
    """

    size: tuple[int, int]
    multiple: int

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width with the padding, px."""
        height, width = (-(-side // self.multiple) * self.multiple for side in self.size)
        return height, width

    @property
    def before(self) -> tuple[int, int]:
        """Rows above and columns to the left; below and to the right there may be one more."""
        height, width = ((padded - side) // 2 for padded, side in zip(self.padded, self.size))
        return height, width

    def pad(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 padded_height padded_width"]:
        """Zeros around normalised pixels, which is their mean colour."""
        return functional.pad(pixels, self._sides())

    def pad_map(
        self, values: Integer[Tensor, "batch height width"], fill: int
    ) -> Integer[Tensor, "batch padded_height padded_width"]:
        """`fill` around a map."""
        return functional.pad(values, self._sides(), value=fill)

    def to_image(
        self, grid: Float[Tensor, "batch rows columns"], *, compat: bool = False
    ) -> Float[Tensor, "batch height width"]:
        """A map of the padded image, of any fineness, as one of the image: enlarged bilinearly, its padding cut off.

        Args:
            grid: Cells that divide the padded image evenly.
            compat: Stretch the padded map over the image, as the published code does; at NYUv2's size its rim is then
                4.5 px off its place.
        """
        size = self.size if compat else self.padded
        fine = functional.interpolate(grid[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        if compat:
            return fine
        (top, left), (height, width) = self.before, self.size
        return fine[:, top : top + height, left : left + width]

    def _sides(self) -> list[int]:
        """As torch has them: left, right, top, bottom."""
        (top, left), (height, width), (padded_height, padded_width) = self.before, self.size, self.padded
        return [left, padded_width - width - left, top, padded_height - height - top]

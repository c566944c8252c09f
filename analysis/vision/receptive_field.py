"""Effective receptive fields: how much each pixel moves one place of a feature map.

For the place's channels z_c: mean over images and channels of |dz_c / dpixel|, summed over the three colours. Source:
Raghu et al. 2021, figures 6 and C.1 to C.4 (32 images, the centre); Luo et al. 2016.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from analysis.vision.embedding import move_pixels
from analysis.vision.taps import tapped
from pipeline.teacher import Teacher

#: Images whose graphs are held at a time.
FIELD_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """What a place sees of the image.

    Attributes:
        field: Mean |gradient| at each pixel.
        place: Row and column of the place, px of its centre.
        cell: Height and width of the place's own patch, px.
    """

    field: Float64[np.ndarray, "height width"]
    place: tuple[float, float]
    cell: tuple[float, float]

    @property
    def own_share(self) -> float:
        """Share of the field within the place's own patch; the patch's share of the image if all pixels count alike."""
        inside = [np.abs(one - at) < size / 2 for one, at, size in zip(self._axes(), self.place, self.cell)]
        return float(self.field[np.ix_(*inside)].sum() / self.field.sum())

    @property
    def reach(self) -> float:
        """Mean distance to the place's centre, weighted by the field, px."""
        rows, columns = (one - at for one, at in zip(self._axes(), self.place))
        return float((self.field * np.hypot(rows[:, None], columns)).sum() / self.field.sum())

    @property
    def flat_reach(self) -> float:
        """What `reach` would be if all pixels counted alike, px."""
        rows, columns = (one - at for one, at in zip(self._axes(), self.place))
        return float(np.hypot(rows[:, None], columns).mean())

    def _axes(self) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.field.shape
        return np.arange(height) + 0.5, np.arange(width) + 0.5


def gradient_field(
    vector: Float[Tensor, "row channel"],
    leaf: Float[Tensor, "row colour height width"],
    draws: Int64[Tensor, "draw row"] | None = None,
) -> Float64[np.ndarray, "height width"]:
    """Sum over rows, mean over channels, of |d vector / d leaf| summed over colours.

    Args:
        vector: Made from the leaf, row by row so that no row moves another's. Its graph is kept.
        leaf: Pixels.
        draws: One channel of each row for each pass back, instead of all: an unbiased estimate of the mean over them.
    """
    chosen = torch.arange(vector.shape[1])[:, None].expand(-1, len(vector)) if draws is None else draws
    total = torch.zeros(leaf.shape[2:], dtype=torch.float64)
    for channels in chosen.to(vector.device):
        picked = vector.gather(1, channels[:, None]).sum()
        (gradient,) = torch.autograd.grad(picked, leaf, retain_graph=True)
        total += gradient.double().abs().sum(dim=(0, 1)).cpu()
    return (total / len(chosen)).numpy()


@dataclass(frozen=True, kw_only=True)
class TeacherFields:
    """Receptive fields of one place in every block.

    Attributes:
        sums: Of the state that leaves each block.
        branches: Of what each block's attention adds, before it is added.
        n_images: That were averaged over.
        n_draws: Channels of each.
    """

    sums: Sequence[ReceptiveField]
    branches: Sequence[ReceptiveField]
    n_images: int
    n_draws: int


def teacher_fields(
    teacher: Teacher,
    x: Float[Tensor, "row token dim"],
    *,
    n_draws: int,
    seed: int,
    batch_rows: int = FIELD_ROWS,
    progress: Callable[[int], None] | None = None,
) -> TeacherFields:
    """Fields of the patch at the centre of the grid; of an even grid, right and below of its middle.

    Memory: the graph of a batch, 2 GB for 8 images of ViT-B/14.

    Args:
        teacher: Of blocks that can be tapped.
        x: State 0 of the images.
        n_draws: So many channels of each image, drawn at random; each costs a pass back through the blocks.
        seed: Of the draws.
        batch_rows: Images at a time.
        progress: Told the number of images after each batch.

    Raises:
        UserError: As `patch_convolution` and `tapped`.
    """
    rows, columns = teacher.grid
    row, column = rows // 2, columns // 2
    centre = teacher.n_prefix + row * columns + column
    height, width = teacher.pixel_size
    cell = (height / rows, width / columns)
    place = ((row + 0.5) * cell[0], (column + 0.5) * cell[1])
    n_blocks = teacher.n_layers - 1
    totals = np.zeros((2, n_blocks, height, width))
    random = torch.Generator().manual_seed(seed)
    for part in x.split(batch_rows):
        change = torch.zeros(len(part), 3, height, width, device=teacher.device, requires_grad=True)
        draws = torch.randint(teacher.dim, (n_draws, len(part)), generator=random)
        with torch.enable_grad():
            state = move_pixels(teacher, part.to(teacher.device), change)
            for block in range(n_blocks):
                with tapped(teacher.model.blocks[block]) as taps:
                    state = teacher.run_blocks(state, block, block + 1)
                for i, name in enumerate(("sum2", "attention")):
                    totals[i, block] += gradient_field(taps[name][:, centre], change, draws)
        if progress is not None:
            progress(len(part))
    made = [[ReceptiveField(field=one / len(x), place=place, cell=cell) for one in fields] for fields in totals]
    return TeacherFields(sums=made[0], branches=made[1], n_images=len(x), n_draws=n_draws)

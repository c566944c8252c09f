"""TASK=nyuv2: depth of NYU Depth v2 from one linear map of [patch; CLS] to 256 bins.

Images are 480 x 640 px, padded to whole patches, augmented while training: 9,900 steps of 128 images.

Expect, as published (arXiv:2512.19941), RMSE in m: DINOv2 ViT-B/14 with registers 0.578, ViT-S/14 0.600, Raptors of
ViT-B of 2, 3 and 4 blocks 0.648, 0.618 and 0.607. An independent evaluation of the same weights with a probe of its own
has 0.567, 0.590, and 0.605, 0.567, 0.564: compare with the first by COMPAT=1. Not yet run on NYUv2 itself by us.

    make probe TASK=nyuv2 IMAGES=/data/nyu-depth-v2 TEACHER=vit_base_patch14_reg4_dinov2 WEIGHTS=... RUN=...

Source: seeds.md 1.11; KempnerInstitute/raptor:raptor/nyud_probes. What compat changes is in docs/probes.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from trainer.probes.backbone import Backbone
from trainer.probes.dense_files import open_images, typed_problems
from trainer.probes.dense_padding import Padding
from trainer.probes.depth_bins import NO_BIN, DepthBins
from trainer.probes.depth_head import DepthHead
from trainer.probes.depth_loss import SCALE_INVARIANT_WEIGHT, bin_loss, scale_invariant_error
from trainer.probes.depth_metrics import NYU_SIZE, SquaredErrors, counted_pixels
from trainer.probes.nyuv2_data import open_nyuv2
from trainer.probes.task import Asked, ProbeSettings, Task, TaskKind

_METRIC = "RMSE (m)"

# What the published code marks a pixel without depth with, which is also the last bin, and what it then ignores.
_PUBLISHED_UNKNOWN, _PUBLISHED_IGNORED = 255, 256


def settings_on(device: torch.device) -> ProbeSettings:
    """The recipe: float16 with a scaled loss on a GPU; float32 on a CPU, where the published code does the same."""
    return ProbeSettings(
        n_epochs=25,
        batch_size=128,
        evaluation_batch_size=8,
        learning_rate=1e-3,
        weight_decay=1e-3,
        schedule="constant",
        clip_norm=None,
        precision="float16" if device.type == "cuda" else "float32",
        drop_last=False,
    )


def image_size(patch: int) -> tuple[int, int]:
    """Height and width of the padded images, px, by the side of a patch: 490 x 644 for 14."""
    return Padding(size=NYU_SIZE, multiple=patch).padded


@dataclass(frozen=True, kw_only=True)
class DepthProtocol:
    """How scores become depths and what they are held against.

    Attributes:
        bins: Of depth.
        padding: Of the images.
        compat: Do as the published code does: padding is not cut off, and pixels without depth count as the last bin.
    """

    bins: DepthBins
    padding: Padding
    compat: bool = False

    def depth(self, logits: Float[Tensor, "batch bin row column"]) -> Float[Tensor, "batch height width"]:
        """Depth of every pixel of the image, m."""
        return self.padding.to_image(self.bins.decode(logits), compat=self.compat)

    def loss(
        self, logits: Float[Tensor, "batch bin row column"], depth: Float[Tensor, "batch height width"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of bins plus ten times the scale-invariant error.

        Bins are compared on the grid of the scores, each cell with the pixel at its middle (compat: with that at its
        first corner, the image stretched over the padded grid).

        Args:
            logits: Scores of bins for the padded image.
            depth: Of the image, m; 0 where it is not known.
        """
        known = depth > 0 if self.compat else self.bins.is_known(depth)
        error = scale_invariant_error(self.depth(logits), depth, known)
        grid = (logits.shape[2], logits.shape[3])
        if self.compat:
            found = _nearest(self.bins.index(depth, unknown=_PUBLISHED_UNKNOWN), grid, "nearest")
            entropy = bin_loss(logits, found, ignored=_PUBLISHED_IGNORED)
        else:
            from_image = self.padding.pad_map(self.bins.index(depth), NO_BIN)
            entropy = bin_loss(logits, _nearest(from_image, grid, "nearest-exact"))
        return SCALE_INVARIANT_WEIGHT * error + entropy


class DepthMetric:
    """Root mean squared error over the pixels of the Eigen crop; `trainer.probes.task.Metric`."""

    def __init__(self, protocol: DepthProtocol) -> None:
        self._protocol = protocol
        self._errors: SquaredErrors | None = None

    def add(self, output: Float[Tensor, "batch bin row column"], target: Float[Tensor, "batch 480 640"]) -> None:
        """Count a batch: scores of bins, and the depth of all pixels in m."""
        if self._errors is None:
            self._errors = SquaredErrors(output.device)
        self._errors.add(self._protocol.depth(output), target, counted_pixels(target, self._protocol.bins))

    def values(self) -> dict[str, float]:
        """m."""
        assert self._errors is not None, "values are asked for after an evaluation"
        return {_METRIC: self._errors.rmse()}


def depth_features(backbone: Backbone) -> Callable[[Float[Tensor, "batch token dim"]], Tensor]:
    """[patch; CLS] of every patch, on their grid, from all tokens: (batch, 2 dim, row, column)."""
    (rows, columns), n_prefix = backbone.teacher.grid, backbone.teacher.n_prefix

    def pick(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch channel row column"]:
        patches = tokens[:, n_prefix:]
        both = torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=-1)
        return both.transpose(1, 2).unflatten(2, (rows, columns))

    return pick


def check(asked: Asked) -> list[str]:
    """What is wrong with IMAGES and HEAD before any file is looked at."""
    missing = "IMAGES is missing: give the folder that holds data/nyu2_train.csv and data/nyu2_test.csv"
    return typed_problems(asked, missing=missing)


def open_task(asked: Asked, backbone: Backbone) -> Task:
    """The task, its images checked.

    Raises:
        UserError: Lists all that is wrong: IMAGES is missing or not NYUv2, HEAD is given, the teacher has no CLS token.
    """
    teacher = backbone.teacher
    problems = check(asked)
    if not teacher.has_cls:
        problems.append(f"{teacher.name} has no CLS token, and this task reads [patch; CLS]: take another TEACHER")
    train, test = open_images(
        asked,
        lambda images: open_nyuv2(images, compat=asked.compat),
        problems=problems,
    )
    padding = Padding(size=NYU_SIZE, multiple=teacher.pixel_size[0] // teacher.grid[0])
    assert padding.padded == teacher.pixel_size, "the teacher was loaded for image_size(patch)"
    protocol = DepthProtocol(bins=DepthBins(), padding=padding, compat=asked.compat)
    dim = teacher.dim

    def make_head() -> nn.Module:
        return DepthHead(dim, protocol.bins.n_bins)

    return Task(
        name="nyuv2",
        metric=_METRIC,
        higher_is_better=False,
        settings=settings_on(asked.device).changed(**asked.changes),
        train=train,
        evaluation=test,
        features=depth_features(backbone),
        make_head=make_head,
        loss=protocol.loss,
        make_metric=lambda: DepthMetric(protocol),
        prepare=padding.pad,
        identity={"pixel_size": list(teacher.pixel_size), "n_bins": protocol.bins.n_bins},
    )


def _nearest(bins: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """A map of bins at another size; float32 holds their numbers exactly."""
    return functional.interpolate(bins[:, None].float(), size=grid, mode=mode)[:, 0].long()


KIND = TaskKind(name="nyuv2", image_size=image_size, check=check, open=open_task, has_compat=True)

"""TASK=ade20k: semantic segmentation of ADE20K's 150 classes by one linear map of each patch.

Images are 518 x 518 px, augmented while training, and go through the backbone at every pass: 6,310 steps of 32 images.

Expect, as published (arXiv:2512.19941), mIoU: DINOv2 ViT-B/14 with registers 47.5 %, ViT-S/14 44.6 %, Raptors of ViT-B
of 2, 3 and 4 blocks 39.6, 43.0 and 43.6 %. Not yet run on ADE20K itself by us.

    make probe TASK=ade20k IMAGES=/data/ADEChallengeData2016 TEACHER=vit_base_patch14_reg4_dinov2 WEIGHTS=... RUN=...

Source: seeds.md 1.11; KempnerInstitute/raptor:raptor/ade20k_probes. What compat changes is in docs/probes.md.
"""

from collections.abc import Callable

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from trainer.probes.ade20k_data import N_CLASSES, open_ade20k
from trainer.probes.backbone import Backbone
from trainer.probes.dense_files import open_images, typed_problems
from trainer.probes.segmentation_head import AT_A_TIME, IGNORED, PatchReadout, segmentation_loss, to_pixels
from trainer.probes.segmentation_metrics import Confusion
from trainer.probes.task import Asked, ProbeSettings, Task, TaskKind

SIDE = 518  # px, or the multiple of the patch that is nearest

_METRIC = "mIoU"

SETTINGS = ProbeSettings(
    n_epochs=10,
    batch_size=32,
    evaluation_batch_size=32,
    learning_rate=1e-3,
    weight_decay=1e-2,
    schedule="warmup_cosine",
    warmup_iterations=100,
    clip_norm=1.0,
    precision="float32",
    drop_last=True,
)


def image_size(patch: int) -> tuple[int, int]:
    """Height and width of the images, px, by the side of a patch."""
    side = max(1, round(SIDE / patch)) * patch
    return side, side


def patch_grid(backbone: Backbone) -> Callable[[Float[Tensor, "batch token dim"]], Tensor]:
    """Picks the patches out of all tokens, on their grid: (batch, row, column, dim)."""
    (rows, columns), n_prefix = backbone.teacher.grid, backbone.teacher.n_prefix

    def pick(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch row column dim"]:
        return tokens[:, n_prefix:].unflatten(1, (rows, columns))

    return pick


class SegmentationMetric:
    """mIoU and pixel accuracy of an evaluation; `trainer.probes.task.Metric`."""

    def __init__(self, *, compat: bool = False) -> None:
        self._compat = compat
        self._confusion: Confusion | None = None

    def add(self, output: Float[Tensor, "batch label row column"], target: UInt8[Tensor, "batch height width"]) -> None:
        """Count a batch: scores on the grid of patches, and the labels of all pixels."""
        if self._confusion is None:
            self._confusion = Confusion(output.shape[1], ignore=IGNORED, device=output.device)
        for logits, labels in zip(output.split(AT_A_TIME), target.split(AT_A_TIME)):
            self._confusion.add(to_pixels(logits, _size(labels)).argmax(dim=1), labels)

    def values(self) -> dict[str, float]:
        """Shares from 0 to 1."""
        assert self._confusion is not None, "values are asked for after an evaluation"
        return {
            _METRIC: self._confusion.mean_iou(compat=self._compat),
            "pixel accuracy": self._confusion.pixel_accuracy(compat=self._compat),
        }


def check(asked: Asked) -> list[str]:
    """What is wrong with IMAGES and HEAD before any file is looked at."""
    missing = "IMAGES is missing: give .../ADEChallengeData2016, the folder that holds images/ and annotations/"
    return typed_problems(asked, missing=missing)


def open_task(asked: Asked, backbone: Backbone) -> Task:
    """The task, its images checked.

    Raises:
        UserError: Lists all that is wrong: IMAGES is not given or not ADE20K, or HEAD is given.
    """
    teacher = backbone.teacher
    train, validation = open_images(
        asked,
        lambda images: open_ade20k(images, teacher.pixel_size),
        problems=check(asked),
    )
    dim = teacher.dim

    def make_head() -> nn.Module:
        return PatchReadout(dim, N_CLASSES)

    return Task(
        name="ade20k",
        metric=_METRIC,
        higher_is_better=True,
        settings=SETTINGS.changed(**asked.changes),
        train=train,
        evaluation=validation,
        features=patch_grid(backbone),
        make_head=make_head,
        loss=segmentation_loss,
        make_metric=lambda: SegmentationMetric(compat=asked.compat),
        identity={"pixel_size": list(teacher.pixel_size), "n_classes": N_CLASSES},
    )


def _size(labels: Tensor) -> tuple[int, int]:
    return labels.shape[1], labels.shape[2]


KIND = TaskKind(name="ade20k", image_size=image_size, check=check, open=open_task, has_compat=True)

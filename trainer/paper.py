"""Numbers that others have published, each with where it stands, so that ours can be shown beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

PAPER = "arXiv:2512.19941, ICLR 2026 camera-ready, Table 2"
DINOV2 = "DINOv2's own README, linear probe"

_VIT_B, _VIT_S = "vit_base_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number.

    Attributes:
        teacher: timm's name of the teacher, without its tag.
        n_blocks: Of the Raptor; 0 for the teacher itself.
        task: As TASK names it.
        mean: Top-1 and mIoU as a share of 1, RMSE in metres.
        std: Over three model seeds; None where one model was measured.
        source: Where it stands.
    """

    teacher: str
    n_blocks: int
    task: str
    mean: float
    std: float | None
    source: str = PAPER


def _raptor(n_blocks: int, *numbers: tuple[float, float]) -> list[Published]:
    return [
        Published(teacher=_VIT_B, n_blocks=n_blocks, task=task, mean=mean, std=std)
        for task, (mean, std) in zip(("imagenet", "ade20k", "nyuv2"), numbers)
    ]


def _teacher(name: str, *numbers: float) -> list[Published]:
    return [
        Published(teacher=name, n_blocks=0, task=task, mean=mean, std=None)
        for task, mean in zip(("imagenet", "ade20k", "nyuv2"), numbers)
    ]


PUBLISHED: Sequence[Published] = (
    *_raptor(2, (0.812, 0.002), (0.396, 0.006), (0.648, 0.003)),
    *_raptor(3, (0.830, 0.001), (0.430, 0.003), (0.618, 0.006)),
    *_raptor(4, (0.832, 0.001), (0.436, 0.001), (0.607, 0.006)),
    *_teacher(_VIT_S, 0.809, 0.446, 0.600),
    *_teacher(_VIT_B, 0.845, 0.475, 0.578),
    Published(teacher=_VIT_B, n_blocks=0, task="head", mean=0.846, std=None, source=DINOV2),
    Published(teacher=_VIT_S, n_blocks=0, task="head", mean=0.809, std=None, source=DINOV2),
)
"""The main table; the best epoch on the evaluation split, as the published code chooses it."""


def published(teacher: str, n_blocks: int, task: str) -> Published | None:
    """What was published for a Raptor of this teacher with so many blocks, or with 0 for the teacher itself.

    Args:
        teacher: timm's name, with or without its tag.
        n_blocks: Blocks.
        task: As TASK names it; "head" is the teacher's own head without any probe.
    """
    wanted = (teacher.partition(".")[0], n_blocks, task)
    return next((one for one in PUBLISHED if (one.teacher, one.n_blocks, one.task) == wanted), None)

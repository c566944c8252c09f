"""Numbers that others have published, each with where it stands, so that ours can be shown beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.published_runs import RAPTORS

PAPER = "arXiv:2512.19941, ICLR 2026 camera-ready, Table 2"
ABLATION = "the same, ablation of k=3: after stage 2, with Meta's published head"
DINOV2 = "DINOv2's own README, linear probe"
REVIT = "reViT, which probed the published Raptors independently"

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
    Published(teacher=_VIT_B, n_blocks=3, task="head", mean=0.824, std=None, source=ABLATION),
    Published(teacher=_VIT_B, n_blocks=0, task="head", mean=0.846, std=None, source=DINOV2),
    Published(teacher=_VIT_S, n_blocks=0, task="head", mean=0.809, std=None, source=DINOV2),
)
"""The main table; the best epoch on the evaluation split, as the published code chooses it."""

INDEPENDENT_NYUV2: Mapping[str, float] = {"k=2": 0.605, "k=3": 0.567, "k=4": 0.564, "ViT-S": 0.590, "ViT-B": 0.567}
"""RMSE in metres of a linear probe without the defects of the published one; from REVIT."""

_SPANS = {tuple(map(str, spans)) for spans in RAPTORS.values()}
#: Samples of the published evaluation splits.
_N_EVALUATION = {"imagenet": 50_000, "ade20k": 2_000, "nyuv2": 654}
_N_CLASSES = 1_000


def published(teacher: str, n_blocks: int, task: str) -> Published | None:
    """What was published for a Raptor of this teacher with so many blocks, or with 0 for the teacher itself.

    Args:
        teacher: timm's name, with or without its tag.
        n_blocks: Blocks.
        task: As TASK names it; "head" is the teacher's own head without any probe.
    """
    wanted = (teacher.partition(".")[0], n_blocks, task)
    return next((one for one in PUBLISHED if (one.teacher, one.n_blocks, one.task) == wanted), None)


def has_published_spans(spans: Sequence[str]) -> bool:
    """Whether a Raptor has the blocks of a published one; a teacher has none, and so the published ones."""
    return not spans or tuple(spans) in _SPANS


def is_published_evaluation(n_samples: int) -> bool:
    """Whether a teacher's head was measured on as many samples as ImageNet's val has."""
    return n_samples == _N_EVALUATION["imagenet"]


def is_published_probe(
    task: str, settings: Mapping[str, Any], task_identity: Mapping[str, Any], n_evaluation: int
) -> bool:
    """Whether a probe is the published one: optimiser values, whole evaluation split, all classes of ImageNet."""
    if n_evaluation != _N_EVALUATION.get(task):
        return False
    if task == "imagenet" and task_identity.get("classes") != _N_CLASSES:
        return False
    return {name: settings.get(name) for name in _SETTINGS[task]} == _SETTINGS[task]


def remark(task: str, task_identity: Mapping[str, Any], *, compat: bool) -> str:
    """In what a probe of ours still differs from the published one; "" for in nothing."""
    if task == "nyuv2" and not compat:
        return "theirs with the defects of the published code, ours without (COMPAT=1 restores them)"
    if task == "imagenet" and task_identity.get("head") == "random":
        return "theirs began with Meta's head, ours with a random one (HEAD= gives one)"
    return ""


def _optimiser(n_epochs: int, batch_size: int, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    return {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
    }


#: Source: seeds.md 1.11. Precision and the batches of an evaluation are the machine's.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "imagenet": {**_optimiser(15, 512, 1e-4, 1e-2), "schedule": "warmup_cosine", "clip_norm": 1.0},
    "ade20k": {**_optimiser(10, 32, 1e-3, 1e-2), "schedule": "warmup_cosine", "clip_norm": 1.0},
    "nyuv2": {**_optimiser(25, 128, 1e-3, 1e-3), "schedule": "constant", "clip_norm": None},
}

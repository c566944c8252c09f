"""What a probe is about. A task brings data, readout, loss, metric and optimiser values; `train_probe` brings the rest.

To add one: a module with a `TaskKind`, and its name in `TASKS`. `TaskKind.open` is given what was typed and the frozen
backbone, and returns a `Task`, or raises a UserError that lists all that is wrong.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from infra.console import UserError
from storage_schemas import Store
from trainer.probes.backbone import Backbone

SCHEDULES = ("warmup_cosine", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Optimiser values of a probe; checks itself when built.

    Attributes:
        n_epochs: Passes over the training samples.
        batch_size: Samples of a step.
        evaluation_batch_size: Samples at a time while evaluating.
        learning_rate: Of AdamW, before the schedule.
        weight_decay: AdamW's, on every parameter of the readout.
        schedule: "warmup_cosine" (see `trainer.probes.schedule`) or "constant".
        warmup_iterations: Of warmup_cosine.
        clip_norm: Global gradient norm to clip to; None clips nothing.
        precision: Of backbone and readout: "float32", "bfloat16" or "float16". Losses are float32; float16 scales them.
        drop_last: Whether the samples that fill no batch at the end of an epoch are left out of it.

    Raises:
        UserError: Lists every value out of range.
    """

    n_epochs: int
    batch_size: int
    evaluation_batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_iterations: int = 100
    clip_norm: float | None = None
    precision: str = "float32"
    drop_last: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; expected at least {least}"
            for name, least in {
                "n_epochs": 1,
                "batch_size": 1,
                "evaluation_batch_size": 1,
                "weight_decay": 0,
                "warmup_iterations": 0,
            }.items()
            if not getattr(self, name) >= least
        ]
        problems += [
            f"{name} is {value}; expected a number above 0"
            for name, value in (("learning_rate", self.learning_rate), ("clip_norm", self.clip_norm))
            if value is not None and not value > 0
        ]
        problems += [
            f"{name} is {value!r}; expected one of {', '.join(known)}"
            for name, value, known in (
                ("schedule", self.schedule, SCHEDULES),
                ("precision", self.precision, PRECISIONS),
            )
            if value not in known
        ]
        if problems:
            raise UserError("\n  ".join(["a probe cannot have these settings:", *problems]))

    def changed(self, **values: Any) -> "ProbeSettings":
        """The same but for the values that are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


@runtime_checkable
class LabelledImages(Protocol):
    """Labelled images in an order of their own.

    `load` runs in several threads at once. It gives the same answer for the same index and state of `draw`, and uses
    no global random state: what it draws it draws from `draw` (see `trainer.probes.augment`).
    """

    def __len__(self) -> int: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON values that tell this data from other data: digests of names and sizes, counts; no location."""

    def load(self, index: int, draw: torch.Generator | None) -> tuple[UInt8[Tensor, "3 height width"], Tensor]:
        """One image and its target, on the CPU.

        Args:
            index: Place in [0, len).
            draw: For augmentation, seeded by probe seed, epoch and index; None asks for the image as it is evaluated.

        Returns:
            Pixels as 0..255, not normalised, of one size for all indices; and the target, of one shape for all.

        Raises:
            UserError: The file cannot be used; names it and says why.
        """


@runtime_checkable
class Metric(Protocol):
    """Sums over an evaluation."""

    def add(self, output: Tensor, target: Tensor) -> None:
        """Count a batch: what the readout gave, float32, and the targets, both on the device."""

    def values(self) -> dict[str, float]:
        """By name, in the task's units; `Task.metric` is one of the names."""


def nothing(pixels: Float32[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch 3 height width"]:
    """No change."""
    return pixels


@dataclass(frozen=True, kw_only=True)
class Task:
    """A probe that can be trained.

    Attributes:
        name: As TASK names it.
        metric: Which of the values of `make_metric()` is reported, such as "top-1", "mIoU" or "RMSE (m)".
        higher_is_better: Of the metric.
        settings: Optimiser values.
        train: Images, augmented at every pass; or a store, whose features are computed once and kept in memory and
            whose targets are its labels.
        evaluation: Images, or a store; features of an evaluation are kept too, where they are small.
        features: What the readout reads, from final-norm tokens (CLS, registers, patches in row order); no parameters.
        make_head: The readout, before training, on the CPU; torch's global generator is seeded when it is called.
        loss: Of the readout's output in float32 and the targets; a mean over the batch.
        make_metric: An empty sum.
        prepare: What happens to normalised pixels before they enter the backbone, such as padding.
        identity: Further JSON values that tell this task from a similar one, such as the digest of the head's file.
        reads_head_input: `features` are the head input, which a store holds for the teacher: no patch need be read.
        teacher_head: Measures what the teacher's own head reaches on the evaluation data; None where that is not known.
    """

    name: str
    metric: str
    higher_is_better: bool
    settings: ProbeSettings
    train: LabelledImages | Store
    evaluation: LabelledImages | Store
    features: Callable[[Float[Tensor, "batch token dim"]], Tensor]
    make_head: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    make_metric: Callable[[], Metric]
    prepare: Callable[[Tensor], Tensor] = nothing
    identity: Mapping[str, Any] = field(default_factory=dict)
    reads_head_input: bool = False
    teacher_head: Callable[[], float | None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was typed.

    Attributes:
        images: IMAGES: where the data set lies, in its own on-disk format; None if not given.
        store: STORE, or the task's default; None if there is none.
        head: HEAD: file of a linear head of the head input, to begin with where the task has such a readout; None if
            not given.
        compat: Restore the defects that published numbers depend on.
        seed: Of the readout, the order and the augmentation.
        changes: Settings in the place of the recipe's, by name; None keeps the recipe's.
        device: Of backbone and readout.
    """

    images: str | None
    store: str | None
    head: str | None
    compat: bool
    seed: int
    changes: Mapping[str, Any]
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What is known of a task before anything is opened.

    Attributes:
        name: As TASK names it.
        image_size: Height and width in px that the teacher must be loaded for, from the side of its patches; None where
            the images are those of a store.
        check: What is wrong with what was typed for the task, as far as it shows without a backbone and at once.
        open: Opens the data and puts the task together.
        default_store: STORE where none is given; None: the task needs none.
        has_compat: Whether the published code of this task has defects that COMPAT=1 restores.
    """

    name: str
    image_size: Callable[[int], tuple[int, int]] | None
    check: Callable[[Asked], list[str]]
    open: Callable[[Asked, Backbone], Task]
    default_store: str | None = None
    has_compat: bool = False


#: Where each task's `KIND` is. Imported when it is asked for, so that one task's needs are not everybody's.
TASKS = {
    "imagenet": "trainer.probes.imagenet",
    "ade20k": "trainer.probes.ade20k",
    "nyuv2": "trainer.probes.nyuv2",
    "digits": "trainer.probes.digits",
}


def find_task(name: str) -> TaskKind:
    """The task of this name.

    Raises:
        UserError: There is none; lists those there are.
    """
    if name not in TASKS:
        given = f"TASK={name} is unknown" if name else "TASK is missing"
        raise UserError(f"{given}; expected one of {', '.join(TASKS)}")
    kind = importlib.import_module(TASKS[name]).KIND
    assert isinstance(kind, TaskKind)
    return kind

"""Frozen models of fake_vit, with and without an exact Raptor, and tasks over images made from a formula."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from pipeline.teacher import Teacher
from storage_schemas import Span, Store
from tests.trainer.tiny import tiny_teacher
from trainer.block import Block
from trainer.probes.backbone import Backbone
from trainer.probes.classification import TOP1, Top1, cross_entropy
from trainer.probes.task import LabelledImages, ProbeSettings, Task
from trainer.raptor import Raptor
from trainer.trained import Trained


class OwnBlocks(nn.Module):
    """A teacher's own blocks in the place of a trained one: exact."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self._teacher = teacher

    def forward(self, x: Float[Tensor, "batch token dim"], layer: int) -> Float[Tensor, "batch token dim"]:
        return self._teacher.run_blocks(x, layer - 1, layer)


def trained_of(
    teacher: Teacher, spans: tuple[Span, ...] | None = None, *, blocks: list[nn.Module] | None = None
) -> Trained:
    """A finished run of these blocks over the whole depth; of exact ones by default."""
    spans = spans or (Span(0, teacher.n_layers - 1),)
    raptor = Raptor(blocks or [OwnBlocks(teacher) for _ in spans], spans).eval().requires_grad_(False)
    return Trained(
        location="runs/exact",
        raptor=raptor,
        config={"train": {"seed": 7}, "data": {"teacher": teacher.weights_digest}},
        result={"weights_sha256": "0" * 64, "blocks": [{"dim": teacher.dim} for _ in spans]},
    )


def seeded_block(dim: int, seed: int = 0) -> Block:
    """A block with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Block(dim, 2)


def backbone(*, raptor: bool = False, teacher: Teacher | None = None) -> Backbone:
    """Of fake_vit; as a Raptor, an exact one."""
    teacher = teacher or tiny_teacher()
    return Backbone(teacher=teacher, trained=trained_of(teacher) if raptor else None)


class FormulaImages:
    """Images whose brightness tells their class, with a shift drawn when they are augmented; `LabelledImages`."""

    def __init__(self, n_samples: int, n_classes: int = 3, *, side: int = 16, offset: int = 0) -> None:
        self.n_samples, self.n_classes, self.side, self.offset = n_samples, n_classes, side, offset
        self.drawn: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.n_samples

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"formula": [self.n_samples, self.n_classes, self.offset]}

    def load(self, index: int, draw: torch.Generator | None) -> tuple[UInt8[Tensor, "3 side side"], Int64[Tensor, ""]]:
        noise = torch.Generator().manual_seed(index + self.offset)
        label = (index + self.offset) % self.n_classes
        pixels = 40 + 60 * label + 30 * torch.randn(3, self.side, self.side, generator=noise)
        if draw is not None:
            shift = int(torch.randint(0, self.side, (1,), generator=draw))
            self.drawn.append((index, shift))
            pixels = pixels.roll(shift, dims=2)
        return pixels.clamp(0, 255).to(torch.uint8), torch.tensor(label)


def settings(**changes: Any) -> ProbeSettings:
    values: dict[str, Any] = {
        "n_epochs": 3,
        "batch_size": 8,
        "evaluation_batch_size": 16,
        "learning_rate": 1e-2,
        "weight_decay": 1e-2,
        "schedule": "warmup_cosine",
        "warmup_iterations": 4,
        "clip_norm": 1.0,
    }
    return ProbeSettings(**(values | changes))


def task(
    frozen: Backbone,
    train: LabelledImages | Store | None = None,
    evaluation: LabelledImages | Store | None = None,
    *,
    head: nn.Linear | None = None,
    **changes: Any,
) -> Task:
    """A classification of FormulaImages, or of what is given."""

    def make_head() -> nn.Module:
        made = nn.Linear(2 * frozen.teacher.dim, 3)
        if head is not None:
            made.load_state_dict(head.state_dict())
        return made

    return Task(
        name="formula",
        metric=TOP1,
        higher_is_better=True,
        settings=settings(**changes),
        train=train or FormulaImages(30),
        evaluation=evaluation or FormulaImages(21, offset=1000),
        features=frozen.teacher.head_input,
        make_head=make_head,
        loss=cross_entropy,
        make_metric=Top1,
    )

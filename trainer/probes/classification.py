"""What the tasks that name a class share: a linear readout of the head input, cross-entropy, top-1."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from pipeline.teacher import Teacher
from storage_schemas import Store
from trainer.probes.backbone import Backbone, check_store
from trainer.probes.features import stored_head_input, stored_labels
from trainer.probes.task import ProbeSettings

TOP1 = "top-1"

#: As published for ImageNet-1k; seeds.md 1.11.
PUBLISHED = ProbeSettings(
    n_epochs=15,
    batch_size=512,
    evaluation_batch_size=512,
    learning_rate=1e-4,
    weight_decay=1e-2,
    schedule="warmup_cosine",
    warmup_iterations=100,
    clip_norm=1.0,
    drop_last=True,
)


class Top1:
    """Share of samples whose highest logit is that of their class, 0 to 1."""

    def __init__(self) -> None:
        self._n, self._right = 0, torch.zeros((), dtype=torch.int64)

    def add(self, output: Float[Tensor, "batch class"], target: Int64[Tensor, " batch"]) -> None:
        """Count a batch."""
        self._n += len(target)
        self._right = self._right.to(output.device) + (output.argmax(-1) == target).sum()

    def values(self) -> dict[str, float]:
        """The share; NaN before any sample."""
        return {TOP1: int(self._right) / self._n if self._n else float("nan")}


def cross_entropy(output: Float[Tensor, "batch class"], target: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the batch."""
    return functional.cross_entropy(output, target)


def linear_readout(n_features: int, n_classes: int, initial: nn.Linear | None) -> Callable[[], nn.Module]:
    """Makes a trainable linear layer: a copy of `initial`, or torch's default initial values."""

    def make() -> nn.Module:
        head = nn.Linear(n_features, n_classes)
        if initial is not None:
            head.load_state_dict(initial.state_dict())
        return head

    return make


def teacher_head_top1(teacher: Teacher, store: Store) -> float | None:
    """Top-1 of the teacher's own head on a store; None if it has none, or the store holds no head input."""
    head_input = None if teacher.head is None else stored_head_input(store)
    if head_input is None or teacher.head is None:
        return None
    metric = Top1()
    with torch.no_grad():
        metric.add(teacher.head(head_input.to(teacher.device)).cpu(), stored_labels(store))
    return metric.values()[TOP1]


def without_cls(backbone: Backbone) -> list[str]:
    """Why a backbone gives no head input."""
    name = backbone.teacher.name
    return (
        [] if backbone.teacher.has_cls else [f"{name} has no CLS token, which this task reads; probe another teacher"]
    )


def store_problems(store: Store, backbone: Backbone) -> list[str]:
    """Why a probe cannot read this store."""
    problems = check_store(backbone, store)
    if not store.is_complete:
        problems.append(f"{store.location} is not finished. Run the same make extract again")
    elif not store.valid.any():
        problems.append(f"{store.location} has no sample to use: all its images were bad")
    elif int(stored_labels(store).min()) < 0:
        problems.append(f"{store.location} has samples without a label (-1); a probe needs a class for each")
    return problems

"""How good a block or a Raptor is: rolled out over its span, by layer, and by what the teacher's head makes of it.

The states of a store's val split are the truth. The model is given state `start` and fed its own output up to `stop`;
the remaining teacher blocks, the final norm and the linear head then name a class.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from pipeline.teacher import Teacher
from storage_schemas import Span, Store
from trainer.losses import Loss
from trainer.machine import Machine
from trainer.objectives import brh_error
from trainer.raptor import LayerModel, rollout
from trainer.stream import LayerSliceStream

ALL_TOKENS = "all"
_REFERENCE_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """What to validate on.

    Attributes:
        store: Every valid sample of it is used.
        teacher: For accuracy, on the device of the training; None, or a teacher without head, measures none.
        batch_size: Samples at a time; the reference's R2 depends on it, nothing else does.
        lanes: Of the stream.
    """

    store: Store
    teacher: Teacher | None
    batch_size: int
    lanes: int

    @property
    def has_accuracy(self) -> bool:
        return self.teacher is not None and self.teacher.head is not None and self.teacher.has_cls


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One measurement of a roll-out. Lists have one value for each produced layer, start + 1 to stop.

    Attributes:
        n_samples: Samples measured.
        loss: The training loss of the roll-out.
        accuracy: Share of right classes, 0 to 1; None without a head.
        r2: By token kind, and "all": 1 - squared error / squared deviation of the teacher's states from their mean per
            channel, both summed over the set. 1 is perfect; 0 is what the mean alone would reach.
        reference_r2: As the published code computes it: the prediction's variance below, about one mean over all
            tokens and channels, averaged over batches.
        epsilon: Mean over samples of the Frobenius norm of the error.
        layers: Which layers the lists are about.
    """

    n_samples: int
    loss: float
    accuracy: float | None
    r2: dict[str, list[float]]
    reference_r2: list[float]
    epsilon: list[float]
    layers: list[int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Accuracies, 0 to 1, that put a block's own into proportion.

    Attributes:
        teacher: Of the teacher: its own state `stop` through its remaining blocks.
        untrained: Of the block as it was before the first step.
        skipping: Of leaving out the span's teacher blocks: state `start` in the place of state `stop`.
    """

    teacher: float
    untrained: float
    skipping: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def validate(
    model: LayerModel, data: ValidationSet, span: Span, loss: Loss, *, machine: Machine, precision: str = "float32"
) -> Validation:
    """Roll the model out over the whole set and measure it.

    Waits for the device once, at the end.

    Args:
        model: Takes state layer - 1 to state layer.
        data: The set.
        span: What the model was trained on.
        loss: Loss of one layer.
        machine: Where the model is.
        precision: Of the model's products; the rest is float32, sums float64.
    """
    slices = token_slices(data.store)
    moments = {kind: _Moments() for kind in slices}
    n_samples = 0
    totals: dict[str, Tensor | float] = {"loss": 0.0, "right": 0.0}
    zeros = torch.zeros(span.n_states - 1, dtype=torch.float64, device=machine.device)
    by_layer = {"reference_r2": zeros, "epsilon": zeros.clone()}
    for states, labels in _batches(data, span, machine):
        predicted = _roll_out(model, states[:, 0], span, machine, precision)
        n = len(states)
        n_samples += n
        truth, made = states[:, 1:], predicted[:, 1:]
        for kind, tokens in slices.items():
            moments[kind].add(truth[:, :, tokens], made[:, :, tokens])
        by_layer["reference_r2"] += n * reference_r2(made, truth).double()
        by_layer["epsilon"] += n * brh_error(made, truth).double()
        totals["loss"] += n * torch.stack([loss(made[:, i], truth[:, i]) for i in range(truth.shape[1])]).mean()
        if data.has_accuracy:
            totals["right"] += _n_right(data.teacher, made[:, -1], span.stop, labels)
    return Validation(
        n_samples=n_samples,
        loss=float(totals["loss"]) / n_samples,
        accuracy=float(totals["right"]) / n_samples if data.has_accuracy else None,
        r2={kind: m.r2() for kind, m in moments.items()} | {ALL_TOKENS: _merge(list(moments.values())).r2()},
        reference_r2=(by_layer["reference_r2"] / n_samples).tolist(),
        epsilon=(by_layer["epsilon"] / n_samples).tolist(),
        layers=list(span.states)[1:],
    )


def measure_baselines(
    untrained: LayerModel, data: ValidationSet, span: Span, *, machine: Machine, precision: str = "float32"
) -> Baselines | None:
    """Accuracy of the teacher, of an untrained block and of no block at all; None without a head."""
    if not data.has_accuracy:
        return None
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "teacher": lambda states: states[:, -1],
        "untrained": lambda states: _roll_out(untrained, states[:, 0], span, machine, precision)[:, -1],
        "skipping": lambda states: states[:, 0],
    }
    right: dict[str, Tensor | float] = dict.fromkeys(ways, 0.0)
    n_samples = 0
    for states, labels in _batches(data, span, machine):
        n_samples += len(states)
        for name, last_of in ways.items():
            right[name] += _n_right(data.teacher, last_of(states), span.stop, labels)
    return Baselines(**{name: float(n) / n_samples for name, n in right.items()})


def reference_r2(
    predicted: Float32[Tensor, "batch layer token dim"], truth: Float32[Tensor, "batch layer token dim"]
) -> Float32[Tensor, " layer"]:
    """R2 of one batch as the published code has it: the prediction stands where the truth belongs.

    Source: seeds.md 1.10; KempnerInstitute/raptor:raptor/trainer.py line 378 with overcomplete.metrics.
    """
    axes = (0, 2, 3)
    variance = (predicted - predicted.mean(axes, keepdim=True)).square().mean(axes)
    return 1 - (predicted - truth).square().mean(axes) / (variance + _REFERENCE_EPSILON)


def token_slices(store: Store) -> dict[str, slice]:
    """Where each kind of token that the store has stands in the teacher's order."""
    first_register = int(store.spec.has_cls)
    first_patch = first_register + store.spec.n_registers
    every = {
        "cls": slice(0, first_register),
        "registers": slice(first_register, first_patch),
        "patches": slice(first_patch, None),
    }
    return {kind: tokens for kind, tokens in every.items() if kind in store.spec.token_kinds}


class _Moments:
    """Squared error, and squared deviation of the truth from its mean per channel, by layer, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor | float = 0.0  # (layer, dim)
        self.m2: Tensor | float = 0.0  # (layer, dim)
        self.error: Tensor | float = 0.0  # (layer,)

    def add(
        self, truth: Float[Tensor, "batch layer token dim"], predicted: Float[Tensor, "batch layer token dim"]
    ) -> None:
        part = _Moments()
        part.n = truth.shape[0] * truth.shape[2]
        part.mean = truth.sum((0, 2), dtype=torch.float64) / part.n
        part.m2 = (truth - part.mean.float()[:, None]).square().sum((0, 2), dtype=torch.float64)
        part.error = (predicted - truth).square().sum((0, 2, 3), dtype=torch.float64)
        self.merge(part)

    def merge(self, other: "_Moments") -> None:
        """Chan's rule: as if both had been seen at once."""
        n = self.n + other.n
        shift = other.mean - self.mean
        self.m2 = self.m2 + other.m2 + shift**2 * (self.n * other.n / n)
        self.mean = self.mean + shift * (other.n / n)
        self.error = self.error + other.error
        self.n = n

    def r2(self) -> list[float]:
        """By layer; a layer without any variance has 1 if it was met exactly, else 0."""
        assert isinstance(self.m2, Tensor)
        assert isinstance(self.error, Tensor)
        deviations, errors = self.m2.sum(-1).tolist(), self.error.tolist()
        return [1 - e / d if d > 0 else float(e == 0) for e, d in zip(errors, deviations)]


def _merge(parts: list[_Moments]) -> _Moments:
    total = _Moments()
    for part in parts:
        total.merge(part)
    return total


def _batches(data: ValidationSet, span: Span, machine: Machine) -> Iterator[tuple[Tensor, Int64[Tensor, " batch"]]]:
    """States (batch, layer, token, dim) of the span and labels, on the device."""
    labels = torch.from_numpy(data.store.samples["label"].to_numpy().copy())
    stream = LayerSliceStream(
        data.store,
        span,
        batch_size=data.batch_size,
        lanes=data.lanes,
        partial=True,  # which samples take part was settled when the store was opened
    )
    with closing(stream):
        for batch in stream:
            chosen = labels[torch.as_tensor(batch.sample_index)]
            yield batch.to(machine.device, torch.float32).activations, chosen.to(machine.device)


def _roll_out(model: LayerModel, x: Tensor, span: Span, machine: Machine, precision: str) -> Tensor:
    with torch.no_grad(), machine.autocast(precision):
        return rollout(model, x, span.start, span.stop).float()


def _n_right(teacher: Teacher | None, state: Tensor, layer: int, labels: Int64[Tensor, " batch"]) -> Tensor:
    assert teacher is not None
    with torch.no_grad():
        logits = teacher.logits(teacher.run_blocks(state, layer, teacher.n_layers - 1))
        return (logits.argmax(-1) == labels).sum(dtype=torch.float64)

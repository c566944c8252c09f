"""What a run is: every number that decides what is learned."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from infra.console import UserError
from storage_schemas import Span
from trainer.raptor import span_problems

LossName = Literal["mse", "cosine", "mse_cosine"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Weights of the mean squared errors of CLS, registers and patches; see `trainer.losses.token_weighted`."""

    cls: float
    registers: float
    patches: float


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run is. The same config on the same data is the same run; another one in its RUN is refused.

    Attributes:
        recipe: The function in `trainer.recipes` that made it.
        spans: One per block: it takes state `start` and produces start + 1 to stop. Each begins where the one before
            it stops; one alone is stage 1, several are trained together.
        seed: Of the initial weights, the order of samples and the noise.
        n_heads: Attention heads of each block; the rest of its shape is the published one.
        depth_scaling: Whether a block knows the layer that it makes; published: yes.
        loss: Of one layer.
        noise: Standard deviation of Gaussian noise on the block's inputs; published runs: 0.
        n_steps: Optimizer steps.
        batch_size: Samples a step; the last one of a pass may have fewer, and weighs less.
        lanes: Most chunks that are mixed with each other; memory grows with it.
        peak_learning_rate: AdamW's, after the warm-up.
        final_learning_rate: At the end of the cosine.
        warmup_steps: Steps of linear rise.
        teacher_forcing_steps: Steps until the weight of the teacher-forced loss has fallen from 1 to 0; 0 for none.
        teacher_forcing_minimum: Where that weight stops falling; published: 0. At 1 nothing is ever rolled out.
        weight_decay: AdamW's, on every parameter.
        clip_norm: Largest global norm of the gradient.
        precision: Of products: "float32" or "bfloat16"; weights and residual stream are float32.
        log_every: Steps between lines of metrics; the only ones that wait for the device.
        validate_every: Steps between validations; one comes before the first step, one at the end.
        validation_samples: Of each validation but the last, which takes all.
        checkpoint_every: Steps between checkpoints.
    """

    recipe: str
    spans: tuple[Span, ...]
    seed: int
    n_heads: int
    depth_scaling: bool
    loss: LossName | TokenWeights
    noise: float
    n_steps: int
    batch_size: int
    lanes: int
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    teacher_forcing_steps: int
    teacher_forcing_minimum: float
    weight_decay: float
    clip_norm: float
    precision: Precision
    log_every: int
    validate_every: int
    validation_samples: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        problems = list(_config_problems(self))
        if problems:
            raise UserError("\n  ".join(["this training cannot be run:", *problems]))

    @property
    def span(self) -> Span:
        """All states that take part, from the first one taken to the last one produced."""
        return Span(self.spans[0].start, self.spans[-1].stop)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "spans": [str(span) for span in self.spans]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of to_json."""
        loss = values["loss"] if isinstance(values["loss"], str) else TokenWeights(**values["loss"])
        return cls(**{**values, "spans": tuple(map(Span.parse, values["spans"])), "loss": loss})


def _config_problems(config: TrainConfig) -> Iterator[str]:
    for kind, name, least in (
        (int, "seed", 0),
        (int, "n_heads", 1),
        (int, "n_steps", 1),
        (int, "batch_size", 1),
        (int, "lanes", 1),
        (int, "log_every", 1),
        (int, "validate_every", 1),
        (int, "validation_samples", 1),
        (int, "checkpoint_every", 1),
        (int, "warmup_steps", 0),
        (int, "teacher_forcing_steps", 0),
        (float, "noise", 0),
        (float, "teacher_forcing_minimum", 0),
        (float, "peak_learning_rate", 0),
        (float, "final_learning_rate", 0),
        (float, "weight_decay", 0),
        (float, "clip_norm", 0),
    ):
        value = getattr(config, name)
        if not _is_number(value, kind) or value < least:
            yield f"{name} is {value!r}, expected {'a whole number, ' * (kind is int)}{least} or more"
    if config.clip_norm == 0:
        yield f"clip_norm is {config.clip_norm!r}, expected more than 0"
    if _is_number(config.teacher_forcing_minimum, float) and config.teacher_forcing_minimum > 1:
        yield f"teacher_forcing_minimum is {config.teacher_forcing_minimum!r}, expected a weight from 0 to 1"
    yield from span_problems(config.spans)
    counts = config.warmup_steps, config.n_steps
    if all(_is_number(count, int) for count in counts) and config.warmup_steps > config.n_steps:
        yield f"warmup_steps is {config.warmup_steps:,}, expected at most the {config.n_steps:,} steps of the run"
    if config.precision not in get_args(Precision):
        yield f"precision is {config.precision!r}, expected {' or '.join(get_args(Precision))}"
    if isinstance(config.loss, TokenWeights):
        for name, weight in dataclasses.asdict(config.loss).items():
            if not _is_number(weight, float) or weight < 0:
                yield f"loss weighs {name} by {weight!r}, expected 0 or more"
    elif config.loss not in get_args(LossName):
        yield f"loss is {config.loss!r}, expected {', '.join(get_args(LossName))} or weights of token kinds"


def _is_number(value: object, kind: type) -> bool:
    """Whether it is a finite number, and a whole one if that is asked for."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return math.isfinite(value)

"""Training: stream -> loss, teacher forcing annealed to roll-out -> clip -> AdamW -> schedule. One plain loop.

It can stop after any step and go on as if it had not: a run interrupted and resumed on the CPU, with the same number of
threads, equals an uninterrupted one bit for bit, and so do its metrics, but for the two that are times.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infra.console import JobError, Progress, UserError
from storage_schemas import Span, Store, StoreSpec
from trainer import losses
from trainer.block import Block
from trainer.data import TrainingData, first_samples
from trainer.machine import Machine
from trainer.objectives import annealed_loss
from trainer.optimizer import clip_and_step, make_optimizer, set_learning_rate
from trainer.raptor import LayerModel
from trainer.run_files import Checkpoint, RunFiles
from trainer.run_log import RunLog
from trainer.schedules import learning_rate, teacher_forcing_ratio
from trainer.stream import LayerSliceStream
from trainer.validation import Baselines, Validation, ValidationSet, measure_baselines, validate

LossName = Literal["mse", "cosine", "mse_cosine"]
Precision = Literal["float32", "bfloat16"]

_VALIDATION_LANES = 8


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
        span: The block takes state `start` and produces start + 1 to stop.
        seed: Of the initial weights, the order of samples and the noise.
        n_heads: Attention heads of the block; the rest of its shape is the published one.
        loss: Of one layer.
        noise: Standard deviation of Gaussian noise on the block's inputs; published runs: 0.
        n_steps: Optimizer steps.
        batch_size: Samples a step; the last one of a pass may have fewer, and weighs less.
        lanes: Most chunks that are mixed with each other; memory grows with it.
        peak_learning_rate: AdamW's, after the warm-up.
        final_learning_rate: At the end of the cosine.
        warmup_steps: Steps of linear rise.
        teacher_forcing_steps: Steps until the weight of the teacher-forced loss has fallen from 1 to 0.
        weight_decay: AdamW's, on every parameter.
        clip_norm: Largest global norm of the gradient.
        precision: Of products: "float32" or "bfloat16"; weights and residual stream are float32.
        log_every: Steps between lines of metrics; the only ones that wait for the device.
        validate_every: Steps between validations; one comes before the first step, one at the end.
        validation_samples: Of each validation but the last, which takes all.
        checkpoint_every: Steps between checkpoints.
    """

    recipe: str
    span: Span
    seed: int
    n_heads: int
    loss: LossName | TokenWeights
    noise: float
    n_steps: int
    batch_size: int
    lanes: int
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    teacher_forcing_steps: int
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "span": str(self.span)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of to_json."""
        loss = values["loss"] if isinstance(values["loss"], str) else TokenWeights(**values["loss"])
        return cls(**{**values, "span": Span.parse(values["span"]), "loss": loss})


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run has to show.

    Attributes:
        validation: Of the trained block, on all validation samples.
        baselines: None without a head.
        final_loss: Mean training loss of the last logging interval.
    """

    validation: Validation
    baselines: Baselines | None
    final_loss: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def make_block(config: TrainConfig, spec: StoreSpec) -> Block:
    """The block before its first step: the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Block(spec.dim, config.n_heads)


def make_loss(config: TrainConfig, spec: StoreSpec) -> losses.Loss:
    """The loss of one layer."""
    if isinstance(config.loss, TokenWeights):
        weights = dataclasses.asdict(config.loss)
        return losses.token_weighted(**weights, n_registers=spec.n_registers, has_cls=spec.has_cls)
    return {"mse": losses.mse, "cosine": losses.cosine, "mse_cosine": losses.mse_cosine}[config.loss]


def train(
    config: TrainConfig,
    data: TrainingData,
    run: RunFiles,
    *,
    machine: Machine,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult | None:
    """Train from the run's last checkpoint, or from the beginning, to the end.

    Args:
        config: What to do. The run must have been claimed for it.
        data: Stores and teacher.
        run: Where checkpoints, metrics and weights go.
        machine: Where to compute.
        stop: Asked after every step; once it says yes, everything is saved and the function returns.

    Returns:
        The result, or None if it was stopped; call again to go on.

    Raises:
        JobError: The loss became infinite or NaN; the last checkpoint is from before.
        StoreError, ObjectError: The store could not be read; the last checkpoint stays valid.
    """
    model = make_block(config, data.train.spec).to(machine.device)
    optimizer = make_optimizer(model, learning_rate=config.peak_learning_rate, weight_decay=config.weight_decay)
    random = torch.Generator(machine.device).manual_seed(config.seed)
    loss_of = make_loss(config, data.train.spec)
    forward: LayerModel = torch.compile(model) if machine.compile else model
    judge = Judge(config, data, loss_of, machine)
    saved = run.newest_checkpoint()
    first = 0 if saved is None else saved.step

    with Feed(data.train, config, machine) as feed, RunLog(run, resume=saved) as log, feed.progress(first) as progress:
        meter = Meter(feed)
        if saved is None:
            progress.status("validating")
            log.validation(0, judge.sample(model))
            progress.status("")
        else:
            progress.say(f"going on from step {first:,}")
            _restore(model, optimizer, random, saved.tensors)
            feed.load_state_dict(saved.state["feed"])
            meter.load_state_dict(saved.state["meter"])
        meter.restart_clock()

        for step in range(first, config.n_steps):
            states = feed.next_states()
            forcing = teacher_forcing_ratio(step, anneal_steps=config.teacher_forcing_steps)
            with machine.autocast(config.precision):
                loss = annealed_loss(forward, states, config.span.start, loss_of, forcing, config.noise, random)
            (loss * (len(states) / config.batch_size)).backward()
            set_learning_rate(optimizer, learning_rate_at(config, step))
            norm = clip_and_step(optimizer, config.clip_norm)
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            meter.add(done, loss, norm, len(states))
            progress.advance(len(states))
            if done % config.log_every == 0 or done == config.n_steps:
                means, rates = meter.take()
                log.training(done, means | {"learning_rate": learning_rate_at(config, step), "forcing": forcing}, rates)
                progress.fields(
                    step=f"{done:,}", loss=f"{means['loss']:.4g}", loader_wait=f"{rates['loader_wait']:.1%}"
                )
            if done % config.validate_every == 0 and done < config.n_steps:
                progress.status("validating")
                log.validation(done, found := judge.sample(model))
                progress.status("")
                progress.say(f"step {done:,}: {describe(found)}")
                meter.restart_clock()
            stopping = stop()
            if stopping or done % config.checkpoint_every == 0 or done == config.n_steps:
                log.flush()  # first, so that no checkpoint is ahead of the metrics
                tensors = _tensors(model, optimizer, random)
                state = {"feed": feed.state_dict(), "meter": meter.state_dict(), "last_loss": log.last_loss}
                run.save_checkpoint(Checkpoint(step=done, tensors=tensors, state=state))
            if stopping:
                return None

        progress.status("validating")
        final = judge.whole(model)
        log.validation(config.n_steps, final)
        assert log.last_loss is not None, "the last step is always logged"
        result = TrainResult(validation=final, baselines=judge.baselines(), final_loss=log.last_loss)
        run.finish(model.state_dict(), {**result.to_json(), "block": model.arguments, "span": str(config.span)})
        return result


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """As the published loop, which moves its schedule before its optimizer: the first step learns already."""
    return learning_rate(
        step,
        peak=config.peak_learning_rate,
        final=config.final_learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.n_steps,
        compat=True,
    )


class Feed:
    """Passes over the training samples, one after another, as states on the device."""

    def __init__(self, store: Store, config: TrainConfig, machine: Machine) -> None:
        self._stream = LayerSliceStream(
            store,
            config.span,
            batch_size=config.batch_size,
            seed=config.seed,
            lanes=config.lanes,
            partial=True,  # which samples take part was settled when the store was opened
        )
        self._config, self._device = config, machine.device
        self._memory: Tensor | None = None

    def progress(self, n_steps_done: int) -> Progress:
        """A progress bar over the samples of the whole run."""

        def samples_after(n_steps: int) -> int:  # the last batch of a pass may be short
            n_passes, rest = divmod(n_steps, len(self._stream))
            return n_passes * self._stream.n_samples + min(rest * self._config.batch_size, self._stream.n_samples)

        return Progress(
            total=samples_after(self._config.n_steps),
            unit="samples",
            label=f"train {self._config.span}",
            done=samples_after(n_steps_done),
        )

    @property
    def waited_s(self) -> float:
        """Seconds that the loop has waited for samples."""
        return self._stream.waited_s

    def next_states(self) -> Float[Tensor, "batch state token dim"]:
        """The next batch. On a CPU its memory is used again for the one after."""
        batch = next(self._stream, None)
        if batch is None:
            self._stream.set_epoch(self._stream.epoch + 1)
            batch = next(self._stream)
        states = batch.to(self._device, torch.float32, out=self._memory).activations
        if self._device.type == "cpu" and self._memory is None:
            self._memory = states
        return states

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, after the batch handed out last."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._stream.load_state_dict(state)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class Meter:
    """Losses and gradient norms since the last line of metrics, left on the device until that line is written."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._step = 0
        self._start_anew()
        self.restart_clock()

    def add(self, step: int, loss: Tensor, norm: Tensor, n_samples: int) -> None:
        """Count one step. Does not wait for the device."""
        self._step = step
        self._losses.append(loss.detach())
        self._norms.append(norm.detach())
        self._sizes.append(n_samples)
        self._n_timed += n_samples

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means over samples, which depend on the config alone, and rates, which depend on the machine. Starts anew."""
        losses, norms = self._read()
        n = sum(self._sizes)
        means = {
            "loss": math.fsum(loss * size for loss, size in zip(losses, self._sizes)) / n,
            "gradient_norm": math.fsum(norms) / len(norms),
        }
        elapsed = time.monotonic() - self._began
        rates = {
            "samples_per_s": self._n_timed / elapsed,
            "loader_wait": (self._feed.waited_s - self._waited_s) / elapsed,
        }
        self._start_anew()
        self.restart_clock()
        return means, rates

    def _start_anew(self) -> None:
        # Restored ones are on the host, those of this process on the device, which is why they are kept apart.
        self._restored_losses: list[float] = []
        self._restored_norms: list[float] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._sizes: list[int] = []  # of both

    def restart_clock(self) -> None:
        """Leave out of the rates what came since the last line."""
        self._began, self._waited_s, self._n_timed = time.monotonic(), self._feed.waited_s, 0

    def state_dict(self) -> dict[str, Any]:
        """What is not logged yet, as JSON values."""
        losses, norms = self._read()
        return {"losses": losses, "norms": norms, "sizes": self._sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._start_anew()
        self._restored_losses, self._restored_norms = list(state["losses"]), list(state["norms"])
        self._sizes = list(state["sizes"])

    def _read(self) -> tuple[list[float], list[float]]:
        """Losses and norms on the host.

        Raises:
            JobError: One is infinite or NaN: what follows from it must reach neither metrics nor checkpoint.
        """
        losses, norms = self._restored_losses, self._restored_norms
        if self._losses:
            new_losses, new_norms = torch.stack([torch.stack(self._losses), torch.stack(self._norms)]).tolist()
            losses, norms = losses + new_losses, norms + new_norms
        bad = [value for value in (*losses, *norms) if not math.isfinite(value)]
        if bad:
            raise JobError(
                f"by step {self._step:,} the loss has become {bad[0]}; training stopped, and the last checkpoint is "
                "from before. Try a smaller learning rate, or float32, in another RUN"
            )
        return losses, norms


class Judge:
    """Validates a block of one run."""

    def __init__(self, config: TrainConfig, data: TrainingData, loss: losses.Loss, machine: Machine) -> None:
        self._config, self._data, self._loss, self._machine = config, data, loss, machine

    def sample(self, model: LayerModel) -> Validation:
        """On the first samples of the set."""
        return self._validate(model, first_samples(self._data.validation, self._config.validation_samples))

    def whole(self, model: LayerModel) -> Validation:
        """On all samples."""
        return self._validate(model, self._data.validation)

    def baselines(self) -> Baselines | None:
        """Accuracies to compare with, on all samples; the untrained block is this run's own at step 0."""
        untrained = make_block(self._config, self._data.train.spec).to(self._machine.device)
        return measure_baselines(
            untrained,
            self._set(self._data.validation),
            self._config.span,
            machine=self._machine,
            precision=self._config.precision,
        )

    def _validate(self, model: LayerModel, store: Store) -> Validation:
        return validate(
            model,
            self._set(store),
            self._config.span,
            self._loss,
            machine=self._machine,
            precision=self._config.precision,
        )

    def _set(self, store: Store) -> ValidationSet:
        return ValidationSet(
            store=store,
            teacher=self._data.teacher,
            batch_size=self._config.batch_size,
            lanes=validation_lanes(self._config),
        )


def validation_lanes(config: TrainConfig) -> int:
    """Few: mixing means nothing here, and the memory of a stream grows with its lanes."""
    return min(_VALIDATION_LANES, config.lanes)


def describe(validation: Validation) -> str:
    """The last layer's figures in one line."""
    last = ", ".join(f"{kind} {values[-1]:.3f}" for kind, values in validation.r2.items())
    accuracy = "" if validation.accuracy is None else f"accuracy {validation.accuracy:.2%}, "
    return f"{accuracy}R2 of layer {validation.layers[-1]}: {last}; validation loss {validation.loss:.4g}"


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, random: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file."""
    moments = {
        f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()
    }
    return {"block": model.state_dict(), "optimizer": moments, "random": {"generator": random.get_state()}}


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Undo `_tensors`."""
    model.load_state_dict(tensors["block"])
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    places = {name: index[p] for name, p in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors["optimizer"].items():
        key, _, name = full_name.partition(".")
        state.setdefault(places[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    random.set_state(tensors["random"]["generator"])


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

"""Training: stream -> loss, teacher forcing annealed to roll-out -> clip -> AdamW -> schedule. One plain loop.

It can stop after any step and go on as if it had not: a run interrupted and resumed on the CPU, with the same number of
threads, equals an uninterrupted one bit for bit, and so do its metrics, but for the two that are times.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from storage_schemas import StoreSpec
from trainer import losses
from trainer.block import Block
from trainer.config import TokenWeights, TrainConfig
from trainer.data import TrainingData
from trainer.feed import Feed
from trainer.judge import Judge, describe
from trainer.machine import Machine
from trainer.meter import Meter
from trainer.objectives import annealed_loss
from trainer.optimizer import clip_and_step, make_optimizer, set_learning_rate
from trainer.raptor import LayerModel, Raptor
from trainer.run_files import Checkpoint, RunFiles
from trainer.run_log import RunLog
from trainer.schedules import learning_rate, teacher_forcing_ratio
from trainer.validation import Baselines, Validation


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run has to show.

    Attributes:
        validation: Of the trained block or Raptor, on all validation samples.
        baselines: None without a head.
        final_loss: Mean training loss of the last logging interval.
    """

    validation: Validation
    baselines: Baselines | None
    final_loss: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def make_model(config: TrainConfig, spec: StoreSpec) -> Block | Raptor:
    """A block for one span, a Raptor for several, before the first step: the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        blocks = [Block(spec.dim, config.n_heads, depth_scaling=config.depth_scaling) for _ in config.spans]
    return blocks[0] if len(blocks) == 1 else Raptor(blocks, config.spans)


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
    initial: Mapping[str, Tensor] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult | None:
    """Train from the run's last checkpoint, or from the beginning, to the end.

    Args:
        config: What to do. The run must have been claimed for it.
        data: Stores and teacher.
        run: Where checkpoints, metrics and weights go.
        machine: Where to compute.
        initial: Weights to begin with, as those of stage 1; None draws them from the seed.
        stop: Asked after every step; once it says yes, everything is saved and the function returns.

    Returns:
        The result, or None if it was stopped; call again to go on.

    Raises:
        JobError: The loss became infinite or NaN; the last checkpoint is from before.
        StoreError, ObjectError: The store could not be read; the last checkpoint stays valid.
    """
    model = make_model(config, data.train.spec)
    if initial is not None:
        model.load_state_dict(initial)
    untrained = copy.deepcopy(model).to(machine.device)
    model = model.to(machine.device)
    optimizer = make_optimizer(model, learning_rate=config.peak_learning_rate, weight_decay=config.weight_decay)
    random = torch.Generator(machine.device).manual_seed(config.seed)
    loss_of = make_loss(config, data.train.spec)
    forward = _compiled(model) if machine.compile else model
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
            forcing = teacher_forcing_ratio(
                step, anneal_steps=config.teacher_forcing_steps, minimum=config.teacher_forcing_minimum
            )
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
        result = TrainResult(validation=final, baselines=judge.baselines(untrained), final_loss=log.last_loss)
        about = {**describe_model(model, config), **describe_teacher(data)}
        run.finish(model.state_dict(), {**result.to_json(), **about})
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


def describe_model(model: Block | Raptor, config: TrainConfig) -> dict[str, Any]:
    """What a result says of the model: enough to build it again and give it its weights."""
    blocks = model.blocks if isinstance(model, Raptor) else [model]
    return {"blocks": [block.arguments for block in blocks], "spans": [str(span) for span in config.spans]}


def describe_teacher(data: TrainingData) -> dict[str, Any]:
    """What a result says of the teacher: its name and its last layer, which tells whether a span is the whole depth."""
    last_layer = data.teacher.n_layers - 1 if data.teacher is not None else data.train.layers[-1]
    return {"teacher": data.train.spec.teacher, "last_layer": last_layer}


def _compiled(model: Block | Raptor) -> LayerModel:
    """Compiled block by block, as routing is a matter of Python."""
    if isinstance(model, Block):
        return torch.compile(model)
    blocks = [cast("nn.Module", torch.compile(block)) for block in model.blocks]
    return Raptor(blocks, model.spans)


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, random: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file."""
    moments = {
        f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()
    }
    return {"model": model.state_dict(), "optimizer": moments, "random": {"generator": random.get_state()}}


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Undo `_tensors`."""
    model.load_state_dict(tensors["model"])
    index = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    places = {name: index[p] for name, p in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors["optimizer"].items():
        key, _, name = full_name.partition(".")
        state.setdefault(places[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    random.set_state(tensors["random"]["generator"])

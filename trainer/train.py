"""Training: stream -> loss, teacher forcing annealed to roll-out -> clip -> AdamW -> schedule. One plain loop.

It runs in one process, or as one of several that share every batch (`trainer.workers`): the same loop, by plain
python, torchrun or Ray Train. It can stop after any step and go on as if it had not: a run interrupted and resumed on
the CPU, with the same numbers of threads and workers, equals an uninterrupted one bit for bit, and so do its metrics,
but for the two that are times. With another number of workers it goes on with the same samples in the same order.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from storage_schemas import StoreSpec
from trainer import losses
from trainer.arithmetic import mfu, training_flop
from trainer.block import Block
from trainer.config import TokenWeights, TrainConfig
from trainer.data import TrainingData
from trainer.feed import Feed, Share
from trainer.gradient import Gradient, take_step
from trainer.machine import Machine
from trainer.meter import Meter
from trainer.optimizer import make_optimizer, set_learning_rate
from trainer.raptor import Raptor
from trainer.record import Record, TrainResult
from trainer.run_files import RunFiles
from trainer.schedules import learning_rate, teacher_forcing_ratio
from trainer.snapshot import newest_checkpoint, put_tensors, take_tensors
from trainer.telemetry import Telemetry, telling_faults
from trainer.workers import Workers

__all__ = ["TrainResult", "make_loss", "make_model", "train"]

_KEY_BOUND = 2**63 - 1  # of the number that a step's noise is drawn from


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
    workers: Workers | None = None,
    initial: Mapping[str, Tensor] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult | None:
    """Train from the run's last checkpoint, or from the beginning, to the end.

    Args:
        config: What to do. The run must have been claimed for it.
        data: Stores and teacher.
        run: Where checkpoints, metrics and weights go; only the first worker reads or writes it.
        machine: Where to compute.
        workers: This process and those that train with it, joined already (`Workers.joined`); None: it is alone.
        initial: Weights to begin with, as those of stage 1; None draws them from the seed. Those of the first worker
            count.
        stop: Asked after every step; once it says yes to any worker, everything is saved and the function returns.

    Returns:
        The result, or None if it was stopped; call again to go on.

    Raises:
        UserError: There are more workers than the store can feed.
        DivergedError: The loss became infinite or NaN; the last checkpoint is from before.
        JobError: Another worker failed.
        StoreError, ObjectError: The store could not be read; the last checkpoint stays valid.
    """
    workers = workers or Workers.alone()
    model = make_model(config, data.train.spec)
    if initial is not None:
        model.load_state_dict(initial)
    untrained = copy.deepcopy(model.state_dict()) if workers.is_first else {}
    model = model.to(machine.device)
    optimizer = make_optimizer(model, learning_rate=config.peak_learning_rate, weight_decay=config.weight_decay)
    random = torch.Generator().manual_seed(config.seed)
    loss_of = make_loss(config, data.train.spec)
    saved = newest_checkpoint(run, workers)
    first = 0 if saved is None else saved.step

    with (
        Feed(data.train, config, machine, workers) as feed,
        Gradient(model, config, loss_of, machine, workers) as gradient,
    ):
        meter = Meter(feed, workers, machine.device)
        if saved is not None:
            put_tensors(model, optimizer, random, saved.tensors)
            feed.load_state_dict(saved.state["feed"])
            meter.load_state_dict(saved.state["meter"])
        telemetry = Telemetry(
            run,
            config,
            n_samples=feed.samples_after(config.n_steps),
            first_step=first,
            samples_before=feed.samples_after(first),
        )
        record = Record(run, config, data, loss_of, machine, model, feed.progress(first), saved, telemetry)
        with ExitStack() as stack:
            workers.first_does(stack.enter_context, record)
            if not workers.is_first:
                stack.enter_context(telling_faults(run, config))
            workers.first_does(record.begin, untrained)
            meter.restart_clock()
            for step in range(first, config.n_steps):
                share, error = _next_share(feed, workers)
                forcing = teacher_forcing_ratio(
                    step, anneal_steps=config.teacher_forcing_steps, minimum=config.teacher_forcing_minimum
                )
                noise_key = int(torch.randint(_KEY_BOUND, (), generator=random))
                set_learning_rate(optimizer, learning_rate_at(config, step))
                with meter.timed():
                    loss, norm = take_step(gradient, optimizer, share, forcing, noise_key)
                stopping = _agree(workers, stop, error)

                done = step + 1
                meter.add(done, loss, norm, share.n_batch)
                log_due = done % config.log_every == 0 or done == config.n_steps
                validation_due = done % config.validate_every == 0 and done < config.n_steps
                checkpoint_due = stopping or done % config.checkpoint_every == 0 or done == config.n_steps
                if workers.is_first:
                    record.count(share.n_batch)
                if log_due:
                    means, rates = meter.take()
                    means |= {"learning_rate": learning_rate_at(config, step), "forcing": forcing}
                    flop = training_flop(config, data.train.spec.dim, data.train.spec.n_tokens, forcing)
                    used = mfu(flop * rates["samples_per_s"], machine.device, workers.world_size)
                    workers.first_does(record.metrics, done, means, rates, meter.spent, used)
                if validation_due:
                    with meter.left_out():
                        workers.first_does(record.validation, done)
                if checkpoint_due:
                    with meter.left_out():
                        state = {"feed": feed.state_dict(), "meter": meter.state_dict()}
                        tensors = take_tensors(model, optimizer, random)
                        workers.first_does(record.checkpoint, done, tensors, state)
                if stopping:
                    if not log_due:
                        workers.first_does(record.rest, meter.spend_rest())
                    return None
            return _finish(record, {**describe_model(model, config), **describe_teacher(data)}, workers)


def _next_share(feed: Feed, workers: Workers) -> tuple[Share, Exception | None]:
    """This worker's samples, or none and what kept it from reading: the others are at their step already."""
    try:
        return feed.next_share(), None
    except Exception as error:
        if workers.is_alone:
            raise
        return feed.no_share(), error


def _agree(workers: Workers, stop: Callable[[], bool], error: Exception | None) -> bool:
    """Whether any worker wants to stop.

    Raises:
        Exception: What went wrong on any worker since the step before.
    """
    wish = False
    if error is None:
        try:
            wish = stop()
        except Exception as found:
            if workers.is_alone:
                raise
            error = found
    return workers.agree(wish=wish, error=error)


def _finish(record: Record, about: Mapping[str, Any], workers: Workers) -> TrainResult:
    """The result, written by the first worker and known to all."""
    results: list[TrainResult] = []
    workers.first_does(lambda: results.append(record.finish(about)))
    if workers.is_alone:
        return results[0]
    found = workers.from_first(json.dumps(results[0].to_json()).encode() if results else None)
    assert found is not None
    return TrainResult.from_json(json.loads(found))


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
    """What a result says of the teacher: its name, its core digest, by which tables and probes know it again, and its
    last layer, which tells whether a span is the whole depth.
    """
    last_layer = data.teacher.n_layers - 1 if data.teacher is not None else data.train.layers[-1]
    digest = "" if data.teacher is None else data.teacher.core_digest
    return {"teacher": data.train.spec.teacher, "teacher_weights": digest, "last_layer": last_layer}

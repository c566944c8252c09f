"""`make train BLOCK=all`: stage 1 of all spans, side by side in this machine or in a Ray cluster."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra.cluster import connected
from infra.console import ExitCode, Progress, UserError, say, stop_on_signals
from infra.s3_settings import shared_environment
from storage_schemas import Span
from trainer.all_spans import Launch, Outcome, Process, SpanRun, process_environment, train_side_by_side
from trainer.commands.blocks import find_blocks, parse_spans
from trainer.commands.options import TrainingOptions
from trainer.commands.start import (
    DEFAULT_RUNS,
    Place,
    Training,
    absolute,
    default_run,
    make_command,
    make_config,
    open_run,
    open_run_data,
    or_problem,
    raptor_name,
    store_name,
)
from trainer.data import TrainingData
from trainer.machine import torch_threads
from trainer.published_runs import published_run
from trainer.raptor import span_problems
from trainer.report import spans_report
from trainer.room import find_room, training_memory_nbytes


@dataclass(frozen=True, kw_only=True)
class AllSpans:
    """What was typed with BLOCK=all; see `train_command`.

    Attributes:
        options: All but where to train.
        place: Where.
    """

    options: TrainingOptions
    blocks: str
    at_once: int | None
    place: Place


def train_all(typed: AllSpans, known_problems: Sequence[str] = ()) -> int:
    """Train all spans; see `train_command`.

    Raises:
        UserError: Lists all that is wrong with the store, the spans and their runs, with what is known to be.
    """
    problems = list(known_problems)
    chosen = or_problem(lambda: find_blocks(typed.blocks, typed.options.store), problems)
    trainings = _make_trainings(typed, chosen, problems)
    assert chosen is not None, "its problem was listed"
    unfinished = [span for span, training in trainings.items() if training.run.read_result() is None]
    # The longest first, as it ends last.
    unfinished.sort(key=lambda span: span.start - span.stop)
    runs = [_span_run(typed, span, trainings[span]) for span in unfinished]
    outcomes = _train(typed, runs, [trainings[span] for span in unfinished]) if runs else []
    return _report(typed, chosen, trainings, outcomes)


def _make_trainings(typed: AllSpans, blocks: str | None, problems: list[str]) -> dict[Span, Training]:
    """Each with its RUN claimed, so that all go on with the same shards and nobody else takes the place."""
    options = typed.options
    if typed.at_once is not None and typed.at_once < 1:
        problems.append(f"AT_ONCE={typed.at_once}: expected 1 or more")
    if typed.place.ray_address:
        from trainer.spans_ray import device_problems

        problems += device_problems(typed.place.device)
    elif typed.place.workers is None:  # the device is this machine's own, not one of Ray's workers
        or_problem(typed.place.machine, problems)
    opened = open_run_data(
        options.store,
        blocks,
        variable="BLOCKS",
        joined=False,
        head=options.head,
        partial=options.partial,
        run=None,
        device=torch.device("cpu"),
        known_problems=problems,
    )[0]
    spans = list(dict.fromkeys(opened.spans))
    trainings: dict[Span, Training] = {}
    for span in spans:
        try:
            trainings[span] = _make_training(options, span, opened)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(["make train BLOCK=all cannot start:", *dict.fromkeys(problems)]))
    for training in trainings.values():
        if training.run.read_config() is None:
            with training.run.exclusive():
                training.run.claim(training.identity)
    return trainings


def _make_training(options: TrainingOptions, span: Span, opened: TrainingData) -> Training:
    run = open_run(_location(options, span))
    data = dataclasses.replace(opened, spans=(span,))
    if options.partial and run.read_config() is not None:  # it goes on with the shards that it began with
        data = open_run_data(
            options.store,
            str(span),
            variable="BLOCK",
            head=options.head,
            partial=True,
            run=run,
            device=torch.device("cpu"),
        )[0]
    config = make_config(data, 1, options.recipe, options.steps, _seed(options, span))
    training = Training(config=config, data=data, run=run, open_data=lambda _: data)
    run.is_of(training.identity)
    return training


def _seed(options: TrainingOptions, span: Span) -> int:
    if options.replica is not None:
        return published_run([span], options.replica, stage=1).seed
    return options.seed or 0


def _location(options: TrainingOptions, span: Span) -> str:
    seed = _seed(options, span)
    if not options.run:
        return default_run(options.store, str(span), seed)
    return f"{options.run.rstrip('/')}/{span}-seed{seed}"


def _span_run(typed: AllSpans, span: Span, training: Training) -> SpanRun:
    """What trains one span by itself."""
    options = typed.options
    values: dict[str, Any] = {
        "block": span,
        "store": absolute(options.store),
        "run": absolute(training.run.location),
        "recipe": training.config.recipe,
        "steps": options.steps,
        "seed": training.config.seed,
        "head": absolute(options.head) if options.head else None,
        "micro-batch": typed.place.micro_batch,
        "workers": typed.place.workers,
        "endpoint-url": options.endpoint_url,
    }
    arguments = [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]
    return SpanRun(
        name=str(span),
        run=training.run,
        n_steps=training.config.n_steps,
        arguments=("train", *arguments, *(["--partial"] if options.partial else [])),
    )


def _train(typed: AllSpans, runs: Sequence[SpanRun], trainings: Sequence[Training]) -> list[Outcome]:
    with ExitStack() as stack:
        launch, at_once = (_on_cluster if typed.place.ray_address else _here)(typed, trainings, stack)
        progress = stack.enter_context(
            Progress(
                total=sum(run.n_steps for run in runs),
                done=sum(run.run.saved_step() for run in runs),
                unit="steps",
                label=f"train {len(runs)} blocks",
            )
        )
        stop = stack.enter_context(stop_on_signals())
        return train_side_by_side(runs, launch, at_once=at_once, progress=progress, stop=stop)


def _here(typed: AllSpans, trainings: Sequence[Training], stack: ExitStack) -> tuple[Launch, int]:
    """As processes of this machine."""
    place, dim = typed.place, trainings[0].data.train.spec.dim
    needs = [
        training_memory_nbytes(one.config, one.data.train, one.data.validation, place.micro_batch) for one in trainings
    ]
    n_workers = place.workers or 1
    room = find_room(needs, dim, device=place.device, threads=place.threads, at_once=typed.at_once, workers=n_workers)
    say(f"{len(trainings)} blocks to train, {room.at_once} at a time ({room.why})")
    options = typed.options
    is_local = options.run and "://" not in options.run
    logs = Path(options.run if is_local else f"{DEFAULT_RUNS}/{store_name(options.store)}")

    def launch(run: SpanRun, slot: int) -> Process:
        device = room.devices[slot] if place.workers is None else place.device  # Ray gives its workers theirs
        arguments = [*run.arguments, *(["--device", device] if device else [])]
        if room.threads is not None:
            arguments += ["--threads", str(room.threads)]
        environment = process_environment(ray=False)
        if room.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = room.gpus[slot]
        return Process(arguments, logs / f"{run.run.location.rpartition('/')[2]}.log", environment)

    return launch, room.at_once


def _on_cluster(typed: AllSpans, trainings: Sequence[Training], stack: ExitStack) -> tuple[Launch, int]:
    """As tasks of a Ray cluster."""
    from trainer.spans_ray import Task, room_of_cluster

    place, dim = typed.place, trainings[0].data.train.spec.dim
    connection = stack.enter_context(connected(place.ray_address))
    say(str(connection))
    room = room_of_cluster(place.device, place.threads or torch_threads(dim), place.workers)
    at_once = min(typed.at_once or room.at_once or len(trainings), len(trainings))
    say(f"{len(trainings)} blocks to train, {at_once} at a time ({room.why})")
    if trainings[0].run.local_folder is not None:
        say(
            f"RUN is a local folder: every machine of the cluster must see {os.path.dirname(trainings[0].run.location)}"
        )

    def launch(run: SpanRun, slot: int) -> Task:
        arguments = (*run.arguments, *room.arguments, *(["--ray-address", connection.address] if place.workers else []))
        return Task(dataclasses.replace(run, arguments=arguments), room.resources, shared_environment())

    return launch, at_once


def _report(typed: AllSpans, blocks: str, trainings: dict[Span, Training], outcomes: Sequence[Outcome]) -> int:
    ended = {outcome.name: outcome for outcome in outcomes}
    results = [(str(span), ended.get(str(span)), one.run, one.run.read_result()) for span, one in trainings.items()]
    print(spans_report(results, trainings[next(iter(trainings))].data))
    if any(outcome.ended == "stopped" for outcome in outcomes):
        print("stopped; everything is saved. The same command goes on", file=sys.stderr)
        return ExitCode.INTERRUPTED
    if failed := [outcome for outcome in outcomes if outcome.ended == "failed"]:
        for outcome in failed:
            say(f"block {outcome.name} was given up after {outcome.n_attempts} attempts. It said:\n{outcome.words}")
        say("once that is mended, the same command goes on; what is finished is not done again")
        return ExitCode.PROBLEMS
    options = typed.options
    common = options.typed("STORE", "SEED", "REPLICA", "HEAD", "PARTIAL", "DEVICE", "ENDPOINT_URL")
    if list(span_problems(parse_spans(blocks))):
        print(f"\nnext        {make_command('table', {})}")
        return ExitCode.OK
    if options.run:
        spans, replica = parse_spans(blocks), options.replica
        seed = published_run(spans, replica, stage=2).seed if replica else options.seed or 0
        common["RUN"] = f"{options.run.rstrip('/')}/{raptor_name(blocks)}-seed{seed}"
    print(f"\nnext        {make_command('raptor', {'BLOCKS': blocks, **common})}")
    return ExitCode.OK

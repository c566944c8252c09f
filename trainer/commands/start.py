"""What the commands that train share: the run's place and config, the claim on it, the loop, what is printed."""

import os
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial as bind
from pathlib import PurePath
from typing import Any, TypeVar

import torch
from torch import Tensor

from infra.cluster import cluster_address, connected
from infra.console import ExitCode, UserError, human_duration, say, stop_on_signals
from infra.objects import open_objects
from trainer.claim import claimed
from trainer.config import TrainConfig
from trainer.data import TrainingData, frozen_shards, open_training_data
from trainer.machine import Machine, torch_threads
from trainer.raptor_teacher import save_ends
from trainer.recipes import RECIPES, recipe_for
from trainer.report import finished_report, start_report
from trainer.run_files import RunFiles
from trainer.run_lock import StillOurs
from trainer.train import train
from trainer.workers import Workers

_T = TypeVar("_T")

DEFAULT_STORE = "data/stores/digits"
DEFAULT_RUNS = "data/runs"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a training is to run, as typed. None of it changes what is learned beyond rounding.

    Attributes:
        device: None: the GPU if there is one.
        threads: Of torch on a CPU; None: by the size of the blocks.
        micro_batch: Most samples of one forward and backward pass; None cuts no batch.
        workers: Processes of Ray Train; None: this process, without Ray.
        ray_address: Of the cluster; None: Ray in this machine.
    """

    device: str | None = None
    threads: int | None = None
    micro_batch: int | None = None
    workers: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name.upper()}={value}: expected 1 or more"
            for name in ("threads", "micro_batch", "workers")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if problems:
            raise UserError("\n".join(problems))

    @classmethod
    def typed(
        cls,
        device: str | None,
        threads: int | None,
        micro_batch: int | None,
        workers: int | None,
        ray_address: str | None,
    ) -> "Place":
        """With the cluster of RAY_ADDRESS, if there is one: a training then goes there, with one worker if not more.

        Raises:
            UserError: A number is below 1.
        """
        address = cluster_address(ray_address)
        return cls(
            device=device,
            threads=threads,
            micro_batch=micro_batch,
            workers=1 if workers is None and address is not None else workers,
            ray_address=address,
        )

    def machine(self) -> Machine:
        """This process's own; of several that torchrun has started, each has its own GPU.

        Where workers of Ray train, this process only looks at the data, on the CPU: `device` is theirs.

        Raises:
            UserError: There is no such device here.
        """
        device = self.device if self.workers is None else "cpu"
        return Machine.found(device, micro_batch=self.micro_batch, local_rank=Workers.found().local_rank)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, ready to begin or to go on.

    Attributes:
        config: What to do.
        data: What to read.
        open_data: Opens the same data on a device, maybe in another process.
        run: Where it goes.
        initial: Weights to begin with; None draws them from the seed.
        blocks: What these weights are, for the run's identity; empty for stage 1.
    """

    config: TrainConfig
    data: TrainingData
    open_data: Callable[[torch.device], TrainingData]
    run: RunFiles
    initial: Mapping[str, Tensor] | None = None
    blocks: Sequence[Mapping[str, Any]] = field(default=())

    @property
    def identity(self) -> dict[str, Any]:
        """What the RUN is claimed for."""
        joint = {"blocks": list(self.blocks)} if self.blocks else {}
        return {"train": self.config.to_json(), "data": self.data.identity, **joint}


def store_name(store: str) -> str:
    """The last part of a store's place; one called train or val is named with its folder."""
    path = PurePath(os.path.normpath(store))
    return f"{path.parent.name}-{path.name}" if path.name in ("train", "val") and path.parent.name else path.name


def default_run(store: str, name: str, seed: int) -> str:
    """data/runs/<store>/<name>-seed<seed>; the name of a block's run is its span."""
    return f"{DEFAULT_RUNS}/{store_name(store)}/{name.strip()}-seed{seed}"


def raptor_name(blocks: str) -> str:
    """raptor-0-7-10-12 for 0-7,7-10,10-12: by its borders."""
    spans = blocks.split(",")
    return "-".join(["raptor", *(span.partition("-")[0] for span in spans), spans[-1].partition("-")[2]])


def open_run(location: str) -> RunFiles:
    """A RUN that may be written, or is finished.

    Raises:
        UserError: No such place can be opened, or nothing may be written there.
    """
    try:
        run = RunFiles(open_objects(location))
    except UserError as error:
        raise UserError(f"RUN={error}") from error
    if run.read_result() is None:
        run.check_writable()
    return run


def open_run_data(
    store: str,
    blocks: str,
    *,
    variable: str,
    joined: bool = True,
    head: str | None,
    partial: bool,
    run: RunFiles | None,
    device: torch.device,
    known_problems: Sequence[str] = (),
) -> tuple[TrainingData, Callable[[torch.device], TrainingData]]:
    """What a run reads, and a function that opens it again in another process, with the same shards.

    Args:
        store: As typed, as are blocks, head and partial.
        blocks: One span or several.
        variable: Which of BLOCK and BLOCKS.
        joined: Whether the spans are trained together.
        head: File of a linear classifier.
        partial: Whether the store may be unfinished.
        run: Where it goes; one that began before goes on with its own shards. None: there is none yet.
        device: Of the teacher.
        known_problems: What is wrong with the command already, to be listed too.

    Raises:
        UserError: Lists all that is wrong with the command, the store and the blocks.
    """
    settings: dict[str, Any] = {"variable": variable, "joined": joined, "head": head, "partial": partial}
    begun = run.read_config() if partial and run is not None else None
    frozen = frozen_shards(begun["data"]) if begun else None
    data = open_training_data(store, blocks, **settings, frozen=frozen, device=device, known_problems=known_problems)
    settings |= {"head": absolute(head) if head else None, "frozen": frozen_shards(data.identity)}
    return data, bind(_open_on, absolute(store), blocks, settings)


def _open_on(store: str, blocks: str, settings: Mapping[str, Any], device: torch.device) -> TrainingData:
    return open_training_data(store, blocks, **settings, device=device)


def absolute(location: str) -> str:
    """A place that means the same in another process: a local path in full."""
    return location if "://" in location else os.path.abspath(location)


def typed_problems(stage: int, recipe: str, steps: int | None, seed: int | None) -> list[str]:
    """What is wrong with RECIPE, STEPS and SEED, whatever the store is: to be listed with what is wrong with that."""
    problems = []
    if recipe and recipe not in RECIPES[stage]:
        problems.append(f"RECIPE={recipe} is unknown; for stage {stage} there are {', '.join(RECIPES[stage])}")
    if steps is not None and steps < 1:
        problems.append(f"STEPS={steps}: expected 1 or more")
    if seed is not None and seed < 0:
        problems.append(f"SEED={seed}: expected 0 or more")
    return problems


def or_problem(find: Callable[[], _T], problems: list[str]) -> _T | None:
    """What `find` returns; None if something typed is wrong, which is added to the problems."""
    try:
        return find()
    except UserError as error:
        problems.append(str(error))
        return None


def make_config(data: TrainingData, stage: int, recipe: str, steps: int | None, seed: int) -> TrainConfig:
    """The config of a recipe for a store; an empty recipe is the one that fits it.

    Raises:
        UserError: There is no such recipe for this stage, or the numbers do not fit.
    """
    spec = data.train.spec
    name = recipe or recipe_for(spec, stage)
    if name not in RECIPES[stage]:
        raise UserError(f"RECIPE={name} is unknown; for stage {stage} there are {', '.join(RECIPES[stage])}")
    last_layer = data.teacher.n_layers - 1 if data.teacher is not None else data.train.layers[-1]
    chosen = {} if steps is None else {"n_steps": steps}
    spans = data.span if stage == 1 else data.spans
    return RECIPES[stage][name](spans, spec, last_layer, seed=seed, **chosen)


def typed_variables(**typed: object) -> dict[str, str]:
    """Of what was typed, what the next command needs again: no defaults, no empty values."""
    return {name: str(value) for name, value in typed.items() if value}


def make_command(target: str, variables: Mapping[str, object]) -> str:
    """A line that can be typed; variables without a value are left out."""
    typed = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items() if value not in (None, "")]
    return " ".join(["make", target, *typed])


def train_and_report(
    training: Training,
    place: Place,
    variables: Mapping[str, str],
    *,
    began: float,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Claim the RUN, train it to the end and say what came out; of a finished run, only the latter.

    Args:
        training: What to train.
        place: Where.
        variables: What the person typed and the next command needs again.
        began: When the command did, by time.monotonic().
        stop: Asks to stop, beside signals.

    Returns:
        An ExitCode.
    """
    workers = Workers.found()
    if place.workers is not None and not workers.is_alone:
        raise UserError(f"this is {workers}, as torchrun started it: leave WORKERS and RAY_ADDRESS out")
    if not training.run.is_of(training.identity) or training.run.read_result() is None:
        machine = place.machine()
        with workers.joined(machine.device), claimed(training.run, training.identity, workers) as still_ours:
            if not _train(training, place, machine, workers, _any(stop, still_ours)):
                return ExitCode.INTERRUPTED
        done = f"This command took {human_duration(time.monotonic() - began)}."
    else:
        if not training.run.read_teacher_files():  # of a run that an earlier version finished
            save_ends(training.run, training.data.teacher)
        done = (
            f"This run is finished; there is nothing to do. For another one give RUN, or delete {training.run.location}"
        )
    if not workers.is_first:
        return ExitCode.OK
    result = training.run.read_result()
    assert result is not None
    print(finished_report(training.config, training.data, training.run, result, variables))
    print(f"\n{done}")
    return ExitCode.OK


def _train(training: Training, place: Place, machine: Machine, workers: Workers, stop: Callable[[], bool]) -> bool:
    """Train to the end; False if it was asked to stop before."""
    if workers.is_first:
        say(start_report(training.config, training.data, training.run, machine))
    if place.workers is None:
        torch.set_num_threads(place.threads or torch_threads(training.data.train.spec.dim, workers.local_world_size))
        with stop_on_signals() as signalled:
            result = train(
                training.config,
                training.data,
                training.run,
                machine=machine,
                workers=workers,
                initial=training.initial,
                stop=lambda: stop() or signalled(),
            )
        finished = result is not None
    else:
        finished = _train_on_ray(training, place, place.workers, stop)
    if not finished and workers.is_first:
        say(f"stopped; everything is saved in {training.run.location}. The same command goes on")
    return finished


def _train_on_ray(training: Training, place: Place, n_workers: int, stop: Callable[[], bool]) -> bool:
    from trainer.ray_train import train_on_ray

    with connected(place.ray_address) as connection:
        say(str(connection))
        with stop_on_signals() as signalled:
            return train_on_ray(
                training.config,
                training.open_data,
                absolute(training.run.location),
                n_workers=n_workers,
                device=place.device,
                threads=place.threads,
                micro_batch=place.micro_batch,
                initial=training.initial,
                grows=not connection.embedded,
                stop=lambda: stop() or signalled(),
            )


def _any(stop: Callable[[], bool], still_ours: StillOurs) -> Callable[[], bool]:
    def asked() -> bool:
        still_ours()
        return stop()

    return asked


def stdin_ended() -> Callable[[], bool]:
    """Tells whether standard input has ended, as it does when the program that holds its other end dies."""
    ended = threading.Event()

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when Python ends
            pass
        ended.set()

    threading.Thread(target=wait, name="stdin", daemon=True).start()
    return ended.is_set

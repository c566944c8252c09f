"""What the commands that train share: what is typed, opened and checked before anything is trained."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial as bind
from pathlib import PurePath
from typing import Any, TypeVar

import torch
from torch import Tensor

from infra.console import UserError
from infra.objects import open_objects
from trainer.config import TrainConfig
from trainer.data import TrainingData, frozen_shards, open_training_data
from trainer.machine import Machine
from trainer.recipes import RECIPES, recipe_for
from trainer.run_files import RunFiles
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
    blocks: str | None,
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
        blocks: One span or several; None: what was typed is none, as the known problems say.
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


def open_for_training(
    location: str,
    place: Place,
    store: str,
    blocks: str | None,
    typed: Mapping[str, Any],
    known_problems: Sequence[str],
) -> tuple[RunFiles, TrainingData, Callable[[torch.device], TrainingData]]:
    """The RUN, and what it reads, on the device of this process.

    Args:
        location: Of the RUN.
        place: Where it is to be trained.
        store: As typed, as are the blocks.
        blocks: As for `open_run_data`.
        typed: variable, head and partial of `open_run_data`.
        known_problems: What is wrong with the command already.

    Raises:
        UserError: Lists all that is wrong with the command, the RUN, the device, the store and the blocks.
    """
    problems = list(known_problems)
    run, machine = or_problem(lambda: open_run(location), problems), or_problem(place.machine, problems)
    device = torch.device("cpu") if machine is None else machine.device
    data, open_again = open_run_data(store, blocks, **typed, run=run, device=device, known_problems=problems)
    assert run is not None, "its problem was listed"
    return run, data, open_again


def _open_on(store: str, blocks: str | None, settings: Mapping[str, Any], device: torch.device) -> TrainingData:
    return open_training_data(store, blocks, **settings, device=device)


def absolute(location: str) -> str:
    """A place that means the same in another process: a local path in full."""
    return location if "://" in location else os.path.abspath(location)


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


def make_command(target: str, variables: Mapping[str, object]) -> str:
    """A line that can be typed; variables without a value are left out."""
    typed = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items() if value not in (None, "")]
    return " ".join(["make", target, *typed])

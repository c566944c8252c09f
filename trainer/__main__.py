"""`python -m trainer`: the door to training. It puts together what was typed, recipe, data, run, loop and report."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path, PurePath

import torch
import tyro

from infra.console import ExitCode, JobError, UserError, human_duration, run_door, stop_on_signals
from infra.objects import ObjectError, Objects, open_objects
from infra.s3_settings import use_endpoint
from storage_schemas.errors import StoreError
from trainer.config import TrainConfig
from trainer.data import TrainingData, frozen_shards, open_training_data
from trainer.machine import Machine, torch_threads
from trainer.recipes import RECIPES, recipe_for
from trainer.report import finished_report, start_report
from trainer.run_files import RunFiles
from trainer.run_lock import StillOurs
from trainer.train import train

DEFAULT_STORE = "data/stores/digits"
DEFAULT_RUNS = "data/runs"
DEFAULT_TEACHER = "data/teachers/digits_vit"


def train_command(
    *,
    block: str = "",
    store: str = DEFAULT_STORE,
    run: str = "",
    recipe: str = "",
    steps: int | None = None,
    seed: int = 0,
    head: str | None = None,
    partial: bool = False,
    device: str | None = None,
    threads: int | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Train one block of a Raptor on the states of a span (stage 1). The same command again resumes.

    Args:
        block: Span a-b: the block takes state a and produces states a+1 to b. For example 0-7.
        store: A store, or a folder with the stores train and val; local or s3://bucket/prefix.
        run: Folder or s3://bucket/prefix for checkpoints, metrics and weights; empty:
            data/runs/<store>/<block>-seed<seed>.
        recipe: digits_stage1 or imagenet_stage1; empty: the one that fits the store's teacher.
        steps: Optimizer steps; warm-up and teacher forcing scale with them. None: the recipe's own number.
        seed: Of initial weights, order of samples and noise.
        head: File with a linear classifier of 2 dim values, in the place of the teacher's own, for accuracy.
        partial: Train on an unfinished store, with the shards that it has now.
        device: For example cpu or cuda:0. None: the GPU if there is one.
        threads: Of torch on a CPU; a run is repeated bit for bit with the same number. None: one for blocks of fewer
            than 256 channels, else one per core.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    began = time.monotonic()
    machine = Machine.found(device)
    if threads is not None and threads < 1:
        raise UserError(f"THREADS={threads}: expected 1 or more")
    location = run or default_run(store, block, seed)
    run_files = RunFiles(_open_run(location))
    if run_files.read_result() is None:
        run_files.check_writable()
    data = open_training_data(
        store,
        block,
        head=head,
        partial=partial,
        frozen=_frozen_shards(run_files) if partial else None,
        device=machine.device,
    )
    config = make_config(data, recipe, steps, seed)
    torch.set_num_threads(threads or torch_threads(data.train.spec.dim))
    typed = {
        "STORE": store if store != DEFAULT_STORE else "",
        "HEAD": head,
        "RECIPE": recipe,
        "SEED": seed or "",
        "PARTIAL": "1" if partial else "",
        "DEVICE": device,
        "ENDPOINT_URL": endpoint_url,
    }
    variables = {name: str(value) for name, value in typed.items() if value}
    identity = {"train": config.to_json(), "data": data.identity}
    if not run_files.is_of(identity) or run_files.read_result() is None:
        with run_files.exclusive() as still_ours:
            run_files.claim(identity)
            if not _train(config, data, run_files, machine, still_ours):
                return ExitCode.INTERRUPTED
        done = f"This command took {human_duration(time.monotonic() - began)}."
    else:
        done = f"This run is finished; there is nothing to do. For another one give RUN, or delete {location}"
    result = run_files.read_result()
    assert result is not None
    print(finished_report(config, data, run_files, result, variables))
    print(f"\n{done}")
    return ExitCode.OK


def _train(config: TrainConfig, data: TrainingData, run: RunFiles, machine: Machine, still_ours: StillOurs) -> bool:
    """Train to the end; False if a signal asked to stop before it."""
    print(start_report(config, data, run, machine), file=sys.stderr)
    with stop_on_signals() as signalled:

        def stop() -> bool:
            still_ours()
            return signalled()

        finished = train(config, data, run, machine=machine, stop=stop) is not None
    if not finished:
        print(f"stopped; everything is saved in {run.location}. The same command goes on", file=sys.stderr)
    return finished


def teacher_command(*, out: str = DEFAULT_TEACHER, seed: int = 0) -> int:
    """Train digits_vit, the small teacher that ships with the project: some minutes on two cores.

    Args:
        out: Folder for the weights and the head; pipeline/weights replaces the teacher that ships.
        seed: Of initial weights, order and augmentation.
    """
    from trainer.digits_teacher import DigitsTeacherConfig, save_digits_teacher, train_digits_teacher

    result = train_digits_teacher(DigitsTeacherConfig(seed=seed))
    weights, head = save_digits_teacher(result, Path(out))
    print(f"held-out top-1 {result.val_accuracy:.2%}; weights {weights}, head {head}")
    print(f"next  make extract TEACHER=digits_vit WEIGHTS={weights} HEAD={head} STORE=data/stores/digits-seed{seed}")
    return ExitCode.OK


def make_config(data: TrainingData, recipe: str, steps: int | None, seed: int) -> TrainConfig:
    """The config of a recipe for a store; an empty recipe is the one that fits it.

    Raises:
        UserError: There is no such recipe, or the numbers do not fit.
    """
    spec = data.train.spec
    name = recipe or recipe_for(spec)
    if name not in RECIPES:
        raise UserError(f"RECIPE={name} is unknown; there are {', '.join(RECIPES)}")
    last_layer = data.teacher.n_layers - 1 if data.teacher is not None else data.train.layers[-1]
    chosen = {} if steps is None else {"n_steps": steps}
    return RECIPES[name](data.span, spec, last_layer, seed=seed, **chosen)


def default_run(store: str, block: str, seed: int) -> str:
    """data/runs/<store>/<block>-seed<seed>; a store called train or val is named with its folder."""
    path = PurePath(os.path.normpath(store))
    name = f"{path.parent.name}-{path.name}" if path.name in ("train", "val") and path.parent.name else path.name
    return f"{DEFAULT_RUNS}/{name}/{block.strip()}-seed{seed}"


def _open_run(location: str) -> Objects:
    try:
        return open_objects(location)
    except UserError as error:
        raise UserError(f"RUN={error}") from error


def _frozen_shards(run: RunFiles) -> dict[str, list[int]]:
    """The shards that an earlier start of this run found, so that it goes on with the same."""
    config = run.read_config()
    return {} if config is None else frozen_shards(config["data"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, or the given arguments, and do it."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"train": train_command, "teacher": teacher_command},
            prog="python -m trainer",
            args=arguments,
            description="Train Raptors on the states in a store, and the teacher of the built-in digits.",
        )
    except (StoreError, ObjectError) as error:
        raise JobError(f"{error}\nOnce that is mended, the same command goes on from the last checkpoint") from error


if __name__ == "__main__":
    sys.exit(run_door(main))

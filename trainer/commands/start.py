"""What the commands that train share: the run's place and config, the claim on it, the loop, what is printed."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import PurePath

from torch import Tensor

from infra.console import ExitCode, UserError, human_duration, stop_on_signals
from infra.objects import Objects, open_objects
from trainer.config import TrainConfig
from trainer.data import TrainingData, frozen_shards
from trainer.machine import Machine
from trainer.recipes import RECIPES, recipe_for
from trainer.report import finished_report, start_report
from trainer.run_files import RunFiles
from trainer.run_lock import StillOurs
from trainer.train import train

DEFAULT_STORE = "data/stores/digits"
DEFAULT_RUNS = "data/runs"


def default_run(store: str, block: str, seed: int) -> str:
    """data/runs/<store>/<block>-seed<seed>; a store called train or val is named with its folder."""
    path = PurePath(os.path.normpath(store))
    name = f"{path.parent.name}-{path.name}" if path.name in ("train", "val") and path.parent.name else path.name
    return f"{DEFAULT_RUNS}/{name}/{block.strip()}-seed{seed}"


def open_run(location: str) -> Objects:
    """The objects of a RUN.

    Raises:
        UserError: No such place can be opened.
    """
    try:
        return open_objects(location)
    except UserError as error:
        raise UserError(f"RUN={error}") from error


def shards_of(run: RunFiles) -> dict[str, list[int]]:
    """The shards that an earlier start of this run found, so that it goes on with the same."""
    config = run.read_config()
    return {} if config is None else frozen_shards(config["data"])


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


def train_and_report(
    config: TrainConfig,
    data: TrainingData,
    run: RunFiles,
    machine: Machine,
    variables: Mapping[str, str],
    *,
    initial: Mapping[str, Tensor] | None = None,
    began: float,
) -> int:
    """Claim the RUN, train it to the end and say what came out; of a finished run, only the latter.

    Args:
        config: What to do.
        data: What to read.
        run: Where it goes.
        machine: Where to compute.
        variables: What the person typed and the next command needs again.
        initial: Weights to begin with.
        began: When the command did, by time.monotonic().

    Returns:
        An ExitCode.
    """
    identity = {"train": config.to_json(), "data": data.identity}
    if not run.is_of(identity) or run.read_result() is None:
        with run.exclusive() as still_ours:
            run.claim(identity)
            if not _train(config, data, run, machine, initial, still_ours):
                return ExitCode.INTERRUPTED
        done = f"This command took {human_duration(time.monotonic() - began)}."
    else:
        done = f"This run is finished; there is nothing to do. For another one give RUN, or delete {run.location}"
    result = run.read_result()
    assert result is not None
    print(finished_report(config, data, run, result, variables))
    print(f"\n{done}")
    return ExitCode.OK


def _train(
    config: TrainConfig,
    data: TrainingData,
    run: RunFiles,
    machine: Machine,
    initial: Mapping[str, Tensor] | None,
    still_ours: StillOurs,
) -> bool:
    """Train to the end; False if a signal asked to stop before it."""
    print(start_report(config, data, run, machine), file=sys.stderr)
    with stop_on_signals() as signalled:

        def stop() -> bool:
            still_ours()
            return signalled()

        finished = train(config, data, run, machine=machine, initial=initial, stop=stop) is not None
    if not finished:
        print(f"stopped; everything is saved in {run.location}. The same command goes on", file=sys.stderr)
    return finished

"""What storing states in fewer bits does to what is learned from them: paired trainings on the built-in digits.

The same block, seed and order of samples, trained from stores that differ in precision alone, and judged on the same
float32 states. An hour on two cores; interrupted, the same command goes on.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from infra.console import say
from infra.objects import FolderObjects
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.run_config import RunConfig
from storage_schemas.spec import PRECISIONS
from trainer.config import TrainConfig
from trainer.data import open_training_data
from trainer.judge import validation_lanes
from trainer.machine import Machine, torch_threads
from trainer.recipes import digits_stage1
from trainer.run_files import RunFiles
from trainer.train import make_loss, make_model, train
from trainer.validation import ALL_TOKENS, Validation, ValidationSet, validate

REFERENCE = "float32"
_DIM = 64  # of digits_vit
DEFAULT_FOLDER = Path("data/fidelity")
NOTES = (
    "Each row is one training of a block, recipe digits_stage1, from a store of that precision. Trainings of one seed "
    "share initial weights and order of samples. All are validated on the same float32 states of the 359 held-out "
    "digits, rolled out over the span; `own store` is the same measure on the val split of the training's own store.",
    "R2 is over all tokens, mean over the layers of the span. Differences are from the float32 training of the seed. "
    "The goals are about means over seeds: one image is 0.28 points, and two trainings whose inputs differ in the last "
    "bit drift apart as chaotic systems do, so that single differences have a noise of their own.",
)


@dataclass(frozen=True, kw_only=True)
class FidelityBenchmark:
    """Sizes of this benchmark.

    Attributes:
        block: Span to train.
        precisions: Of the stores.
        seeds: One training of each precision for each.
        n_steps: Of each training; None is the recipe's.
        limit: Images of each split; None is all.
    """

    block: str = "0-7"
    precisions: tuple[str, ...] = PRECISIONS
    seeds: tuple[int, ...] = (0, 1, 2)
    n_steps: int | None = None
    limit: int | None = None


QUICK = FidelityBenchmark(block="0-2", precisions=("float32", "int8"), seeds=(0,), n_steps=2, limit=64)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One training and what came of it.

    Attributes:
        precision: Of its store.
        seed: Of the run.
        found: On float32 states.
        own: On its own store's.
    """

    precision: str
    seed: int
    found: Validation
    own: Mapping[str, Any]

    @property
    def r2(self) -> float:
        return fmean(self.found.r2[ALL_TOKENS])

    @property
    def accuracy(self) -> float:
        assert self.found.accuracy is not None, "the digits' teacher has a head"
        return self.found.accuracy


def run(config: FidelityBenchmark, folder: Path | None = None, *, n_steps: int | None = None) -> Result:
    """Extract, train, judge, compare; what `folder` holds already is not done again.

    Args:
        config: Sizes.
        folder: For stores and runs, half a gigabyte; None is a temporary one.
        n_steps: In the place of the config's.
    """
    temporary = tempfile.TemporaryDirectory(prefix="bench-fidelity-") if folder is None else nullcontext(folder)
    with temporary as place, _few_threads():
        for precision in config.precisions:
            _extract(config, Path(place), precision)
        trained = [
            _train(config, Path(place), precision, seed, n_steps or config.n_steps)
            for seed in config.seeds
            for precision in config.precisions
        ]
    return _result(config, trained)


@contextmanager
def _few_threads() -> Iterator[None]:
    """As the door of the trainer sets them for a block so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads(_DIM))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _extract(config: FidelityBenchmark, place: Path, precision: str) -> None:
    extract(
        ExtractConfig(images="digits", store=_store(place, precision), precision=precision, limit=config.limit),
        RunConfig(no_ray=True, device="cpu"),
    )


def _store(place: Path, precision: str) -> str:
    return str(place / "stores" / precision)


def _train(config: FidelityBenchmark, place: Path, precision: str, seed: int, n_steps: int | None) -> Trained:
    """Train, or take what an earlier start has trained, and judge."""
    say(f"block {config.block} from {precision}, seed {seed}")
    machine = Machine.found("cpu")
    data = open_training_data(_store(place, precision), config.block)
    last_layer = data.train.layers[-1]
    recipe = digits_stage1(
        data.span, data.train.spec, last_layer, seed=seed, **({} if n_steps is None else {"n_steps": n_steps})
    )
    files = RunFiles(FolderObjects(place / "runs" / f"{config.block}-{precision}-seed{seed}"))
    with files.exclusive():
        files.claim({"train": recipe.to_json(), "data": data.identity})
        if files.read_result() is None:
            train(recipe, data, files, machine=machine)
    result = files.read_result()
    assert result is not None
    return Trained(
        precision=precision,
        seed=seed,
        found=_judge(recipe, files, _store(place, REFERENCE), config.block, machine),
        own=result["validation"],
    )


def _judge(recipe: TrainConfig, files: RunFiles, store: str, block: str, machine: Machine) -> Validation:
    """What a finished run makes of the val split of another store."""
    data = open_training_data(store, block)
    model = make_model(recipe, data.train.spec)
    model.load_state_dict(files.read_weights())
    truth = ValidationSet(
        store=data.validation, teacher=data.teacher, batch_size=recipe.batch_size, lanes=validation_lanes(recipe)
    )
    return validate(model, truth, data.span, make_loss(recipe, data.train.spec), machine=machine)


def _result(config: FidelityBenchmark, trained: Sequence[Trained]) -> Result:
    reference = {one.seed: one for one in trained if one.precision == REFERENCE}
    rows: list[dict[str, Cell]] = [
        {
            "precision": one.precision,
            "seed": one.seed,
            "R2": f"{one.r2:.5f}",
            "difference": f"{one.r2 - reference[one.seed].r2:+.5f}",
            "R2 of the last layer": f"{one.found.r2[ALL_TOKENS][-1]:.5f}",
            "accuracy, %": f"{100 * one.accuracy:.2f}",
            "difference, points": f"{100 * (one.accuracy - reference[one.seed].accuracy):+.2f}",
            "R2, own store": f"{fmean(one.own['r2'][ALL_TOKENS]):.5f}",
            "accuracy, own store, %": f"{100 * one.own['accuracy']:.2f}",
        }
        for one in sorted(trained, key=lambda one: (PRECISIONS.index(one.precision), one.seed))
    ]
    goals = []
    for precision in [p for p in config.precisions if p != REFERENCE]:
        pairs = [(one, reference[one.seed]) for one in trained if one.precision == precision]
        r2 = abs(fmean(one.r2 - other.r2 for one, other in pairs))
        points = 100 * abs(fmean(one.accuracy - other.accuracy for one, other in pairs))
        goals += [
            Goal(what=f"{precision} against float32, mean difference of R2", found=r2, at_most=0.002),
            Goal(what=f"{precision} against float32, mean difference of accuracy, points", found=points, at_most=0.5),
        ]
    return Result(
        name="fidelity",
        title=f"Block {config.block} of digits_vit trained from stores of several precisions",
        machine=this_machine(),
        settings=asdict(config),
        rows=rows,
        goals=goals,
        notes=NOTES,
        details={
            "trained": [
                {"precision": one.precision, "seed": one.seed, "found": one.found.to_json(), "own": one.own}
                for one in trained
            ]
        },
    )

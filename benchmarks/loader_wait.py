"""How long a training waits for its samples when a step takes 40 ms: the real loop, whose arithmetic is a sleep.

The share of waiting is the one that the progress bar of `make train` shows as `loader_wait`.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import psutil
import torch
from jaxtyping import Float

from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from benchmarks.stream_data import make_spec, planted_states
from infra.objects import FolderObjects, MemoryObjects
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.run_config import RunConfig
from storage_schemas import Span
from storage_schemas.from_arrays import write_store
from storage_schemas.samples import Sample
from trainer import train as loop
from trainer.config import TrainConfig
from trainer.data import TrainingData, first_samples, open_training_data
from trainer.feed import Share
from trainer.gradient import Gradient
from trainer.machine import Machine, torch_threads
from trainer.recipes import RECIPES, recipe_for
from trainer.run_files import RunFiles
from trainer.stream import LayerSliceStream

SPAN = Span(7, 10)
IN_TRAINING, ALONE = "training loop", "stream alone"

NOTES = (
    "Training loop: the loop of `make train` as it is, with metrics, checkpoints and progress bar; but its forward and "
    "backward pass is a sleep. Waiting is its own counter, `loader_wait`, which the bar shows and metrics.jsonl keeps: "
    "the share of the time in which the loop stood still for samples. The goal is for the mean, which holds the start "
    "of the run: a chunk for each lane is read before its first step, which is most of the worst line. Passes follow "
    "each other without such a wait: one over the store of ViT-B/14's size is 64 steps, one over the digits 23, one "
    "over ImageNet 20,000.",
    "On a CPU the loop itself widens a batch to float32 before its step. That is not waiting, but it gives the stream "
    "more time for a batch than the step has. A GPU widens it there, beside its step; `stream alone` is that, and the "
    "harder of the two: nothing but the sleep between one batch and the next.",
    "CPU ms a step: of all threads of this process; the sleep costs none, and two cores have 80 ms for it. Others: the "
    "part of all cores that other processes had meanwhile. Files are in the page cache.",
)


@dataclass(frozen=True, kw_only=True)
class LoaderWaitBenchmark:
    """Sizes of this benchmark.

    Attributes:
        n_samples: Of the store of random states.
        span: States that are read.
        batch_size: Samples a step.
        step_s: What a step takes.
        n_steps: Of each measurement.
        log_every: Steps of one line of metrics.
        digits: Images of the digits' store; None is all.
        small: A tiny teacher instead of ViT-B/14, to check that everything runs.
    """

    n_samples: int = 4096
    span: Span = SPAN
    batch_size: int = 64
    step_s: float = 0.04
    n_steps: int = 384
    log_every: int = 16
    digits: int | None = None
    small: bool = False


QUICK = LoaderWaitBenchmark(n_samples=96, batch_size=8, step_s=0.002, n_steps=12, log_every=4, digits=60, small=True)
GOAL = 0.05


@dataclass(frozen=True, kw_only=True)
class Waited:
    """What one measurement found.

    Attributes:
        shares: Of the time that was waited, one number per line of metrics.
        samples_per_s: Over all of them.
        cpu_ms: CPU time of this process for each step: what reading costs, whatever else the machine does.
        others: The part of all cores that other processes took.
        load: The machine's load average of one minute, before and after.
    """

    shares: tuple[float, ...]
    samples_per_s: float
    cpu_ms: float
    others: float
    load: tuple[float, float]

    @property
    def mean(self) -> float:
        return fmean(self.shares)

    @property
    def median(self) -> float:
        return median(self.shares)


Loop = Callable[[LoaderWaitBenchmark, TrainingData], tuple[tuple[float, ...], float]]
"""loop(config, data): the share of waiting by line of metrics, and samples per second."""


class Sleep(Gradient):
    """A step that takes its time and computes nothing."""

    step_s = 0.0

    def add(self, share: Share, forcing: float, noise_key: int) -> Float[torch.Tensor, ""]:
        """Take the samples and sleep."""
        assert len(share)
        time.sleep(self.step_s)
        return torch.zeros(())


def run(config: LoaderWaitBenchmark, folder: Path | None = None) -> Result:
    """Make both stores, measure the training loop and the stream alone on each."""
    found: dict[tuple[str, str], Waited] = {}
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="bench-loader-wait-", dir=folder, ignore_cleanup_errors=True) as place:
        stores = {_name(config): _random_store(config, Path(place)), "digits": _digits_store(config, Path(place))}
        try:
            for name, store in stores.items():
                data = open_training_data(store, str(config.span))
                torch.set_num_threads(torch_threads(data.train.spec.dim))  # as make train does
                found[name, IN_TRAINING] = _measured(in_training, config, data)
                found[name, ALONE] = _measured(alone, config, data)
        finally:
            torch.set_num_threads(before)
    return _result(config, found)


def in_training(config: LoaderWaitBenchmark, data: TrainingData) -> tuple[tuple[float, ...], float]:
    """The real loop with a step that sleeps: the share of waiting by line of metrics, and samples per second."""
    run_files = RunFiles(MemoryObjects())
    few = dataclasses.replace(data, validation=first_samples(data.validation, 2), teacher=None)
    sleep = type("SleepOf", (Sleep,), {"step_s": config.step_s})
    with patch.object(loop, "Gradient", sleep):
        loop.train(_recipe(config, data), few, run_files, machine=Machine(device=torch.device("cpu"), compile=False))
    lines = [line for line in run_files.read_metrics(lambda _: None) if "loader_wait" in line]
    seconds = [config.log_every * config.batch_size / line["samples_per_s"] for line in lines]
    return tuple(line["loader_wait"] for line in lines), len(lines) * config.log_every * config.batch_size / sum(
        seconds
    )


def alone(config: LoaderWaitBenchmark, data: TrainingData) -> tuple[tuple[float, ...], float]:
    """The stream with a sleep for each batch, pass after pass: as `in_training`."""
    shares, n_samples, began = [], 0, time.monotonic()
    n_lines = -(-config.n_steps // config.log_every)
    with LayerSliceStream(
        data.train,
        config.span,
        config.batch_size,
        lanes=_recipe(config, data).lanes,
        n_steps=n_lines * config.log_every,
    ) as stream:
        for _ in range(n_lines):
            start, waited = time.monotonic(), stream.waited_s
            for _ in range(config.log_every):
                batch = next(stream, None)
                if batch is None:
                    stream.set_epoch(stream.epoch + 1)
                    batch = next(stream)
                n_samples += len(batch)
                time.sleep(config.step_s)
            shares.append((stream.waited_s - waited) / (time.monotonic() - start))
    return tuple(shares), n_samples / (time.monotonic() - began)


def _recipe(config: LoaderWaitBenchmark, data: TrainingData) -> TrainConfig:
    """The recipe that fits the store, with this benchmark's steps."""
    spec = data.train.spec
    recipe = RECIPES[1][recipe_for(spec)](config.span, spec, data.train.layers[-1], n_steps=config.n_steps)
    return dataclasses.replace(
        recipe,
        batch_size=config.batch_size,
        log_every=config.log_every,
        validate_every=config.n_steps,
        validation_samples=2,
        checkpoint_every=config.n_steps,
    )


def _measured(measure: Loop, config: LoaderWaitBenchmark, data: TrainingData) -> Waited:
    own, busy, began, load = psutil.Process().cpu_times(), _busy_s(), time.monotonic(), psutil.getloadavg()[0]
    shares, samples_per_s = measure(config, data)
    after = psutil.Process().cpu_times()
    own_s = after.user + after.system - own.user - own.system
    others = (_busy_s() - busy - own_s) / ((time.monotonic() - began) * psutil.cpu_count())
    loads = load, psutil.getloadavg()[0]
    return Waited(
        shares=shares,
        samples_per_s=samples_per_s,
        cpu_ms=1000 * own_s / config.n_steps,
        others=max(0.0, others),
        load=loads,
    )


def _busy_s() -> float:
    """CPU seconds of all processes of this machine, since it began."""
    times = psutil.cpu_times()
    return sum(
        value for name, value in times._asdict().items() if name not in ("idle", "iowait", "guest", "guest_nice")
    )


def _random_store(config: LoaderWaitBenchmark, place: Path) -> str:
    spec = make_spec(config.n_samples, config.span, small=config.small)
    samples = [Sample(sample_id=f"{i:09d}.jpg", label=0, class_name="random", nbytes=1) for i in range(spec.n_samples)]
    write_store(FolderObjects(place / "random"), spec, samples, lambda rows: planted_states(spec, rows))
    return str(place / "random")


def _digits_store(config: LoaderWaitBenchmark, place: Path) -> str:
    store = str(place / "digits")
    extract(ExtractConfig(images="digits", store=store, limit=config.digits), RunConfig(no_ray=True, device="cpu"))
    return store


def _name(config: LoaderWaitBenchmark) -> str:
    return "tiny teacher" if config.small else "ViT-B/14"


def _result(config: LoaderWaitBenchmark, found: dict[tuple[str, str], Waited]) -> Result:
    rows: list[dict[str, Cell]] = [
        {
            "store": store,
            "loop": how,
            "waited, median line, %": 100 * waited.median,
            "mean, %": 100 * waited.mean,
            "worst, %": 100 * max(waited.shares),
            "samples/s": waited.samples_per_s,
            "CPU ms a step": waited.cpu_ms,
            "others, %": 100 * waited.others,
            "load before": waited.load[0],
            "load after": waited.load[1],
        }
        for (store, how), waited in found.items()
    ]
    goals = [
        Goal(what=f"mean loader wait, {store}, {how}", found=waited.mean, at_most=GOAL)
        for (store, how), waited in found.items()
    ]
    details: dict[str, Any] = {f"{store}, {how}": asdict(waited) for (store, how), waited in found.items()}
    return Result(
        name="loader-wait",
        title=f"Waiting for samples with steps of {1000 * config.step_s:.0f} ms, batch {config.batch_size}, "
        f"span {config.span}, float16 from the page cache",
        machine=this_machine(),
        settings={**asdict(config), "span": str(config.span)},
        rows=rows,
        goals=() if config.small else goals,
        notes=NOTES,
        details=details,
    )

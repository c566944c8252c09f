"""How an extraction grows with its workers: a teacher that only sleeps, so that what is left is the road around it."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.images import write_images
from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from infra.cluster import connected
from infra.machine import n_cores
from pipeline.config import ExtractConfig
from pipeline.dispatch import Wanted
from pipeline.extract import extract
from pipeline.run_config import RunConfig
from pipeline.teacher import Teacher, load_teacher

_GATE_S = 600.0

NOTES = (
    "The whole road of an extraction under Ray: decoding small JPEGs, a teacher that sleeps for a fixed time per batch "
    "and then computes next to nothing, reductions, rounding, checksums, files, commits. Workers are processes of one "
    "machine. All of them wait for each other at their first batch; the clock runs from there to the last commit.",
    "efficiency = batches x seconds of a batch / (workers x wall). What it lacks is what is not overlapped within a "
    "worker, what the workers take from each other, and the end, when not all of them have something left to do.",
    "The driver alone: workers that do nothing at all, so that the rate is the driver's. Its CPU time includes Ray's "
    "threads in its process.",
)


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark:
    """Sizes of this benchmark.

    Attributes:
        workers: Numbers of workers to measure, one after the other.
        batch_s: Seconds that the teacher sleeps per batch, which is a shard.
        shards_per_worker: Of each.
        samples_per_shard: One batch.
        n_rounds: Of each number; the best counts, as what else the machine does only ever slows it down.
        n_empty: Shards of the driver's own measurement.
        empty_workers: Numbers of workers of that.
    """

    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_s: float = 2.0
    shards_per_worker: int = 12
    samples_per_shard: int = 16
    n_rounds: int = 1
    n_empty: int = 3000
    empty_workers: tuple[int, ...] = (1, 4)


QUICK = ScalingBenchmark(
    workers=(1, 2),
    batch_s=0.2,
    shards_per_worker=3,
    samples_per_shard=2,
    n_rounds=1,
    n_empty=40,
    empty_workers=(1,),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One number of workers.

    Attributes:
        wall_s: From the gate to the last commit.
        n_shards: Of the store.
        driver_s: CPU seconds of the driver's process, planning and index included.
        worker_s: Seconds of the workers' threads outside of the teacher, summed.
        load: Processes that wanted a core in the minute before, by the system's count.
    """

    n_workers: int
    wall_s: float
    n_shards: int
    driver_s: float
    worker_s: float
    load: float

    def efficiency(self, batch_s: float) -> float:
        """Share of the workers' time that the teacher had."""
        return self.n_shards * batch_s / (self.n_workers * self.wall_s)


class _Sleep:
    """Before the model's first layer: wait for all workers once, then sleep, one batch at a time as a device does."""

    def __init__(self, gate: Path, n_workers: int, seconds: float) -> None:
        self._gate, self._n_workers, self._seconds = gate, n_workers, seconds
        self._device, self._through = threading.Lock(), False

    def __call__(self, module: torch.nn.Module, inputs: object) -> None:
        with self._device:
            if not self._through:
                (self._gate / str(os.getpid())).touch()
                end = time.monotonic() + _GATE_S
                while len(list(self._gate.iterdir())) < self._n_workers:
                    if time.monotonic() > end:
                        raise TimeoutError(f"not all of {self._n_workers} workers came within {_GATE_S:g} s")
                    time.sleep(0.01)
                self._through = True
            time.sleep(self._seconds)


def sleeping_teacher(gate: Path, n_workers: int, seconds: float, device: str) -> Teacher:
    """The tiny teacher of the tests, with a sleep before each batch; only in workers, where the gate is."""
    teacher = load_teacher("fake_vit", "random:0", device=device)
    if gate.exists():
        teacher.model.patch_embed.register_forward_pre_hook(_Sleep(gate, n_workers, seconds))
    return teacher


def run(config: ScalingBenchmark, folder: Path | None = None) -> Result:
    """Measure each number of workers, then the driver alone."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-scaling-", dir=folder, ignore_cleanup_errors=True) as place,
        connected("local", n_cpus=max(config.workers), dashboard=False),
        _one_thread(),
    ):
        n_images = max(config.workers) * config.shards_per_worker * config.samples_per_shard
        write_images(Path(place) / "images", n_images, scale=0.05)
        rounds = [[measure(config, n, Path(place)) for _ in range(config.n_rounds)] for n in config.workers]
        found = [min(ones, key=lambda one: one.wall_s) for ones in rounds]
        empty = [measure_driver(config.n_empty, n) for n in config.empty_workers]
    return _result(config, found, empty, [asdict(one) for ones in rounds for one in ones])


def measure(config: ScalingBenchmark, n_workers: int, place: Path) -> Measured:
    """One extraction into a new store, deleted afterwards."""
    store, gate = place / "store", place / "gate"
    n_shards = n_workers * config.shards_per_worker
    asked = ExtractConfig(
        images=str(place / "images"),
        store=str(store),
        teacher="fake_vit",
        weights="random:0",
        limit=n_shards * config.samples_per_shard,
        samples_per_shard=config.samples_per_shard,
        samples_per_chunk=config.samples_per_shard,
        micro_batch=config.samples_per_shard,
    )
    settings = RunConfig(device="cpu", workers=n_workers, cpus_per_worker=1, depth=2, dashboard=False)
    gate.mkdir()
    load, driver = os.getloadavg()[0], time.process_time()
    factory = partial(sleeping_teacher, gate, n_workers, config.batch_s)
    (result,) = extract(asked, settings, teacher_factory=_OnlyInWorkers(factory, os.getpid()))
    if not result.complete or result.n_done != n_shards * config.samples_per_shard:
        raise RuntimeError(f"{result.n_done} of {asked.limit} images were extracted: the benchmark is void")
    began = max(path.stat().st_mtime for path in gate.iterdir())
    ended = max(path.stat().st_mtime for path in (store / "commits").iterdir())
    others = sum(s for report in result.reports for stage, s in report.seconds.items() if stage not in _NOT_WORK)
    shutil.rmtree(store)
    shutil.rmtree(gate)
    return Measured(
        n_workers=n_workers,
        wall_s=ended - began,
        n_shards=n_shards,
        driver_s=time.process_time() - driver,
        worker_s=others,
        load=load,
    )


_NOT_WORK = ("device", "waiting")


@dataclass(frozen=True)
class _OnlyInWorkers:
    """The sleeping teacher, but for the process that plans, which would wait at the gate for ever."""

    factory: partial[Teacher]
    driver: int

    def __call__(self, device: str) -> Teacher:
        if os.getpid() == self.driver:
            return load_teacher("fake_vit", "random:0", device=device)
        return self.factory(device)


class Nothing:
    """A runner that does nothing."""

    def run(self, shard: int) -> int:
        """Nothing."""
        return shard


def measure_driver(n_shards: int, n_workers: int) -> dict[str, float]:
    """The driver's own rate, shards/s, and its CPU seconds per shard."""
    from pipeline.dispatch_ray import run_on_ray

    wanted = Wanted(n=n_workers, num_cpus=1)
    outcomes = run_on_ray(range(n_shards + 1), Nothing, wanted=lambda _: wanted)
    next(outcomes)  # the workers are there
    began, cpu = time.monotonic(), time.process_time()
    if not all(outcome.ok for outcome in outcomes):
        raise RuntimeError("a shard of nothing failed: the benchmark is void")
    wall = time.monotonic() - began
    return {
        "workers": n_workers,
        "shards_per_s": n_shards / wall,
        "driver_cpu_s_per_shard": (time.process_time() - cpu) / n_shards,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _result(
    config: ScalingBenchmark, found: Sequence[Measured], empty: Sequence[dict[str, float]], rounds: list[dict]
) -> Result:
    rows: list[dict[str, Cell]] = [
        {
            "workers": one.n_workers,
            "wall s": one.wall_s,
            "batches/s": one.n_shards / one.wall_s,
            "efficiency": one.efficiency(config.batch_s),
            "to one worker": one.efficiency(config.batch_s) / found[0].efficiency(config.batch_s),
            "worker s beside the teacher, per batch": one.worker_s / one.n_shards,
            "driver CPU s per batch": one.driver_s / one.n_shards,
            "load before": one.load,
        }
        for one in found
    ]
    goals = [
        Goal(
            what=f"efficiency of {one.n_workers} workers", found=round(one.efficiency(config.batch_s), 3), at_least=0.95
        )
        for one in found
    ]
    said = ", ".join(
        f"{one['shards_per_s']:,.0f} shards/s with {one['workers']:g} workers "
        f"({one['driver_cpu_s_per_shard'] * 1e3:.2f} ms of CPU each)"
        for one in empty
    )
    details: dict[str, Any] = {"rounds": rounds, "driver": list(empty), "cores": n_cores()}
    return Result(
        name="scaling",
        title=f"Extraction with a teacher that sleeps {config.batch_s:g} s per batch, by number of workers",
        machine=this_machine(),
        settings=asdict(config),
        rows=rows,
        goals=goals if config.batch_s >= 1 else (),
        notes=[*NOTES, f"The driver alone does {said}."],
        details=details,
    )

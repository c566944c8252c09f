"""Numbers about a running job, for Prometheus through Ray; and seconds per stage.

Counters do something only in a process that is connected to Ray; elsewhere they cost one dictionary look-up. Ray's
metric objects are made at first use, never on import. Ray exports `activations_images` as
`ray_activations_images_total`, with the node, the worker and our tags.

A process sends Ray what is new every ten seconds, and once more when it ends in good order; what a process that is
killed has not sent is lost. So what has to be exact is counted by the driver, from what the workers report.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

NAMESPACE = "activations"
PREFIX = f"ray_{NAMESPACE}_"  # of the series, as Prometheus sees them
STAGES = ("read", "decode", "waiting", "device", "copy", "encode", "write", "commit")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One exported series. `tags` are the names of its labels; `boundaries` are a histogram's, in its unit."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


_RUN = ("run", "block")

SERIES: Mapping[str, Series] = {
    # ---- extraction, label `store`: its split, as digits/train
    "images": Series(kind="counter", description="Images of the shards that were committed.", tags=("store",)),
    "bad_images": Series(kind="counter", description="Those of them that do not decode.", tags=("store",)),
    "written_bytes": Series(kind="counter", description="Bytes of the shards that were committed.", tags=("store",)),
    "stage_seconds": Series(
        kind="counter", description="Seconds spent per stage, over all threads.", tags=("store", "stage")
    ),
    "stage_lanes": Series(
        kind="gauge", description="Threads that can be in a stage at once, over all workers.", tags=("store", "stage")
    ),
    "shards": Series(kind="counter", description="Shards done, retried or quarantined.", tags=("store", "result")),
    "errors": Series(
        kind="counter",
        description="Requests that failed in a way that may pass, and were made again.",
        tags=("store", "where", "kind"),
    ),
    "shard_duration_seconds": Series(
        kind="histogram",
        description="Seconds from the start of a shard to its commit.",
        tags=("store",),
        boundaries=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
    ),
    "workers_ready": Series(kind="gauge", description="Workers that take shards.", tags=("store",)),
    "workers_wanted": Series(kind="gauge", description="Workers that were asked for.", tags=("store",)),
    "planned_images": Series(kind="gauge", description="Images that the store shall have.", tags=("store",)),
    "committed_images": Series(
        kind="gauge", description="Images that the store has, whoever did them.", tags=("store",)
    ),
    # ---- training, labels `run`: the last part of its place, and `block`: its span
    "train_samples": Series(kind="counter", description="Samples trained on, over all workers.", tags=_RUN),
    "train_steps": Series(kind="counter", description="Optimizer steps.", tags=_RUN),
    "train_loader_wait_seconds": Series(
        kind="counter", description="Seconds that the loop waited for the store; of the slowest worker.", tags=_RUN
    ),
    "train_step_seconds": Series(
        kind="counter", description="Seconds that the loop spent on steps, without those waits.", tags=_RUN
    ),
    "train_validation_seconds": Series(kind="counter", description="Seconds spent on validation.", tags=_RUN),
    "train_checkpoint_seconds": Series(kind="counter", description="Seconds spent on checkpoints.", tags=_RUN),
    "train_fetched_bytes": Series(kind="counter", description="Bytes read from the store.", tags=_RUN),
    "train_needed_bytes": Series(kind="counter", description="Stored bytes of what was asked for.", tags=_RUN),
    "train_errors": Series(
        kind="counter",
        description="Requests that failed in a way that may pass, and were made again.",
        tags=(*_RUN, "where", "kind"),
    ),
    "train_loss": Series(kind="gauge", description="Mean training loss of the last interval.", tags=_RUN),
    "train_planned_samples": Series(kind="gauge", description="Samples of the whole run.", tags=_RUN),
    "train_done_samples": Series(
        kind="gauge", description="Those that it has been trained on, by earlier processes too.", tags=_RUN
    ),
    "train_done_steps": Series(kind="gauge", description="Its steps, those of earlier processes too.", tags=_RUN),
    "train_mfu_ratio": Series(
        kind="gauge", description="Products per second, over the device's peak as its vendor states it.", tags=_RUN
    ),
}


class Metrics:
    """Counts under fixed tags.

    Args:
        tags: Values for labels that are the same for every count of this object: {"store": "imagenet/train"}.
        series: What may be counted; the extraction's when not given.

    Example:
        metrics = Metrics({"store": "digits/train"})
        metrics.add("images", 128)
        metrics.add("stage_seconds", 0.8, stage="decode")
    """

    def __init__(self, tags: Mapping[str, str], series: Mapping[str, Series] = SERIES) -> None:
        self._tags, self._series = dict(tags), series
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **tags: str) -> None:
        """Add to a counter; nothing happens for an amount of zero."""
        metric = self._metric(name, "counter")
        if metric is not None and amount > 0:  # Ray refuses to count zero
            metric.inc(amount, tags=self._tags | tags)

    def expect(self, name: str, **tags: str) -> None:
        """Have a counter begin at zero, so that its first amount is seen to be a rise, and its absence is none."""
        metric = self._metric(name, "counter")
        if metric is not None:
            metric._record(0, tags=self._tags | tags)  # `inc` refuses zero; what it calls does not

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        metric = self._metric(name, "gauge")
        if metric is not None:
            metric.set(value, tags=self._tags | tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Put a value into a histogram."""
        metric = self._metric(name, "histogram")
        if metric is not None:
            metric.observe(value, tags=self._tags | tags)

    def _metric(self, name: str, kind: str) -> Any:
        """Ray's object for a series, or None where there is no Ray. A misspelt name fails with and without Ray."""
        series = self._series[name]
        assert series.kind == kind, f"{name} is a {series.kind}, not a {kind}"
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return None
        with self._lock:
            if name not in self._made:
                self._made[name] = _ray_metric(name, series)
            return self._made[name]


def _ray_metric(name: str, series: Series) -> Any:
    from ray.util import metrics

    full = f"{NAMESPACE}_{name}"
    if series.kind == "histogram":
        return metrics.Histogram(full, series.description, list(series.boundaries), tag_keys=series.tags)
    make = metrics.Counter if series.kind == "counter" else metrics.Gauge
    return make(full, series.description, tag_keys=series.tags)


class StageClock:
    """Adds up seconds per stage over threads.

    Example:
        clock = StageClock()
        with clock("decode"):
            ...
        clock.seconds()  # {"decode": 0.42}
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block; it counts also when the block raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds measured elsewhere."""
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far."""
        with self._lock:
            return dict(self._seconds)


def sum_stages(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up the seconds of many shards."""
    total: dict[str, float] = {}
    for part in parts:
        for stage, seconds in part.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def place_label(location: str) -> str:
    """A short name of a store or run for labels: the last two parts of its place, such as digits/train."""
    return "/".join(location.rstrip("/").rsplit("/", 2)[-2:])

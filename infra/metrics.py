"""Numbers about a running job: counters for Prometheus through Ray, seconds per stage, and what limits the run.

Counters do something only in a process that is connected to Ray; elsewhere they cost one dictionary look-up. Ray's
metric objects are made at first use, never on import. Ray exports `activations_images` as
`ray_activations_images_total`, with the node, the worker and our tags.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

NAMESPACE = "activations"
STAGES = ("decode", "waiting", "device", "copy", "encode", "write", "commit")


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


ADVICE: Mapping[str, str] = {
    "decode": "give each worker more cores",
    "device": "a faster device or more workers would help",
    "copy": "fewer LAYERS, or fewer bytes a value (PRECISION), would help",
    "encode": "more cores, or a lighter CODEC, would help",
    "write": "a faster store, fewer LAYERS, or fewer bytes a value (PRECISION, CODEC) would help",
    "commit": "the store answers small writes slowly; larger shards need fewer",
}
BUSY = 0.6  # a stage that is in use for less than this share of the time limits nothing by itself


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What limits a run.

    Attributes:
        limit: A stage, or "" when none was busy enough.
        busy: Share of the time that each stage's lanes were in use, 0 to 1.
    """

    limit: str
    busy: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in self.busy.items())
        if not self.limit:
            return f"nothing was busy all the time ({shares}): short run, or workers that waited for each other"
        rest = ", ".join(f"{s} {100 * share:.0f} %" for s, share in self.busy.items() if s != self.limit)
        head = f"limited by {self.limit}, busy {100 * self.busy[self.limit]:.0f} % of the time"
        return f"{head} ({rest}); {ADVICE[self.limit]}"


def verdict(
    stage_seconds: Mapping[str, float], *, wall_s: float, n_workers: int, lanes: Mapping[str, int] | int = 1
) -> Verdict:
    """Say which stage limits a run, from how busy the lanes of each were.

    Args:
        stage_seconds: Summed over all shards and workers; "waiting" (for the device) is nobody's work and is left out.
        wall_s: Seconds during which shards were being done, start-up of the workers not included.
        n_workers: Workers that took part.
        lanes: How many threads of one worker can be in a stage at once; the device has one lane. One number stands for
            all stages but the device.

    Returns:
        The busiest stage with its share, or none if all stayed under 60 %.
    """
    if isinstance(lanes, int):
        lanes = {stage: 1 if stage == "device" else lanes for stage in STAGES}
    capacity_s = max(wall_s, 1e-9) * max(n_workers, 1)
    busy = {
        stage: min(stage_seconds[stage] / (capacity_s * lanes.get(stage, 1)), 1.0)
        for stage in STAGES
        if stage != "waiting" and stage_seconds.get(stage, 0.0) > 0
    }
    limit = max(busy, key=lambda stage: busy[stage], default="")
    return Verdict(limit=limit if limit and busy[limit] >= BUSY else "", busy=busy)

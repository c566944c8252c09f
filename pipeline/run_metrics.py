"""What is counted of a running extraction, by its driver: for Prometheus, for status.json, and for the verdict.

The driver counts what workers report of committed shards, and nothing else is counted as done. So a worker that is
killed right after a commit takes no image with it: the shard is found committed, and counted then.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from infra.console import Window
from infra.faults import COMMON, FAULTS, Kind, Where
from infra.metrics import STAGES, Metrics, place_label, sum_stages
from infra.verdict import Pool, Verdict, verdict
from pipeline.dispatch import Event, ShardQuarantined, ShardRetried, WorkersReady
from pipeline.shard import ShardElsewhere, ShardReport

RECENT_S = 300.0
"""The verdict of a run that is still at work is about so much of its past."""


def told(verdict: Verdict) -> dict[str, Any]:
    """A verdict as fields of status.json."""
    busy = {stage: round(share, 4) for stage, share in verdict.busy.items()}
    return {"verdict": str(verdict), "limited_by": verdict.limit, "busy": busy}


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """The end of a shard: when it was, and what had come together by then, the shard's own seconds with it."""

    at: float
    worker_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)


class RunMetrics:
    """Counts of one store's extraction. Threads may share it.

    Args:
        location: Of the store; the last two parts are the label `store`.
        n_planned: Images that it shall have.
        n_committed: Images that it has already.
        faults_here: Whether faults of this process are to be counted beside those that workers report; not where this
            process is the worker.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        location: str,
        *,
        n_planned: int,
        n_committed: int,
        faults_here: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = Metrics({"store": place_label(location)})
        self._n_planned, self._n_committed = n_planned, n_committed
        self._n_there = n_committed  # at least, by the last look at the store
        self._faults_here, self._faults_before = faults_here, FAULTS.counts()
        self._clock, self._lock = clock, threading.RLock()
        self._images, self._bytes = Window(clock=clock), Window(clock=clock)
        self._n_ready = self._n_wanted = 0
        self._worker_s, self._ready_since = 0.0, clock()
        self._pools: dict[str, tuple[Pool, ...]] = {}  # by worker, as it said last
        self._seconds: dict[str, float] = {}
        self._marks: deque[_Mark] = deque([_Mark(at=clock())])
        self._shards = Counter({"done": 0, "retried": 0, "quarantined": 0})
        self._faults: Counter[str] = Counter()
        self._nbytes = 0
        self._shares_work = False

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Show the plan, and count faults of this process, while this lasts."""
        for result in self._shards:
            self._metrics.expect("shards", result=result)
        for where, kind in COMMON:
            self._metrics.expect("errors", where=where, kind=kind)
        for name in ("images", "bad_images", "written_bytes"):
            self._metrics.expect(name)
        for stage in STAGES:
            self._metrics.expect("stage_seconds", stage=stage)
        self._show_gauges()

        def tell(where: Where, kind: Kind) -> None:
            if self._faults_here:
                self._metrics.add("errors", where=where, kind=kind)

        with FAULTS.told_to(tell):
            yield

    def shard(self, report: ShardReport) -> None:
        """Count a shard that a worker has committed."""
        with self._lock:
            self._committed(report.n_samples, len(report.bad_images), report.nbytes)
            self._faults.update(report.faults)
            self._pools[report.worker] = report.pools
            self._seconds = sum_stages([self._seconds, report.seconds])
            self._marks.append(_Mark(at=self._clock(), worker_s=self._worker_seconds(), seconds=self._seconds))
            while len(self._marks) > self._n_ready + 1 and self._marks[1].at < self._clock() - RECENT_S:
                self._marks.popleft()
            self._show_lanes()
        self._metrics.observe("shard_duration_seconds", report.wall_s)
        for stage, seconds in report.seconds.items():
            self._metrics.add("stage_seconds", seconds, stage=stage)

    def elsewhere(self, report: ShardElsewhere, n_samples: int, *, ours: bool) -> None:
        """Count a shard that was found committed: ours if the worker that did it died before it could say so."""
        with self._lock:
            self._faults.update(report.faults)
            if ours:
                self._committed(n_samples, len(report.bad_images), report.nbytes)
            else:
                self._shares_work = True
                self._n_committed += n_samples
                self._images.add(n_samples)
                self._show_committed()

    def there(self, n_images: int) -> None:
        """Note how many images the store was found to have, by this job and by others that share its work."""
        with self._lock:
            self._n_there = n_images
            self._show_committed()

    def event(self, event: Event) -> None:
        """Count what happened to workers and shards."""
        if isinstance(event, WorkersReady):
            self._ready(event.ready, event.total)
        elif isinstance(event, ShardRetried | ShardQuarantined):
            result = "retried" if isinstance(event, ShardRetried) else "quarantined"
            with self._lock:
                self._shards[result] += 1
            self._metrics.add("shards", result=result)

    def idle(self) -> None:
        """All workers have been sent home."""
        self._ready(0, 0)

    def verdict(self) -> Verdict:
        """What has limited the whole run."""
        with self._lock:
            return self._verdict(_Mark(at=0.0), _Mark(at=0.0, worker_s=self._worker_seconds(), seconds=self._seconds))

    def status(self) -> dict[str, Any]:
        """Numbers for status.json, as they are now; called every few seconds, it also shows all gauges again."""
        with self._lock:
            self._show_gauges()
            rate = self._images.per_s()
            left = self._n_planned - self._n_committed
            return {
                "images_per_s": round(rate, 3),
                "bytes_per_s": round(self._bytes.per_s()),
                "written_bytes": self._nbytes,
                "seconds_left": round(left / rate, 1) if rate > 0 and not self._shares_work else None,
                "workers_ready": self._n_ready,
                "workers_wanted": self._n_wanted,
                "shards": dict(self._shards),
                "errors": dict(self.faults()),
                **told(self._recent()),
            }

    def faults(self) -> Counter[str]:
        """Faults of all processes of this run so far, by "where kind"."""
        with self._lock:
            here = FAULTS.counts() - self._faults_before if self._faults_here else Counter()
            return self._faults + here

    def _committed(self, n_samples: int, n_bad: int, nbytes: int) -> None:
        self._n_committed += n_samples
        self._nbytes += nbytes
        self._shards["done"] += 1
        self._images.add(n_samples)
        self._bytes.add(nbytes)
        self._metrics.add("images", n_samples)
        self._metrics.add("bad_images", n_bad)
        self._metrics.add("written_bytes", nbytes)
        self._metrics.add("shards", result="done")
        self._show_committed()

    def _ready(self, n_ready: int, n_wanted: int) -> None:
        with self._lock:
            self._worker_s = self._worker_seconds()
            self._n_ready, self._n_wanted, self._ready_since = n_ready, n_wanted, self._clock()
            self._show_lanes()
        self._metrics.set("workers_ready", n_ready)
        self._metrics.set("workers_wanted", n_wanted)

    def _worker_seconds(self) -> float:
        return self._worker_s + self._n_ready * (self._clock() - self._ready_since)

    def _lanes(self) -> list[Pool]:
        """The pools of one worker; a mean where workers differ."""
        found: dict[tuple[str, ...], list[float]] = {}
        for pools in self._pools.values():
            for pool in pools:
                found.setdefault(pool.stages, []).append(pool.lanes)
        return [Pool(stages=stages, lanes=sum(lanes) / len(lanes)) for stages, lanes in found.items()]

    def _show_gauges(self) -> None:
        """Ray drops a gauge some ten seconds after it was set, so that one which stays the same is set again."""
        self._metrics.set("planned_images", self._n_planned)
        self._show_committed()
        self._metrics.set("workers_ready", self._n_ready)
        self._metrics.set("workers_wanted", self._n_wanted)
        self._show_lanes()

    def _show_committed(self) -> None:
        self._metrics.set("committed_images", max(self._n_committed, self._n_there))

    def _show_lanes(self) -> None:
        if not self._n_ready:
            return  # shares of no lanes are none; boards divide by them
        for pool in self._lanes():
            for stage in pool.stages:
                self._metrics.set("stage_lanes", pool.lanes * self._n_ready, stage=stage)

    def _recent(self) -> Verdict:
        """Of the time between the ends of two shards: what the shards under way have cost is not known before theirs.

        Workers that began together end their shards together, so between the two there are as many shards for each.
        """
        n = len(self._marks) - 1
        whole = n - n % max(self._n_ready, 1) or n
        return self._verdict(self._marks[n - whole], self._marks[n])

    def _verdict(self, begin: _Mark, end: _Mark) -> Verdict:
        spent = {stage: seconds - begin.seconds.get(stage, 0.0) for stage, seconds in end.seconds.items()}
        return verdict(spent, worker_s=end.worker_s - begin.worker_s, pools=self._lanes())

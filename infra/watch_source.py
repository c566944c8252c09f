"""What `make watch` reads: the status.json documents below a store or a run, and the /metrics pages of Ray.

A status.json is a JSON object that its job puts anew every 10 s. A reader takes from it what it knows and leaves the
rest; every field but `time` (seconds since 1970, by the job's clock) may be absent:

    run_id, state (starting, running, complete, incomplete, stopped), cause, seconds, seconds_left, messages,
        busy {stage: share of the time}, limited_by, verdict, errors {"where kind": count}
    extraction: images_done, images_total, images_per_s, bytes_per_s, written_bytes, bad_images, workers_ready,
        workers_wanted, shards {result: count}
    training: spans, step, n_steps, samples_done, samples_total, samples_per_s, loss, loader_wait (share of the time),
        step_s, amplification, mfu, totals {what: since it began to train}
"""

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infra.metrics import NAMESPACE
from infra.objects import ObjectError, ObjectMissingError, Objects, open_objects
from infra.retry import Patience
from infra.running_ray import Value
from infra.status import DEAD_AFTER_S

LOG = "log/"
STATUS = "status.json"
MAX_STATUS_NBYTES = 2**20
LIVING = ("starting", "running")
LOOK_EVERY_S = 10.0  # for new runs; a listing on S3 costs more than the reading of one document
_DEEPEST = 3  # folders below a place in which runs are looked for: all stores, a store's splits, a run's blocks
_MOST_RUNS = 32
#: What S3 does not answer is asked again at the next look, and who presses Ctrl-C waits for no more than this.
_PATIENCE, _STALL_S = Patience(deadline_s=8.0, longest_wait_s=1.0), 4.0
_OF_ONE_RUN = re.compile(rf"(.*/)?{LOG}[^/]+/{re.escape(STATUS)}")  # no later run writes there

RATES_OVER_S = 300.0  # as the board: counters of shards, and of a training's intervals, may grow once a minute
_MARK_EVERY_S = 20.0
#: Gauges that each driver sets for its own workers; two jobs may fill one store. The others are of the store or run.
_OF_ONE_DRIVER = ("workers_ready", "workers_wanted", "stage_lanes")


@dataclass(frozen=True, kw_only=True)
class Status:
    """One status.json.

    Attributes:
        place: Of the store or run, as given or below it.
        document: Its fields.
        age_s: Since the job wrote it; its clock and ours may differ a little.
    """

    place: str
    document: Mapping[str, Any]
    age_s: float

    @property
    def living(self) -> bool:
        """Whether the job says that it runs, and has shown a sign of life within the time after which it is dead."""
        return self.document.get("state") in LIVING and self.age_s <= DEAD_AFTER_S

    @property
    def lost(self) -> bool:
        """Whether the job says that it runs, but has shown no sign of life for too long."""
        return self.document.get("state") in LIVING and self.age_s > DEAD_AFTER_S


class Place:
    """A store, a run, or a folder or prefix of several, whose newest documents are read again and again.

    Args:
        location: As typed: a folder or s3://bucket/prefix. Reading and listing are all that it takes.
        clock: Seconds since 1970.
    """

    def __init__(
        self, location: str, *, objects: Objects | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.location = location.rstrip("/")
        self._objects = _open(location) if objects is None else objects
        self._clock = clock
        self._keys: list[str] = []
        self._ended: dict[str, Status] = {}  # documents that do not change any more
        self._looked = float("-inf")

    def read(self) -> list[Status]:
        """All jobs that live, else the newest that has ended or was lost; none if there is no document.

        Raises:
            ObjectError: The place cannot be listed or read.
        """
        now = self._clock()
        if now - self._looked > LOOK_EVERY_S or not self._keys:
            self._keys, self._looked = list(self._find("", _DEEPEST)), now
        found = [status for status in map(self._status, self._keys) if status]
        living = sorted((status for status in found if status.living), key=lambda status: status.place)
        return living or sorted(found, key=lambda status: status.age_s)[:1]

    def _status(self, key: str) -> Status | None:
        """A document; None if it is gone or torn."""
        if key in self._ended:
            return self._aged(self._ended[key])
        try:
            document = json.loads(self._objects.get(key, at_most=MAX_STATUS_NBYTES))
            float(document["time"])
        except (ObjectMissingError, ValueError, KeyError, TypeError):
            return None
        place = key.partition(LOG)[0] if LOG in key else key.removesuffix(STATUS)
        status = self._aged(Status(place=f"{self.location}/{place}".rstrip("/"), document=document, age_s=0.0))
        if document.get("state") not in LIVING and _OF_ONE_RUN.fullmatch(key):
            self._ended[key] = status  # a training that goes on writes its own anew
        return status

    def _aged(self, status: Status) -> Status:
        return replace(status, age_s=max(self._clock() - float(status.document["time"]), 0.0))

    def _find(self, prefix: str, depth: int) -> Iterator[str]:
        """Keys of documents at and below a prefix. Folders of a store's objects are never entered."""
        level = self._objects.list_folder(prefix)
        names = {info.key for info in level.objects}
        if f"{prefix}{STATUS}" in names:
            yield f"{prefix}{STATUS}"
        if f"{prefix}{LOG}" in level.folders:
            yield from self._runs(f"{prefix}{LOG}")
            return  # a store or a run: what else lies in it are its objects
        if depth and len(level.folders) <= 1000:
            for folder in level.folders:
                yield from self._find(folder, depth - 1)

    def _runs(self, prefix: str) -> Iterator[str]:
        """Below log/: a training's own document, and one for each run of an extraction; the newest names come last."""
        level = self._objects.list_folder(prefix)
        if any(info.key == f"{prefix}{STATUS}" for info in level.objects):
            yield f"{prefix}{STATUS}"
        for folder in level.folders[-_MOST_RUNS:]:
            yield f"{folder}{STATUS}"


def _open(location: str) -> Objects:
    """As `open_objects`, with little patience."""
    if not location.startswith("s3://"):
        return open_objects(location)
    from infra.s3 import S3Objects  # imported late: half a second that local work need not wait

    return S3Objects(location, patience=_PATIENCE, stall_s=_STALL_S)


class Scrape:
    """Looks at /metrics make rates over the last five minutes; each call is a look.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, dict[tuple[str, str, str], float]]] = deque()
        self._rates: dict[tuple[str, str, str], float] = {}

    def statuses(self, values: Sequence[Value]) -> list[Status]:
        """The same pictures that status.json gives, made of counters and gauges, one for each store and run.

        Ray renews its numbers every 10 s, so a mark is kept when one of them differs, and else every 20 s.
        """
        sums = _sums(values)
        self._renew(sums)
        # Counters of what has ended stay as long as Ray does; a gauge is there only while its job sets it.
        stores = sorted({who for name, who, _ in sums if name == "planned_images"})
        runs = sorted({who for name, who, _ in sums if name == "train_planned_samples"})
        found = [Status(place=store, document=self._extraction(sums, store), age_s=0.0) for store in stores]
        found += [Status(place=run, document=self._training(sums, run), age_s=0.0) for run in runs]
        return found

    def _renew(self, sums: dict[tuple[str, str, str], float]) -> None:
        now = self._clock()
        if self._marks and sums == self._marks[-1][1] and now - self._marks[-1][0] < _MARK_EVERY_S:
            return
        self._marks.append((now, sums))
        while len(self._marks) > 2 and self._marks[1][0] <= now - RATES_OVER_S:
            self._marks.popleft()
        self._rates = {key: rate for key in sums if (rate := self._rate(key)) is not None}

    def _rate(self, key: tuple[str, str, str]) -> float | None:
        """Per second since the oldest mark from which on a number was there, and never fell as when a node is gone."""
        marks = reversed(self._marks)
        end, last = next(marks)
        began, first = end, last[key]
        for at, sums in marks:
            if sums.get(key, float("inf")) > first:
                break
            began, first = at, sums[key]
        return (last[key] - first) / (end - began) if end > began else None

    def _extraction(self, sums: Mapping[tuple[str, str, str], float], store: str) -> dict[str, Any]:
        def of(name: str) -> dict[str, float]:
            return {kind: value for (one, who, kind), value in sums.items() if one == name and who == store}

        rate = self._rates.get(("images_total", store, ""))
        done, total = of("committed_images").get(""), of("planned_images").get("")
        lanes = of("stage_lanes")
        busy = {
            stage: min(per_s / lanes[stage], 1.0)
            for (name, who, stage), per_s in self._rates.items()
            if name == "stage_seconds_total" and who == store and lanes.get(stage)
        }
        return _without_none(
            state="running",
            images_done=done,
            images_total=total,
            images_per_s=rate,
            bytes_per_s=self._rates.get(("written_bytes_total", store, "")),
            seconds_left=(total - done) / rate if rate and total is not None and done is not None else None,
            workers_ready=of("workers_ready").get(""),
            workers_wanted=of("workers_wanted").get(""),
            bad_images=of("bad_images_total").get(""),
            shards=of("shards_total") or None,
            errors=of("errors_total") or None,
            busy=dict(sorted(busy.items(), key=lambda one: -one[1])) or None,
        )

    def _training(self, sums: Mapping[tuple[str, str, str], float], run: str) -> dict[str, Any]:
        def rate(name: str) -> float | None:
            return self._rates.get((f"train_{name}", run, ""))

        def now(name: str) -> float | None:
            return sums.get((f"train_{name}", run, ""))

        steps, samples = rate("steps_total"), rate("samples_total")
        wait, working = rate("loader_wait_seconds_total"), rate("step_seconds_total")
        fetched, needed = rate("fetched_bytes_total"), rate("needed_bytes_total")
        done, total = now("done_samples"), now("planned_samples")
        both = (wait or 0.0) + (working or 0.0)
        errors = {
            kind: value for (name, who, kind), value in sums.items() if name == "train_errors_total" and who == run
        }
        return _without_none(
            state="running",
            step=now("done_steps"),  # its counters begin at zero when it goes on
            samples_done=done,
            samples_total=total,
            samples_per_s=samples,
            loss=now("loss"),
            loader_wait=wait / both if wait is not None and both else None,
            step_s=working / steps if working is not None and steps else None,
            amplification=fetched / needed if fetched is not None and needed else None,
            mfu=now("mfu_ratio"),
            seconds_left=(total - done) / samples if samples and total is not None and done is not None else None,
            errors=errors or None,
        )


def _sums(values: Sequence[Value]) -> dict[tuple[str, str, str], float]:
    """By (series, store or run, stage or result or kind): counters and gauges of one driver each are added.

    Of the other gauges the largest counts: each of two drivers knows the whole plan, and some of what the other did.
    """
    found: dict[tuple[str, str, str], float] = {}
    for value in values:
        name = value.name.removeprefix(f"ray_{NAMESPACE}_")
        labels = value.labels
        run = " ".join(filter(None, (labels.get("run"), labels.get("block"))))
        kind = labels.get("stage") or labels.get("result") or ""
        kind = kind or " ".join(filter(None, (labels.get("where"), labels.get("kind"))))
        key = name, labels.get("store") or run, kind
        summed = name.endswith("_total") or name in _OF_ONE_DRIVER
        found[key] = found.get(key, 0.0) + value.value if summed else max(found.get(key, value.value), value.value)
    return found


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def machines(values: Sequence[Value]) -> list[str]:
    """A line for each node: cores, memory, object store, GPUs; of Ray's own series."""
    nodes: dict[str, dict[str, float]] = {}
    for value in values:
        node = value.labels.get("ip") or value.labels.get("NodeAddress")
        if node:
            name = value.name + (f" {value.labels['GpuIndex']}" if "GpuIndex" in value.labels else "")
            nodes.setdefault(node, {})[name] = value.value
    return [_machine(node, found) for node, found in sorted(nodes.items())]


def _machine(node: str, found: Mapping[str, float]) -> str:
    parts = []
    if "ray_node_cpu_utilization" in found:
        parts.append(f"processors {found['ray_node_cpu_utilization']:.0f} %")
    used, total = found.get("ray_node_mem_used"), found.get("ray_node_mem_total")
    if used is not None and total:
        parts.append(f"memory {100 * used / total:.0f} %")
    if "ray_node_disk_utilization_percentage" in found:
        parts.append(f"disk {found['ray_node_disk_utilization_percentage']:.0f} %")
    if "ray_object_store_used_memory" in found:
        parts.append(f"object store {found['ray_object_store_used_memory'] / 1e6:.0f} MB")
    gpus = [f"{value:.0f} %" for name, value in sorted(found.items()) if name.startswith("ray_node_gpus_utilization")]
    if gpus:
        parts.append(f"GPUs {', '.join(gpus)}")
    return f"{node}: {', '.join(parts)}"


def read_all(places: Sequence[Place]) -> tuple[list[Status], list[str]]:
    """The documents of several places, and what could not be read."""
    found: list[Status] = []
    problems = []
    for place in places:
        try:
            found += place.read()
        except ObjectError as error:
            problems.append(str(error))
    return found, problems

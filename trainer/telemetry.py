"""A training as others see it while it runs: status.json in its RUN every ten seconds, and the same through Ray.

The loop leaves numbers here; a thread writes them. What is exported to Prometheus is what the document says, so a
process that is connected to Ray can export for one that is not, from the document alone.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from infra.console import Window
from infra.faults import COMMON, FAULTS, Kind, Where
from infra.metrics import Metrics, place_label
from infra.objects import ObjectError
from infra.status import Beat, status_document
from infra.verdict import Verdict, loop_verdict
from trainer.config import TrainConfig
from trainer.meter import Spent
from trainer.run_files import RunFiles

RECENT_S = 300.0
"""The verdict of a run that is still at work is about so much of its past."""

#: Series by the name of a total in the document.
_TOTALS = {
    "samples": "train_samples",
    "steps": "train_steps",
    "loader_s": "train_loader_wait_seconds",
    "step_s": "train_step_seconds",
    "validation_s": "train_validation_seconds",
    "checkpoint_s": "train_checkpoint_seconds",
    "fetched_bytes": "train_fetched_bytes",
    "needed_bytes": "train_needed_bytes",
}
_GAUGES = {"loss": "train_loss", "samples_total": "train_planned_samples", "mfu": "train_mfu_ratio"}
_DONE = {"samples_done": "train_done_samples", "step": "train_done_steps"}
_STAGES = ("loader", "step", "validation", "checkpoint")


@dataclass(kw_only=True)
class Totals:
    """What a process has done since it began to train, all workers together. Seconds are those of the slowest."""

    samples: int = 0
    steps: int = 0
    loader_s: float = 0.0
    step_s: float = 0.0
    validation_s: float = 0.0
    checkpoint_s: float = 0.0
    fetched_bytes: float = 0.0
    needed_bytes: float = 0.0

    def seconds(self) -> dict[str, float]:
        """By what the loop spent them on."""
        return {stage: getattr(self, f"{stage}_s") for stage in _STAGES}


@dataclass(frozen=True, kw_only=True)
class _Mark:
    at: float
    steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


class Telemetry:
    """Tells about a run while it is entered. Only the first worker does.

    Args:
        run: The RUN.
        config: Of the run.
        n_samples: Of the whole run.
        first_step: Where it goes on.
        samples_before: Samples before that.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        run: RunFiles,
        config: TrainConfig,
        *,
        n_samples: int,
        first_step: int,
        samples_before: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.totals = Totals()
        self._run, self._config, self._clock = run, config, clock
        self._run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{os.urandom(3).hex()}"
        self._n_samples, self._first_step, self._samples_before = n_samples, first_step, samples_before
        self._began, self._faults_before = clock(), FAULTS.counts()
        self._window = Window(clock=clock)
        self._marks: deque[_Mark] = deque([_Mark(at=clock())])
        self._found: dict[str, Any] = {"state": "running"}
        self._judged: Verdict | None = None
        self._export = Export(run_metrics(run.location, config))
        self._beat = Beat(self._write, expected=(ObjectError,))

    def step(self, n_samples: int) -> None:
        """Count a step."""
        self.totals.steps += 1
        self.totals.samples += n_samples
        self._window.add(n_samples)

    def interval(self, means: Mapping[str, float], rates: Mapping[str, float], spent: Spent, mfu: float | None) -> None:
        """Note a line of metrics, and what the time since the one before was spent on.

        Raises:
            ObjectError: Nothing could be written for a minute.
        """
        self._beat.check()
        self.spent(spent)
        self._found |= {"loss": means["loss"], "loader_wait": rates["loader_wait"]}
        if mfu is not None:
            self._found["mfu"] = mfu

    def spent(self, spent: Spent) -> None:
        """Note what the time since this was last noted was spent on."""
        for name in ("loader_s", "step_s", "fetched_bytes", "needed_bytes"):
            setattr(self.totals, name, getattr(self.totals, name) + getattr(spent, name))
        self._marks.append(_Mark(at=self._clock(), steps=self.totals.steps, seconds=self.totals.seconds()))
        while len(self._marks) > 2 and self._marks[1].at < self._clock() - RECENT_S:
            self._marks.popleft()

    @contextmanager
    def spending(self, stage: str) -> Iterator[None]:
        """Count the time of validation or checkpoint."""
        began = self._clock()
        try:
            yield
        finally:
            name = f"{stage}_s"
            setattr(self.totals, name, getattr(self.totals, name) + self._clock() - began)

    def ended(self, state: str) -> None:
        """Say how it ended; the last document will have it."""
        self._found["state"] = state

    def judge(self) -> Verdict:
        """What has limited this process's part of the run up to now; the documents to come say the same."""
        self._judged = loop_verdict(self.totals.seconds())
        return self._judged

    def document(self) -> dict[str, Any]:
        """The numbers of status.json, as they are now."""
        totals, rate = self.totals, self._window.per_s()
        marks = list(self._marks)
        recent = {stage: s - marks[0].seconds.get(stage, 0.0) for stage, s in marks[-1].seconds.items()}
        limit = self._judged or loop_verdict(recent)
        left = self._n_samples - self._samples_before - totals.samples
        found = {
            **self._found,
            "spans": ",".join(map(str, self._config.spans)),
            "step": self._first_step + totals.steps,
            "n_steps": self._config.n_steps,
            "samples_done": self._samples_before + totals.samples,
            "samples_total": self._n_samples,
            "samples_per_s": round(rate, 3),
            "seconds": round(self._clock() - self._began, 1),
            "seconds_left": round(left / rate, 1) if rate > 0 else None,
            "verdict": str(limit),
            "limited_by": limit.limit,
            "busy": {stage: round(share, 4) for stage, share in limit.busy.items()},
            "errors": dict(FAULTS.counts() - self._faults_before),
            "totals": {name: getattr(totals, name) for name in _TOTALS},
        }
        if totals.needed_bytes:
            found["amplification"] = round(totals.fetched_bytes / totals.needed_bytes, 4)
        if marks[-1].steps:  # the seconds of later steps are not known yet
            found["step_s"] = marks[-1].seconds["step"] / marks[-1].steps
        return found

    def _write(self) -> None:
        document = self.document()
        self._run.write_status(status_document(run_id=self._run_id, now=time.time(), **document))
        self._export({"run_id": self._run_id, **document})

    def __enter__(self) -> "Telemetry":
        self._beat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._found["state"] == "running":
            self._found["state"] = "incomplete"
        if error is not None:
            self._found |= {"state": "stopped", "cause": str(error) or type(error).__name__}
        self._beat.__exit__(kind, error, trace)


class Export:
    """Passes what the documents of one run say on to Ray. Documents may come again; each total counts once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._told: dict[str, float] = {}
        self._run_id = ""

    def __call__(self, document: Mapping[str, Any]) -> None:
        """Count what is new in a document."""
        if str(document.get("run_id")) != self._run_id:  # another process, which has begun at zero
            self._run_id, self._told = str(document.get("run_id")), {}
            for series in _TOTALS.values():
                self._metrics.expect(series)
            for where, kind in COMMON:
                self._metrics.expect("train_errors", where=where, kind=kind)
        new = self._numbers(document)
        for name, value in new.items():
            self._count(name, value - self._told.get(name, 0.0))
        self._told = new
        shown = {**_GAUGES, **_DONE} if document.get("state") == "running" else _DONE  # what is done stays true
        for name, series in shown.items():
            if isinstance(found := document.get(name), int | float):
                self._metrics.set(series, found)

    def _numbers(self, document: Mapping[str, Any]) -> dict[str, float]:
        errors = {f"error {name}": n for name, n in document.get("errors", {}).items()}
        return {name: float(n) for name, n in {**document.get("totals", {}), **errors}.items()}

    def _count(self, name: str, amount: float) -> None:
        if name in _TOTALS:
            self._metrics.add(_TOTALS[name], amount)
        else:
            _, where, kind = name.split()
            self._metrics.add("train_errors", amount, where=where, kind=kind)


class Relay:
    """Exports, from a process that is connected to Ray, the numbers of a training that is none of Ray's processes.

    Args:
        run: The RUN that it is about to train.
    """

    def __init__(self, run: RunFiles) -> None:
        self._run = run
        self._export: Export | None = None
        self._before = self._read()

    def look(self) -> None:
        """Pass on what is new."""
        document = self._read()
        if document is None or (self._before is not None and document.get("run_id") == self._before.get("run_id")):
            return  # what a process before it has left
        if self._export is None:
            self._export = Export(Metrics(_labels(self._run.location, str(document.get("spans", "")))))
        self._export(document)

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._run.read_status())
        except (ObjectError, ValueError):  # not there yet, or out of reach for now: the next look will tell
            return None
        return found if isinstance(found, dict) else None


@contextmanager
def telling_faults(run: RunFiles, config: TrainConfig) -> Iterator[None]:
    """While this lasts, faults of this process go to Ray; for the workers that write no document."""
    metrics = run_metrics(run.location, config)

    def tell(where: Where, kind: Kind) -> None:
        metrics.add("train_errors", where=where, kind=kind)

    with FAULTS.told_to(tell):
        yield


def run_metrics(location: str, config: TrainConfig) -> Metrics:
    """Counts of a run under its labels."""
    return Metrics(_labels(location, ",".join(map(str, config.spans))))


def _labels(location: str, spans: str) -> dict[str, str]:
    return {"run": place_label(location), "block": spans}

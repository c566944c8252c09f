"""Metrics of a run: a line of JSON each in metrics.jsonl, and the same for TensorBoard."""

import io
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from trainer.run_files import METRICS_KEY, Checkpoint, RunFiles
from trainer.validation import Validation

_FLUSH_S = 10.0
_REMOTE_FLUSH_S = 60.0  # a put to S3 keeps the training waiting, and costs


class RunLog:
    """Writes metrics. metrics.jsonl is replaced as a whole every few seconds, in S3 every minute, so it is never torn.

    Lines of training have step, loss, gradient_norm (means over the samples, and steps, since the line before),
    learning_rate, forcing (weight of the teacher-forced loss), samples_per_s and loader_wait (share of the time spent
    waiting for the store). Lines of validation have step and validation.

    Attributes:
        last_loss: Of the last line of training; None before the first.
    """

    def __init__(self, run: RunFiles, resume: Checkpoint | None) -> None:
        """Go on with the run's lines up to a checkpoint, or with none."""
        self._run = run
        old = [] if resume is None else run.read_metrics()
        if resume is not None and not old:
            print(f"{run.location}/{METRICS_KEY} is missing; it begins anew at step {resume.step:,}", file=sys.stderr)
        self._lines = [line for line in old if resume is not None and line["step"] <= resume.step]
        # From the checkpoint, as metrics.jsonl is for people and may be edited or lost.
        self.last_loss: float | None = None if resume is None else resume.state["last_loss"]
        self._tensorboard = EventFile(run, None if resume is None else resume.step + 1)
        self._flush_s = _REMOTE_FLUSH_S if run.local_folder is None else _FLUSH_S
        self.flush()

    def training(self, step: int, means: Mapping[str, float], rates: Mapping[str, float]) -> None:
        """Add a line; `rates` are the values that depend on the machine."""
        self.last_loss = means["loss"]
        self._add({"step": step, **means, **rates}, {f"train/{name}": v for name, v in {**means, **rates}.items()})

    def validation(self, step: int, found: Validation) -> None:
        """Add a line; it replaces one of the same step, which a run that died before its result has left."""
        self._lines = [line for line in self._lines if line["step"] != step or "validation" not in line]
        scalars = {"validation/loss": found.loss}
        if found.accuracy is not None:
            scalars["validation/accuracy"] = found.accuracy
        for kind, values in found.r2.items():
            scalars |= {f"r2_{kind}/layer_{layer:02d}": value for layer, value in zip(found.layers, values)}
        self._add({"step": step, "validation": found.to_json()}, scalars)

    def flush(self) -> None:
        """Bring everything to the run's files."""
        self._run.write_metrics(self._lines)
        self._flushed_at = time.monotonic()
        self._tensorboard.flush()

    def _add(self, line: dict[str, Any], scalars: Mapping[str, float]) -> None:
        self._lines.append(line)
        for name, value in scalars.items():
            self._tensorboard.add(name, value, line["step"])
        if time.monotonic() - self._flushed_at > self._flush_s:
            self.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


class EventFile:
    """An event file of TensorBoard. A writer of our own, as theirs has a thread in which a full disk is a traceback."""

    def __init__(self, run: RunFiles, first_step: int | None) -> None:
        """Begin a file that, if `first_step` is given, hides what earlier files have from that step on."""
        # Half a second of import, which --help need not pay.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads files in the order of their names.
        self._name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._run, self._event, self._data, self._n_written = run, Event, io.BytesIO(), 0
        self._records = RecordWriter(self._data)
        self._write(file_version="brain.Event:2")
        if first_step is not None:
            self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Add one value of a curve."""
        self._write(step=step, summary={"value": [{"tag": name, "simple_value": value}]})

    def flush(self) -> None:
        """Bring everything to the file: some megabytes at the end of a long run.

        Raises:
            ObjectAccessError: It could not be written.
        """
        data = self._data.getvalue()
        if len(data) > self._n_written:
            self._run.write_events(self._name, data, self._n_written)
            self._n_written = len(data)

    def _write(self, **values: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **values).SerializeToString())

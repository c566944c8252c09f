"""Trainings as tasks of a Ray cluster: one task starts one process on whichever machine has room."""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from infra.objects import open_objects
from infra.status import Beat
from trainer.all_spans import Process, SpanRun, process_environment
from trainer.run_files import RunFiles
from trainer.telemetry import Relay

_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class ClusterRoom:
    """How a training is put into a cluster.

    Attributes:
        at_once: Most that can run at a time, as the cluster is now.
        why: In words.
        resources: Of one task.
        arguments: For its process.
    """

    at_once: int
    why: str
    resources: Mapping[str, float]
    arguments: tuple[str, ...]


def room_of_cluster(device: str | None, threads: int, workers: int | None) -> ClusterRoom:
    """Room for trainings of one process each, or of several workers each, for whom Ray Train finds the room itself.

    Args:
        device: As typed; None takes GPUs if the cluster has any.
        threads: Of torch for each on a CPU.
        workers: Of each training; None: one process without Ray.
    """
    has = ray.cluster_resources()
    n_gpus = int(has.get("GPU", 0)) if device in (None, "cuda") else 0
    if n_gpus:
        n, what, one = n_gpus, f"{n_gpus} GPUs", {"num_cpus": 1.0, "num_gpus": 1.0}
        arguments: tuple[str, ...] = ("--device", "cuda")
    else:
        most = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        each = max(1, min(threads, most))
        n, what = int(has.get("CPU", 0)) // each, f"{has.get('CPU', 0):g} cores, {each} for each"
        one, arguments = {"num_cpus": float(each)}, ("--device", "cpu", "--threads", str(each))
    if workers is None:
        return ClusterRoom(at_once=max(1, n), why=what, resources=one, arguments=arguments)
    chosen = () if device is None else ("--device", device)
    why = f"{what}, {workers} workers for each"
    return ClusterRoom(at_once=max(1, n // workers), why=why, resources={"num_cpus": 0.0}, arguments=chosen)


def run_process(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Train on this machine until it ends; cancelled, it saves all first. Returns exit code and last words."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {**process_environment(ray="--workers" in arguments), **environment}
        with _relaying(arguments, environment):
            process = Process(arguments, Path(folder, "words.log"), variables)
            while True:
                try:
                    while (code := process.poll()) is None:
                        time.sleep(_POLL_S)
                    return code, process.words()
                except KeyboardInterrupt:  # ray.cancel
                    process.ask_to_stop()


def _relaying(arguments: Sequence[str], environment: Mapping[str, str]) -> AbstractContextManager:
    """Export its numbers while it trains: its process is none of Ray's, and this one is. Workers of Ray Train are."""
    if "--workers" in arguments or "--run" not in arguments:
        return nullcontext()
    os.environ.update(environment)
    relay = Relay(RunFiles(open_objects(arguments[arguments.index("--run") + 1])))
    return Beat(relay.look, expected=())


class Task:
    """A training under way in a cluster."""

    def __init__(self, job: SpanRun, resources: Mapping[str, float], environment: Mapping[str, str]) -> None:
        task: Any = ray.remote(run_process).options(name=f"train {job.name}", max_retries=0, **resources)
        self._task = task.remote(job.arguments, dict(environment))
        self._ended: tuple[int, str] | None = None

    def __str__(self) -> str:
        return "a task of the cluster"

    def poll(self) -> int | None:
        """Its exit code once it has ended; -9 if its machine or its worker is gone."""
        if self._ended is None and ray.wait([self._task], timeout=0)[0]:
            try:
                self._ended = ray.get(self._task)
            except RayError as error:
                # Some of Ray's errors have no words, as that of a task that never began.
                self._ended = -9, next(iter(str(error).splitlines()), type(error).__name__)
        return None if self._ended is None else self._ended[0]

    def ask_to_stop(self) -> None:
        """It saves all; one that has not begun never will."""
        ray.cancel(self._task)

    def words(self) -> str:
        """Its last lines."""
        return "" if self._ended is None else self._ended[1]

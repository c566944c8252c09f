"""Trainings as tasks of a Ray cluster: one task starts one process on whichever machine has room."""

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import LocalRayletDiedError, NodeDiedError, RayError
from ray.experimental import internal_kv

from infra.cluster import draining_nodes
from infra.console import UserError
from infra.objects import open_objects
from infra.status import Beat
from trainer.all_spans import Process, SpanRun, process_environment
from trainer.run_files import RunFiles
from trainer.telemetry import Relay

_POLL_S = 0.2
_LOOK_S = 1.0  # whether a task has begun
_NAMESPACE = "activations"


@dataclass(frozen=True, kw_only=True)
class ClusterRoom:
    """How a training is put into a cluster.

    Attributes:
        at_once: Most that can run at a time, as the cluster is now; None: all are handed over, and wait for GPUs.
        why: In words.
        resources: Of one task.
        arguments: For its process.
    """

    at_once: int | None
    why: str
    resources: Mapping[str, float]
    arguments: tuple[str, ...]


def device_problems(device: str | None) -> list[str]:
    """What is wrong with DEVICE on a cluster, where Ray says which GPU is whose."""
    if device is None:
        return []
    try:
        named = torch.device(device)
    except RuntimeError:
        return [f"DEVICE={device} is not a device: expected cpu or cuda"]
    if named.type not in ("cpu", "cuda"):
        return [f"DEVICE={device}: training runs on cpu or cuda, not on {named.type}"]
    if named.type == "cuda" and named.index is not None:
        return [
            f"DEVICE={device} is one GPU of one machine; on a cluster Ray gives every training a GPU of its own: type "
            "DEVICE=cuda, or leave it out"
        ]
    return []


def room_of_cluster(device: str | None, threads: int, workers: int | None) -> ClusterRoom:
    """Room for trainings of one process each, or of several workers each, for whom Ray Train finds the room itself.

    Args:
        device: As typed; None takes GPUs if the cluster has any now; cuda waits for them, for as long as it takes.
        threads: Of torch for each on a CPU.
        workers: Of each training; None: one process without Ray.

    Raises:
        UserError: There is no such device on a cluster.
    """
    if problems := device_problems(device):
        raise UserError("\n".join(problems))
    has = ray.cluster_resources()
    on_cpu = device is not None and torch.device(device).type == "cpu"
    n_gpus = 0 if on_cpu else int(has.get("GPU", 0))
    n: int | None
    if n_gpus or (device is not None and not on_cpu):
        n, one = n_gpus or None, {"num_cpus": 1.0, "num_gpus": 1.0}
        what = f"{n_gpus} GPUs" if n_gpus else "the cluster has no GPU now; they wait until it has"
        arguments: tuple[str, ...] = ("--device", "cuda")
    else:
        most = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        each = max(1, min(threads, most))
        n, what = max(1, int(has.get("CPU", 0)) // each), f"{has.get('CPU', 0):g} cores, {each} for each"
        one, arguments = {"num_cpus": float(each)}, ("--device", "cpu", "--threads", str(each))
    if workers is None:
        return ClusterRoom(at_once=n, why=what, resources=one, arguments=arguments)
    chosen = () if device is None else ("--device", device)
    why = f"{what}, {workers} workers for each"
    return ClusterRoom(at_once=max(1, (n or 0) // workers), why=why, resources={"num_cpus": 0.0}, arguments=chosen)


def run_process(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Train on this machine until it ends; cancelled, it saves all first. Returns exit code and last words."""
    _tell_where()
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

    def look() -> None:
        try:
            relay.look()
        except Exception as error:
            print(f"the numbers of this training do not reach Ray: {error!r}", file=sys.stderr, flush=True)
            raise  # again by the last look, if it does not pass

    return Beat(look, expected=())


def _tell_where() -> None:
    """Leave word with the cluster that this task has begun, and on which machine."""
    here = ray.get_runtime_context()
    task = here.get_task_id()
    assert task is not None, "this is called in a task"
    try:
        internal_kv._internal_kv_put(task, here.get_node_id(), namespace=_NAMESPACE)
    except (AttributeError, RayError):  # a private call of Ray, right for 2.60; the training needs nobody to know
        return


def _where(task: Any) -> str | None:
    """The machine on which a task has begun; None if that is not known."""
    try:
        found = internal_kv._internal_kv_get(task.task_id().hex(), namespace=_NAMESPACE)
    except (AttributeError, RayError):
        return None
    return found.decode() if found else None


def _is_taken_away(node: str | None) -> bool:
    """Whether a machine is gone, or will be soon."""
    if node is None:
        return False
    return node in draining_nodes() or node not in {one["NodeID"] for one in ray.nodes() if one["Alive"]}


class Task:
    """A training under way in a cluster."""

    def __init__(self, job: SpanRun, resources: Mapping[str, float], environment: Mapping[str, str]) -> None:
        task: Any = ray.remote(run_process).options(name=f"train {job.name}", max_retries=0, **resources)
        self._task = task.remote(job.arguments, dict(environment))
        self._needs = "a GPU" if resources.get("num_gpus") else "cores"
        self._node: str | None = None
        self._looked_at = -_LOOK_S
        self._ended: tuple[int, str] | None = None
        self._lost = False

    def __str__(self) -> str:
        return "a task of the cluster"

    def poll(self) -> int | None:
        """Its exit code once it has ended; -9 if its machine or its worker is gone."""
        if self._ended is None and ray.wait([self._task], timeout=0)[0]:
            node = self._node or _where(self._task)
            try:
                self._ended = ray.get(self._task)
                self._lost = _is_taken_away(node)
            except RayError as error:
                # Some of Ray's errors have no words, as that of a task that never began.
                self._ended = -9, next(iter(str(error).splitlines()), type(error).__name__)
                self._lost = isinstance(error, NodeDiedError | LocalRayletDiedError) or _is_taken_away(node)
        return None if self._ended is None else self._ended[0]

    def waits_for(self) -> str:
        """Empty once it has begun, which is asked once a second."""
        if self._node is None and self._ended is None and time.monotonic() - self._looked_at >= _LOOK_S:
            self._node, self._looked_at = _where(self._task), time.monotonic()
        return self._needs if self._node is None and self._ended is None else ""

    def lost(self) -> bool:
        """Whether its machine is gone, or was being taken away as it ended."""
        return self._lost

    def ask_to_stop(self) -> None:
        """It saves all; one that has not begun never will."""
        ray.cancel(self._task)

    def words(self) -> str:
        """Its last lines."""
        return "" if self._ended is None else self._ended[1]

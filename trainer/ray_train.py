"""Training over several workers of a Ray cluster: the same loop, placed by Ray Train. Ray is imported lazily.

What is known of a run is in its RUN and nowhere in Ray: our own checkpoints are what a worker group that lost a worker
goes on from. Ray Train places the workers, connects them, sees who dies, and starts them anew.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import TextIOBase
from typing import Any

import torch
from torch import Tensor

from infra.console import JobError, UserError, say
from infra.objects import ObjectError, open_objects
from infra.s3_settings import shared_environment
from storage_schemas.errors import StoreError
from trainer.config import TrainConfig
from trainer.data import TrainingData
from trainer.machine import Machine, torch_threads
from trainer.meter import DivergedError
from trainer.run_files import RunFiles
from trainer.train import train
from trainer.workers import TIMEOUT, Workers, backend_for

MAX_FAILURES = 10
"""Times that workers may die before the run is given up; machines that are taken away do not count."""

START_TRIES = 10
"""Times that Ray Train looks for a place for all workers, a minute each."""

# Otherwise Ray Train takes `print` over and says every line twice.
_WORKER_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}

_POLL_S = 1.0
_LOST_S = 30.0  # a first worker that has said nothing for so long is not at work


def train_on_ray(
    config: TrainConfig,
    open_data: Callable[[torch.device], TrainingData],
    run: str,
    *,
    n_workers: int,
    device: str | None = None,
    threads: int | None = None,
    micro_batch: int | None = None,
    initial: Mapping[str, Tensor] | None = None,
    grows: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train over `n_workers` processes of Ray Train, to the end. Call it where `train` would be called.

    Ray must be connected (`infra.cluster`). The caller holds the RUN (`RunFiles.exclusive`) and has claimed it. A
    worker that dies, or its machine, makes all of them begin again from the RUN's last checkpoint, all by themselves.

    Args:
        config: What to do.
        open_data: Opens the data on a worker's device. It is pickled: functools.partial(open_training_data, STORE,
            BLOCKS, ...), with absolute places and, of an unfinished store, the frozen shards.
        run: The RUN, as `open_objects` takes it; every worker's machine must reach it: S3, or a shared folder.
        n_workers: Processes, each with a GPU of its own where there are any.
        device: "cpu" keeps off the GPUs; None takes one for each worker if the cluster has any.
        threads: Of torch in each worker on a CPU; None shares out the cores of its machine.
        micro_batch: Most samples of a forward pass of one worker; None: all of its share at once.
        initial: Weights to begin with, as those of stage 1.
        grows: The cluster may make machines on demand: if there is no place yet, wait for one for ten minutes.
        stop: Asked about once a second; once it says yes, everything is saved and the function returns.

    Returns:
        Whether it trained to the end; False if it was stopped. The result is in the RUN.

    Raises:
        UserError: The cluster cannot hold so many workers.
        JobError: A worker's error, which trying again would not mend, a DivergedError if it was that; or workers died
            too often.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    use_gpu, resources = _resources(ray.cluster_resources(), n_workers, device, grows=grows)
    # On the machine of this command, so that the loss of no other one takes it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk: Any = ray.remote(_Desk).options(num_cpus=0, scheduling_strategy=here).remote()
    # Seen to be there before anybody else is given it: Ray has been seen to cancel an actor that was still starting
    # when its handle came back from another process, as one that nobody refers to.
    ray.get(desk.look.remote(False))
    task = _Task(
        config=config,
        open_data=open_data,
        run=run,
        use_gpu=use_gpu,
        threads=threads,
        micro_batch=micro_batch,
        initial=initial,
        desk=desk,
    )
    with tempfile.TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as folder:
        fit = _make_fit(task, n_workers, use_gpu, resources, folder)
        found = _watch(fit, desk, stop, n_workers)
    if found is None:
        return False
    if found["error"]:
        raise (DivergedError if found["diverged"] else JobError)(found["error"])
    return found["finished"]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker is given, pickled."""

    config: TrainConfig
    open_data: Callable[[torch.device], TrainingData]
    run: str
    use_gpu: bool
    threads: int | None
    micro_batch: int | None
    initial: Mapping[str, Tensor] | None
    desk: Any


class _Desk:
    """An actor between the command and the first worker: what was said, and whether to stop."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._stopping, self._heard_at = False, 0.0

    def tell(self, text: str) -> bool:
        """From the first worker, at least once a second while it is at its steps: returns whether to stop."""
        self._heard_at = time.monotonic()
        if text:
            self._lines.append(text)
        return self._stopping

    def look(self, stopping: bool) -> tuple[list[str], float | None]:
        """For the command: lines since the last look, and seconds since the first worker was heard; None: never."""
        self._stopping |= stopping
        lines, self._lines = self._lines, []
        return lines, time.monotonic() - self._heard_at if self._heard_at else None


def _resources(
    have: Mapping[str, float | int], n_workers: int, device: str | None, *, grows: bool
) -> tuple[bool, dict]:
    """Whether workers get GPUs, and what each one asks for.

    Raises:
        UserError: There is less than that, and no hope for more.
    """
    n_cpus, n_gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    named = torch.device(device).type if device else None
    use_gpu = named == "cuda" or (named is None and n_gpus > 0)
    if use_gpu and n_workers > n_gpus and not grows:
        raise UserError(
            f"WORKERS={n_workers} need a GPU each, but Ray has {n_gpus:g} GPUs here: lower WORKERS, set RAY_ADDRESS to "
            "a larger cluster, or give DEVICE=cpu"
        )
    if n_workers > n_cpus and not grows and n_cpus < 1:
        raise UserError(f"Ray has {n_cpus:g} CPUs here, for WORKERS={n_workers}: start machines that have some")
    # Workers on a laptop with fewer cores share them: slow, and right.
    cpus = 1.0 if grows or n_workers <= n_cpus else n_cpus / n_workers
    return use_gpu, {"CPU": cpus, **({"GPU": 1} if use_gpu else {})}


def _make_fit(
    task: _Task, n_workers: int, use_gpu: bool, resources: dict[str, float], folder: str
) -> Callable[[], dict[str, Any]]:
    """A function that runs the whole training and returns what the first worker returned."""
    import ray.train
    import ray.train.torch

    v2: Any = ray.train  # its annotations are still those of version 1
    trainer = v2.torch.TorchTrainer(
        lambda: _work(task),
        torch_config=v2.torch.TorchConfig(
            backend=backend_for(torch.device("cuda" if use_gpu else "cpu")), timeout_s=int(TIMEOUT.total_seconds())
        ),
        scaling_config=v2.ScalingConfig(num_workers=n_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=v2.RunConfig(
            storage_path=folder,  # nothing of ours: we report nothing to Ray
            failure_config=v2.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=START_TRIES),
            worker_runtime_env={"env_vars": {**shared_environment(), **_WORKER_ENVIRONMENT}},
        ),
    )
    return lambda: trainer.fit().return_value


def _watch(
    fit: Callable[[], dict[str, Any]], desk: Any, stop: Callable[[], bool], n_workers: int
) -> dict[str, Any] | None:
    """Run `fit` while passing on what the first worker says, and to it the wish to stop.

    Returns:
        What `fit` returns, or None if it was stopped before any worker was at work.
    """
    import ray

    found: list[dict[str, Any]] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(fit())
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            failed.append(error)

    # In a thread, as it blocks and the person may want to stop; a daemon, as there may never be a place for it.
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    wants_stop, lost, waiting_since = False, None, time.monotonic()
    while thread.is_alive():
        thread.join(_POLL_S)
        try:
            wants_stop = wants_stop or stop()
        except UserError as error:  # the RUN is no longer ours: the workers must end first
            wants_stop, lost = True, error
        lines, silent_s = ray.get(desk.look.remote(wants_stop))
        for line in lines:
            say(line)
        if silent_s is None and time.monotonic() - waiting_since > _LOST_S:
            say(f"waiting for {n_workers} workers to start")
            waiting_since = time.monotonic()
        if wants_stop and thread.is_alive() and (silent_s is None or silent_s > _LOST_S):
            break
    for line in ray.get(desk.look.remote(wants_stop))[0]:
        say(line)
    if lost is not None:
        raise lost
    if failed:
        cause = _cause(failed[0], n_workers)
        raise failed[0] if cause is None else JobError(cause) from failed[0]
    return found[0] if found else None


def _cause(error: Exception, n_workers: int) -> str | None:
    """Why Ray Train gave up, in lines that help; None if it did not, and the error is another."""
    workers = getattr(error, "worker_failures", None)  # of Ray's WorkerGroupError
    if getattr(error, "controller_failure", None) is not None:
        return (
            f"Ray Train found no place for WORKERS={n_workers}: {_last_line(error)}. Lower WORKERS or add machines; "
            "the same command goes on"
        )
    if not workers:
        return None
    lines = [f"worker {rank}: {_last_line(failure)}" for rank, failure in sorted(workers.items())]
    return "\n  ".join(
        [
            f"workers died {MAX_FAILURES + 1} times, the last time:",
            *lines,
            "Everything up to the last checkpoint is saved; the same command goes on from there",
        ]
    )


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


# ---------------------------------------------------------------- in a worker


def _work(task: _Task) -> dict[str, Any]:
    """Be one worker: open everything and train. Errors that would come again are returned, not raised."""
    workers = Workers.found()
    with redirect_stderr(_Tee(task.desk)) if workers.is_first else nullcontext():
        try:
            return {"finished": _train(task, workers), "error": "", "diverged": False}
        except (UserError, StoreError, ObjectError) as error:
            return {"finished": False, "error": str(error), "diverged": isinstance(error, DivergedError)}


def _train(task: _Task, workers: Workers) -> bool:
    import ray.train.torch

    opened: list[tuple[Machine, TrainingData, RunFiles]] = []

    def open_all() -> None:
        device = str(ray.train.torch.get_device()) if task.use_gpu else "cpu"
        machine = Machine.found(device, micro_batch=task.micro_batch)
        data = task.open_data(machine.device)
        run = RunFiles(open_objects(task.run))
        if workers.is_first and run.read_config() is None:
            raise UserError(
                f"RUN={task.run} is not there on the machine of the first worker: give a place that all machines "
                "share, such as s3://bucket/prefix"
            )
        opened.append((machine, data, run))

    workers.all_do(open_all)
    machine, data, run = opened[0]
    torch.set_num_threads(task.threads or torch_threads(data.train.spec.dim, workers.local_world_size))
    stop = _Ask(task.desk) if workers.is_first else (lambda: False)
    result = train(task.config, data, run, machine=machine, workers=workers, initial=task.initial, stop=stop)
    return result is not None


class _Ask:
    """Asks the desk whether to stop, once a second at most."""

    def __init__(self, desk: Any) -> None:
        self._desk, self._next, self._stopping = desk, 0.0, False

    def __call__(self) -> bool:
        import ray

        if time.monotonic() >= self._next:
            self._stopping = ray.get(self._desk.tell.remote(""))
            self._next = time.monotonic() + _POLL_S
        return self._stopping


class _Tee(TextIOBase):
    """Standard error of the first worker: into Ray's log of it, and line by line to the desk."""

    def __init__(self, desk: Any) -> None:
        self._desk, self._log, self._rest, self._lock = desk, sys.stderr, "", threading.Lock()

    def write(self, text: str) -> int:
        self._log.write(text)
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._desk.tell.remote(line)
        return len(text)

    def flush(self) -> None:
        self._log.flush()

"""Worker processes as Ray actors, how the driver sees them, and where idle ones wait for more to do."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from infra.cluster import draining_nodes
from pipeline.dispatch import Attempt, Runner, Wanted, attempt

SOUR_AFTER = 3  # raises in a row, on a worker that worked before, after which its process itself is suspected


class ShardActor:
    """One worker process: a runner, and `depth` threads that run shards on it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._runner: Runner | None = None

    def __repr__(self) -> str:
        return self._name

    def place(self) -> tuple[str, str]:
        """Node id and host, answered as soon as the actor has a place to run, before any weights are loaded."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def setup(self, make_runner: Callable[[], Runner]) -> Attempt:
        """Make the runner; a former one goes first, with its memory."""
        former, self._runner = self._runner, None
        close = getattr(former, "close", None)
        if close is not None:
            close()  # its threads, and its listener for faults
        del former, close
        made = attempt(make_runner)
        self._runner = made.report
        return Attempt(cause=made.cause, trace=made.trace, fatal=made.fatal)

    def run(self, shard: int) -> Attempt:
        """Run one shard."""
        assert self._runner is not None
        return attempt(partial(self._runner.run, shard))


@dataclass(eq=False, kw_only=True)
class Worker:
    """The driver's view of an actor. A leaving worker is given nothing more, and retires when it is idle.

    Attributes:
        without: Ids of nodes that it was asked for outside of.
        node_id: Where it is; empty until it has a place.
    """

    name: str
    actor: Any
    asked: Wanted
    without: Set[str] = frozenset()
    node_id: str = ""
    host: str = ""
    ready: bool = False
    leaving: bool = False
    n_done: int = 0
    n_raised_in_a_row: int = 0

    def has_gone_bad(self, result: Attempt) -> bool:
        """Count a result; True when the process, and not the shards, is probably to blame.

        After some CUDA errors everything raises in that process, and only there: innocent shards would be blamed.
        """
        self.n_done += not result.cause
        self.n_raised_in_a_row = self.n_raised_in_a_row + 1 if result.cause else 0
        return self.n_done > 0 and self.n_raised_in_a_row >= SOUR_AFTER


class Spares:
    """Idle workers that one call of `run_on_ray` leaves to the next: their processes have all libraries loaded.

    For calls of one depth and environment. Whoever makes it closes it.
    """

    def __init__(self) -> None:
        self.keeps = True  # False: there will be no next call, so GPUs are handed back at once
        self._workers: list[Worker] = []

    def give(self, worker: Worker) -> bool:
        """Keep a worker, if it is a sound one; whether it is kept."""
        if self.keeps and worker.ready and not worker.leaving:
            self._workers.append(worker)
            return True
        return False

    def take(self, asked: Wanted, without: Set[str]) -> Worker | None:
        """A worker as asked for, outside these nodes, that is to be set up anew; None if there is none."""
        for worker in self._workers:
            if shape(worker.asked) == shape(asked) and worker.node_id not in without | draining_nodes():
                self._workers.remove(worker)
                return Worker(name=worker.name, actor=worker.actor, asked=asked, without=without)
        return None

    def close(self) -> None:
        """Leave no actor behind."""
        while self._workers and ray.is_initialized():
            ray.kill(self._workers.pop().actor)


def shape(wanted: Wanted) -> tuple[int | float, int | float]:
    """What makes one worker as good as another: its cores and GPUs."""
    return wanted.num_cpus, wanted.num_gpus


def living_nodes() -> set[str]:
    """Ids of the nodes that are there. Ray is connected."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def result_of(ref: ray.ObjectRef) -> Any:
    """What a finished call returned; a RayError if its worker is gone or out of reach."""
    try:
        return ray.get(ref)
    except RayTaskError as error:  # outside `attempt`: in practice a report that cannot be pickled
        return Attempt(cause=f"{type(error.cause).__name__}: {error.cause}", trace=str(error))
    except RayError as error:
        return error


def why(error: RayError) -> str:
    """Ray's explanation on one line, without its ids and its list of guesses."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("\t")]
    text = " ".join(lines).split(" Some common causes")[0].removeprefix(ActorDiedError.BASE_ERROR_MSG)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        text += " Fewer shards in flight (depth) or smaller shards need less memory."
    return text.strip()

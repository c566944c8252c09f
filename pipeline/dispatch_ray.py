"""The same book-keeping as `dispatch.py`, over Ray actors: workers may die, hang, never come, or be taken away.

Ray Core only, no Ray Data. We replace actors ourselves (no restarts, no task retries by Ray), because only then is it
known what a dead actor had in flight. Nothing but a shard number goes in and a small report comes out.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from infra.cluster import draining_nodes
from pipeline.dispatch import (
    DEFAULT_DEPTH,
    DEFAULT_TRIES,
    Attempt,
    DispatchError,
    FatalError,
    Ledger,
    NodeLeftOut,
    NoRoom,
    OnEvent,
    Outcome,
    Runner,
    Wanted,
    WorkerLost,
    WorkersReady,
    attempt,
    ignore,
    never,
    settle,
)

POLL_S = 1.0  # how late a stop request or a deadline may be noticed
LOOK_S = 5.0  # between looks at the cluster: what is there, and what will be taken away
NO_ROOM_S = 20.0  # without a place for any worker, after which that is said
NODE_TRIES = 2  # workers that may fail to start on one node, in a row, before it is left out
BOOT_TIMEOUT_S = 1800.0
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
        self._runner = None
        made = attempt(make_runner)
        self._runner = made.report
        return Attempt(cause=made.cause, trace=made.trace, fatal=made.fatal)

    def run(self, shard: int) -> Attempt:
        """Run one shard."""
        assert self._runner is not None
        return attempt(partial(self._runner.run, shard))


@dataclass(eq=False, kw_only=True)
class _Worker:
    """The driver's view of an actor. A leaving worker is given nothing more, and retires when it is idle."""

    name: str
    actor: Any
    asked: Wanted
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
        self._workers: list[_Worker] = []

    def give(self, worker: _Worker) -> bool:
        """Keep a worker, if it is a sound one; whether it is kept."""
        if self.keeps and worker.ready and not worker.leaving:
            self._workers.append(worker)
            return True
        return False

    def take(self, asked: Wanted, without: Set[str]) -> _Worker | None:
        """A worker as asked for, outside these nodes, that is to be set up anew; None if there is none."""
        for worker in self._workers:
            if _shape(worker.asked) == _shape(asked) and worker.node_id not in without | draining_nodes():
                self._workers.remove(worker)
                return _Worker(name=worker.name, actor=worker.actor, asked=asked)
        return None

    def close(self) -> None:
        """Leave no actor behind."""
        while self._workers and ray.is_initialized():
            ray.kill(self._workers.pop().actor)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A method call in flight; shard is None for the two calls that bring a worker up."""

    worker: _Worker
    since: float
    shard: int | None = None
    timeout_s: int | float | None = None


def run_on_ray(
    shards: Iterable[int],
    make_runner: Callable[[], Runner],
    *,
    wanted: Callable[[Set[str]], Wanted],
    depth: int = DEFAULT_DEPTH,
    tries: int = DEFAULT_TRIES,
    boot_tries: int = 5,
    shard_timeout_s: int | float | None = None,
    boot_timeout_s: int | float = BOOT_TIMEOUT_S,
    environment: Mapping[str, str] = MappingProxyType({}),
    stop: Callable[[], bool] = never,
    on_event: OnEvent = ignore,
    name: str = "extract",
    spares: Spares | None = None,
) -> Iterator[Outcome]:
    """Run all shards on a pool of Ray actors. Ray must be connected (`infra.cluster`).

    Args:
        make_runner: Picklable and small; called once in each actor.
        wanted: Which workers there should be, given the ids of nodes where none can start; asked every few seconds, as
            nodes come and go. All are asked of Ray at once: pending ones are the autoscaler's demand. Never more than
            there are shards. Fractions of a GPU share a device.
        depth: Shards in flight per actor, each in a thread of its own; they overlap reading, device and writing.
        tries: See `Ledger`.
        boot_tries: Workers that may fail to start, in a row, before no more are started.
        shard_timeout_s: A shard that runs longer loses its worker. It counts from when it was sent, which is when it
            starts: an actor never has more shards than threads. None: no deadline.
        boot_timeout_s: The same for a worker that has its place and makes its runner, for instance downloads weights.
            Waiting for a place has no deadline: a node may have to be made first.
        environment: Variables that actors on a cluster started by others do not have of themselves.
        stop: As in `run_plain`; noticed within a second.
        name: Actors are named `<name>-<i>` on the dashboard, and their calls `<name>:shard`.
        spares: Where workers come from, and go to when they have nothing to do any more.

    Yields:
        Outcomes as they come. However the iteration ends, no actor outlives it but those in `spares`.

    Raises:
        FatalError: As raised by a runner.
        DispatchError: `boot_tries` workers in a row could not start, and none is running.
    """
    ledger = Ledger(shards, tries=tries, depth=depth, on_event=on_event)
    remote_class = ray.remote(ShardActor)
    numbers = itertools.count()

    def spawn(asked: Wanted, without: Set[str]) -> _Worker:
        spare = spares.take(asked, without) if spares is not None else None
        if spare is not None:
            return spare
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(without))})"} if without else None
        while True:
            worker_name = f"{name}-{next(numbers)}"
            try:
                actor = remote_class.options(
                    name=worker_name,
                    num_cpus=asked.num_cpus,
                    num_gpus=asked.num_gpus,
                    label_selector=elsewhere,
                    max_concurrency=depth,
                    max_restarts=0,
                    max_task_retries=0,
                    scheduling_strategy="SPREAD",
                    runtime_env={"env_vars": dict(environment)} if environment else None,
                ).remote(worker_name)
            except ActorAlreadyExistsError:  # one of an earlier run, just killed, whose name Ray has not yet let go
                continue
            return _Worker(name=worker_name, actor=actor, asked=asked)

    pool = _Pool(
        ledger=ledger, spawn=spawn, make_runner=make_runner, spares=spares, wanted=wanted,
        n_shards=ledger.n_waiting, depth=depth, boot_tries=boot_tries,
        shard_timeout_s=shard_timeout_s, boot_timeout_s=boot_timeout_s, on_event=on_event, call_name=f"{name}:shard",
    )  # fmt: skip
    try:
        while True:
            stopping = stop()
            if not stopping:
                pool.feed()
            if not ledger.n_in_flight and (stopping or not ledger.n_waiting):
                return
            yield from pool.collect()
    finally:
        pool.close()


@dataclass(eq=False, kw_only=True)
class _Pool:
    """Actors and calls in flight; every judgement about shards is the ledger's."""

    ledger: Ledger
    spawn: Callable[[Wanted, Set[str]], _Worker]
    make_runner: Callable[[], Runner]
    spares: Spares | None
    wanted: Callable[[Set[str]], Wanted]
    n_shards: int
    depth: int
    boot_tries: int
    shard_timeout_s: int | float | None
    boot_timeout_s: int | float
    on_event: OnEvent
    call_name: str
    workers: list[_Worker] = field(default_factory=list)
    calls: dict[ray.ObjectRef, _Call] = field(default_factory=dict)
    failed_boots: int = 0  # in a row
    boot_failure: str = ""  # the last one
    failed_on: Counter[str] = field(default_factory=Counter)  # node id -> workers in a row that failed to start there
    left_out: set[str] = field(default_factory=set)  # ids of nodes
    now: Wanted = field(default_factory=lambda: Wanted(n=0, num_cpus=0))  # as last asked
    next_look: float = 0.0
    no_room_since: float | None = None
    last_told: WorkersReady | None = None

    def feed(self) -> None:
        """Give work to the workers, one shard each in turn; send home who is not needed; ask for who is missing."""
        self._look()
        for _ in range(self.depth):
            for worker in self.workers:
                if worker.ready and not worker.leaving:
                    shard = self.ledger.feed(worker.name)
                    if shard is not None:
                        ref = worker.actor.run.options(name=self.call_name).remote(shard)
                        self._call(ref, worker, shard=shard, timeout_s=self.shard_timeout_s)
        for worker in list(self.workers):
            if not self.ledger.load(worker.name) and (worker.leaving or not self.ledger.n_waiting):
                if self.spares is not None and self.spares.give(worker):
                    self._forget(worker)
                else:
                    self._remove(worker)  # hands its GPU back
        self._start_missing()

    def collect(self) -> Iterator[Outcome]:
        """Wait a little, then book what has come back or is overdue."""
        refs = list(self.calls)
        ray.wait(refs, num_returns=1, timeout=POLL_S)
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        results = [(ref, _result(ref)) for ref in done]
        # What a worker finished before it died is booked before its death.
        for ref, result in sorted(results, key=lambda pair: isinstance(pair[1], RayError)):
            call = self.calls.pop(ref, None)
            if call is None:  # went with its worker, a moment ago
                continue
            if isinstance(result, RayError):
                yield from self._lost(call.worker, _why(result), preempted=bool(getattr(result, "preempted", False)))
            elif call.shard is None:
                self._boot_step(call.worker, result)
            else:
                if call.worker.has_gone_bad(result):
                    self._let_go(call.worker, f"{SOUR_AFTER} shards in a row raised in it; a fresh process takes over")
                outcome = settle(self.ledger, call.worker.name, call.shard, result)
                if outcome is not None:
                    yield outcome
        yield from self._end_overdue()

    def close(self) -> None:
        """Leave no actor behind."""
        while self.workers and ray.is_initialized():
            ray.kill(self.workers.pop().actor)

    def _call(self, ref: ray.ObjectRef, worker: _Worker, **more: Any) -> None:
        self.calls[ref] = _Call(worker=worker, since=time.monotonic(), **more)

    def _look(self) -> None:
        """Every few seconds: which workers there should be now, and which nodes will be taken away."""
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_S
        draining = draining_nodes()
        for worker in self.workers:
            if worker.node_id in draining:
                self._let_go(worker, "its node will be taken away; it finishes what it has", preempted=True)
        self.now = self.wanted(self.left_out)
        # Workers that wait for a place ask for what is wanted now; those that have the wrong device are replaced.
        for worker in list(self.workers):
            if not worker.node_id and _shape(worker.asked) != _shape(self.now):
                self._remove(worker)
            elif worker.node_id and worker.asked.num_gpus != self.now.num_gpus:
                self._let_go(worker, "the cluster has other machines for workers now")
        surplus = sum(not worker.leaving for worker in self.workers) - self.now.n
        for worker in [worker for worker in self.workers if not worker.node_id][: max(0, surplus)]:
            self._remove(worker)
        self._tell_no_room()
        self._tell_ready()

    def _tell_no_room(self) -> None:
        """Say once that all wait for a machine that is not there."""
        if self.now.n_fit != 0 or any(worker.node_id for worker in self.workers):
            self.no_room_since = None
        elif self.no_room_since is None:
            self.no_room_since = time.monotonic()
        elif time.monotonic() - self.no_room_since > NO_ROOM_S:
            needs = f"{self.now.num_cpus:g} CPUs and {self.now.num_gpus:g} GPUs"
            self.on_event(NoRoom(needs=needs, have=self.now.have))
            self.no_room_since = float("inf")

    @property
    def _n_wanted(self) -> int:
        return min(self.now.n, self.n_shards)

    def _start_missing(self) -> None:
        staying = sum(not worker.leaving for worker in self.workers)
        missing = min(self._n_wanted, self.ledger.n_waiting) - staying
        if self.failed_boots < self.boot_tries:
            for _ in range(missing):
                worker = self.spawn(self.now, self.left_out)
                self.workers.append(worker)
                self._call(worker.actor.place.remote(), worker)
                self._tell_ready()
        elif missing > 0 and not any(worker.ready for worker in self.workers):
            raise DispatchError(
                f"{self.failed_boots} workers in a row could not start and none is running; the last said:\n"
                f"{self.boot_failure}\nPut that right and run the same command again; finished shards are kept."
            )

    def _boot_step(self, worker: _Worker, result: Attempt | tuple[str, str]) -> None:
        """A worker has got its place, or has made its runner, or has failed to."""
        if isinstance(result, tuple):
            worker.node_id, worker.host = result
            self._call(worker.actor.setup.remote(self.make_runner), worker, timeout_s=self.boot_timeout_s)
        elif result.fatal:
            raise FatalError(result.cause)
        elif result.cause:
            self._boot_failed(worker, result.cause, result.trace)
        else:
            worker.ready, self.failed_boots = True, 0
            self.failed_on.pop(worker.node_id, None)
            self._tell_ready()

    def _boot_failed(self, worker: _Worker, cause: str, trace: str = "") -> None:
        self._remove(worker)
        self.failed_boots += 1
        self.boot_failure = trace or cause
        where = f" on {worker.host}" if worker.host else ""
        self.on_event(WorkerLost(worker=worker.name, cause=f"it could not start{where}: {cause}"))
        self.failed_on[worker.node_id] += 1
        others = any(other.ready and other.node_id != worker.node_id for other in self.workers)
        if others and self.failed_on[worker.node_id] >= NODE_TRIES and worker.node_id not in ("", *self.left_out):
            self.left_out.add(worker.node_id)
            self.failed_boots = 0
            self.next_look = 0.0
            self.on_event(NodeLeftOut(node=worker.host, cause=cause))

    def _lost(self, worker: _Worker, cause: str, *, preempted: bool = False) -> Iterator[Outcome]:
        preempted = preempted or worker.node_id in draining_nodes()
        self.next_look = 0.0  # its node may be gone
        if not worker.ready and not preempted:
            self._boot_failed(worker, cause)
            return
        self._remove(worker)
        self.on_event(WorkerLost(worker=worker.name, cause=cause, preempted=preempted))
        yield from self.ledger.lost(worker.name, cause, preempted=preempted)
        self._tell_ready()

    def _remove(self, worker: _Worker) -> None:
        """Kill the actor, so that it cannot write any more, and forget it and its calls."""
        ray.kill(worker.actor)
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        self.calls = {ref: call for ref, call in self.calls.items() if call.worker is not worker}

    def _end_overdue(self) -> Iterator[Outcome]:
        now = time.monotonic()
        overdue = {}
        unfinished = set(ray.wait(list(self.calls), num_returns=len(self.calls), timeout=0)[1]) if self.calls else set()
        for ref, call in self.calls.items():
            if call.timeout_s is not None and now - call.since > call.timeout_s and ref in unfinished:
                what = "it was not ready" if call.shard is None else f"shard {call.shard} was not done"
                overdue[call.worker] = f"{what} after {call.timeout_s:g} s"
        for worker, cause in overdue.items():
            yield from self._lost(worker, cause)

    def _let_go(self, worker: _Worker, cause: str, *, preempted: bool = False) -> None:
        if not worker.leaving:
            worker.leaving = True
            self.on_event(WorkerLost(worker=worker.name, cause=cause, preempted=preempted))
            self._tell_ready()

    def _tell_ready(self) -> None:
        now = WorkersReady(
            ready=sum(worker.ready and not worker.leaving for worker in self.workers), total=self._n_wanted
        )
        if now != self.last_told:
            self.last_told = now
            self.on_event(now)


def _result(ref: ray.ObjectRef) -> Any:
    """What a finished call returned; a RayError if its worker is gone or out of reach."""
    try:
        return ray.get(ref)
    except RayTaskError as error:  # outside `attempt`: in practice a report that cannot be pickled
        return Attempt(cause=f"{type(error.cause).__name__}: {error.cause}", trace=str(error))
    except RayError as error:
        return error


def _why(error: RayError) -> str:
    """Ray's explanation on one line, without its ids and its list of guesses."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("\t")]
    text = " ".join(lines).split(" Some common causes")[0].removeprefix(ActorDiedError.BASE_ERROR_MSG)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        text += " Fewer shards in flight (depth) or smaller shards need less memory."
    return text.strip()


def _shape(wanted: Wanted) -> tuple[int | float, int | float]:
    return wanted.num_cpus, wanted.num_gpus

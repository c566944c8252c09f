"""The same book-keeping as `dispatch.py`, over Ray actors: workers may die, hang, never come, or be taken away.

Ray Core only, no Ray Data. We replace actors ourselves (no restarts, no task retries by Ray), because only then is it
known what a dead actor had in flight. Nothing but a shard number goes in and a small report comes out.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from pipeline.dispatch import (
    DEFAULT_DEPTH,
    DEFAULT_TRIES,
    Attempt,
    DispatchError,
    FatalError,
    Ledger,
    OnEvent,
    Outcome,
    Runner,
    WorkerLost,
    WorkersReady,
    attempt,
    ignore,
    never,
    settle,
)

POLL_S = 1.0  # how late a stop request or a deadline may be noticed
DRAIN_POLL_S = 5.0
BOOT_TIMEOUT_S = 1800.0
SOUR_AFTER = 3  # raises in a row, on a worker that worked before, after which its process itself is suspected


class ShardActor:
    """One worker process: a runner, and `depth` threads that run shards on it."""

    def __init__(self, name: str, make_runner: Callable[[], Runner]) -> None:
        self._name, self._make_runner = name, make_runner

    def __repr__(self) -> str:
        return self._name

    def node_id(self) -> str:
        """Answered as soon as the actor has a place to run, before any weights are loaded."""
        return ray.get_runtime_context().get_node_id()

    def setup(self) -> Attempt:
        """Make the runner."""
        made = attempt(self._make_runner)
        self._runner = made.report
        return Attempt(cause=made.cause, trace=made.trace, fatal=made.fatal)

    def run(self, shard: int) -> Attempt:
        """Run one shard."""
        return attempt(partial(self._runner.run, shard))


@dataclass(eq=False, kw_only=True)
class _Worker:
    """The driver's view of an actor. A leaving worker is given nothing more, and retires when it is idle."""

    name: str
    actor: Any
    node_id: str = ""
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
    n_actors: int,
    num_cpus: int | float,
    num_gpus: int | float = 0,
    depth: int = DEFAULT_DEPTH,
    tries: int = DEFAULT_TRIES,
    boot_tries: int = 5,
    shard_timeout_s: int | float | None = None,
    boot_timeout_s: int | float = BOOT_TIMEOUT_S,
    environment: Mapping[str, str] = MappingProxyType({}),
    stop: Callable[[], bool] = never,
    on_event: OnEvent = ignore,
    name: str = "extract",
) -> Iterator[Outcome]:
    """Run all shards on a pool of Ray actors. Ray must be connected (`infra.cluster`).

    Args:
        make_runner: Picklable and small; called once in each actor.
        n_actors: Workers asked for, all at once: pending ones are the autoscaler's demand. Never more than shards.
        num_cpus: Per actor. Ray gives a worker process this many OpenMP threads.
        num_gpus: Per actor; fractions share a device.
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

    Yields:
        Outcomes as they come. However the iteration ends, no actor outlives it.

    Raises:
        FatalError: As raised by a runner.
        DispatchError: `boot_tries` workers in a row could not start, and none is running.
    """
    ledger = Ledger(shards, tries=tries, depth=depth, on_event=on_event)
    n_actors = min(n_actors, ledger.n_waiting)
    remote_class = ray.remote(ShardActor)
    numbers = itertools.count()

    def spawn() -> _Worker:
        while True:
            worker_name = f"{name}-{next(numbers)}"
            try:
                actor = remote_class.options(
                    name=worker_name,
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    max_concurrency=depth,
                    max_restarts=0,
                    max_task_retries=0,
                    scheduling_strategy="SPREAD",
                    runtime_env={"env_vars": dict(environment)} if environment else None,
                ).remote(worker_name, make_runner)
            except ActorAlreadyExistsError:  # one of an earlier run, just killed, whose name Ray has not yet let go
                continue
            return _Worker(name=worker_name, actor=actor)

    pool = _Pool(
        ledger=ledger, spawn=spawn, n_actors=n_actors, depth=depth, boot_tries=boot_tries,
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
    spawn: Callable[[], _Worker]
    n_actors: int
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
    next_drain_poll: float = 0.0
    last_told: WorkersReady | None = None

    def feed(self) -> None:
        """Give work to the workers, one shard each in turn; send home who is not needed; ask for who is missing."""
        self._note_draining_nodes()
        for _ in range(self.depth):
            for worker in self.workers:
                if worker.ready and not worker.leaving:
                    shard = self.ledger.feed(worker.name)
                    if shard is not None:
                        ref = worker.actor.run.options(name=self.call_name).remote(shard)
                        self._call(ref, worker, shard=shard, timeout_s=self.shard_timeout_s)
        for worker in list(self.workers):
            if not self.ledger.load(worker.name) and (worker.leaving or not self.ledger.n_waiting):
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

    def _start_missing(self) -> None:
        staying = sum(not worker.leaving for worker in self.workers)
        missing = min(self.n_actors, self.ledger.n_waiting) - staying
        if self.failed_boots < self.boot_tries:
            for _ in range(missing):
                worker = self.spawn()
                self.workers.append(worker)
                self._call(worker.actor.node_id.remote(), worker)
                self._tell_ready()
        elif missing > 0 and not any(worker.ready for worker in self.workers):
            raise DispatchError(
                f"{self.failed_boots} workers in a row could not start and none is running; the last said:\n"
                f"{self.boot_failure}\nPut that right and run the same command again; finished shards are kept."
            )

    def _boot_step(self, worker: _Worker, result: Attempt | str) -> None:
        """A worker has got its place, or has made its runner, or has failed to."""
        if isinstance(result, str):
            worker.node_id = result
            self._call(worker.actor.setup.remote(), worker, timeout_s=self.boot_timeout_s)
        elif result.fatal:
            raise FatalError(result.cause)
        elif result.cause:
            self._boot_failed(worker, result.cause, result.trace)
        else:
            worker.ready, self.failed_boots = True, 0
            self._tell_ready()

    def _boot_failed(self, worker: _Worker, cause: str, trace: str = "") -> None:
        self._remove(worker)
        self.failed_boots += 1
        self.boot_failure = trace or cause
        self.on_event(WorkerLost(worker=worker.name, cause=f"it could not start: {cause}"))

    def _lost(self, worker: _Worker, cause: str, *, preempted: bool = False) -> Iterator[Outcome]:
        preempted = preempted or worker.node_id in _draining_nodes()
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

    def _note_draining_nodes(self) -> None:
        if time.monotonic() >= self.next_drain_poll:
            self.next_drain_poll = time.monotonic() + DRAIN_POLL_S
            draining = _draining_nodes()
            for worker in self.workers:
                if worker.node_id in draining:
                    self._let_go(worker, "its node will be taken away; it finishes what it has", preempted=True)

    def _let_go(self, worker: _Worker, cause: str, *, preempted: bool = False) -> None:
        if not worker.leaving:
            worker.leaving = True
            self.on_event(WorkerLost(worker=worker.name, cause=cause, preempted=preempted))
            self._tell_ready()

    def _tell_ready(self) -> None:
        now = WorkersReady(
            ready=sum(worker.ready and not worker.leaving for worker in self.workers), total=self.n_actors
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


def _draining_nodes() -> set[str]:
    """Ids of nodes that will soon be taken away.

    A private call of Ray, right for 2.60. Where it does not work we lose the early notice and nothing else.
    """
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except (ImportError, AttributeError, RuntimeError, RayError):
        return set()

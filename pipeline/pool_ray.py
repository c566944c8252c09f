"""The pool of Ray actors behind `run_on_ray`: who has what in flight, who comes, who goes."""

import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from infra.cluster import draining_nodes
from pipeline.boots import Boots
from pipeline.dispatch import (
    Attempt,
    DispatchError,
    FatalError,
    Ledger,
    NoRoom,
    OnEvent,
    Outcome,
    Runner,
    Wanted,
    WorkerLost,
    WorkersReady,
    settle,
)
from pipeline.workers_ray import SOUR_AFTER, Spares, Worker, living_nodes, result_of, shape, why

POLL_S = 1.0  # how late a stop request or a deadline may be noticed
LOOK_S = 5.0  # between looks at the cluster: what is there, and what will be taken away
NO_ROOM_S = 20.0  # without a place for any worker, after which that is said
PLACE_S = 30.0  # more than an actor takes to say where it is, from when it has a place


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A method call in flight; shard is None for the two calls that bring a worker up."""

    worker: Worker
    since: float
    shard: int | None = None
    timeout_s: int | float | None = None


@dataclass(eq=False, kw_only=True)
class Pool:
    """Actors and calls in flight; every judgement about shards is the ledger's."""

    ledger: Ledger
    spawn: Callable[[Wanted, frozenset[str]], Worker]
    make_runner: Callable[[], Runner]
    spares: Spares | None
    wanted: Callable[[Set[str]], Wanted]
    n_shards: int
    depth: int
    boots: Boots
    shard_timeout_s: int | float | None
    boot_timeout_s: int | float
    on_event: OnEvent
    call_name: str
    workers: list[Worker] = field(default_factory=list)
    calls: dict[ray.ObjectRef, _Call] = field(default_factory=dict)
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
        results = [(ref, result_of(ref)) for ref in done]
        # What a worker finished before it died is booked before its death.
        for ref, result in sorted(results, key=lambda pair: isinstance(pair[1], RayError)):
            call = self.calls.pop(ref, None)
            if call is None:  # went with its worker, a moment ago
                continue
            if isinstance(result, RayError):
                yield from self._lost(call.worker, why(result), preempted=bool(getattr(result, "preempted", False)))
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

    def _call(self, ref: ray.ObjectRef, worker: Worker, **more: Any) -> None:
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
        self.boots.keep(living_nodes())
        left_out = self.boots.left_out
        self.now = self.wanted(left_out)
        # Workers that wait for a place ask for what is wanted now; those that have the wrong device are replaced.
        for worker in list(self.workers):
            if not worker.node_id and (shape(worker.asked), worker.without) != (shape(self.now), left_out):
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
        left_out = self.boots.left_out
        self.boots.judge({worker.node_id for worker in self.workers if worker.node_id and not worker.leaving})
        if self.boots.left_out - left_out:
            self.next_look = 0.0  # fewer workers fit, and those that wait for a place are to wait for others
        staying = sum(not worker.leaving for worker in self.workers)
        missing = min(self._n_wanted, self.ledger.n_waiting) - staying
        if self.boots.exhausted():
            self._wait_for_those_there()
            return
        for _ in range(missing):
            worker = self.spawn(self.now, self.boots.left_out)
            self.workers.append(worker)
            self._call(worker.actor.place.remote(), worker)
            self._tell_ready()

    def _wait_for_those_there(self) -> None:
        """Too many could not start: whoever has a place goes on, and may show that the job is not to blame."""
        if not self.ledger.n_waiting:
            return
        if self.workers and self.boots.suspend() > PLACE_S:
            for worker in [worker for worker in self.workers if not worker.node_id]:
                self._remove(worker)  # there may be thousands in the queue for a place, all to fail
        if not self.workers:
            raise DispatchError(
                f"{self.boots.n_failed} workers in a row could not start and none is running; the last said:\n"
                f"{self.boots.last_trace}\nPut that right and run the same command again; finished shards are kept."
            )

    def _boot_step(self, worker: Worker, result: Attempt | tuple[str, str]) -> None:
        """A worker has got its place, or has made its runner, or has failed to."""
        if isinstance(result, tuple):
            worker.node_id, worker.host = result
            self._call(worker.actor.setup.remote(self.make_runner), worker, timeout_s=self.boot_timeout_s)
        elif result.fatal:
            raise FatalError(result.cause)
        elif result.cause:
            self._boot_failed(worker, result.cause, result.trace)
        else:
            worker.ready = True
            self.boots.started(worker.node_id)
            self._tell_ready()

    def _boot_failed(self, worker: Worker, cause: str, trace: str = "") -> None:
        self._remove(worker)
        if not worker.node_id or worker.node_id in living_nodes():
            self.boots.failed(worker.node_id, worker.host, cause, trace)
        where = f" on {worker.host}" if worker.host else ""
        self.on_event(WorkerLost(worker=worker.name, cause=f"it could not start{where}: {cause}"))

    def _lost(self, worker: Worker, cause: str, *, preempted: bool = False) -> Iterator[Outcome]:
        preempted = preempted or worker.node_id in draining_nodes()
        self.next_look = 0.0  # its node may be gone
        if not worker.ready and not preempted:
            self._boot_failed(worker, cause)
            return
        self._remove(worker)
        self.on_event(WorkerLost(worker=worker.name, cause=cause, preempted=preempted))
        yield from self.ledger.lost(worker.name, cause, preempted=preempted)
        self._tell_ready()

    def _remove(self, worker: Worker) -> None:
        """Kill the actor, so that it cannot write any more, and forget it and its calls."""
        ray.kill(worker.actor)
        self._forget(worker)

    def _forget(self, worker: Worker) -> None:
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

    def _let_go(self, worker: Worker, cause: str, *, preempted: bool = False) -> None:
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

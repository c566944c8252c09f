"""The rules of the pool of workers, with a pretended Ray whose machines, time and failures the test decides.

Only the calls to Ray are pretended; `feed` and `collect` are called as `run_on_ray` calls them.
"""

import os
from collections.abc import Callable, Iterator, Set
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from pipeline import pool_ray
from pipeline.boots import AGAIN_S, NODE_TRIES, Boots
from pipeline.dispatch import (
    Attempt,
    DispatchError,
    Event,
    Ledger,
    NodeLeftOut,
    NoRoom,
    Outcome,
    StartsSuspended,
    Wanted,
    WorkerLost,
)
from pipeline.pool_ray import LOOK_S, NO_ROOM_S, PLACE_S, Pool
from pipeline.workers_ray import Worker

TRIES = 5
BAD = Attempt(cause="no images here", trace="Traceback ...\nno images here")


class Call:
    """A method of an actor: calling it gives a reference whose result the test sets."""

    def options(self, **_: Any) -> "Call":
        return self

    def remote(self, *_: Any) -> ray.ObjectRef:
        return ray.ObjectRef(os.urandom(28))


class World:
    """Machines, time, and one pool of workers.

    Attributes:
        n: How many workers are wanted.
        n_fit: How many of them the machines can hold.
        living: Nodes that are there.
    """

    def __init__(self, n: int, n_shards: int = 100) -> None:
        self.now, self.n, self.n_fit = 0.0, n, n
        self.living: set[str] = set()
        self.draining: set[str] = set()
        self.results: dict[ray.ObjectRef, Any] = {}
        self.killed: list[Any] = []
        self.events: list[Event] = []
        self.outcomes: list[Outcome] = []
        self.n_spawned = 0
        self.asked_without: list[Set[str]] = []
        self.ledger = Ledger(range(n_shards), depth=2, on_event=self.events.append)
        self.pool = Pool(
            ledger=self.ledger, spawn=self.spawn, make_runner=SimpleNamespace, spares=None, wanted=self.wanted,
            n_shards=n_shards, depth=2, boots=Boots(tries=TRIES, on_event=self.events.append, clock=self.clock),
            shard_timeout_s=60.0, boot_timeout_s=600.0, on_event=self.events.append, call_name="x",
        )  # fmt: skip

    def clock(self) -> float:
        return self.now

    def wanted(self, without: Set[str]) -> Wanted:
        self.asked_without.append(without)
        return Wanted(n=self.n, num_cpus=1, n_fit=self.n_fit, have="the largest machine has nothing")

    def spawn(self, asked: Wanted, without: frozenset[str]) -> Worker:
        self.n_spawned += 1
        actor = SimpleNamespace(place=Call(), setup=Call(), run=Call())
        return Worker(name=f"e-{self.n_spawned}", actor=actor, asked=asked, without=without)

    def wait(self, refs: list[ray.ObjectRef], num_returns: int, timeout: float) -> tuple[list, list]:
        done = [ref for ref in refs if ref in self.results]
        return done, [ref for ref in refs if ref not in self.results]

    def step(self, seconds: float = 1.0) -> None:
        """Time goes by, then one turn of the loop of `run_on_ray`."""
        self.now += seconds
        self.outcomes += self.pool.collect()
        self.pool.feed()

    def answer(self, worker: Worker, result: Any) -> None:
        """The oldest call to a worker that has no answer yet gets this one."""
        mine = [ref for ref, call in self.pool.calls.items() if call.worker is worker]
        self.results[next(ref for ref in mine if ref not in self.results)] = result

    def place(self, worker: Worker, node: str) -> None:
        self.living.add(node)
        self.answer(worker, (node, f"host-{node}"))
        self.step()
        assert worker.node_id == node

    def start(self, worker: Worker, node: str) -> None:
        """It gets its place and gets ready."""
        self.place(worker, node)
        self.answer(worker, Attempt())
        self.step()
        assert worker.ready

    def fail(self, worker: Worker, node: str) -> None:
        """It gets its place and cannot start there."""
        self.place(worker, node)
        self.answer(worker, BAD)
        self.step()
        assert worker not in self.pool.workers

    def finish(self) -> None:
        """All shards in flight are done."""
        self.results |= {ref: Attempt(report="done") for ref, call in self.pool.calls.items() if call.shard is not None}

    def kill(self, node: str) -> None:
        """The machine goes, and all workers on it."""
        self.living.discard(node)
        for worker in [worker for worker in self.pool.workers if worker.node_id == node]:
            self.answer(worker, RayError("its node has died"))
        self.step()

    @property
    def waiting(self) -> list[Worker]:
        """Workers without a place."""
        return [worker for worker in self.pool.workers if not worker.node_id]

    def said(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    def make(n: int, **more: int) -> World:
        world = World(n, **more)
        pretended = SimpleNamespace(kill=world.killed.append, is_initialized=lambda: True, wait=world.wait)
        monkeypatch.setattr(pool_ray, "ray", pretended)
        monkeypatch.setattr(pool_ray, "time", SimpleNamespace(monotonic=world.clock))
        monkeypatch.setattr(pool_ray, "result_of", world.results.__getitem__)
        monkeypatch.setattr(pool_ray, "living_nodes", lambda: set(world.living))
        monkeypatch.setattr(pool_ray, "draining_nodes", lambda: set(world.draining))
        world.pool.feed()
        return world

    return make


def test_a_bad_machine_is_left_out_while_the_good_one_still_loads(world: Callable[..., World]) -> None:
    w = world(2)
    good, _ = w.pool.workers
    w.place(good, "good")
    for _ in range(NODE_TRIES):
        w.fail(w.waiting[0], "bad")
    assert [event.node for event in w.said(NodeLeftOut)] == ["host-bad"]
    w.step()
    assert w.asked_without[-1] == {"bad"}
    assert [worker.without for worker in w.waiting] == [{"bad"}]
    w.answer(good, Attempt())
    w.step()
    assert good.ready
    assert len(w.pool.workers) == 2
    assert not w.said(StartsSuspended)


def test_a_bad_machine_does_not_end_the_job_before_the_good_one_has_said_where_it_is(
    world: Callable[..., World],
) -> None:
    w = world(2)
    good = w.pool.workers[0]
    for _ in range(TRIES):
        w.fail(w.waiting[-1], "bad")
    assert len(w.said(StartsSuspended)) == 1
    assert w.pool.workers == [good]
    w.place(good, "good")  # now the machine can be blamed, and the suspension is over
    assert [event.node for event in w.said(NodeLeftOut)] == ["host-bad"]
    assert len(w.pool.workers) == 2


def test_the_job_ends_when_nobody_is_there_who_could_still_start(world: Callable[..., World]) -> None:
    w = world(2)
    for _ in range(TRIES - 1):
        w.fail(w.waiting[0], "only")
    last, other = w.waiting
    w.place(other, "only")
    w.fail(last, "only")  # the fifth; the other still loads
    w.answer(other, BAD)
    with pytest.raises(DispatchError, match=r"6 workers in a row could not start(.|\n)*no images here"):
        w.step()
    assert w.n_spawned == TRIES + 1


def test_those_who_wait_for_a_place_in_vain_do_not_keep_the_job_waiting(world: Callable[..., World]) -> None:
    w = world(100, n_shards=200)
    for _ in range(TRIES):
        w.fail(w.waiting[0], "only")
    assert len(w.pool.workers) == 99
    with pytest.raises(DispatchError, match="5 workers in a row"):
        w.step(PLACE_S + 1)
    assert w.n_spawned < 100 + TRIES


def test_a_node_that_dies_while_its_workers_load_costs_no_capacity(world: Callable[..., World]) -> None:
    w = world(9)
    w.start(w.waiting[0], "a")
    for worker in w.waiting:
        w.place(worker, "b")
    w.kill("b")
    assert len(w.said(WorkerLost)) == 8
    assert not w.said(NodeLeftOut)
    assert not w.said(StartsSuspended)
    assert len(w.waiting) == 8
    assert all(worker.without == frozenset() for worker in w.waiting)
    for worker in w.waiting:
        w.start(worker, "c")
    assert sum(worker.ready for worker in w.pool.workers) == 9


def test_the_same_where_the_death_of_the_workers_is_known_before_that_of_the_node(world: Callable[..., World]) -> None:
    w = world(9)
    w.start(w.waiting[0], "a")
    for worker in w.waiting:
        w.place(worker, "b")
    for worker in w.pool.workers[1:]:
        w.answer(worker, RayError("its node has died"))
    w.step()
    assert len(w.waiting) == 8
    assert len(w.said(NodeLeftOut)) == 1
    w.living.discard("b")
    w.step(LOOK_S)
    w.step()
    assert {worker.without for worker in w.waiting} == {frozenset()}
    assert len(w.waiting) == 8


def test_starting_is_suspended_and_goes_on_later_while_others_work(world: Callable[..., World]) -> None:
    w = world(3)
    w.start(w.waiting[0], "a")
    for _ in range(TRIES):  # they die before anybody knows where they were
        w.answer(w.waiting[0], RayError("it died"))
        w.step()
    (said,) = w.said(StartsSuspended)
    assert (said.n_failed, said.seconds) == (TRIES, AGAIN_S)
    n = w.n_spawned
    for _ in range(int(AGAIN_S / 30) - 1):
        w.finish()
        w.step(30)
    assert w.n_spawned == n
    assert len(w.pool.workers) == 1
    assert w.outcomes
    w.finish()
    w.step(31)
    assert len(w.waiting) == 2
    for worker in w.waiting:
        w.start(worker, "a")
    assert len(w.said(StartsSuspended)) == 1


def test_a_node_that_was_left_out_gets_another_chance(world: Callable[..., World]) -> None:
    w = world(2)
    w.place(w.waiting[0], "good")
    for _ in range(NODE_TRIES):
        w.fail(w.waiting[0], "bad")
    w.step()
    assert [worker.without for worker in w.waiting] == [{"bad"}]
    w.step(AGAIN_S)
    assert [worker.without for worker in w.waiting] == [frozenset()]
    assert w.asked_without[-1] == frozenset()
    w.start(w.waiting[0], "bad")


def test_a_lost_worker_is_replaced_and_its_shards_are_suspects(world: Callable[..., World]) -> None:
    w = world(2)
    first, second = w.pool.workers
    w.start(first, "a")
    w.start(second, "b")
    assert w.ledger.load(first.name) == 2
    w.kill("a")
    assert len(w.waiting) == 1
    assert first not in w.pool.workers
    assert [event.preempted for event in w.said(WorkerLost)] == [False]
    assert w.ledger.load(first.name) == 0
    assert not w.outcomes


def test_a_deadline_is_of_each_shard_and_not_of_the_job(world: Callable[..., World]) -> None:
    w = world(1, n_shards=20)
    (worker,) = w.pool.workers
    w.start(worker, "a")
    for _ in range(10):  # two at a time
        w.step(w.pool.shard_timeout_s)
        w.finish()
        w.step(0)
    assert len(w.outcomes) == 20
    assert not w.said(WorkerLost)


def test_a_shard_past_its_deadline_loses_its_worker(world: Callable[..., World]) -> None:
    w = world(1)
    (worker,) = w.pool.workers
    w.start(worker, "a")
    w.step(w.pool.shard_timeout_s)
    assert not w.said(WorkerLost)
    w.step(1)
    assert [event.cause for event in w.said(WorkerLost)] == ["shard 1 was not done after 60 s"]
    assert w.killed == [worker.actor]
    assert len(w.waiting) == 1


def test_a_worker_on_a_draining_node_finishes_gets_nothing_more_and_is_replaced(world: Callable[..., World]) -> None:
    w = world(1)
    (worker,) = w.pool.workers
    w.start(worker, "a")
    w.draining.add("a")
    w.step(LOOK_S)
    assert worker.leaving
    assert len(w.waiting) == 1
    w.finish()
    w.step()
    assert len(w.outcomes) == 2
    assert worker not in w.pool.workers
    assert w.killed == [worker.actor]


def test_no_room_is_said_once_and_again_only_after_there_was_some(world: Callable[..., World]) -> None:
    w = world(1)
    w.n_fit = 0
    for _ in range(10):
        w.step(LOOK_S)
    (said,) = w.said(NoRoom)
    assert (said.needs, said.have) == ("1 CPUs and 0 GPUs", "the largest machine has nothing")
    w.n_fit = 1
    w.start(w.waiting[0], "a")
    w.step(LOOK_S)
    w.n_fit = 0
    w.kill("a")
    w.step(LOOK_S)
    w.step(NO_ROOM_S - 2 * LOOK_S)
    assert len(w.said(NoRoom)) == 1
    for _ in range(3):
        w.step(LOOK_S)
    assert len(w.said(NoRoom)) == 2

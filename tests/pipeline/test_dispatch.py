"""The blame rule by property, and the plain loop by behaviour."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dispatch import (
    Attempt,
    Event,
    FatalError,
    FinalError,
    Ledger,
    Outcome,
    ShardQuarantined,
    ShardRetried,
    ShardSuspected,
    WorkersReady,
    run_plain,
)

GOOD, RAISES, KILLS = "good", "raises", "kills"


@dataclass
class World:
    """Workers and shards driven step by step by drawn choices; the ledger is the only thing under test."""

    habits: list[list[str]]  # per shard, what it does each time it runs; the last entry goes on for ever
    n_workers: int
    depth: int
    tries: int
    outcomes: list[Outcome] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    runs: Counter[int] = field(default_factory=Counter)
    disturbed: set[int] = field(default_factory=set)  # shards that were on a worker which died
    in_flight: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(range(len(self.habits)), tries=self.tries, depth=self.depth, on_event=self.events.append)
        self.in_flight = {worker: set() for worker in range(self.n_workers)}

    def feed(self, worker: int) -> None:
        while (shard := self.ledger.feed(worker)) is not None:
            self.in_flight[worker].add(shard)
            self.runs[shard] += 1
            if self.disturbed & self.in_flight[worker]:
                assert len(self.in_flight[worker]) == 1, "a suspect has company"
            assert len(self.in_flight[worker]) <= self.depth

    def end(self, worker: int, shard: int) -> None:
        habits = self.habits[shard]
        habit = habits[min(self.runs[shard], len(habits)) - 1]
        if habit == KILLS:
            self.lose(worker, preempted=False)
            return
        self.in_flight[worker].remove(shard)
        if habit == RAISES:
            outcome = self.ledger.raised(worker, shard, "it raised")
            self.outcomes += [outcome] if outcome else []
        else:
            self.outcomes.append(self.ledger.finished(worker, shard, f"report {shard}"))

    def lose(self, worker: int, *, preempted: bool) -> None:
        if not preempted:
            self.disturbed |= self.in_flight[worker]
        self.in_flight[worker].clear()
        self.outcomes += self.ledger.lost(worker, "it died", preempted=preempted)


def play(world: World, data: st.DataObject, n_preemptions: int) -> None:
    """Let things happen in an order that hypothesis chooses, until nothing can happen any more."""
    for _ in range(40 * len(world.habits) + 40):
        busy = [(w, s) for w, shards in world.in_flight.items() for s in sorted(shards)]
        hungry = list(world.in_flight) if world.ledger.n_waiting else []
        if not busy and not hungry:
            return
        if n_preemptions and busy and data.draw(st.integers(0, 5)) == 0:
            n_preemptions -= 1
            world.lose(data.draw(st.sampled_from(busy))[0], preempted=True)
        elif hungry and (not busy or data.draw(st.booleans())):
            world.feed(data.draw(st.sampled_from(hungry)))
        elif busy:
            world.end(*data.draw(st.sampled_from(busy)))
    raise AssertionError("the ledger does not come to an end")


habits = st.one_of(
    st.just([GOOD]),
    st.just([RAISES]),
    st.just([KILLS]),
    st.lists(st.sampled_from([GOOD, RAISES, KILLS]), min_size=1, max_size=5),
)


@given(
    data=st.data(),
    shards=st.lists(habits, max_size=9),
    n_workers=st.integers(1, 4),
    depth=st.integers(1, 4),
    tries=st.integers(1, 3),
    n_preemptions=st.integers(0, 3),
)
def test_every_shard_ends_once_and_only_the_guilty_are_quarantined(
    data: st.DataObject, shards: list[list[str]], n_workers: int, depth: int, tries: int, n_preemptions: int
) -> None:
    world = World(habits=shards, n_workers=n_workers, depth=depth, tries=tries)
    play(world, data, n_preemptions)

    assert sorted(outcome.shard for outcome in world.outcomes) == list(range(len(shards)))
    assert world.ledger.n_waiting == world.ledger.n_in_flight == 0
    for outcome in world.outcomes:
        did = shards[outcome.shard]
        seen = [did[min(run, len(did) - 1)] for run in range(world.runs[outcome.shard])]
        assert outcome.attempts == world.runs[outcome.shard]
        if outcome.ok:
            assert outcome.report == f"report {outcome.shard}"
            assert seen[-1] == GOOD
        else:
            # Never without having raised `tries` times, or killed `tries` times itself.
            assert seen.count(RAISES) >= tries or seen.count(KILLS) >= tries
        if set(did) == {GOOD}:
            assert outcome.ok
        if did in ([RAISES], [KILLS]):
            assert not outcome.ok
            # One run in company, the strikes alone, and whatever was pre-empted or ended by a neighbour.
            assert outcome.attempts <= tries + 1 + n_preemptions
    given_up = [event.shard for event in world.events if isinstance(event, ShardQuarantined)]
    assert sorted(given_up) == sorted(outcome.shard for outcome in world.outcomes if not outcome.ok)


def test_a_death_in_company_is_no_strike_and_a_death_alone_is() -> None:
    ledger = Ledger([0, 1], tries=1, depth=2)
    assert [ledger.feed("w"), ledger.feed("w"), ledger.feed("w")] == [0, 1, None]
    assert ledger.lost("w", "killed") == []
    assert [ledger.feed("w"), ledger.feed("w")] == [0, None]  # alone, though there is room for two
    (outcome,) = ledger.lost("w", "killed")
    assert (outcome.shard, outcome.ok, outcome.attempts) == (0, False, 2)
    assert "killed" in outcome.cause


def test_a_shard_whose_company_has_left_is_still_not_alone() -> None:
    ledger = Ledger([0, 1], tries=1, depth=2)
    ledger.feed("w")
    ledger.feed("w")
    ledger.finished("w", 1, None)
    assert ledger.lost("w", "killed") == []  # shard 1 may have left the damage behind


def test_preemption_costs_nothing_however_often() -> None:
    ledger = Ledger([0], tries=1, depth=1)
    for _ in range(20):
        assert ledger.feed("w") == 0
        assert ledger.lost("w", "spot", preempted=True) == []
    assert ledger.feed("w") == 0
    assert ledger.finished("w", 0, "r").attempts == 21


@pytest.mark.parametrize(
    ("arguments", "match"), [({"shards": [1, 1]}, "twice"), ({"shards": [1], "tries": 0}, "tries")]
)
def test_the_ledger_refuses_nonsense(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Ledger(**arguments)


def test_preempted_company_is_not_suspected() -> None:
    ledger = Ledger([0, 1], tries=1, depth=2)
    ledger.feed("w")
    ledger.feed("w")
    ledger.lost("w", "spot", preempted=True)
    assert {ledger.feed("w"), ledger.feed("w")} == {0, 1}


@dataclass
class Runner:
    """Runs a function, and keeps count."""

    work: Callable[[int], object]
    runs: Counter[int] = field(default_factory=Counter)

    def run(self, shard: int) -> object:
        self.runs[shard] += 1
        return self.work(shard)


def test_plain_runs_every_shard_once() -> None:
    runner = Runner(lambda shard: shard * 10)
    outcomes = list(run_plain(range(7), lambda: runner, depth=3))
    assert sorted((o.shard, o.ok, o.report, o.attempts) for o in outcomes) == [(i, True, 10 * i, 1) for i in range(7)]
    assert runner.runs == dict.fromkeys(range(7), 1)


def test_plain_retries_what_raises_and_quarantines_it_alone() -> None:
    def work(shard: int) -> str:
        if shard == 2 or (shard == 4 and runner.runs[4] < 3):
            raise OSError(f"no disk for {shard}")
        return "done"

    runner, events = Runner(work), []
    outcomes = {o.shard: o for o in run_plain(range(6), lambda: runner, depth=2, on_event=events.append)}
    assert [shard for shard, outcome in sorted(outcomes.items()) if not outcome.ok] == [2]
    assert outcomes[2].cause == "OSError: no disk for 2"
    assert "in work" in outcomes[2].trace
    assert (outcomes[2].attempts, outcomes[4].attempts) == (3, 3)
    assert sum(isinstance(event, ShardRetried) for event in events) == 4
    assert not any(isinstance(event, ShardSuspected) for event in events)
    assert WorkersReady(ready=1, total=1) in events


def test_plain_tries_what_can_never_pass_once() -> None:
    runs: Counter[int] = Counter()

    class Runner:
        def run(self, shard: int) -> int:
            runs[shard] += 1
            if shard == 1:
                raise FinalError("too large for float16")
            return shard

    outcomes = {o.shard: o for o in run_plain(range(3), Runner, tries=3)}
    assert runs == {0: 1, 1: 1, 2: 1}
    assert (outcomes[1].ok, outcomes[1].attempts) == (False, 1)
    assert "too large for float16" in outcomes[1].cause
    assert outcomes[0].ok
    assert outcomes[2].ok


def test_plain_overlaps_shards_and_never_more_than_depth() -> None:
    together = threading.Barrier(3, timeout=200)  # passes only if three shards are in flight at once
    now, most = 0, 0
    lock = threading.Lock()

    def work(shard: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait()
        with lock:
            now -= 1

    assert all(outcome.ok for outcome in run_plain(range(6), lambda: Runner(work), depth=3))
    assert most == 3


def test_plain_stops_after_what_is_in_flight() -> None:
    runner, seen = Runner(lambda shard: time.sleep(0.01)), []
    for outcome in run_plain(range(50), lambda: runner, depth=2, stop=lambda: len(seen) >= 3):
        seen.append(outcome.shard)
    assert 3 <= len(seen) <= 5
    assert sorted(runner.runs) == sorted(seen)


def test_plain_makes_no_runner_for_nothing() -> None:
    def forbidden() -> Runner:
        raise AssertionError("nothing to do, so no teacher should be loaded")

    assert list(run_plain([], forbidden)) == []
    assert list(run_plain([1], forbidden, stop=lambda: True)) == []


class DiskFullError(FatalError):
    """As a writer would raise it."""


def test_plain_ends_at_once_when_no_shard_can_pass() -> None:
    def work(shard: int) -> None:
        if shard == 1:
            raise DiskFullError("no space left for layer_00/cls/c/1")

    runner = Runner(work)
    with pytest.raises(FatalError, match="no space left for layer_00/cls/c/1"):
        list(run_plain(range(100), lambda: runner, depth=1))
    assert runner.runs == {0: 1, 1: 1}


def test_plain_finishes_what_is_beside_the_fatal_one_and_begins_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    given: queue.SimpleQueue[Future[Attempt]] = queue.SimpleQueue()

    class Told(ThreadPoolExecutor):
        def submit(self, work: Callable[..., Attempt], /, *args: object, **named: object) -> Future[Attempt]:
            future = super().submit(work, *args, **named)
            given.put(future)
            return future

    monkeypatch.setattr("pipeline.dispatch.ThreadPoolExecutor", Told)
    finished = []

    def work(shard: int) -> None:
        if shard == 1:
            raise DiskFullError("no space left for layer_00/cls/c/1")
        if shard == 0:  # it ends after the other, wherever the threads stand still
            _, of_1 = given.get(timeout=200), given.get(timeout=200)
            assert of_1.result(timeout=200).fatal
        finished.append(shard)

    runner = Runner(work)
    with pytest.raises(FatalError, match="no space left for layer_00/cls/c/1"):
        list(run_plain(range(100), lambda: runner, depth=2))
    assert runner.runs == {0: 1, 1: 1}
    assert finished == [0]


def test_plain_closed_early_leaves_no_thread_running() -> None:
    runner = Runner(lambda shard: time.sleep(0.02))
    outcomes = run_plain(range(50), lambda: runner, depth=3)
    next(outcomes)
    outcomes.close()
    n_runs = sum(runner.runs.values())
    assert n_runs <= 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard")]

"""The Ray dispatcher on real Ray: killed, hanging, raising and failing workers, and what is left behind (nothing).

Workers import this module: it needs nothing that takes them seconds.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.dispatch import (
    DispatchError,
    Event,
    FatalError,
    Outcome,
    ShardRetried,
    ShardSuspected,
    Wanted,
    WorkerLost,
    WorkersReady,
)
from tests.kills import lives, wait_for

pytestmark = pytest.mark.ray


class PickyError(Exception):
    """Cannot be unpickled: as many of our errors it takes other arguments than its message."""

    def __init__(self, key: str, expected: int) -> None:
        super().__init__(f"{key} has not {expected} bytes")


@dataclass(frozen=True)
class Behaviour:
    """A runner whose shards misbehave as listed. Picklable, and its own factory. Every run leaves a line in `log`."""

    log: Path
    kills: tuple[int, ...] = ()
    hangs: tuple[int, ...] = ()
    raises: tuple[int, ...] = ()
    fatal: tuple[int, ...] = ()
    kills_once: tuple[int, ...] = ()
    seconds: float = 0.0
    together: int = 0
    bad_starts: int = 0
    stuck_starts: int = 0

    def __call__(self) -> "Behaviour":
        nth = note(self.log, "start")
        if nth <= self.stuck_starts:
            time.sleep(3600)
        if nth <= self.bad_starts:
            raise RuntimeError("the weights are not there")
        return self

    def run(self, shard: int) -> dict:
        nth = note(self.log, f"shard-{shard}")
        time.sleep(self.seconds)
        if self.together:
            self._wait_for_others(shard)
        if shard in self.kills or (shard in self.kills_once and nth == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard in self.hangs:
            time.sleep(3600)
        if shard in self.fatal:
            raise FatalError("no space left on device")
        if shard in self.raises:
            raise PickyError(f"shard {shard}", 7)
        return {"shard": shard, "pid": os.getpid()}

    def _wait_for_others(self, shard: int) -> None:
        (self.log / f"at-once-{shard}").touch()
        deadline = time.monotonic() + 60
        while len(list(self.log.glob("at-once-*"))) < self.together:
            assert time.monotonic() < deadline, "alone for a minute"
            time.sleep(0.01)


def note(log: Path, what: str) -> int:
    """Count something across processes; returns how often it has happened, this time included."""
    path = log / what
    with path.open("ab") as file:
        file.write(b".")
    return path.stat().st_size


def runs(log: Path) -> dict[int, int]:
    """How often each shard was started."""
    return {int(path.name[6:]): path.stat().st_size for path in log.glob("shard-*")}


def assert_never_run_more_than_booked(outcomes: Iterable[Outcome], log: Path) -> None:
    """A shard may be handed to a worker that is already dying, so fewer runs than attempts are possible."""
    for outcome in outcomes:
        assert 1 <= runs(log)[outcome.shard] <= outcome.attempts


@pytest.fixture
def start(ray_cluster: None, tmp_path: Path) -> Iterator:
    """Call it to run shards; afterwards no actor of ours may be alive."""
    from pipeline.dispatch_ray import run_on_ray

    events: list[Event] = []

    def start_(shards: range, behaviour: Behaviour | None = None, **settings: object) -> Iterator[Outcome]:
        make_runner = replace(behaviour, log=tmp_path) if behaviour else Behaviour(tmp_path)
        names = {"n_actors": "n", "num_cpus": "num_cpus", "num_gpus": "num_gpus"}
        asked = {names[name]: settings.pop(name) for name in names if name in settings}
        wanted = Wanted(**({"n": 2, "num_cpus": 1} | asked))
        return run_on_ray(shards, make_runner, wanted=lambda _: wanted, **({"on_event": events.append} | settings))

    start_.events = events  # type: ignore[attr-defined]
    yield start_
    assert living_actors() == []


def living_actors() -> list[str]:
    """Names of the dispatcher's actors that Ray still knows, given a moment to notice a kill."""
    import ray

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        names = [name for name in ray.util.list_named_actors() if name.startswith("extract-")]
        if not names:
            return []
        time.sleep(0.1)
    return names


HERE = Path()  # replaced by the fixture


def test_all_shards_are_done_and_the_workers_are_announced(start) -> None:
    outcomes = list(start(range(20), num_cpus=2))
    assert sorted(o.shard for o in outcomes) == list(range(20))
    assert all(o.ok and o.attempts == 1 and o.report["shard"] == o.shard for o in outcomes)
    ready = [str(event) for event in start.events if isinstance(event, WorkersReady)]
    assert ready[:2] == ["0 of 2 workers ready", "1 of 2 workers ready"]


def test_killer_hanger_and_raiser_are_quarantined_and_nobody_else(start, tmp_path) -> None:
    behaviour = Behaviour(HERE, kills=(4,), hangs=(9,), raises=(12,), seconds=0.02)
    outcomes = {o.shard: o for o in start(range(24), behaviour, shard_timeout_s=8, tries=2)}
    assert sorted(outcomes) == list(range(24))
    assert [shard for shard, o in sorted(outcomes.items()) if not o.ok] == [4, 9, 12]
    assert "process has died" in outcomes[4].cause
    assert "shard 9 was not done after 8 s" in outcomes[9].cause
    assert outcomes[12].cause == "PickyError: shard 12 has not 7 bytes"
    assert "in run" in outcomes[12].trace
    assert all(2 <= outcomes[bad].attempts <= 4 for bad in (4, 9, 12))
    assert_never_run_more_than_booked(outcomes.values(), tmp_path)


def test_a_worker_killed_from_outside_costs_a_rerun_and_nothing_else(start, tmp_path) -> None:
    pids, outcomes = set(), []
    for outcome in start(range(30), Behaviour(HERE, seconds=0.05)):
        outcomes.append(outcome)
        if outcome.report["pid"] not in pids and len(pids) < 3:
            pids.add(outcome.report["pid"])
            os.kill(outcome.report["pid"], signal.SIGKILL)
    assert sorted(o.shard for o in outcomes) == list(range(30))
    assert all(o.ok for o in outcomes)
    assert sum(isinstance(event, WorkerLost) for event in start.events) == 3
    assert_never_run_more_than_booked(outcomes, tmp_path)
    assert any(isinstance(event, ShardSuspected | ShardRetried) for event in start.events)


def test_depth_shards_run_at_once_in_one_worker(start) -> None:
    """Each waits for two others that have begun."""
    outcomes = list(start(range(9), Behaviour(HERE, together=3), n_actors=1, depth=3))
    assert all(o.ok and o.attempts == 1 for o in outcomes)


def test_workers_that_cannot_start_are_bounded(start, tmp_path) -> None:
    behaviour = Behaviour(HERE, bad_starts=1000)
    with pytest.raises(DispatchError, match="the weights are not there"):
        list(start(range(4), behaviour, n_actors=1, boot_tries=2))
    assert (tmp_path / "start").stat().st_size == 2
    assert runs(tmp_path) == {}


def test_a_worker_that_starts_at_the_third_try_is_welcome(start) -> None:
    behaviour = Behaviour(HERE, stuck_starts=1, bad_starts=2)
    outcomes = list(start(range(4), behaviour, n_actors=1, boot_tries=3, boot_timeout_s=10))
    assert all(o.ok for o in outcomes)
    assert len(outcomes) == 4
    lost = [event.cause for event in start.events if isinstance(event, WorkerLost)]
    assert "it was not ready after 10 s" in lost[0]
    assert "the weights are not there" in lost[1]


def test_a_fatal_error_ends_the_job(start, tmp_path) -> None:
    with pytest.raises(FatalError, match="no space left on device"):
        list(start(range(200), Behaviour(HERE, fatal=(3,), seconds=0.02)))
    assert len(runs(tmp_path)) < 100


def test_stop_finishes_what_is_in_flight(start, tmp_path) -> None:
    seen = []
    for outcome in start(range(200), Behaviour(HERE, seconds=0.05), stop=lambda: len(seen) >= 5):
        assert outcome.ok
        seen.append(outcome.shard)
    assert 5 <= len(seen) <= 5 + 2 * 3
    assert sorted(runs(tmp_path)) == sorted(seen)  # nothing was started and dropped


def test_closed_early_it_leaves_no_actor(start) -> None:
    outcomes = start(range(200), Behaviour(HERE, seconds=0.02), n_actors=6)  # only four find a place here
    assert next(outcomes).ok
    outcomes.close()  # the fixture looks for survivors
    assert {event.total for event in start.events if isinstance(event, WorkersReady)} == {6}


def test_nonsense_for_ray_is_an_error_and_not_a_wait(start) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        list(start(range(2), num_gpus=1.5))


def test_a_poisoned_process_is_replaced_before_it_gets_innocents_quarantined(start, tmp_path) -> None:
    outcomes = list(start(range(12), PoisonedFactory(tmp_path), n_actors=1))
    assert sorted(o.shard for o in outcomes) == list(range(12))
    assert all(o.ok for o in outcomes)
    assert any("a fresh process takes over" in str(event) for event in start.events)


@dataclass(frozen=True)
class PoisonedFactory:
    """Its first process works for two shards and then raises for ever, as after a CUDA error."""

    log: Path

    def __call__(self) -> "PoisonedRunner":
        return PoisonedRunner(works_for=2 if note(self.log, "start") == 1 else 1000)


class PoisonedRunner:
    def __init__(self, works_for: int) -> None:
        self._left = iter(range(works_for))

    def run(self, shard: int) -> None:
        if next(self._left, None) is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_worker_no_machine_here_can_hold_is_refused(ray_cluster: None) -> None:
    import ray

    from infra.cluster import Connection, check_fits
    from infra.console import UserError

    here = Connection(
        address=ray.get_runtime_context().gcs_address, embedded=True, owned=False, dashboard_url="", needs_token=False
    )
    check_fits(num_cpus=4, num_gpus=0, connection=here)
    with pytest.raises(UserError, match="needs 5 CPUs and 0 GPUs, but this machine has 4 CPUs"):
        check_fits(num_cpus=5, num_gpus=0, connection=here)


class Says:
    """A runner that tells what it was made with."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self) -> "Says":
        return self

    def run(self, shard: int) -> tuple[str, int]:
        return self._what, os.getpid()


def run_all(what: str, spares: Any, wanted: Wanted, n: int = 4) -> list[tuple[str, int]]:
    from pipeline.dispatch_ray import run_on_ray

    outcomes = list(run_on_ray(range(n), Says(what), wanted=lambda _: wanted, depth=1, spares=spares))
    assert all(outcome.ok for outcome in outcomes)
    return [outcome.report for outcome in outcomes]


def test_a_spare_is_set_up_anew_and_only_for_what_it_fits(ray_cluster: None) -> None:
    from pipeline.workers_ray import Spares

    one, half = Wanted(n=1, num_cpus=1), Wanted(n=1, num_cpus=0.5)
    spares = Spares()
    first = run_all("first", spares, one)
    second = run_all("second", spares, one)
    assert {what for what, _ in second} == {"second"}
    assert {pid for _, pid in first} == {pid for _, pid in second}
    other = run_all("other", spares, half)
    assert {pid for _, pid in other}.isdisjoint({pid for _, pid in first}), "it has other cores"
    spares.close()
    pids = {pid for _, pid in first + other}
    assert wait_for(lambda: not any(map(lives, pids)))


def test_a_spare_that_has_died_is_replaced(ray_cluster: None) -> None:
    from pipeline.workers_ray import Spares

    spares = Spares()
    ((_, pid), *_) = run_all("first", spares, Wanted(n=1, num_cpus=1))
    os.kill(pid, signal.SIGKILL)
    second = run_all("second", spares, Wanted(n=1, num_cpus=1))
    assert pid not in {pid for _, pid in second}
    spares.keeps = False
    ((_, pid), *_) = run_all("third", spares, Wanted(n=1, num_cpus=1))
    assert wait_for(lambda: not lives(pid)), "nobody comes after it"
    spares.close()

"""What follows from failures to start, by itself: which node is left out, when starting is suspended, until when."""

import pytest

from pipeline.boots import AGAIN_S, NODE_TRIES, Boots
from pipeline.dispatch import Event, NodeLeftOut, StartsSuspended

TRIES = 5


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def boots(clock: Clock, events: list[Event]) -> Boots:
    return Boots(tries=TRIES, on_event=events.append, clock=clock)


def fail(boots: Boots, node: str, n: int = 1) -> None:
    for _ in range(n):
        boots.failed(node, f"host of {node}", "no images here", "Traceback ...\nno images here")


def test_a_node_is_left_out_only_while_others_have_workers(boots: Boots, events: list[Event]) -> None:
    fail(boots, "bad", NODE_TRIES)
    boots.judge(set())
    boots.judge({"bad"})  # another worker of its own says nothing
    assert boots.left_out == frozenset()
    assert boots.n_failed == NODE_TRIES
    boots.judge({"bad", "good"})
    assert boots.left_out == {"bad"}
    assert boots.n_failed == 0  # the node takes the blame
    boots.judge({"good"})
    assert events == [NodeLeftOut(node="host of bad", cause="no images here", seconds=AGAIN_S)]
    assert "host of bad is left out for 5 min" in str(events[0])


def test_one_failure_is_forgiven_and_a_success_starts_the_count_anew(boots: Boots) -> None:
    fail(boots, "a", NODE_TRIES - 1)
    boots.started("a")
    fail(boots, "a", NODE_TRIES - 1)
    boots.judge({"b"})
    assert boots.left_out == frozenset()


def test_a_success_elsewhere_does_not_hide_a_bad_node(boots: Boots) -> None:
    fail(boots, "bad")
    boots.started("good")
    fail(boots, "bad", NODE_TRIES - 1)
    boots.judge({"good"})
    assert boots.left_out == {"bad"}


def test_a_node_comes_back_and_stays_away_twice_as_long_if_it_fails_again(
    boots: Boots, clock: Clock, events: list[Event]
) -> None:
    away = []
    fail(boots, "bad", NODE_TRIES)
    for _ in range(3):
        boots.judge({"good"})
        since = clock.now
        while boots.left_out:
            clock.now += 1
        away.append(clock.now - since)
        boots.judge({"good"})
        assert not boots.left_out  # it is given another chance
        fail(boots, "bad")  # and one failure is enough
    assert away == [AGAIN_S, 2 * AGAIN_S, 4 * AGAIN_S]
    boots.started("bad")
    fail(boots, "bad", NODE_TRIES)
    boots.judge({"good"})
    assert [event.seconds / AGAIN_S for event in events if isinstance(event, NodeLeftOut)] == [1, 2, 4, 1]


def test_what_fails_on_a_node_that_is_left_out_does_not_count(boots: Boots) -> None:
    fail(boots, "bad", NODE_TRIES)
    boots.judge({"good"})
    fail(boots, "bad", 3 * TRIES)
    assert boots.n_failed == 0
    assert not boots.exhausted()


def test_what_failed_on_a_node_that_has_died_does_not_count(boots: Boots) -> None:
    fail(boots, "dead", TRIES)
    fail(boots, "alive")
    fail(boots, "")
    boots.keep({"alive"})
    assert boots.n_failed == 2
    boots.judge({"other"})
    assert boots.left_out == frozenset()


def test_too_many_failures_suspend_starting_and_its_end_gives_all_tries_back(
    boots: Boots, clock: Clock, events: list[Event]
) -> None:
    for seconds in (AGAIN_S, 2 * AGAIN_S):
        fail(boots, "", TRIES - 1)  # nobody knows where: no node can take the blame
        assert not boots.exhausted()
        fail(boots, "")
        assert boots.exhausted()
        assert boots.suspend() == 0
        clock.now += seconds - 1
        assert boots.exhausted()
        assert boots.suspend() == seconds - 1
        clock.now += 1
        assert not boots.exhausted()
    said = [event for event in events if isinstance(event, StartsSuspended)]
    assert [(event.n_failed, event.seconds) for event in said] == [(TRIES, AGAIN_S), (TRIES, 2 * AGAIN_S)]
    assert "no more workers are started for 5 min" in str(said[0])
    assert boots.last_trace.startswith("Traceback")


@pytest.mark.parametrize("end", ["started", "judge", "keep"])
def test_a_suspension_ends_when_the_job_is_not_to_blame(boots: Boots, end: str) -> None:
    fail(boots, "bad", TRIES)
    boots.suspend()
    assert boots.exhausted()
    if end == "started":
        boots.started("good")
    elif end == "judge":
        boots.judge({"good"})
    else:
        boots.keep({"good"})
    assert not boots.exhausted()
    fail(boots, "other", TRIES)
    assert boots.exhausted()
    assert boots.suspend() == 0

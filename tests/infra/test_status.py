"""Heartbeats: who is alive, who is dead, and how long it takes to know."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from infra.status import (
    Beat,
    Heartbeat,
    find_living,
    is_dead,
    kernel_id,
    my_heartbeat,
    process_start,
    status_document,
)

MINE = Heartbeat(host="here", kernel="k1", pid=10, started=5.0, time=1000.0, run_id="r")


def starts(table: dict[int, float]):
    return lambda pid: table.get(pid)


@pytest.mark.parametrize(
    ("kernel", "now", "processes", "dead"),
    [
        ("k1", 1001.0, {10: 5.0}, False),  # same machine, same process
        ("k1", 9999.0, {10: 5.0}, False),  # it lives, however late its heartbeat is: a stopped laptop
        ("k1", 1001.0, {}, True),  # gone: dead at once
        ("k1", 1001.0, {10: 6.0}, True),  # another process has its number now
        ("k2", 1059.0, {10: 5.0}, False),  # elsewhere, recent
        ("k2", 1061.0, {10: 5.0}, True),  # elsewhere, silent for more than 60 s
        ("k2", 900.0, {}, False),  # elsewhere, its clock ahead of ours
    ],
)
def test_the_rule(kernel: str, now: float, processes: dict[int, float], dead: bool) -> None:
    assert is_dead(MINE, now, kernel=kernel, start_of=starts(processes)) is dead


def test_a_heartbeat_survives_the_document_and_nonsense_is_no_heartbeat() -> None:
    mine = my_heartbeat("run-7", now=12.5)
    assert Heartbeat.from_bytes(mine.to_bytes()) == mine
    assert str(mine) == f"run run-7, process {os.getpid()} on {mine.host}"
    for document in (b"", b"{}", b"[]", mine.to_bytes()[:-9], b'{"host": 1, "pid": "x"}', b"\xff"):
        assert Heartbeat.from_bytes(document) is None


def test_real_processes_living_killed_and_zombie() -> None:
    assert process_start(os.getpid()) == process_start(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    beat = replace(my_heartbeat("r", time.time()), pid=child.pid, started=process_start(child.pid))
    assert not is_dead(beat, beat.time, kernel=kernel_id())
    assert is_dead(replace(beat, started=beat.started - 1), beat.time, kernel=kernel_id())
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not is_dead(beat, beat.time, kernel=kernel_id()) and time.monotonic() < deadline:
        time.sleep(0.02)  # killed and not yet reaped: a zombie
    assert is_dead(beat, beat.time, kernel=kernel_id())
    child.wait()
    child.stdin.close()
    assert process_start(child.pid) is None


class Story:
    """A clock that sleeps at once, and a heartbeat document that changes with it."""

    def __init__(self, beats_until: float, skew: float = 0.0, first_beat: float = 0.0) -> None:
        self.now, self.beats_until, self.skew, self.first_beat = 0.0, beats_until, skew, first_beat
        self.said: list[str] = []

    def read(self) -> Heartbeat:
        last = max(self.first_beat, min(self.now, self.beats_until) // 10 * 10)
        return replace(MINE, time=last + self.skew)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def find(self, kernel: str = "k2", processes: dict[int, float] | None = None) -> Heartbeat | None:
        return find_living(
            self.read, say=self.said.append, kernel=kernel, clock=lambda: self.now, sleep=self.sleep,
            start_of=starts(processes or {}),
        )  # fmt: skip


def test_on_the_same_machine_there_is_no_waiting() -> None:
    story = Story(beats_until=0)
    assert story.find("k1", {10: 5.0}) == MINE.__class__(**{**MINE.__dict__, "time": 0.0})
    assert story.find("k1", {}) is None
    assert story.now == 0
    assert story.said == []


@pytest.mark.parametrize("skew", [0.0, 3600.0, -30.0])
def test_elsewhere_a_renewed_heartbeat_means_life(skew: float) -> None:
    story = Story(beats_until=1e9, skew=skew)
    assert story.find() is not None
    assert story.now <= 12


@pytest.mark.parametrize(("skew", "waits"), [(0.0, 60.0), (3600.0, 60.0), (-45.0, 15.0), (-500.0, 0.0)])
def test_elsewhere_a_silent_heartbeat_dies_within_a_minute_of_our_clock(skew: float, waits: float) -> None:
    story = Story(beats_until=0, skew=skew)
    assert story.find() is None
    assert story.now == pytest.approx(waits, abs=2.1)
    if waits:
        assert "run r, process 10 on here" in story.said[0]
        assert len(story.said) <= 7


def test_no_heartbeat_means_the_way_is_free() -> None:
    assert find_living(lambda: None, say=lambda text: None) is None


def test_the_beat_writes_first_last_and_in_between() -> None:
    written: list[int] = []
    third = threading.Event()

    def write() -> None:
        written.append(len(written))
        if len(written) == 3:
            third.set()

    with Beat(write, every_s=0.01) as beat:
        assert written
        assert third.wait(200)
        beat.check()
    count = len(written)
    time.sleep(0.05)
    assert len(written) == count


def beating_into(error: Exception, now: list[float]) -> Beat:
    """A beat whose first write works and whose later ones raise."""
    calls: list[None] = []

    def write() -> None:
        calls.append(None)
        if len(calls) > 1:
            raise error

    return Beat(write, every_s=0.01, clock=lambda: now[0])


def wait_until_it_raises(beat: Beat) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        beat.check()
        time.sleep(0.01)


def test_a_failing_store_ends_the_job_only_after_a_minute() -> None:
    now = [0.0]
    beat = beating_into(OSError("503"), now)
    with pytest.raises(OSError, match="503"), beat:
        outlive_a_minute(beat, now)


def outlive_a_minute(beat: Beat, now: list[float]) -> None:
    time.sleep(0.05)
    beat.check()
    now[0] = 61.0
    wait_until_it_raises(beat)


def test_an_unexpected_error_in_the_beat_is_raised_at_once() -> None:
    with pytest.raises(ZeroDivisionError), beating_into(ZeroDivisionError(), [0.0]) as beat:
        wait_until_it_raises(beat)


def test_status_is_json_for_people() -> None:
    document = status_document(run_id="r", now=3.0, images_done=5, images_per_s=2.5)
    assert document.decode().startswith('{\n "run_id": "r",\n "time": 3.0,\n "images_done": 5')

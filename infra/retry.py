"""Trying again what failed for a while: with back-off, within a deadline, and never in silence."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from infra.console import human_duration, say
from infra.faults import FAULTS, Kind

_LOOK_S = 1.0
SILENT_S = 20.0  # a request that takes longer is said, and again after as long

Result = TypeVar("Result")

_local = threading.local()


class TransientError(Exception):
    """An attempt failed in a way that may pass; the message is the cause, `kind` the same in a word."""

    def __init__(self, cause: str, kind: Kind = "other") -> None:
        super().__init__(cause)
        self.kind = kind


class DeadlineError(Exception):
    """The time is up; the message says how often and how long it was tried, and the last cause."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often to try.

    Attributes:
        deadline_s: From the first attempt to giving up.
        first_wait_s: Before the second attempt, at most; doubled for each further one.
        longest_wait_s: Between attempts.
    """

    deadline_s: float = 300.0
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0


def persist(
    what: str, attempt: Callable[[float], Result], patience: Patience, *, least_s: float, extra_s: float = 0.0
) -> Result:
    """Call until it succeeds.

    Args:
        what: Is done, as printed: "reading s3://bucket/key".
        attempt: Is given the seconds that are left, which it must not exceed.
        patience: How long.
        least_s: No attempt is begun with less time than that.
        extra_s: Added to the deadline, for what is large.

    Raises:
        DeadlineError: Time is up.
        Exception: Whatever else the attempt raises, at once.
    """
    began = time.monotonic()
    end = began + patience.deadline_s + extra_s
    for n in itertools.count(1):
        try:
            with watched(what, end):
                return attempt(end - time.monotonic())
        except TransientError as error:
            FAULTS.note(error.kind)
            wait = random.uniform(0.5, 1) * min(patience.longest_wait_s, patience.first_wait_s * 2 ** (n - 1))
            left = end - time.monotonic() - wait
            if left < least_s or _is_pointless():
                spent = human_duration(time.monotonic() - began)
                tries = "once" if n == 1 else f"{n} times"
                raise DeadlineError(f"{error}; tried {tries} in {spent}") from error
            say(f"{what}: {error}; again in {human_duration(wait)}, for {human_duration(left)} more")
            time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def pointless_once(stopped: Callable[[], bool]) -> Iterator[None]:
    """While this lasts, this thread tries nothing again once `stopped` says that nobody waits for it any more."""
    _local.stopped = stopped
    try:
        yield
    finally:
        del _local.stopped


def _is_pointless() -> bool:
    return getattr(_local, "stopped", lambda: False)()


class _Watch:
    """Says of each request in flight, now and then, that it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._in_flight: dict[int, tuple[str, float, float]] = {}
        self._thread: threading.Thread | None = None

    def begin(self, what: str, end: float) -> int:
        if self._thread is None or not self._thread.is_alive():
            self._start()
        number = next(self._numbers)
        self._in_flight[number] = (what, time.monotonic(), end)
        return number

    def finish(self, number: int) -> None:
        del self._in_flight[number]

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, name="s3-watch", daemon=True)
                self._thread.start()

    def _look(self) -> None:
        said: dict[int, float] = {}
        while True:
            time.sleep(_LOOK_S)
            now, flying = time.monotonic(), dict(self._in_flight)
            said = {number: at for number, at in said.items() if number in flying}
            due = [number for number, (_, began, _) in flying.items() if now - said.get(number, began) >= SILENT_S]
            if due:
                said |= dict.fromkeys(due, now)
                what, began, end = flying[due[0]]
                more = f"; {len(due) - 1} more requests likewise" if len(due) > 1 else ""
                took, left = human_duration(now - began), human_duration(end - now)
                say(f"{what}: no end after {took}; given up after {left} more{more}")


_watch = _Watch()


@contextmanager
def watched(what: str, end: float) -> Iterator[None]:
    """While this lasts, the person is told every 20 s that it does."""
    number = _watch.begin(what, end)
    try:
        yield
    finally:
        _watch.finish(number)

"""Requests that failed in a way that may pass: counted in this process, by place and kind, and told to who listens."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Where = Literal["store", "network", "source"]
"""The store answered, with an error; no whole answer of it came; or an image could not be read, for either reason."""

Kind = Literal["throttled", "server", "timeout", "reset", "refused", "unreachable", "cut_off", "denied", "io", "other"]
_ANSWERS = ("throttled", "server", "denied")

Listener = Callable[[Where, Kind], None]


class Faults:
    """Counts of faults. Threads may share it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    def note(self, kind: Kind) -> None:
        """Count one."""
        at_source = getattr(self._local, "at_source", False)
        where: Where = "source" if at_source else "store" if kind in _ANSWERS else "network"
        with self._lock:
            self._counts[f"{where} {kind}"] += 1
            listeners = list(self._listeners)
        for listener in listeners:
            listener(where, kind)

    def counts(self) -> Counter[str]:
        """How many so far, by "where kind", such as "store throttled"."""
        with self._lock:
            return Counter(self._counts)

    @contextmanager
    def at_source(self) -> Iterator[None]:
        """While this lasts, faults in this thread are of the source of images."""
        self._local.at_source = True
        try:
            yield
        finally:
            self._local.at_source = False

    @contextmanager
    def told_to(self, listener: Listener) -> Iterator[None]:
        """While this lasts, each fault is told, in the thread in which it happened."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)


COMMON: tuple[tuple[Where, Kind], ...] = (
    ("store", "throttled"),
    ("store", "server"),
    ("network", "timeout"),
    ("network", "reset"),
    ("source", "io"),
)
"""Those that are shown from the start, as zero: a rise from nothing is none to Prometheus."""

FAULTS = Faults()
"""Those of this process."""

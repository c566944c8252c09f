"""The documents that tell others about a running job: status.json for people and tools, the heartbeat for a second job.

The heartbeat decides whether a store is in use: dead at once if its process is gone on this host, else when it has not
been renewed for 60 s.
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

BEAT_EVERY_S = 10.0
DEAD_AFTER_S = 60.0
MAX_SIGN_NBYTES = 2**16  # of a heartbeat, or a claim; nothing larger is read in their place
_MAX_PID = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """A sign of life of one process.

    Attributes:
        host: Name of the machine or container, for people.
        kernel: Identifies the running kernel and its process table (boot and pid namespace): only where it is equal
            do process numbers mean the same. Host names alone repeat between containers and survive a reboot.
        pid: Process number there.
        started: When that process began, as `process_start` says it; tells it from a later process with its number.
        time: When this was written, seconds since 1970 by the writer's clock.
        run_id: Which run this is.
        ready: Whether others may join it: what it prepares for all has been prepared.
    """

    host: str
    kernel: str
    pid: int
    started: float
    time: float
    run_id: str
    ready: bool = True

    def to_bytes(self) -> bytes:
        """As a JSON document."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, document: bytes) -> "Heartbeat | None":
        """Read a document; None if it is not a heartbeat (torn, foreign), which then says nothing about any process."""
        try:
            found = json.loads(document if len(document) <= MAX_SIGN_NBYTES else b"")
            heartbeat = cls(
                host=str(found["host"]),
                kernel=str(found["kernel"]),
                pid=int(found["pid"]),
                started=float(found["started"]),
                time=float(found["time"]),
                run_id=str(found["run_id"]),
                ready=bool(found.get("ready", True)),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None
        # A time that is no number would differ from itself for ever, as that of a job which renews it.
        plain = math.isfinite(heartbeat.started) and math.isfinite(heartbeat.time) and 0 < heartbeat.pid <= _MAX_PID
        return heartbeat if plain and f"{heartbeat}{heartbeat.kernel}".isprintable() else None

    def __str__(self) -> str:
        return f"run {self.run_id}, process {self.pid} on {self.host}"


def my_heartbeat(run_id: str, now: float, *, ready: bool = True) -> Heartbeat:
    """The heartbeat of this process."""
    pid = os.getpid()
    started = process_start(pid)
    assert started is not None, "this process exists"
    return Heartbeat(
        host=socket.gethostname(),
        kernel=kernel_id(),
        pid=pid,
        started=started,
        time=now,
        run_id=run_id,
        ready=ready,
    )


def kernel_id() -> str:
    """Names this boot of this machine and our pid namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and namespace.is_symlink():
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def process_start(pid: int) -> float | None:
    """When a process of this machine began, in a unit of its own that never jumps; None if it is gone.

    A zombie is gone: a killed driver stays one for as long as nobody reaps it, which in a container can be for ever.
    """
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            # Clock ticks since boot, field 22; the name in field 2 may hold blanks and brackets. Unlike psutil's
            # create_time it does not move when the system's clock is corrected.
            return float(stat.read_text().rpartition(")")[2].split()[19])
        return process.create_time()
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return None


def is_dead(
    heartbeat: Heartbeat,
    now: float,
    *,
    kernel: str,
    start_of: Callable[[int], float | None] = process_start,
) -> bool:
    """Whether the process that wrote this heartbeat has certainly ended, or must be given up.

    Args:
        now: Seconds since 1970.
        kernel: Ours, from `kernel_id`.
        start_of: When the process with a number began, None if there is none.
    """
    if heartbeat.kernel == kernel:
        return start_of(heartbeat.pid) != heartbeat.started
    return now - heartbeat.time > DEAD_AFTER_S


def find_living(
    read: Callable[[], Heartbeat | None],
    *,
    say: Callable[[str], None],
    kernel: str | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
    start_of: Callable[[int], float | None] = process_start,
) -> Heartbeat | None:
    """Find out whether another job is alive, waiting up to 60 s where only time can tell.

    A heartbeat from another machine may be the last one of a job that was killed seconds ago. So it is watched: when
    it is renewed, its job lives; when it stays the same for 60 s of our own clock, it is dead, whatever its clock says.

    Args:
        read: The newest heartbeat, None if there is none.
        say: Told why we wait, at most every 10 s.

    Returns:
        The other job's heartbeat if it lives, None if the way is free.
    """
    kernel = kernel_id() if kernel is None else kernel
    first, watched_since, last_said = read(), clock(), float("-inf")
    while True:
        now, latest = clock(), read()
        if first is None or latest is None or is_dead(latest, now, kernel=kernel, start_of=start_of):
            return None
        if latest.kernel == kernel or latest.time != first.time:
            return latest
        left = DEAD_AFTER_S - max(now - watched_since, now - latest.time)
        if left <= 0:
            return None
        if now - last_said >= BEAT_EVERY_S:
            say(f"waiting up to {left:.0f} s to see whether {first} is still alive")
            last_said = now
        sleep(min(2.0, left))


class Watch:
    """Tells over a long time which of several other jobs live, as `find_living` does for one at one moment.

    A heartbeat from another machine counts as a sign of life when it differs from the one seen before; 60 s of our own
    clock without one, and its job is dead.
    """

    def __init__(
        self,
        *,
        kernel: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        start_of: Callable[[int], float | None] = process_start,
    ) -> None:
        self._kernel = kernel_id() if kernel is None else kernel
        self._clock, self._start_of = clock, start_of
        self._seen: dict[str, tuple[float, float]] = {}  # by run: its last time, and ours when we first saw that

    def living(self, found: Iterable[Heartbeat]) -> set[str]:
        """Ids of the runs that live, of those whose heartbeats have just been read."""
        return {heartbeat.run_id for heartbeat in found if self._lives(heartbeat)}

    def _lives(self, heartbeat: Heartbeat) -> bool:
        if heartbeat.kernel == self._kernel:
            return self._start_of(heartbeat.pid) == heartbeat.started
        last, since = self._seen.get(heartbeat.run_id, (None, 0.0))
        if last != heartbeat.time:
            since = self._clock()
            self._seen[heartbeat.run_id] = heartbeat.time, since
        return self._clock() - since <= DEAD_AFTER_S


class Beat:
    """Calls a function every few seconds from a thread of its own: writes heartbeats and status.json.

    The function's errors of the given kinds do not end the job at once, since a store may fail for a moment; but when
    it has not succeeded for 60 s, `check` raises the last one.

    Args:
        write: Writes the documents; called once before the body begins and once at its end, in the caller's thread.
        expected: What may go wrong for a moment, for instance (OSError, ObjectError).
    """

    def __init__(
        self,
        write: Callable[[], None],
        *,
        every_s: float = BEAT_EVERY_S,
        expected: tuple[type[Exception], ...] = (OSError,),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every_s, self._expected, self._clock = write, every_s, expected, clock
        self._last_success = clock()
        self._error: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(*(self._expected if kind else ())):  # never hide the error that is on its way
            self._write()

    def check(self) -> None:
        """Raise the last error if nothing could be written for 60 s, or at once if it was of no expected kind."""
        error = self._error
        if error is None:
            return
        if not isinstance(error, self._expected) or self._clock() - self._last_success > DEAD_AFTER_S:
            raise error

    def _run(self) -> None:
        while not self._closed.wait(self._every_s):
            try:
                self._write()
            except Exception as error:  # noqa: BLE001 - kept for `check`, which raises it in the caller's thread
                self._error = error
            else:
                self._error, self._last_success = None, self._clock()


def status_document(*, run_id: str, now: float, **numbers: Any) -> bytes:
    """status.json: who, when, and whatever numbers the job has, in a form that people can read too."""
    return (json.dumps({"run_id": run_id, "time": now, **numbers}, indent=1) + "\n").encode()

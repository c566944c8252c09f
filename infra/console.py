"""What a person at a terminal meets: progress, messages, exit codes and Ctrl-C.

Progress is a bar on a terminal and plain lines elsewhere, so that a log file, `nohup` and a Ray job are never silent.
"""

import enum
import gc
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn, Self, TextIO

from tqdm import tqdm


class ExitCode(enum.IntEnum):
    """The exit codes of every door (`python -m <package>`). `meaning` is the only table of them."""

    OK = 0
    ERROR = 1
    BAD_INPUT = 2
    PROBLEMS = 3
    WOULD_COME_AGAIN = 4
    INTERRUPTED = 75
    KILLED = 130

    @property
    def meaning(self) -> str:
        """In words, for people."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.ERROR: "a bug, or a failure of the outside world that nobody foresaw; a traceback tells",
    ExitCode.BAD_INPUT: "a setting, path or file must be put right first; nothing was damaged",
    ExitCode.PROBLEMS: "it ran, but something is amiss: quarantined shards, too many bad images, corrupt objects, a "
    "full disk",
    ExitCode.WOULD_COME_AGAIN: "it had to stop, and the same command would stop there again: a loss that became NaN",
    ExitCode.INTERRUPTED: "stopped on request, after what was in flight was finished; the same command goes on",
    ExitCode.KILLED: "stopped at once, by a second Ctrl-C or before work began; the same command goes on",
}


class UserError(Exception):
    """Something the person who typed the command can put right. One message, no traceback, exit code 2."""

    exit_code = ExitCode.BAD_INPUT


class JobError(UserError):
    """The job had to stop, or ended with problems, through no bug of ours. One message, no traceback, exit code 3."""

    exit_code = ExitCode.PROBLEMS


def say(message: str) -> None:
    """One line to the person, on standard error, in order with progress."""
    print(message, file=sys.stderr, flush=True)


def run_door(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit code as `ExitCode` lists them.

    SIGTERM ends it as Ctrl-C does: what was begun is taken back (heartbeats, locks, a Ray of our own). Where there is
    work to finish first, `stop_on_signals` takes over. An unforeseen exception is not caught: Python prints its
    traceback and exits with 1.
    """
    try:
        with interrupted_by_sigterm():
            code = int(main() or ExitCode.OK)
            sys.stdout.flush()
            return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return int(ExitCode.KILLED)
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains of the rest as it ends
        return 128 + signal.SIGPIPE  # as shells say of what ends so: make inspect | head


def _nobody_reads_stdout() -> bool:
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def leave(code: int) -> NoReturn:
    """`sys.exit`, without Python's last search for garbage: three quarters of a second after torch and Ray."""
    gc.freeze()
    sys.exit(code)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the main thread; elsewhere Python sets no handlers, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def interrupts_kept() -> Iterator["StopFlag"]:
    """Keep a Ctrl-C or SIGTERM that comes in the block until its end, where it raises KeyboardInterrupt.

    For calls into libraries that now and then lose what is raised in their midst. The flag tells whoever can end the
    block early; a second signal raises at once. In another thread than the main one nothing changes.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def keep(number: int, frame: FrameType | None) -> None:
        if flag():
            signal.default_int_handler(number, frame)
        flag.request()

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    former = {
        number: handler for number, handler in found.items() if callable(handler)
    }  # others are left to the system
    for number in former:
        signal.signal(number, keep)
    try:
        yield flag
    except BaseException as error:
        if flag() and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if flag():
        raise KeyboardInterrupt


class StopFlag:
    """Becomes true when the person, or the machine, asks the job to stop. Call it to ask."""

    def __init__(self) -> None:
        # A bare flag, not an Event: setting an Event in a signal handler can deadlock with a wait it interrupted.
        self._requested = False

    def __call__(self) -> bool:
        return self._requested

    def request(self) -> None:
        """Ask for a stop."""
        self._requested = True


STOPPING = "stopping: what is in flight will be finished; press Ctrl-C again to stop at once (nothing is damaged)"


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a stop request and the second into an immediate exit with code 130.

    Enter it after `ray.init`, which installs a SIGTERM handler of its own. The former handlers come back at the end.
    Leaving at once is safe because a shard exists only when its commit, written last, is whole. In another thread than
    the main one, where Python sets no handlers, the flag is never raised by a signal.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: FrameType | None) -> None:
        # os.write and os._exit: a signal may arrive in the middle of a print, which is not re-entrant.
        if flag():
            os.write(2, b"\nstopped at once; the same command resumes\n")
            os._exit(ExitCode.KILLED)
        flag.request()
        os.write(2, f"\n{STOPPING}\n".encode())

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def counted(n: int, what: str) -> str:
    """ "1 class", "2,000 classes"."""
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{n:,} {what if n == 1 else plural}"


def human_bytes(n: float) -> str:
    """Decimal bytes as people read them: 999 B, 1.5 kB, 13.4 TB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 999.5:
            return f"{n:.0f} {unit}" if unit == "B" or abs(n) >= 99.95 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} PB"


def human_duration(seconds: float) -> str:
    """A duration in its two largest units: 0.5 s, 42 s, 3 min 05 s, 2 h 07 min, 5 d 3 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def human_rate(per_s: float) -> str:
    """A count per second with three figures: 0.52, 8.31, 71.0, 4,154."""
    if per_s >= 99.95:
        return f"{per_s:,.0f}"
    return f"{per_s:.1f}" if per_s >= 9.995 else f"{per_s:.2f}"


class Window:
    """A rate over the recent past: amounts arrive in bursts (whole shards), so a mean over a window is what reads well.

    Args:
        seconds: Length of the window.
        clock: Seconds, monotonic; a parameter so that tests need not wait.
    """

    def __init__(self, *, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._marks: deque[tuple[float, float]] = deque([(clock(), 0.0)])
        self._total = 0.0

    def add(self, amount: float) -> None:
        """Count an amount that has just been completed."""
        now = self._clock()
        self._total += amount
        self._marks.append((now, self._total))
        # The oldest mark kept lies just outside the window, so that a burst longer ago than that still has a beginning.
        while len(self._marks) > 2 and self._marks[1][0] < now - self._seconds:
            self._marks.popleft()

    def per_s(self) -> float:
        """Amount per second since the oldest mark kept; zero before anything has come."""
        began, base = self._marks[0]
        elapsed = self._clock() - began
        return (self._total - base) / elapsed if elapsed > 0 else 0.0


class Progress:
    """One line of progress that is never silent: a tqdm bar on a terminal, a plain line every `every_s` elsewhere.

    A thread repaints it, so that it also lives while nothing is finished for a long time.

    Args:
        total: How many units there are in all.
        unit: Their name in the plural, as printed: "images", "samples", "steps".
        label: What is going on: "extract train".
        done: Units already there before this run; they do not count for the rate.
        stream: Where to write; standard error when not given. A bar appears only if it is a terminal.

    Example:
        with Progress(total=1437, unit="images", label="extract train") as progress:
            progress.status("0 of 2 workers ready")
            progress.advance(128, n_bytes=40_000_000)
            progress.say("shard 3 will be tried again: TimeoutError")
    """

    def __init__(
        self,
        *,
        total: int,
        unit: str,
        label: str,
        done: int = 0,
        every_s: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._unit, self._label, self._done = total, unit, label, done
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._began = clock, clock()
        self._units, self._bytes = Window(clock=clock), Window(clock=clock)
        self._has_bytes = False
        self._status, self._estimates = "", True
        self._fields: dict[str, str] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._on_terminal = self._stream.isatty()
        self._bar: tqdm | None = None
        self._repainter = threading.Thread(
            target=self._repaint, args=(min(every_s, 1.0) if self._on_terminal else every_s,), daemon=True
        )

    def __enter__(self) -> Self:
        if self._on_terminal:
            self._bar = tqdm(total=self._total, initial=self._done, file=self._stream, dynamic_ncols=True)
        self._show()
        self._repainter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._repainter.join()
        self._show()
        if self._bar is not None:
            self._bar.close()

    def advance(self, n: int = 1, *, n_bytes: int = 0, **fields: object) -> None:
        """Count finished units, and what was written for them; further keywords become fields of the line."""
        with self._lock:
            self._done += n
            self._units.add(n)
            self._bytes.add(n_bytes)
            self._has_bytes |= n_bytes > 0
            self._fields |= {name: str(value) for name, value in fields.items()}

    def fields(self, **fields: object) -> None:
        """Set fields of the line, shown as `name value`: fields(loss="0.124", loader_wait="3 %")."""
        with self._lock:
            self._fields |= {name: str(value) for name, value in fields.items()}

    def status(self, text: str) -> None:
        """Set the free text at the end of the line, for instance "7 of 32 workers ready"; "" removes it."""
        with self._lock:
            changed, self._status = text != self._status, text
        if changed and self._bar is not None:
            self._show()

    def estimate(self, shown: bool) -> None:
        """Whether to tell the time left; not while others do the work, at a rate that nobody here knows."""
        with self._lock:
            self._estimates = shown

    def say(self, message: str) -> None:
        """Print a message above the line, at once and once."""
        with self._lock:
            if self._bar is not None:
                self._bar.clear()
            print(message, file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()

    def line(self) -> str:
        """The line without the label: count, rates, fields, time left, status; times are of this run alone."""
        with self._lock:
            per_s = self._units.per_s()
            parts = [f"{self._done:,}/{self._total:,} {self._unit}"]
            if per_s > 0:
                parts.append(f"{human_rate(per_s)} {self._unit}/s")
            if self._has_bytes:
                parts.append(f"{human_bytes(self._bytes.per_s())}/s written")
            parts += [f"{name.replace('_', ' ')} {value}" for name, value in self._fields.items()]
            left = self._total - self._done
            if per_s > 0 and left > 0 and self._estimates:
                parts.append(f"{human_duration(left / per_s)} left")
            else:
                parts.append(f"{human_duration(self._clock() - self._began)} so far")
            return ", ".join([*parts, self._status] if self._status else parts)

    def _show(self) -> None:
        with self._lock:
            if self._bar is None:
                percent = 100 * self._done / self._total if self._total else 100.0
                print(f"{self._label} {percent:.0f}%: {self.line()}", file=self._stream, flush=True)
                return
            label, text = (part.replace("{", "{{").replace("}", "}}") for part in (self._label, self.line()))
            self._bar.bar_format = f"{label} {{percentage:3.0f}}% |{{bar}}| {text}"
            self._bar.n = self._done
            self._bar.refresh()

    def _repaint(self, every_s: float) -> None:
        while not self._closed.wait(every_s):
            self._show()

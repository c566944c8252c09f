"""Parts of a long piece of work, each a command of one of our doors, run side by side as far as they do not need each
other. Safe to interrupt and repeat: a part that ended well leaves a stamp and is not started again.
"""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.console import ExitCode, JobError, Progress, UserError, human_duration, say

CONFIG_NAME = "config.json"
_DRAFT_NAME = "config.draft"
_POLL_S = 0.05
_LOCK_NAME = ".lock"
_PERCENT = re.compile(r"^(.*? \d+%)[:|]")
_LOG_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command.

    Attributes:
        name: Such as "block 0-7"; its log and its stamp are called so.
        arguments: Of Python: a package, a command of it, options.
        command: What a person would type for the same.
        made: A file that is there once it has ended well.
        needs: Names of the parts that must have ended before.
        size: Roughly what it costs, in any unit: of those that may start the largest does, so that no core is idle at
            the end.
    """

    name: str
    arguments: Sequence[str]
    command: str
    made: Path
    needs: Sequence[str] = ()
    size: int = 0

    @property
    def file_name(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True, kw_only=True)
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    began: float


class Parts:
    """Runs parts below one folder, and remembers there which have ended.

    Args:
        folder: Logs and stamps go below it.
        at_once: Most processes at a time.
        progress: Counts parts.
        stopping: Asked between polls; once it says yes, what runs is asked to stop, and waited for.
        lock: File that every process keeps open while it lives, as `hold` gives it.
    """

    def __init__(
        self, folder: Path, *, at_once: int, progress: Progress, stopping: Callable[[], bool], lock: int
    ) -> None:
        self._folder, self._at_once, self._progress = folder, at_once, progress
        self._stopping, self._lock = stopping, lock
        self._ended: set[str] = set()

    def run(self, parts: Sequence[Part]) -> bool:
        """Run those that have not ended yet.

        Returns:
            True; False if it was asked to stop before all had ended.

        Raises:
            JobError: A part failed; shows the end of its log. The others were stopped, and go on with the next call.
        """
        waiting = []
        for part in parts:
            if self._has_ended(part):
                self._end(part)
            else:
                waiting.append(part)
        running: list[_Running] = []
        asked, failed = False, ""
        while waiting or running:
            if self._stopping() or failed:
                asked = asked or _ask_to_stop(running)
                waiting = []
            for part in self._ready(waiting, self._at_once - len(running)):
                waiting.remove(part)
                running.append(self._start(part))
            for one in list(running):
                used = _children_cpu_s()
                if (code := one.process.poll()) is None:
                    continue
                running.remove(one)
                if code == ExitCode.OK and one.part.made.exists():
                    self._stamp(one, cpu_s=_children_cpu_s() - used)
                elif not failed and (code == ExitCode.OK or not asked):
                    failed = self._failure(one.part, code)
            self._show(running)
            time.sleep(_POLL_S)
        self._progress.status("")
        if failed:
            raise JobError(failed)
        return not self._stopping()

    # ------------------------------------------------------------------ what has ended

    def _has_ended(self, part: Part) -> bool:
        try:
            stamp = json.loads(self._stamp_path(part).read_text())
        except FileNotFoundError:
            return False
        except ValueError:  # torn by a crash: the door itself will find that there is nothing to do
            return False
        return stamp == list(part.arguments) and part.made.exists()

    def _stamp(self, one: _Running, cpu_s: float) -> None:
        path = self._stamp_path(one.part)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(one.part.arguments)))
        took = human_duration(time.monotonic() - one.began)
        self._progress.say(f"{one.part.name}: done in {took}, {human_duration(cpu_s)} of processor time")
        self._end(one.part)

    def _end(self, part: Part) -> None:
        self._ended.add(part.name)
        self._progress.advance()

    def _ready(self, waiting: Sequence[Part], n_free: int) -> list[Part]:
        ready = [part for part in waiting if set(part.needs) <= self._ended]
        return sorted(ready, key=lambda part: -part.size)[: max(0, n_free)]

    # ------------------------------------------------------------------ processes

    def _start(self, part: Part) -> _Running:
        self._progress.say(f"{part.name}: {part.command}")
        log = self._log_path(part)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *part.arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C at the terminal reaches us alone; we pass it on once
                pass_fds=[self._lock],
            )
        return _Running(part=part, process=process, began=time.monotonic())

    def _show(self, running: Sequence[_Running]) -> None:
        self._progress.status("; ".join(f"{one.part.name} {self._percent(one.part)}".strip() for one in running))

    def _percent(self, part: Part) -> str:
        """How far it says it is, at the end of its log."""
        found = [match[1] for line in self._log_tail(part) if (match := _PERCENT.match(line))]
        return found[-1].rpartition(" ")[2] if found else ""

    def _failure(self, part: Part, code: int) -> str:
        log = "\n".join(f"  {line}" for line in self._log_tail(part))
        how = f"ended well but made no {part.made}" if code == ExitCode.OK else f"failed with exit code {code}"
        return (
            f"{part.name} {how}. The end of {self._log_path(part)}:\n{log}\n"
            f"Its command is: {part.command}\nOnce that is mended, the same command goes on"
        )

    def _log_tail(self, part: Part) -> list[str]:
        with self._log_path(part).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]

    def _log_path(self, part: Part) -> Path:
        return self._folder / "log" / f"{part.file_name}.log"

    def _stamp_path(self, part: Part) -> Path:
        return self._folder / "done" / f"{part.file_name}.json"


def _children_cpu_s() -> float:
    """Of the children that have ended and were asked about."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ask_to_stop(running: Sequence[_Running]) -> bool:
    """Once each: a second signal would end them at once."""
    for one in running:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGINT)
    return True


def place_problems(folder: Path, name: str) -> list[str]:
    """Why a folder cannot be the place of such work: it holds other things, and was never begun.

    Args:
        folder: There may be none yet.
        name: The variable that gives it, and in small letters the target.
    """
    try:
        found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".")
    except OSError:  # there is none yet; or it is no folder, or not ours to read: `hold` says so
        return []
    if CONFIG_NAME in found or not (others := [each for each in found if each != _DRAFT_NAME]):
        return []
    return [
        f"{name}={folder} has no {CONFIG_NAME}, so make {name.lower()} did not begin it, but it holds "
        f"{', '.join(others[:5])}{' and more' if len(others) > 5 else ''}. Give an empty or new place ({name}=...)"
    ]


@contextmanager
def hold(folder: Path, stopping: Callable[[], bool], name: str = "DEMO") -> Iterator[int | None]:
    """Keep others out of a folder, and wait for them; also for parts whose parent was killed, as they hold it too.

    Args:
        folder: Made if missing.
        stopping: Asked while waiting.
        name: The variable that gives the folder, for messages.

    Yields:
        The open lock file, for the processes that are started; None if it was asked to stop while waiting.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK_NAME).open("a")
    except OSError as error:
        raise UserError(
            f"{name}={folder} cannot be written: {error.strerror}. Give another place ({name}=...)"
        ) from error
    with file:
        yield file.fileno() if _take(file.fileno(), folder, stopping) else None


def claim(folder: Path, choices: Mapping[str, int | None], name: str) -> None:
    """Remember in a folder what was chosen, or refuse to mix it with something else.

    Args:
        folder: There is one.
        choices: By the names of their variables, in small letters.
        name: The variable that gives the folder, and in small letters the target, for messages.

    Raises:
        UserError: The folder was begun with other choices, or its file cannot be read.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        draft = folder / _DRAFT_NAME  # a crash leaves no half of it
        draft.write_text(json.dumps(dict(choices)))
        draft.rename(path)
        return
    try:
        found = json.loads(path.read_text())
        begun = {choice: found[choice] for choice in choices}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not as make {name.lower()} wrote it ({error!r}). Give another {name}=") from error
    if begun != choices:
        texts = [
            " ".join(f"{choice.upper()}={'' if value is None else value}" for choice, value in one.items())
            for one in (begun, choices)
        ]
        raise UserError(
            f"{name}={folder} was begun with {texts[0]}, not {texts[1]}: give these, or give another {name}="
        )


def _take(lock: int, folder: Path, stopping: Callable[[], bool]) -> bool:
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                say(f"another command, or parts that one has left behind, are at work in {folder}: waiting for them")
            said = True
            if stopping():
                return False
            time.sleep(_POLL_S)
        else:
            return True

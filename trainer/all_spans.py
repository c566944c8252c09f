"""Several trainings side by side, each in a process of its own, so that they share neither random numbers nor files.

One that fails begins again from its last checkpoint. It is given up once several attempts in a row have saved nothing
new, not counting those whose machine was taken away; or at once where its own exit code says that something must be put
right first, or that it would come to the same.
"""

import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from infra.console import ExitCode, Progress
from infra.objects import ObjectError
from trainer.run_files import RunFiles

TRIES = 3
"""Attempts in a row without a new checkpoint after which a training is given up."""

PAUSE_S = 5.0
"""Before the second attempt; it doubles with each."""

_LAST_WORDS = 5
_REMOTE_LOOK_S = 60.0
_LOCAL_LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class SpanRun:
    """One of several trainings.

    Attributes:
        name: For people: the span.
        run: Its RUN.
        n_steps: Of it.
        arguments: What `python -m trainer` is given to train it.
    """

    name: str
    run: RunFiles
    n_steps: int
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one of them ended.

    Attributes:
        name: Of the training.
        ended: "stopped" if all were asked to.
        n_attempts: Starts by this command; 0 if it never began.
        words: The last that a failed one said.
    """

    name: str
    ended: Literal["finished", "failed", "stopped"]
    n_attempts: int
    words: str = ""


@runtime_checkable
class Attempt(Protocol):
    """A training under way somewhere."""

    def __str__(self) -> str:
        """Where it is, for people."""
        ...

    def poll(self) -> int | None:
        """Its exit code once it has ended, negative for a signal; None before."""
        ...

    def waits_for(self) -> str:
        """What it waits for before it begins, for people, such as "a GPU"; empty once it has begun."""
        ...

    def lost(self) -> bool:
        """Whether it ended because its machine was taken away, which tells nothing about the training."""
        ...

    def ask_to_stop(self) -> None:
        """Have it save all and end."""
        ...

    def words(self) -> str:
        """The last lines that it said."""
        ...


Launch = Callable[[SpanRun, int], Attempt]
"""launch(job, slot): begins a training; `slot` is from 0 to the number at a time, and no other is in it."""


@dataclass
class _Running:
    job: SpanRun
    slot: int
    attempt: Attempt
    began_at: int  # step


@dataclass
class _Waiting:
    job: SpanRun
    n_attempts: int = 0
    n_vain: int = 0
    saved: int = 0  # the step that is known to be saved
    not_before: float = 0.0


def train_side_by_side(
    jobs: Sequence[SpanRun],
    launch: Launch,
    *,
    at_once: int,
    progress: Progress,
    stop: Callable[[], bool],
    poll_s: float = 0.2,
    pause_s: float = PAUSE_S,
) -> list[Outcome]:
    """Train all of them; returns when each is finished, given up, or saved after a stop.

    Args:
        jobs: In the order in which they begin.
        launch: Begins one.
        at_once: Most at a time.
        progress: Counts their steps; each has a field of its own.
        stop: Once it says yes, all are asked to stop.
        poll_s: Seconds between looks.
        pause_s: Seconds before a second attempt.

    Returns:
        One for each job, in their order.
    """
    waiting = deque(_Waiting(job=job) for job in jobs)
    states = {id(waits.job): waits for waits in waiting}
    running: list[_Running] = []
    outcomes: dict[str, Outcome] = {}
    watch = _Watch(jobs, progress)
    stopping = False
    while waiting or running:
        if stop() and not stopping:
            stopping = True
            for one in running:
                one.attempt.ask_to_stop()
        if stopping:
            for waits in waiting:
                outcomes[waits.job.name] = Outcome(name=waits.job.name, ended="stopped", n_attempts=waits.n_attempts)
            waiting.clear()
        for one in [one for one in running if one.attempt.poll() is not None]:
            running.remove(one)
            watch.look(force=True)
            outcome = _settle(one, states[id(one.job)], stopping, progress, pause_s)
            if outcome is None:
                waiting.append(states[id(one.job)])
            else:
                outcomes[one.job.name] = outcome
        _start_due(waiting, running, launch, at_once, progress)
        watch.look()
        progress.status("stopping: all is being saved" if stopping else _counts(waiting, running))
        if waiting or running:
            time.sleep(poll_s)
    return [outcomes[job.name] for job in jobs]


def _start_due(
    waiting: deque[_Waiting], running: list[_Running], launch: Launch, at_once: int, progress: Progress
) -> None:
    """Begin what may begin now."""
    for waits in [waits for waits in waiting if waits.not_before <= time.monotonic()]:
        if len(running) == at_once:
            return
        waiting.remove(waits)
        waits.n_attempts += 1
        slot = next(slot for slot in range(at_once) if slot not in {one.slot for one in running})
        at = waits.saved = _saved_step(waits.job.run, waits.saved, progress)
        attempt = launch(waits.job, slot)
        running.append(_Running(waits.job, slot, attempt, at))
        again = f", attempt {waits.n_attempts}, from step {at:,}" if waits.n_attempts > 1 else ""
        progress.say(f"block {waits.job.name}: {attempt}{again}")


def _settle(one: _Running, waits: _Waiting, stopping: bool, progress: Progress, pause_s: float) -> Outcome | None:
    """What became of a training that has ended; None if it begins again."""
    code = one.attempt.poll()
    assert code is not None
    name, n_attempts = one.job.name, waits.n_attempts
    if code == ExitCode.OK:
        progress.say(f"block {name}: finished")
        return Outcome(name=name, ended="finished", n_attempts=n_attempts)
    if stopping:
        return Outcome(name=name, ended="stopped", n_attempts=n_attempts)
    words = one.attempt.words()
    saved = waits.saved = _saved_step(one.job.run, one.began_at, progress)
    lost = one.attempt.lost()
    waits.n_vain = (0 if saved > one.began_at else waits.n_vain) + (not lost)
    # What was good input at first is refused later where the process of a killed attempt is still saving.
    refused = code == ExitCode.BAD_INPUT and waits.n_attempts == 1
    hopeless = refused or code == ExitCode.WOULD_COME_AGAIN or waits.n_vain == TRIES
    pause = 0.0 if hopeless else pause_s * 2 ** max(0, waits.n_vain - 1)
    waits.not_before = time.monotonic() + pause
    then = "given up" if hopeless else f"it goes on from step {saved:,} in {pause:.0f} s"
    progress.say(f"block {name} {'lost its machine' if lost else _ending(code)}; {then}{_indented(words)}")
    return Outcome(name=name, ended="failed", n_attempts=n_attempts, words=words) if hopeless else None


def _saved_step(run: RunFiles, known: int, progress: Progress) -> int:
    """The step of its newest checkpoint; `known` if the place of the runs cannot be asked: the others train on."""
    try:
        return run.saved_step()
    except ObjectError as error:
        progress.say(f"how far {run.location} is cannot be seen now: {error}")
        return known


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code}"
    return "was asked to stop by somebody else" if code == ExitCode.INTERRUPTED else f"ended with exit code {code}"


def _indented(words: str) -> str:
    return "".join(f"\n    {line}" for line in words.splitlines())


def _counts(waiting: Sequence[_Waiting], running: Sequence[_Running]) -> str:
    needs = Counter(one.attempt.waits_for() for one in running)
    parts = [f"{needs.pop('', 0)} running", *(f"{n} waiting for {what}" for what, n in needs.items())]
    return ", ".join([*parts, *([f"{len(waiting)} waiting"] if waiting else [])])


class _Watch:
    """Looks at the runs' metrics now and then, as they tell the same wherever a training is."""

    def __init__(self, jobs: Sequence[SpanRun], progress: Progress) -> None:
        self._jobs, self._progress = jobs, progress
        self._steps = {job.name: _saved_step(job.run, 0, progress) for job in jobs}
        self._due = 0.0
        local = all(job.run.local_folder is not None for job in jobs)
        self._every_s = _LOCAL_LOOK_S if local else _REMOTE_LOOK_S

    def look(self, *, force: bool = False) -> None:
        """Show what is new."""
        if not force and time.monotonic() < self._due:
            return
        for job in self._jobs:
            self._look_at(job)
        self._due = time.monotonic() + self._every_s

    def _look_at(self, job: SpanRun) -> None:
        try:
            lines = [line for line in job.run.read_metrics(lambda _: None) if "loss" in line]
        except ObjectError:  # the training itself will say so, if it lasts
            return
        if lines:
            step = lines[-1]["step"]
            self._progress.advance(max(0, step - self._steps[job.name]))
            self._steps[job.name] = max(step, self._steps[job.name])
            text = f"{step / job.n_steps:.0%} loss {lines[-1]['loss']:.3g} wait {lines[-1]['loader_wait']:.0%}"
            self._progress.fields(**{job.name: text})


class Process:
    """A training in a process of its own on this machine, whose words go to a file.

    It is in a session of its own, so that Ctrl-C reaches it through us alone; and it stops, with all saved, when its
    standard input ends, as it does when we die.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as words:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer", *arguments, "--stop-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=words,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def __str__(self) -> str:
        return f"process {self._process.pid}, its words in {self._log}"

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def waits_for(self) -> str:
        return ""

    def lost(self) -> bool:
        return False

    def ask_to_stop(self) -> None:
        # No SIGINT: in the workers of Ray it is blocked, and so it is in what they start.
        if self._process.stdin is not None:
            self._process.stdin.close()

    def words(self) -> str:
        text = self._log.read_text(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-_LAST_WORDS:])


def process_environment(*, ray: bool) -> dict[str, str]:
    """For a training that must find its own way: without RAY_ADDRESS, which would send it to the cluster."""
    return {name: value for name, value in os.environ.items() if ray or name != "RAY_ADDRESS"}

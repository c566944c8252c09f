"""Follow a job of a Ray cluster to its end, or stop it."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from infra.console import JobError, StopFlag, UserError, interrupts_kept
from infra.jobs import JobRow, answering, find_job, first_line, job_row, no_answer

POLL_S = 1.0
RECONNECTS = 30
"""Times in a row that nothing answers after which a job is followed no more."""

_LOOK_S = 0.2
_LEAVE_S = 2.0  # for a goodbye to the cluster
_ROOM_S = 15.0  # for a job that is asked to stop before it has begun


def follow(client: Any, job: str, write: Callable[[str], None], *, poll_s: float = POLL_S) -> JobRow:
    """Write the log of a job from its beginning until it has ended; returns what became of it.

    A connection that breaks is made again, for as long as the cluster says that the job lives, and what was shown is
    not shown twice. Proxies end connections on which nothing is said for a minute, and a job may be silent for longer.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the job goes on.
        JobError: Nothing answers, again and again; or the job has ended, and the rest of its log cannot be had.
    """
    with interrupts_kept() as left:
        return _follow(client, job, _Counted(write), left, poll_s)


def _follow(client: Any, job: str, counted: "_Counted", left: StopFlag, poll_s: float) -> JobRow:
    n_broken = 0
    while True:
        n_shown = counted.n
        broken: Exception | None = None
        row: JobRow | None = None
        try:
            asyncio.run(_tail_until(left, client, job, counted.n, counted))
        except no_answer() as error:
            broken = error
        if left():
            raise KeyboardInterrupt
        try:
            row = job_row(client.get_job_info(job))
        except no_answer() as error:
            broken = error
        if row is not None and not row.lives and broken is None:
            return row
        lives = row is not None and row.lives
        n_broken = 0 if broken is None or lives or counted.n > n_shown else n_broken + 1
        if broken is not None and n_broken == RECONNECTS:
            what = "may still run there" if row is None else f"has ended there: {row.state}"
            raise JobError(f"the cluster answers no more ({first_line(broken)}); {job} {what}") from broken
        time.sleep(poll_s)


class _Counted:
    """Counts what is written through it."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self.n = write, 0

    def __call__(self, text: str) -> None:
        self._write(text)
        self.n += len(text)


async def _tail_until(left: StopFlag, client: Any, job: str, skip: int, write: Callable[[str], None]) -> None:
    """Looks for Ctrl-C itself: asyncio's own way, a cancellation, gets lost in Ray's client now and then."""
    tail = asyncio.create_task(_tail(client, job, skip, write))
    while not tail.done() and not left():
        await asyncio.wait({tail}, timeout=_LOOK_S)
    if left():
        tail.cancel()
        await asyncio.wait({tail}, timeout=_LEAVE_S)
    else:
        tail.result()


async def _tail(client: Any, job: str, skip: int, write: Callable[[str], None]) -> None:
    async with aclosing(client.tail_job_logs(job)) as pieces:
        async for piece in pieces:
            if len(piece) > skip:
                write(piece[skip:])
            skip = max(0, skip - len(piece))


def last_line(client: Any, job: str) -> str:
    """The last line of a job's log: how far it is; or why it cannot be had, which is no reason to show nothing else."""
    try:
        lines = client.get_job_logs(job).splitlines()
    except no_answer() as error:
        return f"its log cannot be shown: {first_line(error)}"
    return lines[-1] if lines else ""


def stop(client: Any, job: str, tell: Callable[[str], None], *, poll_s: float = POLL_S) -> JobRow:
    """Ask a job to stop, and wait until it has.

    It gets SIGTERM, finishes and saves what is in flight, and ends; after the grace that it was submitted with (Ray's
    own is 3 s) it is killed, and what is committed or saved by then stays valid.

    A job that still waits for room cannot be told before it gets some; then it ends at once. That is not waited for.

    Args:
        tell: Gets every line that the job writes meanwhile.

    Raises:
        UserError: There is no such job, or it was not submitted.
        JobError: The cluster answers no more.
    """
    row = find_job(client, job)
    if not row.lives:
        return row
    if not row.submitted:
        raise UserError(f"JOB={job} was not submitted but typed on some machine; stop it there with Ctrl-C")
    with answering(f"whether {job} has stopped, make jobs tells"):
        n_told = len(client.get_job_logs(job))
        client.stop_job(job)
        gives_up = time.monotonic() + _ROOM_S
        while row.lives and not (row.state == "PENDING" and time.monotonic() > gives_up):
            time.sleep(poll_s)
            row = job_row(client.get_job_info(job))
            text = client.get_job_logs(job)
            whole = text.rfind("\n") + 1 if row.lives else len(text)
            for line in text[n_told:whole].splitlines():
                tell(line)
            n_told = max(n_told, whole)
    return row

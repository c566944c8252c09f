"""Drivers and workers of an extraction under Ray, to be killed."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

REPO = Path(__file__).parents[1]
START_TIMEOUT_S = 450.0


class Driver:
    """`python -m pipeline extract` in a process of its own, on a Ray cluster or, with "local", on a private one."""

    def __init__(
        self, arguments: Sequence[str], told: Path, address: str, *, workers: int = 2, holds: int | None = None
    ) -> None:
        """Begin.

        Args:
            arguments: Of the door, as `fake_arguments` makes them.
            told: File that gets what it says.
            address: Of a Ray cluster, or "local".
            workers: Of one core each.
            holds: So many shards are committed, and no more ever are: it cannot end before it is killed.
        """
        self._told = told
        flags = [*arguments, "--no-dashboard", "--workers", str(workers), "--cpus-per-worker", "1"]
        flags.remove("--no-ray")
        door = ["pipeline"] if holds is None else ["tests.held_commits", str(holds)]
        with self._told.open("ab") as told:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *door, "extract", *flags],
                cwd=REPO,
                env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"},
                stdout=told,
                stderr=told,
            )

    @property
    def told(self) -> str:
        return self._told.read_text()

    def workers(self) -> list[psutil.Process]:
        """Of a private Ray."""
        return shard_workers(self._process.pid)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()


@contextmanager
def driving(driver: Driver) -> Iterator[Driver]:
    try:
        yield driver
    finally:
        driver.kill()


def shard_workers(below: int | None = None) -> list[psutil.Process]:
    """Processes of the dispatcher's actors below this test, or below another process, whichever Ray they belong to."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        try:
            if re.match("ray::(ShardActor|extract)", " ".join(process.cmdline())):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for(what: Callable[[], bool], *, timeout_s: float = START_TIMEOUT_S) -> bool:
    """Poll until it is so; False if it never was."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.02)
    return False


def ray_address() -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lives(pid: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    try:
        return is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False

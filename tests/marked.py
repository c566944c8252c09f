"""Processes that belong to one command of a test, its children's children too, wherever they have moved to.

A mark in the environment is inherited by every process that the command starts, also by those that leave its session
or outlive it, as Ray's do; another test's, or another person's, do not have it.
"""

import os
import secrets
import time

import psutil

NAME = "RAPTOR_TEST_MARK"


def new_mark() -> dict[str, str]:
    """An environment variable that no other process has."""
    return {NAME: secrets.token_hex(8)}


def marked(mark: dict[str, str]) -> list[psutil.Process]:
    """Every living process with the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(NAME) == mark[NAME]
            if is_ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def left_after(mark: dict[str, str], seconds: float) -> list[str]:
    """Command lines of those that are still there after so long; returns as soon as there are none."""
    deadline = time.monotonic() + seconds
    while (there := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [_line(process) for process in there]


def _line(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return f"{process.pid}: just gone"


def end_marked(mark: dict[str, str]) -> None:
    """Kill what a failed test has left."""
    for process in marked(mark):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue

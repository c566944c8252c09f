"""A Ray cluster of a test's own, as `ray start` makes it: its ports, its folder, its dashboard, nobody else's."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.marked import end_marked, new_mark
from tests.s3_servers import free_port

START_S = 180.0
OBJECT_STORE_NBYTES = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A running head.

    Attributes:
        dashboard: http://127.0.0.1:PORT, where jobs go.
        address: 127.0.0.1:PORT, where programs join.
        mark: Of all its processes, in their environment; of the jobs that it runs too.
        folder: Its sessions and logs.
    """

    dashboard: str
    address: str
    mark: dict[str, str]
    folder: Path


@contextmanager
def ray_head(*, n_cpus: int, environment: Mapping[str, str] | None = None) -> Iterator[RayCluster]:
    """Start a head, and end it and all that it has started.

    On a busy machine a start now and then misses Ray's fixed limit of 15 s for its agent; so it has three tries.

    Args:
        n_cpus: Logical ones.
        environment: Added to this process's for the cluster and its jobs; keys of S3, for instance.
    """
    for last in (False, False, True):
        try:
            with _ray_head(n_cpus, environment or {}) as cluster:
                yield cluster
                return
        except _StartError as error:
            if last:
                raise AssertionError(str(error)) from error


class _StartError(Exception):
    """Ray did not start."""


@contextmanager
def _ray_head(n_cpus: int, environment: Mapping[str, str]) -> Iterator[RayCluster]:
    folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # short: sockets lie in it
    gcs, dashboard, client, agent = (free_port() for _ in range(4))
    mark = new_mark()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(folder),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    flags = {
        "port": gcs,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": n_cpus,
        "object-store-memory": OBJECT_STORE_NBYTES,
        "temp-dir": folder,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    cluster = RayCluster(
        dashboard=f"http://127.0.0.1:{dashboard}", address=f"127.0.0.1:{gcs}", mark=mark, folder=folder
    )
    try:
        started = subprocess.run(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--disable-usage-stats", *words],
            env={**inherited, **settings, **environment, **mark},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if started.returncode:
            raise _StartError(started.stdout)
        deadline = time.monotonic() + START_S
        while not _answers(f"{cluster.dashboard}/api/jobs/"):
            if time.monotonic() > deadline:
                raise _StartError(f"the dashboard does not answer: {started.stdout}")
            time.sleep(0.2)
        yield cluster
    finally:
        end_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:
        return False


def actor_processes(mark: Mapping[str, str]) -> list[psutil.Process]:
    """Workers of the dispatcher on this cluster."""
    from tests.marked import marked

    found = []
    for process in marked(dict(mark)):
        try:
            if "ray::extract" in " ".join(process.cmdline()) or "ray::ShardActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found

"""Prometheus beside a running Ray: find the program, start it on loopback, ask it, and end it.

The program is Debian's package `prometheus`, or any that PROMETHEUS=path names; nothing is downloaded. It reads the
scrape settings and alert rules that are kept in deploy/monitoring/, with where this Ray's metrics are put in.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.console import UserError

MONITORING = Path(__file__).parent / "deploy" / "monitoring"
READY_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
_HOST = "127.0.0.1"
_DEBIAN = Path("/usr/bin/prometheus")  # a PATH without /usr/bin is met in cron and in containers
MISSING = (
    "Prometheus is not installed. Debian and Ubuntu: apt-get install prometheus; elsewhere give the program by "
    "PROMETHEUS=/path/to/prometheus. Without it, make watch shows a run in the terminal"
)


class PrometheusError(UserError):
    """Prometheus does not start, does not answer, or refuses a query."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One value of a query's answer, and the labels that tell it from the others."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """A Prometheus that answers at `url`, and its process."""

    url: str
    process: subprocess.Popen[bytes]

    def query(self, expression: str) -> list[Sample]:
        """Ask for the value of an expression now; an empty list when no series matches.

        Raises:
            PrometheusError: The expression is wrong, or nobody answers.
        """
        found = self._get("query", query=expression)
        if found["resultType"] == "scalar":
            return [Sample(labels={}, value=float(found["result"][1]))]
        return [Sample(labels=one["metric"], value=float(one["value"][1])) for one in found["result"]]

    def targets(self) -> dict[str, str]:
        """Health ("up", "down", "unknown") of all that is scraped, by its URL."""
        return {one["scrapeUrl"]: one["health"] for one in self._get("targets", state="active")["activeTargets"]}

    def wait_for(self, expression: str, *, timeout_s: float = 60.0) -> list[Sample]:
        """Ask again and again until an expression has a value.

        Raises:
            PrometheusError: It has none within `timeout_s`; names the expression and what is scraped.
        """
        until = time.monotonic() + timeout_s
        while not (found := self.query(expression)):
            if time.monotonic() > until:
                raise PrometheusError(f"{expression} has no value after {timeout_s:g} s; scraped: {self.targets()}")
            time.sleep(0.5)
        return found

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise PrometheusError(f"Prometheus refuses {parameters}: {said}") from error
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise PrometheusError(f"no Prometheus answers at {self.url}: {error}") from error


def find_binary(variables: Mapping[str, str] | None = None) -> Path | None:
    """The program: what PROMETHEUS names, else the one in PATH, else Debian's; None if there is none.

    Raises:
        UserError: PROMETHEUS names something that cannot be run.
    """
    variables = os.environ if variables is None else variables
    return find_program("PROMETHEUS", "prometheus", _DEBIAN, variables)


def find_program(variable: str, name: str, elsewhere: Path, variables: Mapping[str, str]) -> Path | None:
    """A program by a variable that names its file, by PATH, or at its usual place."""
    given = variables.get(variable)
    if given:
        path = Path(given).expanduser()
        if not path.is_file() or not os.access(path, os.X_OK):
            raise UserError(f"{variable}={given} is no program that can be run; give the path of {name}, or unset it")
        return path.resolve()
    found = shutil.which(name, path=variables.get("PATH", os.defpath))
    return Path(found) if found else elsewhere if os.access(elsewhere, os.X_OK) else None


def scrape_settings(
    *, targets: Sequence[str] = (), files: Sequence[Path] = (), every_s: int = 5, rules: bool = True
) -> dict[str, Any]:
    """The settings kept in deploy/monitoring/prometheus.yml, for the Ray of this machine.

    Args:
        targets: Addresses whose /metrics is read, such as 127.0.0.1:8080.
        files: Documents that Ray's dashboard keeps up to date, with the addresses of all its nodes.
        every_s: How often. Ray itself renews its numbers every 10 s unless it is told otherwise.
        rules: Whether the alert rules are evaluated.
    """
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    settings["global"] |= {"scrape_interval": f"{every_s}s", "scrape_timeout": f"{every_s}s"}
    settings["global"] |= {"evaluation_interval": f"{every_s}s"}
    settings["rule_files"] = [str(MONITORING / "alerts.yml")] if rules else []
    (ray,) = (job for job in settings["scrape_configs"] if job["job_name"] == "ray")
    ray.pop("file_sd_configs", None)
    if files:
        ray["file_sd_configs"] = [{"files": [str(file) for file in files], "refresh_interval": "5s"}]
    if targets:
        ray["static_configs"] = [{"targets": list(targets)}]
    return settings


@contextmanager
def serving(
    *,
    targets: Sequence[str] = (),
    files: Sequence[Path] = (),
    every_s: int = 5,
    port: int = 0,
    rules: bool = True,
    folder: Path | None = None,
) -> Iterator[Prometheus]:
    """Run Prometheus on loopback for the length of a with block; it and what it stored are gone afterwards.

    Args:
        targets, files, every_s, rules: See `scrape_settings`.
        port: Where it listens; 0 is any that is free.
        folder: Keeps settings, series and log, and is not removed; a temporary one when not given.

    Raises:
        UserError: There is no Prometheus here, or it does not start; says why.

    Example:
        with serving(targets=[f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"], every_s=1) as prometheus:
            prometheus.wait_for("ray_activations_images_total")
    """
    binary = find_binary()
    if binary is None:
        raise UserError(MISSING)
    settings = scrape_settings(targets=targets, files=files, every_s=every_s, rules=rules)
    with _folder(folder) as work:
        (work / "prometheus.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
        port = port or free_port()
        command = [
            *(str(binary), f"--config.file={work / 'prometheus.yml'}", f"--storage.tsdb.path={work / 'series'}"),
            *(f"--web.listen-address={_HOST}:{port}", "--log.level=warn", "--storage.tsdb.retention.time=7d"),
        ]
        with running(command, log=work / "prometheus.log") as process:
            url = f"http://{_HOST}:{port}"
            wait_until_ready(f"{url}/-/ready", process, log=work / "prometheus.log", name="Prometheus")
            yield Prometheus(url=url, process=process)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="prometheus-") as made:
        yield Path(made)


def free_port() -> int:
    """A port of loopback on which nobody listens now."""
    with socket.socket() as tried:
        tried.bind((_HOST, 0))
        return int(tried.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], *, log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in the background for the length of a with block, and end it by its process number.

    It gets a session of its own, so that a Ctrl-C in the terminal reaches us and not it. On Linux it also ends when we
    are killed (setpriv, of util-linux).
    """
    setpriv = shutil.which("setpriv")
    guard = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*guard, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=None if variables is None else {**os.environ, **variables},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(
    url: str, process: subprocess.Popen[bytes], *, log: Path, name: str, timeout_s: float = READY_TIMEOUT_S
) -> None:
    """Return when a URL answers with success.

    Raises:
        PrometheusError: The program has ended, or is silent for `timeout_s`; with the end of its log.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, http.client.HTTPException) as error:  # HTTPError is an OSError: 503 while it starts
            ended = process.poll()
            if ended is None and time.monotonic() < until:
                time.sleep(0.1)
                continue
            said = log.read_text(errors="replace").strip()[-1500:]
            what = f"ended with {ended}" if ended is not None else f"does not answer at {url}: {error}"
            raise PrometheusError(f"{name} {what}. Its last words:\n{said}") from error

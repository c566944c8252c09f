"""`make dashboard`: Prometheus, and Grafana where it is installed, beside the Rays of this machine or of a cluster.

Both listen on loopback and end with us. Start it before or after a run, and once for many: the list of what is read is
renewed every few seconds, so a run that begins later is seen too.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from infra.console import ExitCode, JobError, UserError, say
from infra.grafana import MISSING as GRAFANA_MISSING
from infra.grafana import Grafana, board_url, find_grafana, ray_boards, serving_grafana
from infra.prometheus import MISSING as PROMETHEUS_MISSING
from infra.prometheus import find_binary, free_port, serving
from infra.running_ray import GET_TOKEN, dashboard_url, is_dashboard, living_sessions, metrics_addresses

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000  # where Ray's own dashboard looks for them
LOOK_EVERY_S = 5.0


def dashboard(
    ray_address: str | None = None,
    port: int = PROMETHEUS_PORT,
    grafana_port: int = GRAFANA_PORT,
    keep: Path | None = None,
) -> int:
    """Show a running Ray in Prometheus and Grafana, until Ctrl-C.

    Args:
        ray_address: A cluster's dashboard, http://HOST:8265; else RAY_ADDRESS, else all Rays of this machine.
        port: Of Prometheus on loopback; another one if it is taken.
        grafana_port: Of Grafana, likewise.
        keep: Folder for what was measured and for logs; a temporary one that is removed at the end when not given.

    Raises:
        UserError: Prometheus is not installed, or something does not start.
    """
    binary, grafana = find_binary(), find_grafana()
    if binary is None:
        raise UserError(PROMETHEUS_MISSING)
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    with _stopped() as stopped, ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dashboard-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        targets = Targets(address, folder)
        addresses = targets.renew()  # a cluster that does not answer is told before anything is started
        prometheus = stack.enter_context(
            serving(files=[targets.file], port=_port(port), folder=folder / "prometheus", every_s=5)
        )
        found, served = None, {"Prometheus": prometheus.process}
        if grafana:
            started = _grafana(grafana, folder / "grafana", grafana_port, prometheus.url)
            found, served["Grafana"] = stack.enter_context(started)
        for line in what_to_open(prometheus.url, found, folder, address, addresses):
            print(line, flush=True)
        while not stopped(LOOK_EVERY_S):
            targets.renew_quietly()
            _check_alive(served)
    say("stopped; Prometheus and Grafana have ended" if grafana else "stopped; Prometheus has ended")
    return ExitCode.OK


class Targets:
    """The list of what Prometheus reads, in a file that it watches, and Ray's boards for Grafana.

    Args:
        address: Of a cluster's dashboard; None is this machine.
        folder: Where both go.
    """

    def __init__(self, address: str | None, folder: Path) -> None:
        self._address, self._folder = address, folder
        self.file = folder / "targets.json"
        self._said = ""

    def renew(self) -> list[str]:
        """Write the list anew.

        Raises:
            UserError: The cluster does not answer.
        """
        addresses = metrics_addresses(self._address)
        document = json.dumps([{"labels": {"job": "ray"}, "targets": addresses}])
        if not self.file.exists() or self.file.read_text() != document:
            new = self.file.with_suffix(".new")  # Prometheus never reads half a list
            new.write_text(document)
            new.replace(self.file)
        self._copy_boards()
        return addresses

    def renew_quietly(self) -> None:
        """The same while all runs: a cluster that is away for a while keeps its last list."""
        try:
            self.renew()
            self._said = ""
        except UserError as error:
            if str(error) != self._said:
                say(str(error))
            self._said = str(error)

    def _copy_boards(self) -> None:
        into = ray_boards(self._folder / "grafana")
        if not into.is_dir() or any(into.iterdir()):
            return
        if self._address and is_dashboard(self._address):
            _make_boards(into)
            return
        for session in living_sessions():
            with suppress(OSError):  # it may end at any time
                for board in (session.folder / "metrics" / "grafana" / "dashboards").glob("*.json"):
                    shutil.copyfile(board, into / board.name)
                return


def _make_boards(into: Path) -> None:
    """Ray's boards for a cluster elsewhere, whose head alone has them as files."""
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory

    for name, make in (
        ("default", factory.generate_default_grafana_dashboard),
        ("train", factory.generate_train_grafana_dashboard),
    ):
        (into / f"{name}_grafana_dashboard.json").write_text(make()[0])


def what_to_open(
    prometheus: str, grafana: str | None, folder: Path, address: str | None, addresses: list[str]
) -> list[str]:
    """Addresses, how to log in, and what is missing."""
    lines = [f"Prometheus  {prometheus}  no login; alerts at {prometheus}/alerts"]
    if grafana:
        password = folder / "grafana" / "admin-password"
        lines += [
            f"Grafana     {board_url(grafana)}  looking needs no login",
            f'            to change boards sign in as "admin"; the password is in {password}',
        ]
    else:
        lines += [f"Grafana     {GRAFANA_MISSING}", "            make watch shows the same figures in the terminal"]
    sessions = [] if address and is_dashboard(address) else living_sessions()
    token = f'if it asks for a token: "{GET_TOKEN}" shows it'
    if address and is_dashboard(address):
        lines.append(f"Ray         {address}  {token}")
    for url in filter(None, map(dashboard_url, sessions)):
        lines.append(f"Ray         {url}  {token}")
    n_read = f"{len(addresses)} pages of metrics are read" if addresses else "no Ray runs on this machine yet"
    lines.append(f"{n_read}; runs that begin later are found. Ctrl-C ends all this")
    wrong = [
        f"{variable}={url}"
        for variable, url, port in (
            ("RAY_PROMETHEUS_HOST", prometheus, PROMETHEUS_PORT),
            ("RAY_GRAFANA_HOST", grafana, GRAFANA_PORT),
        )
        if url and not url.endswith(f":{port}")
    ]
    if wrong:
        lines.append(f"For the Metrics page of Ray's dashboard set, before Ray starts: {' '.join(wrong)}")
    return lines


@contextmanager
def _grafana(
    grafana: Grafana, folder: Path, port: int, prometheus: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    folder.mkdir(parents=True, exist_ok=True)
    with serving_grafana(grafana, folder, port=_port(port), prometheus_url=prometheus) as served:
        yield served


def _port(wanted: int) -> int:
    """A port that is free: the one wanted if it is."""
    if wanted:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                tried.bind(("127.0.0.1", wanted))
                return wanted
    return free_port()


def _check_alive(served: Mapping[str, subprocess.Popen[bytes]]) -> None:
    ended = [
        f"{name} has ended by itself with {one.returncode}" for name, one in served.items() if one.poll() is not None
    ]
    if ended:
        raise JobError("; ".join(ended))


@contextmanager
def _stopped() -> Iterator[Callable[[float], bool]]:
    """Waits; true as soon as Ctrl-C or SIGTERM has come."""
    event = threading.Event()
    former = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event.wait
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

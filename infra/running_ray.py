"""Where the metrics of a running Ray are: of a cluster by its address, or of all Rays that run on this machine.

On this machine Ray keeps a folder for each session below its temporary folder. In it lie the number of the port where
the node shows its metrics and, while a dashboard runs, a list of all nodes that is written anew every 5 s. Of a
cluster elsewhere the dashboard tells the same list. None of this needs Ray to be imported, or a driver to be started.
"""

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from infra.console import UserError

TARGETS_FILE = "prom_metrics_service_discovery.json"
STALE_AFTER_S = 30.0  # Ray writes the list anew every 5 s
GET_TOKEN = "ray get-auth-token"
_TIMEOUT_S = 5.0
_KNOCK_S = 0.5


class RayError(UserError):
    """No Ray answers, or it refuses us."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A Ray that runs on this machine.

    Attributes:
        folder: Ray's own, with logs and what its dashboard writes for Grafana.
        addresses: Where metrics are read, as host:port.
        gcs: Where programs join it; empty if its head is on another machine.
    """

    folder: Path
    addresses: tuple[str, ...]
    gcs: str

    @property
    def began(self) -> float:
        """Seconds since 1970."""
        return self.folder.stat().st_ctime


def ray_folder(variables: Mapping[str, str] | None = None) -> Path:
    """Ray's temporary folder on this machine."""
    variables = os.environ if variables is None else variables
    return Path(variables.get("RAY_TMPDIR") or variables.get("TMPDIR") or "/tmp") / "ray"


def living_sessions(folder: Path | None = None) -> list[Session]:
    """The Rays that run on this machine, the newest first."""
    found = [_session(path) for path in (folder or ray_folder()).glob("session_*_*")]
    return sorted((session for session in found if session), key=lambda session: session.began, reverse=True)


def _session(folder: Path) -> Session | None:
    """A session that lives, else None."""
    try:
        ports = [int(path.read_text()) for path in folder.glob("metrics_export_port_*")]
        gcs_ports = [int(path.read_text()) for path in folder.glob("gcs_server_port_*")]
        listed = folder / TARGETS_FILE
        fresh = listed.exists() and time.time() - listed.stat().st_mtime < STALE_AFTER_S
        addresses = _addresses(json.loads(listed.read_bytes())) if fresh else []
    except (OSError, ValueError):  # it ends while we look, or another user's
        return None
    if not addresses:
        addresses = [f"127.0.0.1:{port}" for port in ports]
    # The ports of dashboard and autoscaler are the same for every Ray, so only a node's own is a sign of life.
    nodes = [address for address in addresses if int(address.rpartition(":")[2]) in ports]
    if not any(_answers(address) for address in nodes):
        return None
    host = nodes[0].rpartition(":")[0]
    return Session(
        folder=folder,
        addresses=tuple(address for address in addresses if address in nodes or _answers(address)),
        gcs=f"{host}:{gcs_ports[0]}" if gcs_ports else "",
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except OSError:
        return False
    return True


def _addresses(document: Any) -> list[str]:
    """Of a document as Prometheus discovers services by."""
    return [address for part in document for address in part["targets"]]


def is_dashboard(address: str) -> bool:
    """Whether an address is one of a dashboard, http://HOST:8265, and not where programs join a cluster."""
    return address.startswith(("http://", "https://"))


def metrics_addresses(address: str | None, folder: Path | None = None) -> list[str]:
    """Where metrics are read, as host:port: of the cluster whose dashboard is at `address`, else of this machine.

    Raises:
        RayError: The dashboard does not answer, or asks for a token that we have not got.
    """
    if address and is_dashboard(address):
        return _told_by_dashboard(address)
    sessions = living_sessions(folder)
    if address and address not in ("auto", "local"):
        port = address.rpartition(":")[2]
        sessions = [session for session in sessions if session.gcs.rpartition(":")[2] == port]
        if not sessions:
            raise RayError(
                f"RAY_ADDRESS={address} is no Ray of this machine. For a cluster elsewhere give its dashboard: "
                "RAY_ADDRESS=http://HOST:8265"
            )
    return list(dict.fromkeys(one for session in sessions for one in session.addresses))


def read_token(variables: Mapping[str, str] | None = None) -> str | None:
    """The token of Ray's dashboard, from where Ray itself looks for it; None if there is none. Never print it."""
    variables = os.environ if variables is None else variables
    if variables.get("RAY_AUTH_TOKEN"):
        return variables["RAY_AUTH_TOKEN"].strip()
    path = Path(variables.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _told_by_dashboard(url: str) -> list[str]:
    request = urllib.request.Request(f"{url.rstrip('/')}/api/prometheus/sd")
    token = read_token()
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            return _addresses(json.load(reply))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise RayError(
                f"the Ray at {url} asks for a token ({error.code}). Put the cluster's token into a file and give "
                f'RAY_AUTH_TOKEN_PATH=that file; on the cluster\'s head "{GET_TOKEN}" shows it'
            ) from error
        raise RayError(f"the Ray at {url} does not tell its nodes: {error}") from error
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise RayError(f"no Ray dashboard answers at {url} ({error}). Correct RAY_ADDRESS=http://HOST:8265") from error


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number of a /metrics page."""

    name: str
    labels: Mapping[str, str]
    value: float


def read_metrics(addresses: list[str], prefix: str) -> tuple[list[Value], list[str]]:
    """All numbers whose name begins with `prefix`, of many nodes at once.

    Returns:
        The numbers, and the addresses that did not answer.
    """

    def read(address: str) -> list[Value] | None:
        try:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as reply:
                text = reply.read().decode()
            # Only what is asked for is parsed: a page of a busy node has thousands of lines of Ray's own.
            lines = [line for line in text.splitlines() if line.startswith((prefix, f"# TYPE {prefix}"))]
            return list(_parse("\n".join(lines) + "\n"))
        except (OSError, http.client.HTTPException, ValueError):  # it ends while we read, or is no Ray
            return None

    with ThreadPoolExecutor(max_workers=16) as pool:
        pages = dict(zip(addresses, pool.map(read, addresses)))
    silent = [address for address, page in pages.items() if page is None]
    return [value for page in pages.values() for value in page or ()], silent


def _parse(text: str) -> Iterator[Value]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield Value(name=sample.name, labels=sample.labels, value=sample.value)


def dashboard_url(session: Session) -> str:
    """Where a session's dashboard is, asked of the session itself; empty if it has none or does not say."""
    if not session.gcs:
        return ""
    if read_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray._private import ray_constants
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without types
    from ray.exceptions import RayError as RaysError

    try:
        found = GcsClient(address=session.gcs).internal_kv_get(
            ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD, timeout=_TIMEOUT_S
        )
    except (RaysError, RuntimeError):
        return ""
    return f"http://{found.decode()}" if found else ""

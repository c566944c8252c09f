"""Grafana beside a running Ray: settings and provisioning files in a folder, and the program on loopback.

Debian has no package of Grafana; its makers' own, or an unpacked archive with GRAFANA=path, is what is used.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.board import BOARD_PATH, UID
from infra.console import UserError
from infra.prometheus import find_program, running, wait_until_ready

MISSING = (
    "Grafana is not installed, so there are no boards: install it as its makers describe for your system and have "
    "grafana-server in PATH, or give GRAFANA=/path/to/grafana-server of an unpacked archive"
)
SOURCE = "Prometheus"  # the name that Ray's boards and its Metrics page look for
SCRAPE_EVERY_S = 10  # told to Grafana: reading more often shows nothing new, as Ray renews its numbers every 10 s
RATE_INTERVAL = f"{4 * SCRAPE_EVERY_S}s"  # Grafana's $__rate_interval is never less than four of them
_HOST = "127.0.0.1"
_PACKAGED = Path("/usr/sbin/grafana-server")
_PACKAGED_HOME = Path("/usr/share/grafana")


@dataclass(frozen=True, kw_only=True)
class Grafana:
    """A Grafana that is installed.

    Attributes:
        program: grafana-server, or grafana, which takes `server` as its first word.
        home: With conf/defaults.ini and public/.
    """

    program: Path
    home: Path

    def command(self, settings: Path) -> list[str]:
        """What starts it, with the settings in a file."""
        word = ["server"] if self.program.name == "grafana" else []
        return [str(self.program), *word, f"--homepath={self.home}", f"--config={settings}"]


def find_grafana(variables: Mapping[str, str] | None = None) -> Grafana | None:
    """What GRAFANA names, else grafana-server in PATH or where packages put it; None if there is none.

    Raises:
        UserError: GRAFANA names something that cannot be run, or there is no conf/defaults.ini where it should be.
    """
    variables = os.environ if variables is None else variables
    program = find_program("GRAFANA", "grafana-server", _PACKAGED, variables)
    if program is None:
        return None
    homes = [program.resolve().parents[1], _PACKAGED_HOME]
    for home in homes:
        if (home / "conf" / "defaults.ini").is_file():
            return Grafana(program=program, home=home)
    raise UserError(f"{program} has no conf/defaults.ini in {' or '.join(map(str, homes))}; is it unpacked whole?")


def provision(folder: Path, *, port: int, prometheus_url: str) -> Path:
    """Write settings, data source and boards below a folder.

    Everybody on this machine may look without a name. To change boards one signs in as admin; the password is made
    here once, in a file that only we may read, and not Grafana's well-known one.

    Returns:
        The settings. Ray's own boards go into `ray_boards(folder)`, at any time.
    """
    for name in ("boards", "provisioning/datasources", "provisioning/dashboards", "provisioning/plugins"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "provisioning" / "alerting").mkdir(exist_ok=True)
    ray_boards(folder).mkdir(exist_ok=True)
    shutil.copyfile(BOARD_PATH, folder / "boards" / BOARD_PATH.name)
    password = folder / "admin-password"
    if not password.exists():
        with os.fdopen(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(18))
    _write(folder / "provisioning/datasources/prometheus.yml", {"datasources": [_source(prometheus_url)]})
    providers = [_provider("Activations", folder / "boards"), _provider("Ray", ray_boards(folder))]
    _write(folder / "provisioning/dashboards/boards.yml", {"providers": providers})
    settings = folder / "grafana.ini"
    settings.write_text(_settings(folder, port))
    return settings


def ray_boards(folder: Path) -> Path:
    """Where Ray's boards are put; Grafana looks there every few seconds."""
    return folder / "ray-boards"


@contextmanager
def serving_grafana(
    grafana: Grafana, folder: Path, *, port: int, prometheus_url: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run Grafana on loopback for the length of a with block; gives its URL and its process.

    Raises:
        UserError: It does not start; with its last words.
    """
    settings = provision(folder, port=port, prometheus_url=prometheus_url)
    log, url = folder / "grafana.log", f"http://{_HOST}:{port}"
    with running(grafana.command(settings), log=log) as process:
        wait_until_ready(f"{url}/api/health", process, log=log, name="Grafana", timeout_s=90)
        yield url, process


def board_url(url: str) -> str:
    """The address of our board."""
    return f"{url}/d/{UID}"


def _source(url: str) -> dict[str, Any]:
    return {
        "name": SOURCE,
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": url,
        "isDefault": True,
        "editable": False,
        "jsonData": {"timeInterval": f"{SCRAPE_EVERY_S}s"},
    }


def _provider(name: str, folder: Path) -> dict[str, Any]:
    return {
        "name": name,
        "folder": name,
        "type": "file",
        "updateIntervalSeconds": 10,
        "allowUiUpdates": True,
        "options": {"path": str(folder)},
    }


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"apiVersion": 1, **document}, sort_keys=False))


def _settings(folder: Path, port: int) -> str:
    return f"""\
[server]
http_addr = {_HOST}
http_port = {port}

[paths]
data = {folder / "data"}
logs = {folder / "logs"}
plugins = {folder / "plugins"}
provisioning = {folder / "provisioning"}

[security]
admin_user = admin
admin_password = $__file{{{folder / "admin-password"}}}
# so that the Metrics page of Ray's dashboard can show panels
allow_embedding = true

[auth.anonymous]
enabled = true
org_name = Main Org.
org_role = Viewer

[dashboards]
default_home_dashboard_path = {folder / "boards" / BOARD_PATH.name}

[analytics]
reporting_enabled = false
check_for_updates = false
check_for_plugin_updates = false

[users]
allow_sign_up = false
"""

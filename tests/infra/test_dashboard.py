"""`make dashboard`: what it starts, writes and says. Grafana is a stand-in that keeps what it is given."""

import configparser
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from infra import dashboard, grafana
from infra.board import BOARD_PATH
from infra.console import JobError, UserError
from infra.running_ray import TARGETS_FILE, living_sessions, metrics_addresses, ray_folder, read_metrics, read_token
from tests.infra.broken_pages import BROKEN, serving_page

STAND_IN = f"""#!{sys.executable}
import http.server, json, os, sys
from configparser import RawConfigParser

settings = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
open(os.environ["SEEN"], "w").write(json.dumps({{"arguments": sys.argv[1:], "pid": os.getpid()}}))
found = RawConfigParser()
found.read(settings["config"])

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
        self.wfile.write(b'{{"database": "ok"}}')
    def log_message(self, *_):
        pass

http.server.HTTPServer((found["server"]["http_addr"], int(found["server"]["http_port"])), Health).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder as Grafana's archive unpacks to."""
    home = tmp_path / "grafana-home"
    for name in ("bin", "conf", "public"):
        (home / name).mkdir(parents=True)
    (home / "conf" / "defaults.ini").write_text("")
    path = home / "bin" / "grafana-server"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def test_grafana_is_found_with_its_home(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(grafana, "_PACKAGED", tmp_path / "nowhere")
    monkeypatch.setattr(grafana, "_PACKAGED_HOME", tmp_path / "nowhere")
    assert grafana.find_grafana({"PATH": str(tmp_path)}) is None
    found = grafana.find_grafana({"PATH": str(stand_in.parent)})
    assert found is not None
    assert found.home == stand_in.parents[1]
    assert grafana.find_grafana({"GRAFANA": str(stand_in), "PATH": ""}) == found
    (found.home / "conf" / "defaults.ini").unlink()
    with pytest.raises(UserError, match="unpacked whole"):
        grafana.find_grafana({"GRAFANA": str(stand_in), "PATH": ""})
    with pytest.raises(UserError, match="is no program"):
        grafana.find_grafana({"GRAFANA": str(tmp_path), "PATH": ""})


def test_both_programs_of_grafana_are_started_in_their_own_way(tmp_path):
    ini = tmp_path / "x.ini"
    old = grafana.Grafana(program=Path("/g/bin/grafana-server"), home=Path("/g")).command(ini)
    new = grafana.Grafana(program=Path("/g/bin/grafana"), home=Path("/g")).command(ini)
    assert old == ["/g/bin/grafana-server", "--homepath=/g", f"--config={ini}"]
    assert new == ["/g/bin/grafana", "server", "--homepath=/g", f"--config={ini}"]


def test_what_grafana_is_given(tmp_path):
    settings = grafana.provision(tmp_path, port=3456, prometheus_url="http://127.0.0.1:9999")
    found = configparser.RawConfigParser()
    found.read(settings)
    assert dict(found["server"]) == {"http_addr": "127.0.0.1", "http_port": "3456"}
    for path in found["paths"].values():
        assert Path(path).is_relative_to(tmp_path)
    assert found["auth.anonymous"]["org_role"] == "Viewer"
    assert found["users"]["allow_sign_up"] == "false"
    assert found["analytics"]["reporting_enabled"] == "false"
    assert Path(found["dashboards"]["default_home_dashboard_path"]).read_text() == BOARD_PATH.read_text()

    password = tmp_path / "admin-password"
    assert found["security"]["admin_password"] == f"$__file{{{password}}}"
    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    assert len(password.read_text()) >= 24
    kept = password.read_text()
    grafana.provision(tmp_path, port=3456, prometheus_url="http://127.0.0.1:9999")
    assert password.read_text() == kept  # Grafana took it at its first start

    provisioning = Path(found["paths"]["provisioning"])
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    assert sources["apiVersion"] == 1
    (source,) = sources["datasources"]
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://127.0.0.1:9999", True)
    # Ray renews its numbers every 10 s, and a rate takes four of them.
    assert source["jsonData"] == {"timeInterval": "10s"}
    assert grafana.RATE_INTERVAL == "40s"
    assert source["name"] == "Prometheus"  # RAY_PROMETHEUS_NAME's default
    boards = yaml.safe_load((provisioning / "dashboards" / "boards.yml").read_text())
    folders = {provider["name"]: Path(provider["options"]["path"]) for provider in boards["providers"]}
    assert json.loads((folders["Activations"] / "activations.json").read_text())["uid"] == "activations"
    assert folders["Ray"] == grafana.ray_boards(tmp_path)
    assert folders["Ray"].is_dir()


def make_session(folder: Path, port: int, *, age_s: float = 0.0) -> Path:
    """A folder as Ray keeps for a session with a dashboard."""
    session = folder / "session_2026-01-01_00-00-00_000000_1"
    (session / "metrics/grafana/dashboards").mkdir(parents=True)
    (session / "metrics/grafana/dashboards/default_grafana_dashboard.json").write_text('{"uid": "rayDefaultDashboard"}')
    (session / "metrics_export_port_ab").write_text(str(port))
    (session / "gcs_server_port_ab").write_text("1")
    listed = session / TARGETS_FILE
    listed.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{port}", "127.0.0.1:1"]}]))
    os.utime(listed, (time.time() - age_s,) * 2)
    return session


@pytest.fixture
def listener():
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


def test_sessions_of_this_machine_are_those_that_answer(tmp_path, listener):
    session = make_session(tmp_path, listener)
    (found,) = living_sessions(tmp_path)
    assert found.folder == session
    assert found.addresses == (f"127.0.0.1:{listener}",)  # nobody listens at port 1
    assert found.gcs == "127.0.0.1:1"


def test_a_list_that_is_no_longer_renewed_does_not_count(tmp_path, listener):
    session = make_session(tmp_path, listener, age_s=100)
    (found,) = living_sessions(tmp_path)  # its node answers, without a dashboard
    assert found.addresses == (f"127.0.0.1:{listener}",)
    (session / "metrics_export_port_ab").write_text("1")
    assert living_sessions(tmp_path) == []
    (session / "metrics_export_port_ab").write_text("torn")
    assert living_sessions(tmp_path) == []


def test_where_ray_keeps_its_folder():
    assert ray_folder({}) == Path("/tmp/ray")
    assert ray_folder({"TMPDIR": "/x"}) == Path("/x/ray")
    assert ray_folder({"TMPDIR": "/x", "RAY_TMPDIR": "/y"}) == Path("/y/ray")


def test_the_token_is_found_where_ray_looks(tmp_path):
    (tmp_path / "t").write_text("abc\n")
    assert read_token({"RAY_AUTH_TOKEN": "xyz", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "t")}) == "xyz"
    assert read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "t")}) == "abc"
    assert read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}) is None


def test_the_list_of_targets_follows_the_sessions(tmp_path, listener, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    targets = dashboard.Targets(None, tmp_path / "work")
    (tmp_path / "work").mkdir()
    assert targets.renew() == []
    assert json.loads(targets.file.read_text()) == [{"labels": {"job": "ray"}, "targets": []}]
    make_session(tmp_path / "ray", listener)
    boards = grafana.ray_boards(tmp_path / "work" / "grafana")
    boards.mkdir(parents=True)
    assert targets.renew() == [f"127.0.0.1:{listener}"]
    assert json.loads(targets.file.read_text())[0]["targets"] == [f"127.0.0.1:{listener}"]
    assert [path.name for path in boards.iterdir()] == ["default_grafana_dashboard.json"]
    before = targets.file.stat().st_mtime_ns
    targets.renew()
    assert targets.file.stat().st_mtime_ns == before  # Prometheus is not woken for nothing


def test_a_cluster_that_is_away_for_a_while_keeps_its_list(tmp_path, capsys):
    targets = dashboard.Targets("http://127.0.0.1:1", tmp_path)
    targets.file.write_text("kept")
    with pytest.raises(UserError, match="no Ray dashboard answers"):
        targets.renew()
    targets.renew_quietly()
    targets.renew_quietly()
    assert targets.file.read_text() == "kept"
    assert capsys.readouterr().err.count("no Ray dashboard answers") == 1


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_a_page_that_breaks_off_or_is_none_is_a_node_that_does_not_answer(reply):
    with serving_page(reply) as port:
        assert read_metrics([f"127.0.0.1:{port}"], "ray_") == ([], [f"127.0.0.1:{port}"])
        with pytest.raises(UserError, match="no Ray dashboard answers"):
            metrics_addresses(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("name", ["Prometheus", "Grafana"])
@pytest.mark.parametrize("code", [0, 3])
def test_either_of_them_that_ends_by_itself_is_told(name, code):
    with subprocess.Popen(["sleep", "600"]) as living, subprocess.Popen(["sh", "-c", f"exit {code}"]) as ended:
        ended.wait()
        served = {"Prometheus": living, "Grafana": living}
        dashboard._check_alive(served)
        with pytest.raises(JobError, match=f"^{name} has ended by itself with {code}$"):
            dashboard._check_alive(served | {name: ended})
        living.terminate()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves its templates open
def test_rays_boards_for_a_cluster_elsewhere_are_made_by_ray(tmp_path):
    dashboard._make_boards(tmp_path)
    found = {json.loads(path.read_text())["uid"] for path in tmp_path.iterdir()}
    assert found == {"rayDefaultDashboard", "rayTrainDashboard"}


def test_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    bare = "\n".join(dashboard.what_to_open("http://127.0.0.1:9090", None, tmp_path, None, []))
    assert "Grafana is not installed" in bare
    assert "GRAFANA=" in bare
    assert "make watch" in bare
    assert "no Ray runs on this machine yet" in bare
    assert "RAY_PROMETHEUS_HOST" not in bare  # it is where Ray looks
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret")
    full = "\n".join(
        dashboard.what_to_open("http://127.0.0.1:5", "http://127.0.0.1:6", tmp_path, "http://head:8265", ["head:1"])
    )
    assert "http://127.0.0.1:6/d/activations" in full
    assert f"the password is in {tmp_path}/grafana/admin-password" in full
    assert "RAY_PROMETHEUS_HOST=http://127.0.0.1:5 RAY_GRAFANA_HOST=http://127.0.0.1:6" in full
    assert 'http://head:8265  if it asks for a token: "ray get-auth-token"' in full
    assert "very-secret" not in full


def test_without_prometheus_one_is_told_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "infra", "dashboard"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PROMETHEUS": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "PROMETHEUS=" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_real_command_serves_both_and_leaves_nothing(stand_in, tmp_path, end):
    seen = tmp_path / "seen"
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "infra", "dashboard", "--port", "0", "--grafana-port", "0"]
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | {"GRAFANA": str(stand_in), "SEEN": str(seen), "RAY_TMPDIR": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        said = ""
        for line in process.stdout:
            said += line
            if "Ctrl-C ends" in line:
                break
        urls = [word for word in said.split() if word.startswith("http://127.0.0.1:")]
        with urllib.request.urlopen(f"{urls[0]}/api/v1/rules", timeout=10) as reply:
            groups = json.load(reply)["data"]["groups"]
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(end)
        rest, _ = process.communicate(timeout=30)
        code = process.returncode
    assert {group["name"] for group in groups} == {"extraction", "training", "machines"}
    arguments = json.loads(seen.read_text())["arguments"]
    assert arguments[0] == f"--homepath={stand_in.parents[1]}"
    assert code == 0, said + rest
    assert "stopped; Prometheus and Grafana have ended" in rest
    assert len(children) == 2
    assert not [child for child in children if child.is_running()]
    assert list((tmp_path / "tmp").iterdir()) == []

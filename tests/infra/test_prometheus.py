"""Prometheus is found, started on loopback, asked and ended; what is missing is told, and nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from infra import prometheus
from infra.console import UserError
from infra.prometheus import Prometheus, PrometheusError, find_binary, running, serving
from tests.infra.broken_pages import BROKEN, serving_page
from tests.kills import lives

installed = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
)


def program(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_program_is_the_one_that_is_named_else_the_one_in_path(tmp_path, monkeypatch):
    monkeypatch.setattr(prometheus, "_DEBIAN", tmp_path / "nowhere")
    here = program(tmp_path / "bin" / "prometheus")
    other = program(tmp_path / "other" / "prometheus-3")
    assert find_binary({"PATH": str(tmp_path)}) is None
    assert find_binary({"PATH": str(here.parent)}) == here
    assert find_binary({"PATH": str(here.parent), "PROMETHEUS": str(other)}) == other
    monkeypatch.setattr(prometheus, "_DEBIAN", here)
    assert find_binary({"PATH": str(tmp_path)}) == here


@pytest.mark.parametrize("given", ["/nowhere/prometheus", "/etc", __file__])
def test_a_named_program_that_cannot_be_run_is_an_error(given):
    with pytest.raises(UserError, match="is no program that can be run"):
        find_binary({"PROMETHEUS": given, "PATH": "/usr/bin"})


def test_without_it_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(prometheus, "find_binary", lambda: None)
    with pytest.raises(UserError, match=r"apt-get install prometheus.*make watch"), serving():
        pass


def test_one_that_ends_at_once_tells_its_last_words(tmp_path, monkeypatch):
    broken = program(tmp_path / "prometheus", "echo no space left >&2; exit 3")
    monkeypatch.setenv("PROMETHEUS", str(broken))
    with pytest.raises(PrometheusError, match=r"ended with 3(.|\n)*no space left"), serving(folder=tmp_path / "work"):
        pass


def test_a_program_that_ignores_sigterm_is_ended_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(prometheus, "END_TIMEOUT_S", 0.5)
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    with running([sys.executable, "-c", script], log=tmp_path / "log") as process:
        wait_for_text(tmp_path / "log", "deaf")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_it_ends_with_us_even_if_we_are_killed(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from infra.prometheus import running
with running(["sleep", "300"], log=Path({str(tmp_path / "log")!r})) as process:
    print(process.pid, flush=True)
    time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        until_name(pid, "sleep")  # setpriv has become it
        parent.kill()
    until = time.monotonic() + 200
    while lives(pid):
        assert time.monotonic() < until, "it lives on without us"
        time.sleep(0.05)


def wait_for_text(path: Path, text: str) -> None:
    until = time.monotonic() + 200
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def until_name(pid: int, name: str) -> None:
    until = time.monotonic() + 200
    while psutil.Process(pid).name() != name:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_an_answer_that_is_none_is_told_in_a_line(reply):
    with (
        subprocess.Popen(["true"]) as process,
        serving_page(reply) as port,
        pytest.raises(PrometheusError, match="no Prometheus answers at"),
    ):
        Prometheus(url=f"http://127.0.0.1:{port}", process=process).query("up")


class _Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(b'# TYPE planted counter\nplanted_total{stage="decode"} 41\nplanted_total{stage="write"} 1\n')

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@installed
def test_a_real_one_scrapes_answers_and_leaves_nothing(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folders = set(Path("/tmp").glob("prometheus-*"))
    try:
        with serving(targets=[f"127.0.0.1:{server.server_port}"], every_s=1) as found:
            samples = found.wait_for("planted_total")
            assert {sample.labels["stage"]: sample.value for sample in samples} == {"decode": 41.0, "write": 1.0}
            assert [sample.value for sample in found.query("sum(planted_total)")] == [42.0]
            assert found.query("2 * 3")[0].value == 6.0
            assert found.query("nothing_total") == []
            assert set(found.targets().values()) == {"up"}
            with pytest.raises(PrometheusError, match="parse error"):
                found.query("sum(")
            with pytest.raises(PrometheusError, match=r"nothing_total has no value after 0.1 s; scraped: .*up"):
                found.wait_for("nothing_total", timeout_s=0.1)
            pid = found.process.pid
            listens = [c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
            assert set(listens) == {"127.0.0.1"}
        assert not psutil.pid_exists(pid)
        with pytest.raises(PrometheusError, match="no Prometheus answers"):
            found.query("1")
    finally:
        server.shutdown()
        server.server_close()
    assert set(Path("/tmp").glob("prometheus-*")) - folders == set()


@pytest.mark.slow
@installed
def test_a_list_of_nodes_may_change_while_it_runs(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = tmp_path / "targets.json"
    file.write_text("[]")
    try:
        with serving(files=[file], every_s=1, folder=tmp_path / "kept") as found:
            assert found.targets() == {}
            new = tmp_path / "new"
            new.write_text(f'[{{"labels": {{"job": "ray"}}, "targets": ["127.0.0.1:{server.server_port}"]}}]')
            os.replace(new, file)
            assert found.wait_for('sum(planted_total{job="ray"})')[0].value == 42.0
        assert (tmp_path / "kept" / "series").is_dir()
    finally:
        server.shutdown()
        server.server_close()

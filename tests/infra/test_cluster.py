"""Connecting to Ray: what is refused quickly, and one embedded cluster in a process of its own, in another folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from infra.cluster import Connection, cluster_address, connect
from infra.console import UserError, interrupted_by_sigterm


def test_the_address_comes_from_the_caller_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address() == "head:6379"
    assert cluster_address("other:6379") == "other:6379"
    assert cluster_address("local") is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster_address() is None


@pytest.fixture
def no_connection() -> None:
    """These tests need a process that is not connected to Ray."""
    import ray

    ray.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["nobody listens", "no port"])
def test_a_dead_address_is_refused_quickly_with_a_next_step(no_connection: None, kind: str) -> None:
    with socket.socket() as taken:  # bound but not listening, so nobody can answer there
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}" if kind == "nobody listens" else "no-such-cluster"
        began = time.monotonic()
        with pytest.raises(UserError, match=f"no Ray cluster answers at {address} .*unset RAY_ADDRESS"):
            connect(address)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("before", ["", "\n \n"])  # Ray's words about its dashboard begin with empty lines
def test_the_start_is_tried_twice_and_then_explained(
    no_connection: None, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    import ray

    tried, said = [], []

    def fail(**settings: object) -> None:
        tried.append(settings)
        raise Exception(f"{before}The current node timed out during startup\nand more")  # noqa: TRY002 - what Ray 2.60 raises

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError, match=r"timed out during startup\. It needs .* --no-ray"):
        connect("local", say=said.append)
    assert len(tried) == 2
    assert said == ["Ray did not start (The current node timed out during startup); trying once more"]
    assert tried[0]["object_store_memory"] == 256 * 2**20
    assert tried[0]["dashboard_host"] == "127.0.0.1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fails", [False, True])
def test_a_stop_while_ray_starts_is_not_lost(
    no_connection: None, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, fails: bool
) -> None:
    """Ray loses an exception raised in its midst now and then, and sets a handler of SIGTERM of its own."""
    import ray

    tried = []

    def init(**settings: object) -> None:
        tried.append(settings)
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        if fails:
            raise Exception("its processes were interrupted")  # noqa: TRY002 - what Ray 2.60 raises

    monkeypatch.setattr(ray, "init", init)
    with interrupted_by_sigterm():
        former = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            connect("local")
        assert signal.getsignal(signal.SIGTERM) is former
    assert len(tried) == 1


def test_a_stop_after_ray_has_set_its_handler_is_an_interruption(
    no_connection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def init(**settings: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    with interrupted_by_sigterm(), pytest.raises(KeyboardInterrupt):
        connect("local")


def test_the_message_tells_how_to_get_the_token_and_never_the_token() -> None:
    connection = Connection(
        address="a:1", embedded=True, owned=True, dashboard_url="http://127.0.0.1:8265", needs_token=True
    )
    assert str(connection) == (
        'Ray runs inside this job, dashboard: http://127.0.0.1:8265 (it asks for a token; get it with "ray '
        'get-auth-token")'
    )


PROGRAM = """
import os, signal, sys, urllib.request
from infra.cluster import connected
from infra.console import stop_on_signals
from pipeline.dispatch_ray import run_on_ray
from pipeline.dispatch import Outcome, Wanted

class Where:
    def run(self, shard):
        import infra.console, pipeline.dispatch  # the worker finds our packages from any folder
        return os.getcwd()

def main():
    with connected(n_cpus=2) as connection, stop_on_signals() as stop:
        assert connection.embedded and connection.owned, connection
        assert connection.dashboard_url.startswith("http://127.0.0.1:"), connection
        urllib.request.urlopen(connection.dashboard_url, timeout=30).close()
        done = []
        for outcome in run_on_ray(range(1000), Where, wanted=lambda _: Wanted(n=1, num_cpus=1), stop=stop):
            assert outcome.ok, outcome
            done.append(outcome)
            if len(done) == 5:
                os.kill(os.getpid(), signal.SIGTERM)  # Ray's own handler would end the process here
        assert 5 <= len(done) < 1000
        print("stopped after what was in flight")
    print({name: os.environ[name] for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")})

main()
"""


@pytest.mark.ray
def test_an_embedded_cluster_from_another_folder(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.getcwd()}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines == [
        "stopped after what was in flight",
        "{'RAY_USAGE_STATS_ENABLED': '0', 'RAY_ENABLE_UV_RUN_RUNTIME_ENV': '0'}",
    ]  # and no chatter of Ray's
    assert "stopping" in found.stderr

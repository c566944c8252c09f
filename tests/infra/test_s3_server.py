"""`make s3`: a server for a person, on loopback."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.__main__ import main
from infra.console import ExitCode
from infra.objects import open_objects

pytestmark = pytest.mark.s3


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "infra", "s3", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "make extract" in line:
            break
    yield process, said
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_it_prints_is_what_a_second_terminal_needs(number, running, monkeypatch):
    process, said = running
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in re.findall(r"^  export (\w+)=(\S+)$", said, re.MULTILINE):
        monkeypatch.setenv(name, value)
    location = re.search(r"^  make extract STORE=(s3://\S+)$", said, re.MULTILINE)
    assert location, said
    objects = open_objects(location[1])
    objects.check_writable()
    objects.put("a/b", b"0123456789")
    part = bytearray(3)
    objects.read_into("a/b", 2, memoryview(part))
    assert part == b"234"
    process.send_signal(number)
    rest, _ = process.communicate(timeout=500)
    assert rest.strip() == "stopped; what was in the server is gone"
    assert process.returncode == ExitCode.OK


def test_a_taken_port_is_said(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["s3", "--port", str(port)]) == ExitCode.BAD_INPUT
    assert f"port {port} cannot be used: somebody listens there already; give another" in capsys.readouterr().err

"""Every query of the Grafana board has data during a real extraction and a real training, in a real Prometheus."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import board
from infra.dashboard import Targets
from infra.prometheus import Prometheus, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
    ),
]
REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 420


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A folder of its own for the Rays that the commands start; short, as Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="w", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        variables = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "TMPDIR")}
        yield variables | {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def ask_while_it_runs(
    command: list[str], environment: dict[str, str], prometheus: Prometheus, targets: Targets, asked: dict[str, str]
) -> tuple[set[str], str]:
    """Run a command; the queries that had data at some time until shortly after its end, and what it printed."""
    answered: set[str] = set()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + LIMIT_S
            while process.poll() is None and time.monotonic() < until:
                targets.renew()
                answered |= {query for query in asked if query not in answered and prometheus.query(query)}
                time.sleep(1)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)
        output.seek(0)
        said = output.read()
    assert process.returncode == 0, said
    return answered, said


def test_every_query_has_data_during_a_run(ray_here, tmp_path):
    store, run = str(tmp_path / "digits"), str(tmp_path / "run")
    # The interval that Grafana takes for numbers that are renewed every 10 s and scraped every second.
    asked = {query: panel for panel, query in board.queries(rate_interval="40s")}
    training = {query for query in asked if "ray_activations_train_" in query}
    on_gpus = {query for query, panel in asked.items() if "GPU" in panel.needs}
    targets = Targets(None, tmp_path)
    targets.renew()
    with serving(files=[targets.file], every_s=1, folder=tmp_path / "prometheus") as prometheus:
        extraction = {query: asked[query].title for query in asked.keys() - training - on_gpus}
        found, said = ask_while_it_runs(
            ["pipeline", "extract", "--images", "digits", "--store", store], ray_here, prometheus, targets, extraction
        )
        missing = {extraction[query]: query for query in extraction.keys() - found}
        assert not missing, said
        trained = {query: asked[query].title for query in training - on_gpus}
        found, said = ask_while_it_runs(
            [
                *("trainer", "train", "--block", "0-3", "--store", store, "--run", run, "--workers", "1"),
                *("--steps", "600", "--device", "cpu"),
            ],
            ray_here,
            prometheus,
            targets,
            trained,
        )
        missing = {trained[query]: query for query in trained.keys() - found}
        assert not missing, said
        assert "up" in set(prometheus.targets().values()) or targets.renew() == []

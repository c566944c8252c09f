"""Every query of the Grafana board has data during a real extraction and a real training, in a real Prometheus."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra import board
from infra.dashboard import Targets
from infra.grafana import RATE_INTERVAL
from infra.prometheus import Prometheus, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
    ),
]
REPOSITORY = Path(__file__).parents[2]


ASKED = {query: panel for panel, query in board.queries(RATE_INTERVAL)}
TRAINING = {query for query in ASKED if "ray_activations_train_" in query}
ON_GPUS = {query for query, panel in ASKED.items() if "GPU" in panel.needs}


@contextmanager
def ray_here() -> Iterator[dict[str, str]]:
    """The environment of commands that start a Ray of their own, in a short folder, as Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="w", dir="/tmp", ignore_cleanup_errors=True) as folder:
        inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "TMPDIR")}
        yield inherited | {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def unanswered(command: list[str], asked: set[str], folder: Path) -> dict[str, str]:
    """Run a command beside a Prometheus; titles of the queries that had no number at any time, with the queries."""
    waiting = set(asked)
    with ray_here() as environment, pytest.MonkeyPatch.context() as patch, (folder / "said").open("w+") as output:
        patch.setenv("RAY_TMPDIR", environment["RAY_TMPDIR"])
        targets = Targets(None, folder)
        targets.renew()
        with serving(files=[targets.file], every_s=2, folder=folder / "prometheus") as prometheus:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                while process.poll() is None:
                    targets.renew()
                    waiting -= {query for query in waiting if has_numbers(prometheus, query)}
                    time.sleep(1)
            finally:
                if process.poll() is None:
                    process.terminate()
                process.wait(60)
        output.seek(0)
        assert process.returncode == 0, output.read()
    return {ASKED[query].title: query for query in waiting}


def has_numbers(prometheus: Prometheus, query: str) -> bool:
    """0 / 0 is no number."""
    return any(math.isfinite(sample.value) for sample in prometheus.query(query))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A store, and what had no data while it was made."""
    folder = tmp_path_factory.mktemp("extraction")
    store = str(folder / "digits")
    command = ["pipeline", "extract", "--images", "digits", "--store", store]
    command += ["--micro-batch", "1", "--samples-per-shard", "32", "--samples-per-chunk", "32"]  # for half a minute
    return store, unanswered(command, set(ASKED) - TRAINING - ON_GPUS, folder)


def test_every_query_has_data_during_an_extraction(extracted):
    _, missing = extracted
    assert missing == {}


def test_every_query_has_data_during_a_training(extracted, tmp_path):
    store, _ = extracted
    command = ["trainer", "train", "--block", "0-3", "--store", store, "--run", str(tmp_path / "run")]
    command += ["--workers", "1", "--steps", "200", "--device", "cpu"]
    assert unanswered(command, TRAINING - ON_GPUS, tmp_path) == {}

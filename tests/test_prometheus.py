"""A real Prometheus scrapes a real Ray while digits are extracted and a block is trained: what it has seen is exact."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.metrics import PREFIX, SERIES
from infra.objects import FolderObjects
from infra.prometheus import Prometheus, serving
from pipeline.shard import commit_nbytes
from pipeline.shard_writer import ShardWriter
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import open_store
from storage_schemas.create import read_store_document
from storage_schemas.reader import read_commits
from tests.trainer.tiny import write_tiny_pair
from trainer.run_files import STATUS_KEY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
    ),
]

REPO = Path(__file__).parents[1]
KILL_AT = "commits/000003.json"
SETTLE_S = 120.0

HEAD = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(
    initialize_head=True, head_node_args=dict(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
)
node = cluster.head_node
print(cluster.address, f"{node.node_ip_address}:{node.metrics_export_port}", flush=True)
sys.stdin.read()
cluster.shutdown()
"""

DRIVER = """
import os
import sys
from tests.test_prometheus import DeadlyTeacher
from pipeline.extract import extract_and_tell
from pipeline.config import ExtractConfig
from pipeline.run_config import RunConfig
run = RunConfig(device="cpu", workers=2, cpus_per_worker=1)
teacher = DeadlyTeacher(marker=sys.argv[2], driver=os.getpid())
sys.exit(extract_and_tell(ExtractConfig(store=sys.argv[1]), run, teacher_factory=teacher))
"""


@dataclass(frozen=True, kw_only=True)
class DeadlyTeacher:
    """Makes the digits' own. The first worker that commits shard 3 dies in that very moment and tells nobody.

    Attributes:
        marker: File that tells that it has happened.
        driver: The process that is to live.
    """

    marker: str
    driver: int

    def __call__(self, device: str) -> Teacher:
        put, marker = ShardWriter.put, Path(self.marker)

        def deadly_put(writer: ShardWriter, key: str, data: object) -> None:
            put(writer, key, data)  # type: ignore[arg-type]
            if key == KILL_AT and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), 9)

        if os.getpid() != self.driver:
            ShardWriter.put = deadly_put  # type: ignore[method-assign]
        return load_teacher("digits_vit", device=device)


@contextmanager
def cluster() -> Iterator[tuple[str, str]]:
    """A Ray of our own: its address, and where its metrics are read."""
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "180"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(REPO)}
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert head.stdin is not None
        assert head.stdout is not None
        address, metrics = head.stdout.readline().split()
        yield address, metrics
    finally:
        head.communicate()  # its standard input ends
        assert head.wait(60) == 0


@pytest.fixture(scope="module")
def scraped() -> Iterator[tuple[str, Prometheus]]:
    """Address of a Ray, and a Prometheus that reads it every second."""
    with cluster() as (address, metrics), serving(targets=[metrics], every_s=1, rules=False) as prometheus:
        yield address, prometheus


def run_command(arguments: list[str], address: str, **variables: str) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPO, env={**environment, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-1500:], done.stderr[-1500:])


def value(prometheus: Prometheus, expression: str) -> float:
    """Of one series; NaN where there is none."""
    found = prometheus.query(expression)
    assert len(found) < 2, found
    return found[0].value if found else float("nan")


def settled(prometheus: Prometheus, expression: str, expected: float) -> float:
    """The value, once it is what it should be; or what it is after two minutes."""
    deadline = time.monotonic() + SETTLE_S
    while (found := value(prometheus, expression)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def test_totals_are_exact_though_a_worker_is_killed_and_the_driver_ends_with_the_last_shard(
    scraped: tuple[str, Prometheus], tmp_path: Path
) -> None:
    address, prometheus = scraped
    root, marker = tmp_path / "digits", tmp_path / "killed"
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(root), str(marker)],
        env={**os.environ, **environment},
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert marker.exists(), "no worker was killed"
    assert "was lost" in done.stderr
    n_digits = 0
    for split in ("train", "val"):
        store = open_store(str(root / split))
        n_images = store.n_committed
        assert n_images == store.n_samples
        n_digits += n_images
        objects = FolderObjects(root / split)
        commits, damaged = read_commits(objects, read_store_document(objects, objects.location))
        assert not damaged

        def of(name: str, labels: str = "", split: str = split) -> str:
            return f'sum({PREFIX}{name}{{store="digits/{split}"{labels}}})'

        assert settled(prometheus, of("images_total"), n_images) == n_images
        nbytes = sum(map(commit_nbytes, commits))
        assert settled(prometheus, of("written_bytes_total"), nbytes) == nbytes
        assert value(prometheus, of("bad_images_total")) == 0
        assert value(prometheus, of("shards_total", ',result="done"')) == len(commits)
        assert value(prometheus, of("shards_total", ',result="quarantined"')) == 0
        # What the killed worker had measured of shard 3 went with it, and of another one if it had just done that too.
        told = value(prometheus, of("shard_duration_seconds_count"))
        assert told == len(commits) if split == "val" else len(commits) - 2 <= told < len(commits)

        status = json.loads(next((root / split).glob("log/*/status.json")).read_text())
        for stage in ("read", "decode", "device", "copy", "encode", "write", "commit"):
            spent = value(prometheus, of("stage_seconds_total", f',stage="{stage}"'))
            lanes = value(
                prometheus, f'max_over_time({PREFIX}stage_lanes{{store="digits/{split}",stage="{stage}"}}[1h])'
            )
            assert spent > 0, stage
            # A core each and two shards in flight, for one worker or two: gauges are sent every ten seconds.
            assert lanes in ((2, 4) if stage == "commit" else (1, 2)), stage
        assert status["limited_by"] in status["verdict"]
        gauges = {"planned_images": n_images, "committed_images": n_images, "workers_wanted": 2}
        for name, expected in gauges.items() if split == "train" else ():  # the other is over too soon for them
            found = value(prometheus, f'max_over_time({PREFIX}{name}{{store="digits/{split}"}}[1h])')
            assert found == expected, name
    assert n_digits == 1797
    missing = [name for name, series in SERIES.items() if "store" in series.tags and not seen(prometheus, name)]
    assert missing == []


def test_a_training_is_counted_exactly(scraped: tuple[str, Prometheus], tmp_path: Path) -> None:
    address, prometheus = scraped
    write_tiny_pair(tmp_path / "store")
    run = tmp_path / "runs" / "0-2"
    arguments = ["--block", "0-2", "--store", str(tmp_path / "store"), "--run", str(run), "--device", "cpu"]
    run_command(["-m", "trainer", "train", *arguments, "--steps", "400"], address)
    status = json.loads((run / STATUS_KEY).read_text())
    assert (status["state"], status["step"]) == ("complete", 400)

    def of(name: str) -> str:
        return f'sum({PREFIX}train_{name}_total{{run="runs/0-2",block="0-2"}})'

    for name, series in (("samples", "samples"), ("steps", "steps"), ("fetched_bytes", "fetched_bytes")):
        expected = status["totals"][name]
        assert expected > 0
        assert settled(prometheus, of(series), expected) == expected
    for name, series in (("loader_s", "loader_wait_seconds"), ("step_s", "step_seconds")):
        assert settled(prometheus, of(series), status["totals"][name]) == pytest.approx(status["totals"][name])
    assert value(prometheus, of("needed_bytes")) <= value(prometheus, of("fetched_bytes"))
    assert (
        value(prometheus, f'max_over_time({PREFIX}train_planned_samples{{run="runs/0-2"}}[1h])')
        == status["samples_total"]
    )
    missing = {name for name, series in SERIES.items() if "run" in series.tags and not seen(prometheus, name)}
    assert missing == {"train_mfu_ratio"}, "which has a value on a GPU whose peak is known"


def test_trainings_in_processes_of_their_own_are_counted_by_the_tasks_that_started_them(
    scraped: tuple[str, Prometheus], tmp_path: Path
) -> None:
    address, prometheus = scraped
    write_tiny_pair(tmp_path / "store")
    arguments = ["--block", "all", "--blocks", "0-2,2-3", "--store", str(tmp_path / "store"), "--run", str(tmp_path)]
    run_command(["-m", "trainer", "train", *arguments, "--device", "cpu", "--steps", "60"], address)
    for block in ("0-2", "2-3"):
        (found,) = tmp_path.glob(f"{block}*/{STATUS_KEY}")
        status = json.loads(found.read_text())
        assert status["step"] == 60
        for name in ("samples", "steps"):
            total = f'sum({PREFIX}train_{name}_total{{block="{block}",run=~"{tmp_path.name}/.*"}})'
            assert settled(prometheus, total, status["totals"][name]) == status["totals"][name]


def seen(prometheus: Prometheus, name: str) -> bool:
    """Whether there was ever a value under this name of our list."""
    suffix = {"counter": "_total", "histogram": "_count", "gauge": ""}[SERIES[name].kind]
    return bool(prometheus.query(f"last_over_time({PREFIX}{name}{suffix}[1h])"))

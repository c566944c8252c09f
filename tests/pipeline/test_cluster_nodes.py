"""The whole extraction on a cluster of several (pretended) machines that come, go, and differ."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.objects import open_objects
from pipeline.job import DEPTH_ON_CPU
from storage_schemas import open_store
from storage_schemas.digest import content_digest
from tests.ray_nodes import Nodes, ray_nodes, workers_of
from tests.s3_servers import S3Server, environment_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*unclosed.*socket:ResourceWarning"),  # Ray's own, when a node's start fails
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]

DIGITS = {"images": "digits", "samples-per-shard": 8, "samples-per-chunk": 8, "device": "cpu"}
N_TRAIN_SHARDS = 180


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ray_nodes(tmp_path / "cluster") as nodes:
        yield nodes


class Command:
    """`python -m pipeline extract` in a process of its own, from a folder of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], *more: str, **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        self._told = folder / "told.txt"
        flags = [text for name, value in {**DIGITS, **settings}.items() for text in (f"--{name}", str(value))]
        with self._told.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "extract", *flags, *more],
                cwd=folder,
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))},
                    "RAY_AUTH_MODE": "disabled",
                    "PYTHONPATH": os.getcwd(),
                    **environment,
                },
                stdout=out,
                stderr=out,
            )

    @property
    def told(self) -> str:
        return self._told.read_text()

    def wait_for(self, what: Callable[[], object], why: str, at_most_s: float = 900.0) -> None:
        """Until it is so, while the command runs."""
        end = time.monotonic() + at_most_s
        while not what():
            assert self.process.poll() is None, f"it ended before {why}:\n{self.told}"
            assert time.monotonic() < end, f"waited in vain until {why}:\n{self.told}"
            time.sleep(0.1)

    def end(self, at_most_s: float = 900.0) -> int:
        """Its exit code."""
        return self.process.wait(at_most_s)


@pytest.fixture
def extract(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start the command; it does not outlive the test."""
    started: list[Command] = []

    def start(environment: dict[str, str], *more: str, **settings: Any) -> Command:
        started.append(Command(tmp_path / f"driver-{len(started)}", environment, *more, **settings))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


def object_store_nbytes(nodes: Nodes) -> dict[str, float]:
    """What lies in the object store of each living node now, by Ray's own metrics."""
    import ray

    used = {}
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            try:
                text = urllib.request.urlopen(url, timeout=10).read().decode()
            except OSError:  # its agent is not up yet, or the node has just died; we look often
                continue
            families = {family.name: family for family in text_string_to_metric_families(text)}
            if "ray_object_store_memory" in families:
                used[node["NodeID"]] = sum(sample.value for sample in families["ray_object_store_memory"].samples)
    return used


def status_of(store: str) -> dict[str, Any]:
    objects = open_objects(store)
    (key,) = [info.key for info in objects.list("log/") if info.key.endswith("status.json")]
    return json.loads(objects.get(key))


def shards_of(store: str) -> list[dict[str, Any]]:
    objects = open_objects(store)
    (key,) = [info.key for info in objects.list("log/") if info.key.endswith("shards.jsonl")]
    return [json.loads(line) for line in objects.get(key).decode().splitlines()]


def test_nodes_that_die_drain_and_come_late_change_nothing(
    nodes: Nodes, moto: S3Server, extract: Callable[..., Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four machines; one is killed, one is announced to go, one comes; the store is the one of a single machine."""
    import ray

    from pipeline.pool_ray import LOOK_S

    environment = environment_of(moto.direct)  # past the proxy, which has nothing to do here
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"s3://{moto.make_bucket()}"
    train = open_objects(f"{bucket}/store/train")
    first = [nodes.add(s3_keys=True) for _ in range(4)]
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    command = extract({**environment, "RAY_ADDRESS": nodes.address}, store=f"{bucket}/store")

    def n_committed() -> int:
        return sum(1 for _ in train.list("commits/"))

    pids: dict[str, set[int]] = {node.node_id: set() for node in first}
    peak: dict[str, float] = {}

    def look() -> bool:
        for node in [*first, *late]:
            pids.setdefault(node.node_id, set()).update(workers_of(node))
        for node_id, nbytes in object_store_nbytes(nodes).items():
            peak[node_id] = max(peak.get(node_id, 0), nbytes)
        return True

    late: list[Any] = []
    command.wait_for(lambda: look() and n_committed() >= 10, "10 shards were committed")
    late.append(nodes.add(s3_keys=True))
    command.wait_for(lambda: look() and workers_of(late[0]), "the late node got a worker")
    at_kill = n_committed()
    nodes.remove(first[0])
    nodes.drain(first[1])
    drained_at, draining_workers = time.monotonic(), workers_of(first[1])
    assert at_kill < 0.8 * N_TRAIN_SHARDS, "too fast for this test: it is to happen while there is work"
    assert draining_workers
    command.wait_for(lambda: look() and not workers_of(first[1]), "the draining node's worker had gone")
    left_after_s = time.monotonic() - drained_at
    at_leave = n_committed()
    command.wait_for(lambda: look() and n_committed() >= N_TRAIN_SHARDS, "all were committed")
    assert not workers_of(first[1])
    assert command.end() == 0, command.told
    print(command.told)
    print(f"killed at {at_kill}, draining worker left after {left_after_s:.1f} s with {at_leave} committed")
    print("object store peak:", peak)

    shards = shards_of(train.location)
    everywhere = [*shards, *shards_of(f"{bucket}/store/val")]
    by_node = {
        node_id: sum(int(shard["worker"].rpartition(":")[2]) in mine for shard in everywhere)
        for node_id, mine in pids.items()
    }
    print("shards by node:", by_node)
    assert open_store(train.location).is_complete
    assert sorted(shard["shard"] for shard in shards) == list(range(N_TRAIN_SHARDS))
    assert by_node[late[0].node_id] > 0, "the late node was not used"
    assert at_leave < N_TRAIN_SHARDS
    assert left_after_s < LOOK_S + 30
    # What the killed machine had in hand, in company, was handed out anew. Had anything been charged to a shard, be it
    # for the kill or for the drain, it would stand under "retried"; had the drain cost anything, there would be more.
    again = {shard["shard"]: shard["attempts"] for shard in shards if shard["attempts"] > 1}
    print("handed out more than once:", again)
    assert len(again) <= DEPTH_ON_CPU
    assert set(again.values()) <= {2}
    assert status_of(train.location)["shards"] == {"done": N_TRAIN_SHARDS, "retried": 0, "quarantined": 0}
    assert command.told.count(" was lost: ") == 1, command.told
    assert peak
    assert max(peak.values()) < 2**20, peak

    alone = extract({}, "--no-ray", store=str(tmp_path / "alone"))
    assert alone.end() == 0, alone.told
    for split in ("train", "val"):
        there, here = (open_objects(f"{place}/{split}") for place in (f"{bucket}/store", str(tmp_path / "alone")))
        assert content_digest(there) == content_digest(here)

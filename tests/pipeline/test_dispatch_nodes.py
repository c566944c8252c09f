"""The Ray dispatcher on several (pretended) nodes: one is drained and taken away, another comes late."""

import os
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import pytest

from pipeline.dispatch import Wanted, WorkerLost, WorkersReady

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def two_workers(without: Set[str]) -> Wanted:
    """Two workers of one core, whatever the cluster has."""
    return Wanted(n=2, num_cpus=1)


@dataclass(frozen=True)
class Sleeper:
    """Every shard takes a moment and tells on which node it ran."""

    seconds: float

    def __call__(self) -> "Sleeper":
        return self

    def run(self, shard: int) -> str:
        import ray

        time.sleep(self.seconds)
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose head has no CPUs; add nodes to it."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # the embedded cluster that other tests share; the next one that needs it starts it again
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    cluster.small = small
    yield cluster
    cluster.shutdown()


def drain(cluster: Any, node: Any) -> None:
    """Announce to Ray that this node will be taken away, as a spot market does."""
    import ray
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs = ray._raylet.GcsClient(address=cluster.address)
    gcs.drain_node(node.node_id, reason, "spot", int((time.time() + 60) * 1000))


def test_a_drained_and_lost_node_costs_no_attempt_and_its_successor_joins(nodes: Any) -> None:
    from infra.cluster import connected
    from pipeline.dispatch_ray import run_on_ray

    first, second = (nodes.add_node(num_cpus=1, **nodes.small) for _ in range(2))
    events, outcomes, drained_at, gone, late = [], [], None, False, None
    with connected(nodes.address) as connection:
        assert not connection.embedded
        for outcome in run_on_ray(
            range(60), Sleeper(0.5), wanted=two_workers, depth=2, tries=1, on_event=events.append
        ):
            outcomes.append(outcome)
            if drained_at is None and {o.report for o in outcomes} == {first.node_id, second.node_id}:
                drain(nodes, second)
                drained_at = time.monotonic()
            elif drained_at and late is None:
                late = nodes.add_node(num_cpus=1, wait=False, **nodes.small)
            elif late and not gone and time.monotonic() > drained_at + 1:
                nodes.remove_node(second, allow_graceful=False)
                gone = True
    assert sorted(o.shard for o in outcomes) == list(range(60))
    assert all(o.ok for o in outcomes)  # with tries=1 a single charged death in solitude would have shown
    assert gone
    assert late.node_id in {o.report for o in outcomes}
    assert all(event.preempted for event in events if isinstance(event, WorkerLost))
    assert next(e for e in events if isinstance(e, WorkersReady)).total == 2


def test_a_draining_node_is_given_nothing_more(nodes: Any) -> None:
    from infra.cluster import connected
    from pipeline.dispatch_ray import run_on_ray
    from pipeline.pool_ray import LOOK_S

    first, second = (nodes.add_node(num_cpus=1, **nodes.small) for _ in range(2))
    drained_at, late_on_second = None, 0
    with connected(nodes.address):
        seen = set()
        for outcome in run_on_ray(range(60), Sleeper(0.5), wanted=two_workers, depth=1):
            seen.add(outcome.report)
            assert outcome.ok
            if drained_at is None and seen == {first.node_id, second.node_id}:
                drain(nodes, second)
                drained_at = time.monotonic()
            if drained_at and time.monotonic() > drained_at + LOOK_S + 2:
                late_on_second += outcome.report == second.node_id
    assert drained_at
    assert late_on_second == 0

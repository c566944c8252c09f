"""Gauges of an extraction are shown as long as it runs, though Ray forgets each ten seconds after it was set."""

import pytest

from infra.metrics import SERIES, Metrics
from infra.verdict import Pool
from pipeline.dispatch import WorkersReady
from pipeline.run_metrics import RunMetrics
from pipeline.shard import ShardReport


def report(**changes) -> ShardReport:
    values = dict.fromkeys(ShardReport.__dataclass_fields__)
    values |= {"shard": 0, "n_samples": 10, "nbytes": 1000, "worker": "w", "wall_s": 1.0, "bad_images": ()}
    values |= {"seconds": {"decode": 1.0}, "faults": {}, "requests": {}}
    values |= {"pools": (Pool(stages=("decode",), lanes=2),)}
    return ShardReport(**(values | changes))


def test_every_gauge_is_set_again_whenever_the_status_is_written(monkeypatch: pytest.MonkeyPatch):
    shown: dict[str, float] = {}
    monkeypatch.setattr(Metrics, "set", lambda self, name, value, **tags: shown.__setitem__(name, value))
    metrics = RunMetrics("data/stores/digits/train", n_planned=100, n_committed=40)
    with metrics.begun():
        metrics.event(WorkersReady(ready=3, total=4))
        metrics.shard(report())
        gauges = {name for name, one in SERIES.items() if one.kind == "gauge" and "store" in one.tags}
        for _ in range(2):
            shown.clear()
            metrics.status()
            assert shown.keys() == gauges
        assert shown == {
            "planned_images": 100,
            "committed_images": 50,
            "workers_ready": 3,
            "workers_wanted": 4,
            "stage_lanes": 6,
        }

"""Gauges of an extraction are shown as long as it runs, though Ray forgets each ten seconds after it was set.

And its verdict is right at any moment, though what a stage took is known only at the end of a shard.
"""

import pytest

from infra.metrics import SERIES, STAGES, Metrics
from infra.verdict import Pool
from pipeline.dispatch import WorkersReady
from pipeline.run_metrics import RunMetrics
from pipeline.shard import ShardElsewhere, ShardReport


def report(**changes) -> ShardReport:
    values = dict.fromkeys(ShardReport.__dataclass_fields__)
    values |= {"shard": 0, "n_samples": 10, "nbytes": 1000, "worker": "w", "wall_s": 1.0, "bad_images": ()}
    values |= {"seconds": {"decode": 1.0}, "faults": {}, "requests": {}}
    values |= {"pools": (Pool(stages=("decode",), lanes=2),)}
    return ShardReport(**(values | changes))


def somewhere(shard: int) -> ShardElsewhere:
    return ShardElsewhere(
        shard=shard, run_id="other", committed=True, bad_images=(), nbytes=1000, requests={}, faults={}
    )


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


def test_what_other_jobs_have_committed_is_shown_as_soon_as_it_is_seen(monkeypatch: pytest.MonkeyPatch):
    shown: dict[str, float] = {}
    monkeypatch.setattr(Metrics, "set", lambda self, name, value, **tags: shown.__setitem__(name, value))
    metrics = RunMetrics("data/stores/digits/train", n_planned=100, n_committed=40)
    metrics.shard(report())
    metrics.there(80)
    assert shown["committed_images"] == 80
    metrics.shard(report())  # a look that is older than our last shards takes nothing away
    metrics.status()
    assert shown["committed_images"] == 80
    for shard in range(4):
        metrics.elsewhere(somewhere(shard), 10, ours=False)
    assert shown["committed_images"] == 100


def test_every_stage_begins_at_zero(monkeypatch: pytest.MonkeyPatch):
    expected: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(Metrics, "expect", lambda self, name, **tags: expected.append((name, tags)))
    with RunMetrics("data/stores/digits/train", n_planned=100, n_committed=40).begun():
        assert [tags["stage"] for name, tags in expected if name == "stage_seconds"] == list(STAGES)


@pytest.mark.parametrize("n_workers", [1, 4])
@pytest.mark.parametrize("shard_s", [40, 250, 2000])
def test_long_shards_are_no_idle_workers(n_workers: int, shard_s: int):
    """Workers that are busy for 95 % of the time are found so at any moment after the first shards."""
    now = [0.0]
    metrics = RunMetrics("data/stores/digits/train", n_planned=10**6, n_committed=0, clock=lambda: now[0])
    pools = (Pool(stages=("read", "decode"), lanes=2),)
    seconds = {"read": 0.1 * 2 * shard_s, "decode": 0.85 * 2 * shard_s}
    metrics.event(WorkersReady(ready=n_workers, total=n_workers))
    assert metrics.status()["verdict"] == "nothing was done yet"
    for _ in range(6):
        began = now[0]
        for _ in range(4):  # asked long after a shard, and right before the next
            status = metrics.status()
            if began:
                assert status["limited_by"] == "decode"
                assert status["busy"] == pytest.approx({"read": 0.1, "decode": 0.85}), now
                assert status["verdict"].startswith("limited by decode, busy 85 % of the time (read 10 %)")
            now[0] += shard_s / 4
        for worker in range(n_workers):  # they end together, and it is asked in between
            metrics.shard(report(worker=f"w{worker}", seconds=seconds, pools=pools))
            if began:
                assert metrics.status()["busy"] == pytest.approx({"read": 0.1, "decode": 0.85}), (now, worker)
    assert sum(metrics.verdict().busy.values()) == pytest.approx(0.95)

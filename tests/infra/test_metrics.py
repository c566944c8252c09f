"""Stage seconds, the verdict, and counters with and without Ray."""

import threading
import time
import urllib.request

import pytest

from infra.faults import Faults
from infra.metrics import PREFIX, SERIES, Metrics, StageClock, place_label, sum_stages
from infra.verdict import Pool, Verdict, loop_verdict, verdict


def test_the_clock_adds_up_over_threads_and_counts_a_block_that_raises() -> None:
    clock = StageClock()

    def work() -> None:
        with clock("decode"):
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ValueError, match="torn"), clock("write"):
        raise ValueError("torn")
    clock.add("device", 1.5)
    seconds = clock.seconds()
    assert seconds["decode"] >= 0.2
    assert seconds["write"] >= 0
    assert seconds["device"] == 1.5


def test_seconds_of_shards_add_up() -> None:
    assert sum_stages([{"a": 1.0, "b": 2.0}, {"b": 0.5}]) == {"a": 1.0, "b": 2.5}
    assert sum_stages([]) == {}


POOLS = (
    Pool(stages=("decode", "encode"), lanes=4),
    Pool(stages=("device", "copy"), lanes=1),
    Pool(stages=("write",), lanes=16),
)


@pytest.mark.parametrize("limit", ["decode", "encode", "device", "copy", "write"])
def test_the_verdict_names_the_planted_limit(limit: str) -> None:
    # Two workers for 100 s; every stage is used for a tenth of what its threads could do, and one for 60 % more.
    lanes = {stage: pool.lanes for pool in POOLS for stage in pool.stages}
    seconds = {stage: 0.1 * 200 * n for stage, n in lanes.items()}
    seconds[limit] += 0.6 * 200 * lanes[limit]
    found = verdict(seconds | {"waiting": 5000.0}, worker_s=200, pools=POOLS)
    assert found.limit == limit
    assert found.busy == pytest.approx(dict.fromkeys(lanes, 0.1) | {limit: 0.7})
    assert str(found).startswith(f"limited by {limit}, busy 70 % of the time (")
    assert "waiting" not in found.busy


def test_stages_that_share_their_threads_limit_together() -> None:
    # Writing has threads of its own, 60 % of whose time it takes; the others have none left, and do two things.
    found = verdict({"decode": 180.0, "encode": 200.0, "write": 960.0}, worker_s=100, pools=POOLS)
    assert found.limit == "encode"
    assert found.pool_busy == pytest.approx(0.95)
    assert found.busy == pytest.approx({"decode": 0.45, "encode": 0.5, "write": 0.6})


def test_the_verdict_admits_that_nothing_was_busy_all_the_time() -> None:
    found = verdict({"decode": 80.0, "device": 30.0}, worker_s=100, pools=POOLS)
    assert found.limit == "device"
    assert str(found) == (
        "mostly device, busy 30 % of the time (decode 20 %), but no threads were busy all the time: a short run, or "
        "stages that waited for each other, which a larger DEPTH would help"
    )
    assert verdict({}, worker_s=0, pools=()) == Verdict()
    assert str(Verdict()) == "nothing was done yet"


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({"loader": 50.0, "step": 100.0}, "loader"),  # a loader 1.5 times slower than the step shows half a step
        ({"loader": 4.0, "step": 100.0}, "step"),
        ({"loader": 4.0, "step": 40.0, "validation": 60.0}, "validation"),
        ({"loader": 1.0}, "loader"),
        ({}, ""),
    ],
)
def test_a_loop_waits_for_its_loader_or_for_nothing(seconds: dict[str, float], limit: str) -> None:
    assert loop_verdict(seconds).limit == limit


def test_faults_are_counted_by_place_and_kind_and_told() -> None:
    faults, told = Faults(), []
    with faults.told_to(lambda where, kind: told.append((where, kind))):
        faults.note("throttled")
        faults.note("reset")
        with faults.at_source():
            faults.note("throttled")
            thread = threading.Thread(target=faults.note, args=("timeout",))
            thread.start()
            thread.join()
    faults.note("server")
    assert told == [("store", "throttled"), ("network", "reset"), ("source", "throttled"), ("network", "timeout")]
    assert faults.counts() == {
        "store throttled": 1, "network reset": 1, "source throttled": 1, "network timeout": 1, "store server": 1
    }  # fmt: skip


def test_without_ray_counting_does_nothing_but_names_are_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "ray", raising=False)
    metrics = Metrics({"store": "digits/train"})
    metrics.add("images", 3)
    metrics.set("workers_ready", 2)
    metrics.observe("shard_duration_seconds", 0.4)
    with pytest.raises(KeyError):
        metrics.add("imagse")
    with pytest.raises(AssertionError, match="workers_ready is a gauge"):
        metrics.add("workers_ready")


@pytest.mark.ray
def test_with_ray_the_series_are_exported_under_our_names(ray_cluster: None) -> None:
    import ray

    metrics = Metrics({"store": "digits/test"})
    of_run = Metrics({"run": "digits", "block": "digits/test"})

    def count(*kinds: str) -> None:
        for name, series in SERIES.items():
            extra = {tag: "device" for tag in series.tags if tag not in ("store", "run", "block")}
            of = metrics if "store" in series.tags else of_run
            if series.kind in kinds:
                {"counter": of.add, "gauge": of.set, "histogram": of.observe}[series.kind](name, 7, **extra)

    count("counter", "histogram")
    metrics.add("images", 3)
    metrics.add("images", 0)
    metrics.expect("shards", result="quarantined")
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 200
    values: dict[str, float] = {}
    while time.monotonic() < deadline:
        count("gauge")  # which Ray forgets some ten seconds after it was set
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                lines = [line for line in answer.read().decode().splitlines() if '"digits/test"' in line]
        except OSError:  # Ray's agent starts a little after Ray
            lines = []
        values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
        all_there = len(values) >= len(SERIES) and any('result="quarantined"' in line for line in lines)
        if all_there and values["ray_activations_images_total"] == 10:  # not 7: they are exported now and then
            break
        time.sleep(0.5)
    assert values["ray_activations_images_total"] == 10
    assert values["ray_activations_stage_seconds_total"] == 7
    assert values["ray_activations_workers_ready"] == 7
    assert values["ray_activations_shard_duration_seconds_count"] == 1
    assert any(line.startswith(f"{PREFIX}shards_total") and 'result="quarantined"' in line for line in lines)
    assert {name for line in lines for name in SERIES if line.startswith(PREFIX + name)} == set(SERIES)


def test_labels_are_short() -> None:
    assert place_label("s3://bucket/deep/imagenet/train/") == "imagenet/train"
    assert place_label("data/stores/digits") == "stores/digits"
    assert place_label("digits") == "digits"

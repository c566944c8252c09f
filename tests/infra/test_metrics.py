"""Stage seconds, the verdict, and counters with and without Ray."""

import threading
import time
import urllib.request

import pytest

from infra.metrics import SERIES, STAGES, Metrics, StageClock, sum_stages, verdict


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
    assert 0.2 <= seconds["decode"] < 2
    assert 0 <= seconds["write"] < 0.5
    assert seconds["device"] == 1.5


def test_seconds_of_shards_add_up() -> None:
    assert sum_stages([{"a": 1.0, "b": 2.0}, {"b": 0.5}]) == {"a": 1.0, "b": 2.5}
    assert sum_stages([]) == {}


@pytest.mark.parametrize("limit", [stage for stage in STAGES if stage != "waiting"])
def test_the_verdict_names_the_planted_limit(limit: str) -> None:
    # Two workers for 100 s; every other stage is used for a tenth of what its lanes could do.
    lanes = 1 if limit == "device" else 3
    seconds = dict.fromkeys(STAGES, 20.0) | {limit: 0.9 * 100 * 2 * lanes, "waiting": 500.0}
    found = verdict(seconds, wall_s=100, n_workers=2, lanes=3)
    assert found.limit == limit
    assert found.busy[limit] == pytest.approx(0.9)
    assert str(found).startswith(f"limited by {limit}, busy 90 % of the time (")
    assert "waiting" not in found.busy


def test_the_verdict_weighs_seconds_by_lanes() -> None:
    # Decoding took twice the seconds of the device, but had four threads for it: the device is the limit.
    found = verdict({"decode": 180.0, "device": 90.0}, wall_s=100, n_workers=1, lanes={"decode": 4, "device": 1})
    assert found.limit == "device"
    assert found.busy == pytest.approx({"decode": 0.45, "device": 0.9})


def test_the_verdict_admits_when_nothing_was_the_limit() -> None:
    found = verdict({"decode": 20.0, "device": 30.0}, wall_s=100, n_workers=1)
    assert found.limit == ""
    assert str(found) == (
        "nothing was busy all the time (decode 20 %, device 30 %): short run, or workers that waited for each other"
    )
    assert verdict({}, wall_s=0, n_workers=0).limit == ""


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
    for name, series in SERIES.items():
        extra = {tag: "device" for tag in series.tags if tag not in ("store", "run", "block")}
        of = metrics if "store" in series.tags else of_run
        {"counter": of.add, "gauge": of.set, "histogram": of.observe}[series.kind](name, 7, **extra)
    metrics.add("images", 3)
    metrics.add("images", 0)
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        with urllib.request.urlopen(address, timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if '"digits/test"' in line]
        if len({line.split("{")[0] for line in lines}) >= len(SERIES):
            break
        time.sleep(0.5)
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert values["ray_activations_images_total"] == 10
    assert values["ray_activations_stage_seconds_total"] == 7
    assert values["ray_activations_workers_ready"] == 7
    assert values["ray_activations_shard_duration_seconds_count"] == 1

"""The verdict of real extractions, with time put into their stages: the one that is half as slow again is named.

By default the time is pretended, each thread's by itself, and what a busy machine takes is none; the slow test sleeps.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pipeline.rounds
import pipeline.shard
import pipeline.shard_writer
from infra.objects import FolderObjects
from infra.verdict import Pool
from pipeline.dispatch import ShardQuarantined, WorkersReady
from pipeline.image_folder import ImageFolderSource
from pipeline.job import ExtractResult
from pipeline.run_config import RunConfig
from pipeline.run_metrics import RunMetrics
from pipeline.shard import ShardReport
from pipeline.teacher import Teacher
from storage_schemas.keys import sharded_array_paths
from storage_schemas.samples import Sample
from storage_schemas.shard_buffers import ShardBuffers
from tests.pipeline_jobs import fake_config, make_tree, run_job

N_THREADS, N_PUTTERS = 3, 16
RUN = RunConfig(no_ray=True, device="cpu", cpus_per_worker=N_THREADS, depth=2)
N_OBJECTS = 4 + 1 + 1
"""Of a shard of one layer of fake_vit: four kinds, what the head reads, and the statistics."""

UNIT_S = 1.0
"""Seconds of threads that a stage takes for a shard; the throttled one takes half as much again."""

STAGES = ("decode", "device", "encode", "write")
"""Those that are slowed in every trial; reading is so in its own."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 32)


class RealTime:
    """Stages take as long as they are told to, at least."""

    def paced(self, stage: str, seconds: float, work: Callable[..., Any], *args: Any) -> Any:
        until = time.perf_counter() + seconds
        done = work(*args)
        time.sleep(max(0.0, until - time.perf_counter()))
        return done

    def replace_clocks(self, patch: pytest.MonkeyPatch, *, remote: bool) -> None:
        pass


class PretendedTime(RealTime):
    """Stands for `time` where stages are measured. Each thread has a clock, which goes on when it is paced only."""

    monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

    def __init__(self) -> None:
        self._local, self._lock = threading.local(), threading.Lock()
        self._spent_s: Counter[str] = Counter()

    def perf_counter(self) -> float:
        return getattr(self._local, "now", 0.0)

    def paced(self, stage: str, seconds: float, work: Callable[..., Any], *args: Any) -> Any:
        done = work(*args)
        self._local.now = self.perf_counter() + seconds
        with self._lock:
            self._spent_s[stage] += seconds
        return done

    def replace_clocks(self, patch: pytest.MonkeyPatch, *, remote: bool) -> None:
        def of_the_run() -> float:
            """In which the threads that have most to do are always busy."""
            with self._lock:
                write_s, all_s = self._spent_s["write"], self._spent_s.total()
            return max(write_s / N_PUTTERS, (all_s - write_s) / N_THREADS) if remote else all_s / N_THREADS

        patch.setattr("infra.metrics.time", self)
        patch.setattr(pipeline.shard, "time", self)
        patch.setattr(pipeline.rounds, "RunMetrics", partial(RunMetrics, clock=of_the_run))


def throttled(
    images: Path,
    store: Path,
    seconds: dict[str, float],
    patch: pytest.MonkeyPatch,
    *,
    n_images: int = 32,
    remote: bool = False,
    timed: RealTime | None = None,
) -> dict[str, Any]:
    """Extract with each stage slowed to so many seconds a shard, over all threads; returns status.json."""
    config = fake_config(
        images, store, layers="3", limit=n_images, samples_per_shard=8, samples_per_chunk=4, micro_batch=4
    )
    read, decode, states = ImageFolderSource.read, pipeline.shard.decode_image, Teacher.layer_states_list
    encode, put = ShardBuffers.encode, FolderObjects.put
    timed = timed or PretendedTime()
    paced = timed.paced
    data_keys = ("layer_", "head_input/", "statistics/")

    def slow_read(self: ImageFolderSource, sample: Sample) -> bytes:
        return paced("read", seconds.get("read", 0.0) / 8, read, self, sample)

    def slow_decode(*args: Any) -> Any:
        return paced("decode", seconds["decode"] / 8, decode, *args)

    def slow_states(*args: Any) -> Any:
        return paced("device", seconds["device"] / 2, states, *args)

    def slow_encode(self: ShardBuffers, *args: Any) -> Any:
        return paced("encode", seconds["encode"] / (N_OBJECTS - 1), encode, self, *args)

    def slow_put(self: FolderObjects, key: str, data: Any) -> None:
        is_data = key.startswith(data_keys) and not key.endswith("zarr.json")
        paced("write", seconds["write"] / N_OBJECTS if is_data else 0.0, put, self, key, data)

    with patch.context() as slow:
        timed.replace_clocks(slow, remote=remote)
        slow.setattr(ImageFolderSource, "read", slow_read)
        slow.setattr(pipeline.shard, "decode_image", slow_decode)
        slow.setattr(Teacher, "layer_states_list", slow_states)
        slow.setattr(ShardBuffers, "encode", slow_encode)
        slow.setattr(FolderObjects, "put", slow_put)
        slow.setattr(os, "fsync", lambda _: None)  # a disk that others keep busy is a throttle of its own
        if remote:  # a store that others share, whose puts have threads of their own; here it is a folder all the same
            slow.setattr(pipeline.shard, "is_remote", lambda _: True)
            slow.setattr(pipeline.shard_writer, "is_remote", lambda _: True)
        result = run_job(config, RUN)
    assert result.complete
    (report, *_) = result.reports
    assert len(sharded_array_paths(result.planned.spec)) + 1 == N_OBJECTS
    assert report.seconds["write"] >= seconds["write"] * 0.99
    return status_of(result)


def status_of(result: ExtractResult) -> dict[str, Any]:
    (path,) = Path(result.planned.location).glob("log/*/status.json")
    return json.loads(path.read_text())


def verdict_of(images: Path, store: Path, limit: str, patch: pytest.MonkeyPatch, **how: Any) -> dict[str, Any]:
    seconds = dict.fromkeys(STAGES, UNIT_S) | {limit: 1.5 * UNIT_S}
    return throttled(images, store, seconds, patch, n_images=16 if limit == "read" else 32, **how)


def remote_verdict_of(images: Path, store: Path, limit: str, patch: pytest.MonkeyPatch, **how: Any) -> dict[str, Any]:
    """Decoding and the rest share three threads, and writing has sixteen."""
    unit_s = 2 * UNIT_S  # many threads that sleep wake late; the longer they sleep, the less it matters
    pool_s = {"decode": 0.5 * unit_s, "device": 0.25 * unit_s, "encode": 0.25 * unit_s}
    slower = 1.5 if limit == "write" else 1 / 1.5
    write_s = slower * unit_s / N_THREADS * N_PUTTERS
    return throttled(images, store, {**pool_s, "write": write_s}, patch, n_images=32, remote=True, **how)


@pytest.mark.parametrize("limit", ["read", *STAGES])
def test_the_stage_that_is_slower_is_named(
    images: Path, tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = verdict_of(images, tmp_path / "store", limit, monkeypatch)
    assert status["limited_by"] == limit
    assert status["verdict"].startswith(f"limited by {limit}, busy ")
    others = {stage for stage in STAGES if stage != limit}
    assert status["busy"][limit] == pytest.approx(1.5 / (1.5 + len(others)), abs=1e-3)
    assert [status["busy"][stage] for stage in others] == pytest.approx(
        [1 / (1.5 + len(others))] * len(others), abs=1e-3
    )


@pytest.mark.parametrize("limit", ["decode", "write"])
def test_writing_with_threads_of_its_own_is_weighed_against_all_that_shares_the_others(
    images: Path, tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = remote_verdict_of(images, tmp_path / "store", limit, monkeypatch)
    assert status["limited_by"] == limit
    full, rest = {"write": 1.0}, dict.fromkeys(STAGES[:3], 1 / 1.5)
    if limit == "decode":
        full, rest = dict.fromkeys(STAGES[:3], 1.0), {"write": 1 / 1.5}
    share = {"decode": 0.5, "device": 0.25, "encode": 0.25, "write": 1.0}
    expected = {stage: of_pool * share[stage] for stage, of_pool in (full | rest).items()}
    assert {stage: status["busy"][stage] for stage in STAGES} == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["read", *STAGES, "remote decode", "remote write"])
def test_the_verdict_is_right_in_nineteen_of_twenty(
    images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = kind.split()[-1]
    verdict = remote_verdict_of if kind.startswith("remote") else verdict_of
    found = [verdict(images, tmp_path / f"store{i}", limit, monkeypatch, timed=RealTime()) for i in range(20)]
    right = sum(one["limited_by"] == limit for one in found)
    print(f"{kind}: {right} of 20; {[one['busy'] for one in found[:2]]}")
    assert right >= 19, [(one["limited_by"], one["busy"]) for one in found]


# ---------------------------------------------------------------- the numbers beside it


def a_report(shard: int, seconds: dict[str, float], *, worker: str = "here:1") -> ShardReport:
    return ShardReport(
        shard=shard,
        n_samples=8,
        bad_images=(),
        nbytes=1000,
        seconds=seconds,
        wall_s=1.0,
        worker=worker,
        requests={},
        faults={"store throttled": 2},
        pools=(Pool(stages=("decode", "device"), lanes=2), Pool(stages=("write",), lanes=4)),
    )


def test_a_run_at_work_is_judged_by_its_recent_past() -> None:
    now = [0.0]
    metrics = RunMetrics("s3://bucket/imagenet/train", n_planned=400, n_committed=40, clock=lambda: now[0])
    with metrics.begun():
        metrics.event(WorkersReady(ready=0, total=2))
        now[0] = 100.0  # nobody is ready yet: this time is nobody's
        metrics.event(WorkersReady(ready=2, total=2))
        for shard in range(4):  # at first decoding takes all threads
            now[0] += 100.0
            metrics.shard(a_report(shard, {"decode": 300.0, "device": 80.0, "write": 40.0}))
        assert metrics.status()["limited_by"] == "decode"
        for shard in range(4, 9):  # then the store is slow
            now[0] += 100.0
            metrics.shard(a_report(shard, {"decode": 20.0, "device": 20.0, "write": 780.0}))
        metrics.event(ShardQuarantined(shard=20, cause="it raised", attempts=3))
        status = metrics.status()
        assert status["limited_by"] == "write"
        assert status["busy"]["write"] == pytest.approx(780 / (2 * 100 * 4))
        assert metrics.verdict().busy["write"] == pytest.approx((4 * 40 + 5 * 780) / (2 * 900 * 4))
        assert status["images_per_s"] == pytest.approx(8 / 100)
        assert status["seconds_left"] == pytest.approx((400 - 40 - 72) / (8 / 100))
        assert status["shards"] == {"done": 9, "retried": 0, "quarantined": 1}
        assert status["errors"] == {"store throttled": 18}
        assert status["written_bytes"] == 9000
        metrics.idle()
        now[0] += 1000.0
        assert metrics.verdict().busy["write"] == pytest.approx((4 * 40 + 5 * 780) / (2 * 900 * 4)), "nobody is there"

"""The verdict of real extractions, with sleeps put into their stages: the one that is half as slow again is named."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline.shard
import pipeline.shard_writer
from infra.objects import FolderObjects
from infra.verdict import BUSY, Pool
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


def paced(seconds: float, work: Callable[..., Any], *args: Any) -> Any:
    """Do it, and take at least so long."""
    until = time.perf_counter() + seconds
    done = work(*args)
    time.sleep(max(0.0, until - time.perf_counter()))
    return done


def throttled(
    images: Path,
    store: Path,
    seconds: dict[str, float],
    patch: pytest.MonkeyPatch,
    *,
    n_images: int = 32,
    remote: bool = False,
) -> dict[str, Any]:
    """Extract with each stage slowed to so many seconds a shard, over all threads; returns status.json."""
    config = fake_config(
        images, store, layers="3", limit=n_images, samples_per_shard=8, samples_per_chunk=4, micro_batch=4
    )
    read, decode, states = ImageFolderSource.read, pipeline.shard.decode_image, Teacher.layer_states_list
    encode, put = ShardBuffers.encode, FolderObjects.put
    data_keys = ("layer_", "head_input/", "statistics/")

    def slow_read(self: ImageFolderSource, sample: Sample) -> bytes:
        return paced(seconds.get("read", 0.0) / 8, read, self, sample)

    def slow_decode(*args: Any) -> Any:
        return paced(seconds["decode"] / 8, decode, *args)

    def slow_states(*args: Any) -> Any:
        return paced(seconds["device"] / 2, states, *args)

    def slow_encode(self: ShardBuffers, *args: Any) -> Any:
        return paced(seconds["encode"] / (N_OBJECTS - 1), encode, self, *args)

    def slow_put(self: FolderObjects, key: str, data: Any) -> None:
        is_data = key.startswith(data_keys) and not key.endswith("zarr.json")
        paced(seconds["write"] / N_OBJECTS if is_data else 0.0, put, self, key, data)

    with patch.context() as slow:
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


def verdict_of(images: Path, store: Path, limit: str, patch: pytest.MonkeyPatch, times: float = 1.5) -> dict[str, Any]:
    seconds = dict.fromkeys(STAGES, UNIT_S) | {limit: times * UNIT_S}
    return throttled(images, store, seconds, patch, n_images=16 if limit == "read" else 32)


def remote_verdict_of(
    images: Path, store: Path, limit: str, patch: pytest.MonkeyPatch, times: float = 1.5
) -> dict[str, Any]:
    """Decoding and the rest share three threads, and writing has sixteen."""
    unit_s = 2 * UNIT_S  # many threads that sleep wake late; the longer they sleep, the less it matters
    pool_s = {"decode": 0.5 * unit_s, "device": 0.25 * unit_s, "encode": 0.25 * unit_s}
    slower = times if limit == "write" else 1 / times
    write_s = slower * unit_s / N_THREADS * N_PUTTERS
    return throttled(images, store, {**pool_s, "write": write_s}, patch, n_images=32, remote=True)


@pytest.mark.parametrize("limit", ["read", "device"])
def test_the_stage_that_is_slower_is_named(
    images: Path, tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So much slower that other programs on this machine do not matter."""
    status = verdict_of(images, tmp_path / "store", limit, monkeypatch, times=3.0)
    assert status["limited_by"] == limit
    assert status["verdict"].startswith(f"limited by {limit}, busy ")
    assert status["busy"][limit] > 1.2 * max(share for stage, share in status["busy"].items() if stage != limit)
    assert sum(status["busy"][stage] for stage in {*STAGES, limit}) > BUSY, "they share their threads"


@pytest.mark.parametrize("limit", ["decode", "write"])
def test_writing_with_threads_of_its_own_is_weighed_against_all_that_shares_the_others(
    images: Path, tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote_verdict_of(images, tmp_path / "store", limit, monkeypatch, times=3.0)["limited_by"] == limit


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["read", *STAGES, "remote decode", "remote write"])
def test_the_verdict_is_right_in_nineteen_of_twenty(
    images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = kind.split()[-1]
    verdict = remote_verdict_of if kind.startswith("remote") else verdict_of
    found = [verdict(images, tmp_path / f"store{i}", limit, monkeypatch) for i in range(20)]
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

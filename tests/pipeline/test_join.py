"""Two jobs, one store: they share its shards, notice each other's, and take over those of the dead."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest
import torch

from infra.console import ExitCode, JobError, UserError
from infra.object_verbs import LEFTOVER_SUFFIX
from infra.objects import FolderObjects, MemoryObjects, Objects, open_objects
from infra.status import my_heartbeat
from pipeline.__main__ import main
from pipeline.claims import CLAIMS_PREFIX, Claims, claim_key
from pipeline.extract import exit_code, extract, extract_planned
from pipeline.job import ExtractResult
from pipeline.presence import Presence, anybody_at_work, read_heartbeat
from pipeline.rounds import Rounds
from pipeline.run_config import RunConfig
from pipeline.settings import make_teacher, plan_stores
from pipeline.sources import ImageFolderSource
from storage_schemas import open_store
from storage_schemas.digest import content_digest
from storage_schemas.keys import HEARTBEAT_KEY, HEARTBEATS_PREFIX, LOG_PREFIX
from storage_schemas.samples import Sample
from tests.pipeline_jobs import ALONE, digest_of, fake_arguments, fake_config, make_tree, run_job
from tests.s3_servers import S3Server

JOINING = RunConfig(no_ray=True, device="cpu", cpus_per_worker=1, depth=1, join=True)
N_SHARDS = 20


def silent(message: str) -> None:
    raise AssertionError(f"nobody should have to wait: {message}")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 4 * N_SHARDS)


@pytest.fixture
def moto_location(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return location_on(moto, monkeypatch)


@pytest.fixture
def rclone_location(rclone: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return location_on(rclone, monkeypatch)


def location_on(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.make_bucket()}/x"


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that one job has made; copy it before you change it."""
    store = tmp_path_factory.mktemp("alone") / "store"
    run_job(fake_config(images, store, samples_per_shard=4))
    return store


@pytest.fixture(scope="module")
def digest(finished: Path) -> str:
    return digest_of(finished)


@dataclass(frozen=True, kw_only=True)
class SlowJob:
    """A job in a process of its own, whose images take their time, so that two are at work at once."""

    process: BaseProcess
    go: Event
    said: Path

    def start(self) -> None:
        self.go.set()

    def ends(self) -> str:
        """What it said, once it has ended well."""
        self.process.join(500)
        assert self.process.exitcode == 0, self.said.read_text()
        return self.said.read_text()


@contextmanager
def jobs_of(place: Path, *jobs: list[str], alone: int = 0, stuck: int = -1) -> Iterator[list[SlowJob]]:
    """Jobs that wait for a word before they begin; forked from a process that has imported everything.

    The first waits after so many images until the other has images to read, the other for the first; and at one of its
    images the first is stuck for ever, if that is asked for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.preload"])
    flags = ["--cpus-per-worker", "1", "--depth", "1", "--samples-per-shard", "4"]
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    made, both = [], context.Barrier(len(jobs))
    for i, arguments in enumerate(jobs):
        go, said = context.Event(), place / f"said-{i}.txt"
        work = (["extract", *arguments, *flags], environment, go, said, both, 0 if i else alone, -1 if i else stuck)
        process = context.Process(target=_slow_job, args=work)
        process.start()
        made.append(SlowJob(process=process, go=go, said=said))
    try:
        yield made
    finally:
        for job in made:
            job.process.kill()
            job.process.join()
            job.process.close()


def _slow_job(
    arguments: list[str], environment: dict[str, str], go: Event, said: Path, both: Barrier, alone: int, stuck: int
) -> None:
    with open(said, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    read, n_read = ImageFolderSource.read, itertools.count()

    def slow(self: ImageFolderSource, sample: Sample) -> bytes:
        nth = next(n_read)
        if nth == alone:
            both.wait(500)
        if nth == stuck:
            said.with_suffix(".stuck").touch()
            time.sleep(600)
        time.sleep(0.02)
        return read(self, sample)

    ImageFolderSource.read = slow  # type: ignore[method-assign]
    go.wait()
    sys.exit(main(arguments))


def shards_of(objects: Objects) -> list[list[int]]:
    """What each run extracted, by its log."""
    logs = sorted(info.key for info in objects.list(LOG_PREFIX) if info.key.endswith("/shards.jsonl"))
    return [[json.loads(line)["shard"] for line in objects.get(key).decode().splitlines()] for key in logs]


def check_shared(objects: Objects, digest: str, said: list[str]) -> None:
    """Both did their part, told the truth, and left a whole store."""
    done = shards_of(objects)
    assert len(done) == 2
    assert all(done), done  # how many each has is up to the machine's load
    assert set(done[0]) | set(done[1]) == set(range(N_SHARDS))
    assert len(done[0]) + len(done[1]) <= 1.2 * N_SHARDS
    for out in said:
        ((mine, theirs),) = re.findall(r"(\d+) shards by this job, (\d+) by others", out)
        before = sum(map(int, re.findall(r"; (\d+) were there before", out)))
        assert int(mine) in map(len, done)
        assert int(mine) + int(theirs) + before / 4 == N_SHARDS
    assert content_digest(objects) == digest
    assert open_store(objects).verify() == []
    assert not anybody_at_work(objects)
    assert list(objects.list(CLAIMS_PREFIX)) == []


def test_a_job_joins_one_that_knew_nothing_of_it(images: Path, digest: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first, second = fake_arguments(images, store), fake_arguments(images, store, "--join")
    with jobs_of(tmp_path, first, second, alone=8) as jobs:
        jobs[0].start()
        while not list(store.glob("commits/*.json")):
            assert jobs[0].process.is_alive()
            time.sleep(0.02)
        jobs[1].start()
        said = [job.ends() for job in jobs]
    check_shared(FolderObjects(store), digest, said)


def test_two_jobs_that_begin_at_one_moment_share_the_shards_on_s3(
    images: Path, digest: str, moto_location: str, tmp_path: Path
) -> None:
    check_two_at_once(images, digest, moto_location, tmp_path)


@pytest.mark.slow
def test_the_same_where_conditions_are_not_honoured(
    images: Path, digest: str, rclone_location: str, tmp_path: Path
) -> None:
    check_two_at_once(images, digest, rclone_location, tmp_path)


def check_two_at_once(images: Path, digest: str, s3_location: str, tmp_path: Path) -> None:
    arguments = fake_arguments(images, s3_location, "--join")
    with jobs_of(tmp_path, arguments, arguments) as jobs:
        for job in jobs:
            job.start()
        said = [job.ends() for job in jobs]
    check_shared(open_objects(s3_location), digest, said)


def test_shards_of_a_job_that_was_killed_are_taken_over(images: Path, digest: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first, second = fake_arguments(images, store), fake_arguments(images, store, "--join")
    with jobs_of(tmp_path, first, second, alone=8, stuck=18) as jobs:
        jobs[0].start()
        while not list(store.glob("commits/*.json")):
            assert jobs[0].process.is_alive()
            time.sleep(0.02)
        jobs[1].start()
        while not jobs[0].said.with_suffix(".stuck").exists():
            assert jobs[1].process.is_alive()
            time.sleep(0.02)
        jobs[0].process.kill()
        jobs[0].process.join()
        said = jobs[1].ends()
    assert digest_of(store) == digest
    assert {int(path.stem) for path in store.glob("commits/*.json")} == set(range(N_SHARDS))
    assert "joined run" in said
    assert re.search(r"the job that had shards? \d+ has ended without", said)


def test_without_join_the_second_is_refused_with_the_firsts_name(images: Path, tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path / "store")
    theirs = Presence(objects)
    theirs.enter(silent)
    with pytest.raises(UserError, match=rf"another job \(run {theirs.run_id}, .*JOIN=1"):
        run_job(fake_config(images, tmp_path / "store", samples_per_shard=4), ALONE)
    theirs.release()
    joined = Presence(objects)  # one that joined a job which has ended since
    joined._join(my_heartbeat("gone", 0.0))
    objects.put(f"{HEARTBEATS_PREFIX}x.json", my_heartbeat("x", time.time()).to_bytes())
    with pytest.raises(UserError, match=r"another job \(run x, "):
        run_job(fake_config(images, tmp_path / "store", samples_per_shard=4), ALONE)


def test_nobody_joins_before_the_store_is_prepared() -> None:
    objects = MemoryObjects()
    leader, second = Presence(objects), Presence(objects)
    leader.enter(silent)
    found = read_heartbeat(objects)
    assert found is not None
    assert (leader.leads, found.ready) == (True, False)
    assert not second._join(found)
    assert list(objects.list(HEARTBEATS_PREFIX)) == []
    leader.set_ready(True)
    second.enter(lambda message: None, join=True)
    assert not second.leads
    assert leader.others() == {second.run_id}
    assert second.others() == {leader.run_id}
    leader.release()
    assert second.others() == set()
    third = Presence(objects)
    third.enter(lambda message: None, join=True)  # leads, for nobody does
    assert third.leads
    assert third.others() == {second.run_id}
    third.release()
    second.release()
    assert not anybody_at_work(objects)


def test_dead_heartbeats_of_jobs_that_joined_are_cleared_away(tmp_path: Path) -> None:
    objects = FolderObjects(tmp_path)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = my_heartbeat("dead", time.time()).to_bytes().replace(b'"pid": ', b'"pid": ' + gone.stdout.strip()[:1])
    objects.put(f"{HEARTBEATS_PREFIX}dead.json", dead)
    presence = Presence(objects)
    presence.enter(silent)
    assert [info.key for info in objects.list(HEARTBEATS_PREFIX)] == []
    presence.release()


def test_a_claim_is_of_whoever_was_first_and_a_torn_one_is_nobodys() -> None:
    objects = MemoryObjects()
    mine, theirs = Claims(objects, "mine"), Claims(objects, "theirs")
    assert mine.take(3) == ("mine", True)
    assert mine.take(3) == ("mine", False)
    assert theirs.take(3) == ("mine", False)
    theirs.take_over(3)
    assert mine.take(3) == ("theirs", False)
    theirs.give_up(3, "y" * 100_000)
    claim = mine.find(3)
    assert claim is not None
    assert (claim.run_id, claim.given_up.strip("y")) == ("theirs", "")
    assert claim.given_up
    for torn in (b'{"run', b"[]", b'{"run_id": 7}', b"\xff"):
        objects.put(claim_key(4), torn)
        assert mine.take(4) == ("mine", True)


def test_a_shard_that_was_committed_meanwhile_is_not_done_again(
    images: Path, finished: Path, digest: str, tmp_path: Path
) -> None:
    """Here the claims have gone already, as after a job that found the store complete."""
    config = fake_config(images, shutil.copytree(finished, tmp_path / "store"), samples_per_shard=4)
    (tmp_path / "store/commits/000007.json").rename(tmp_path / "kept.json")
    (tmp_path / "store/index.parquet").unlink()

    class Returning(FolderObjects):
        """The commit comes back while the job begins."""

        def put_new(self, key, data):  # type: ignore[no-untyped-def]
            if key.startswith(CLAIMS_PREFIX):
                (tmp_path / "kept.json").rename(tmp_path / "store/commits/000007.json")
            return super().put_new(key, data)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.shard.open_objects", Returning)
        (result,) = extract(config, JOINING)
    assert (result.n_done, result.n_by_others, result.n_shards_by_others) == (0, 4, 1)
    assert result.complete
    assert exit_code([result]) == ExitCode.OK
    assert digest_of(tmp_path / "store") == digest


def test_two_jobs_do_not_wait_for_each_others_bad_shards(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader fails at shard 1, the one that joins, from the end, at shard 6."""
    store = tmp_path / "store"
    config = fake_config(images, store, samples_per_shard=4, limit=32)
    read, bad = ImageFolderSource.read, set[str]()

    def failing(self: ImageFolderSource, sample: Sample) -> bytes:
        while not (store / claim_key(0)).exists() or not (store / claim_key(7)).exists():
            time.sleep(0.01)  # until both are at work
        if sample.sample_id in bad:
            raise ValueError("a planted failure")
        time.sleep(0.01)
        return read(self, sample)

    (planned,) = plan_stores(config, make_teacher(config))
    samples = planned.samples
    bad |= {samples[index].sample_id for shard in (1, 6) for index in range(4 * shard, 4 * shard + 4)}
    monkeypatch.setattr(ImageFolderSource, "read", failing)
    monkeypatch.setattr("pipeline.rounds.LOOK_EVERY_S", 0.05)
    results: list[ExtractResult] = []
    jobs = [threading.Thread(target=lambda: results.extend(extract(config, JOINING)), daemon=True) for _ in range(2)]
    jobs[0].start()
    while not (store / claim_key(0)).exists():
        assert jobs[0].is_alive()
        time.sleep(0.01)
    jobs[1].start()
    for job in jobs:
        job.join(200)
        assert not job.is_alive(), "they wait for each other"
    assert len(results) == 2
    assert sum(result.n_done for result in results) == 6 * 4
    for result in results:
        assert sorted(outcome.shard for outcome in result.quarantined) == [1, 6]
        assert all("a planted failure" in outcome.cause for outcome in result.quarantined)
        assert exit_code([result]) == ExitCode.PROBLEMS
    monkeypatch.setattr(ImageFolderSource, "read", read)
    assert run_job(config, JOINING).complete  # the same command tries them again


@pytest.fixture
def one_missing(finished: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A store without the commit of shard 7 but with its data, and that commit; a job "x" which had joined lives."""
    store, kept = shutil.copytree(finished, tmp_path / "store"), tmp_path / "kept.json"
    (store / "commits/000007.json").rename(kept)
    (store / "index.parquet").unlink()
    FolderObjects(store).put(f"{HEARTBEATS_PREFIX}x.json", my_heartbeat("x", time.time()).to_bytes())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.rounds.LOOK_EVERY_S", 0.05)
        yield store, kept


def at_each_look(monkeypatch: pytest.MonkeyPatch, *happen: Callable[[], object]) -> None:
    """What happens while a job waits for others, before each time that it looks."""
    note, todo = Rounds._note_commits, list(happen)

    def noted(self: Rounds) -> None:
        note(self)
        if todo:
            todo.pop(0)()

    monkeypatch.setattr(Rounds, "_note_commits", noted)


def test_a_dead_jobs_shard_that_a_living_one_has_claimed_is_left_to_that(
    images: Path, one_missing: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, kept = one_missing
    claims = {run_id: Claims(FolderObjects(store), run_id) for run_id in ("dead", "x")}
    claims["dead"].take(7)
    at_each_look(monkeypatch, lambda: claims["x"].take_over(7), lambda: kept.rename(store / "commits/000007.json"))
    result = run_job(fake_config(images, store, samples_per_shard=4), JOINING)
    assert (result.n_done, result.n_by_others, result.complete) == (0, 4, True)


def test_who_leads_beside_one_that_had_joined_touches_nothing_of_it(
    images: Path, one_missing: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, kept = one_missing
    Claims(FolderObjects(store), "x").take(7)
    half_written = store / f"layer_00/patches/c/7{LEFTOVER_SUFFIX}"
    half_written.write_bytes(b"half")
    at_each_look(monkeypatch, lambda: kept.rename(store / "commits/000007.json"))
    result = run_job(fake_config(images, store, samples_per_shard=4), JOINING)
    assert (result.n_done, result.n_by_others, result.complete) == (0, 4, True)
    assert half_written.exists()


def test_a_store_that_somebody_writes_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    config = fake_config(images, store, samples_per_shard=4, limit=4)
    run_job(config)
    before = (store / "store.json").read_bytes()
    FolderObjects(store).put(f"{HEARTBEATS_PREFIX}x.json", my_heartbeat("x", time.time()).to_bytes())
    other = replace(config, precision="int8", overwrite=True)
    with pytest.raises(UserError, match="JOIN=1 with --overwrite"):
        run_job(other, JOINING)
    with pytest.raises(UserError, match=r"another job \(run x, "):
        run_job(other)
    planned = plan_stores(other, make_teacher(other))
    with pytest.raises(UserError, match=r"cannot be created anew: run x is at work on it"):
        extract_planned(planned, JOINING, overwrite=True)
    assert (store / "store.json").read_bytes() == before
    assert list((store / "commits").glob("*.json")) != []


def test_a_leader_that_was_superseded_stops_and_leaves_the_heartbeat_to_the_other() -> None:
    objects = MemoryObjects()
    leader, joined = Presence(objects), Presence(objects)
    leader.enter(silent, join=True)
    leader.set_ready(True)
    joined.enter(lambda message: None, join=True)
    theirs = my_heartbeat("theirs", time.time()).to_bytes()
    objects.put(HEARTBEAT_KEY, theirs)
    with pytest.raises(UserError, match=r"run theirs, .* has taken over .*Run the same command again$"):
        leader.renew()
    leader.release()
    joined.renew()
    assert objects.get(HEARTBEAT_KEY) == theirs
    assert joined.others() == {"theirs"}


@pytest.mark.parametrize("precision", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_a_precision_that_does_not_hold_the_bound_is_refused_on_the_first_shard(
    precision: str, images: Path, tmp_path: Path
) -> None:
    config = fake_config(images, tmp_path / "store", precision=precision)
    better = {"float16": "float32", "bfloat16": "float32", "int8": "float32"}[precision]
    pattern = rf"layer_0\d, patches: the relative MSE of {precision} .* is \S+, and MAX_ERROR=1e-10.*PRECISION={better}"
    with pytest.raises(JobError, match=pattern) as stopped:
        extract(config, RunConfig(no_ray=True, device="cpu", max_error=1e-10))
    assert stopped.value.exit_code == ExitCode.PROBLEMS
    assert open_store(tmp_path / "store").n_committed == 0
    assert list((tmp_path / "store").glob("layer_*/*/c")) == []
    (result,) = extract(config, RunConfig(no_ray=True, device="cpu", max_error=1e-2))
    assert result.complete
    (tmp_path / "store/commits/000001.json").unlink()
    with pytest.raises(UserError, match=r"shard 0, is committed already: layer_"):
        extract(config, RunConfig(no_ray=True, device="cpu", max_error=1e-10))


def test_heartbeat_key_is_the_leaders() -> None:
    objects = MemoryObjects()
    presence = Presence(objects)
    presence.enter(silent)
    assert [info.key for info in objects.list()] == [HEARTBEAT_KEY]

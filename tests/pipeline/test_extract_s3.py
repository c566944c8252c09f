"""Extraction into S3: the same bytes as in a folder, refusals at once, errors that name the object."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import pipeline.extract
import pipeline.rounds
from infra.console import ExitCode, JobError, UserError
from infra.metrics import StageClock
from infra.objects import Buffer, MemoryObjects, open_objects
from infra.status import my_heartbeat
from pipeline.__main__ import main
from pipeline.config import ExtractConfig, check_inputs
from pipeline.extract import extract
from pipeline.place import begin_store, check_place
from pipeline.settings import PlannedStore, make_teacher, plan_stores
from pipeline.shard_writer import ShardWriter
from storage_schemas import open_store
from storage_schemas.create import plan_documents, read_store_document
from storage_schemas.digest import content_digest
from storage_schemas.keys import HEARTBEAT_KEY, SAMPLES_KEY, STORE_KEY, statistics_key
from storage_schemas.shard_buffers import ShardBuffers
from storage_schemas.spec import BACKENDS
from storage_schemas.verify import verify_store
from tests.fault_proxy import Rule
from tests.kills import wait_for
from tests.pipeline_jobs import ALONE, ON_RAY, THREADS, digest_of, fake_arguments, fake_config, make_tree, run_job
from tests.s3_servers import S3Server, environment_of, read_only_environment


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 22)


@pytest.fixture
def bucket(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, moto.environment)
    return f"s3://{moto.make_bucket()}"


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_s3_it_is_the_same_store_as_in_a_folder(backend: str, images: Path, bucket: str, tmp_path: Path) -> None:
    config = fake_config(images, tmp_path / "store", format=backend)
    run_job(config)
    result = run_job(dataclasses.replace(config, store=f"{bucket}/a/b/"), THREADS)
    assert result.planned.location == f"{bucket}/a/b"
    assert content_digest(open_objects(f"{bucket}/a/b")) == digest_of(tmp_path / "store")
    assert result.requests["put"] >= result.plan.n_objects
    again = run_job(dataclasses.replace(config, store=f"{bucket}/a/b"), THREADS)
    assert (again.n_done, again.complete) == (0, True)
    assert np.array_equal(open_store(f"{bucket}/a/b").read(), open_store(tmp_path / "store").read())


@pytest.mark.ray
def test_through_ray_it_is_the_same_and_workers_are_told_the_endpoint(
    ray_cluster: None, images: Path, bucket: str, tmp_path: Path, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = pipeline.rounds.worker_environment(bucket)
    assert told["AWS_ENDPOINT_URL"] == moto.endpoint
    assert not {name for name in told if "KEY" in name or "SECRET" in name}
    assert pipeline.rounds.worker_environment("/data") == {}
    assert pipeline.rounds.worker_environment("/data", bucket) == told, "images may lie there, and the store here"
    # a cluster's machines have a role; the workers here have to be given keys
    monkeypatch.setattr(pipeline.rounds, "worker_environment", lambda *locations: moto.environment)
    config = fake_config(images, f"{bucket}/x")
    result = run_job(config, ON_RAY)
    assert result.complete
    assert result.requests["put"] > result.plan.n_objects
    run_job(dataclasses.replace(config, store=str(tmp_path / "store")))
    assert content_digest(open_objects(f"{bucket}/x")) == digest_of(tmp_path / "store")


def test_who_may_not_write_is_told_at_once(
    images: Path, bucket: str, moto: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(fake_config(images, f"{bucket}/x"))
    use(monkeypatch, read_only_environment(moto, bucket.removeprefix("s3://")))
    for command in ("make_teacher", "plan_stores"):
        monkeypatch.setattr(pipeline.extract, command, None)  # calling it would fail otherwise
    for store in ("x", "new"):
        assert main(["extract", *fake_arguments(images, f"{bucket}/{store}")]) == ExitCode.BAD_INPUT
        said = capsys.readouterr().err
        assert said.count("error:") == 1
        assert "again in" not in said  # what fails, and is not refused, is asked for five minutes
        assert "Choose another STORE, or get the right to write there" in said
    assert main(["verify", "--store", f"{bucket}/x"]) == ExitCode.OK


def test_a_whole_bucket_may_be_a_store_but_is_never_deleted(images: Path, bucket: str) -> None:
    config = fake_config(images, bucket, limit=9)
    run_job(config)
    assert verify_store(open_objects(bucket)) == []
    other = dataclasses.replace(config, limit=10, overwrite=True)
    before = content_digest(open_objects(bucket))
    with pytest.raises(UserError, match="--overwrite deletes nothing in a whole bucket"):
        run_job(other)
    assert content_digest(open_objects(bucket)) == before
    with pytest.raises(UserError, match="would lie inside a store"):
        run_job(dataclasses.replace(config, store=f"{bucket}/x"))
    assert content_digest(open_objects(bucket)) == before


def test_below_a_bucket_a_store_may_be_deleted(images: Path, bucket: str) -> None:
    config = fake_config(images, f"{bucket}/x", limit=9)
    run_job(config)
    assert run_job(dataclasses.replace(config, limit=10, overwrite=True)).n_done == 10


def test_the_door_takes_an_endpoint(
    images: Path, bucket: str, moto: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with moto.faulty() as proxy:
        proxy.rules.append(Rule(fault="503", method="PUT", key="layer_0", times=3))
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody there
        arguments = fake_arguments(images, f"{bucket}/x", "--endpoint-url", proxy.endpoint)
        assert main(["extract", *arguments]) == ExitCode.OK
        assert main(["plan", *arguments, "--no-measure"]) == ExitCode.OK
        assert main(["verify", "--store", f"{bucket}/x", "--endpoint-url", proxy.endpoint]) == ExitCode.OK
        assert [rule.n_hit for rule in proxy.rules] == [3]
    assert "again in" in capsys.readouterr().err  # tries are told


def test_a_refused_object_stops_the_job_and_is_named(
    images: Path, bucket: str, moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fake_config(images, f"{bucket}/x")
    with moto.faulty() as proxy:
        use(monkeypatch, environment_of(proxy.endpoint))
        proxy.rules.append(Rule(fault="403", method="PUT", key="layer_02/patches/c/1", times=None))
        with pytest.raises(JobError, match=r"/x/layer_02/patches/c/1/0/0 could not be written.*stays valid") as stopped:
            run_job(config)
    assert stopped.value.exit_code == ExitCode.PROBLEMS
    use(monkeypatch, moto.environment)
    assert [info.key for info in open_objects(f"{bucket}/x").list(HEARTBEAT_KEY)] == []
    store = open_store(f"{bucket}/x")
    assert store.committed.tolist() == [True, False, False]
    assert store.verify() == []
    assert run_job(config).n_done == 14


def test_repair_and_damage_in_s3(images: Path, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    location = f"{bucket}/x"
    run_job(fake_config(images, location, format="webdataset"))
    objects = open_objects(location)
    digest = content_digest(objects)
    key = "layer_01/patches/000001.tar"
    data = bytearray(objects.get(key))
    data[1000] ^= 1
    objects.put(key, bytes(data))
    objects.delete(statistics_key(2))
    assert main(["verify", "--store", location]) == ExitCode.PROBLEMS
    assert "layer_01/patches/000001.tar" in capsys.readouterr().out
    arguments = ["--store", location, "--images", str(images), "--no-ray", "--device", "cpu"]
    objects.put(HEARTBEAT_KEY, my_heartbeat("another", time.time()).to_bytes())
    assert main(["verify", *arguments, "--repair"]) == ExitCode.BAD_INPUT
    assert "another job (run another" in capsys.readouterr().err
    objects.delete(HEARTBEAT_KEY)
    assert main(["verify", *arguments, "--repair"]) == ExitCode.OK
    assert content_digest(objects) == digest


def planned(config: ExtractConfig) -> PlannedStore:
    (store,) = plan_stores(config, make_teacher(config))
    return store


class Raced(MemoryObjects):
    """Another job puts its store.json a moment before ours."""

    theirs = b""

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> bool:
        if key == STORE_KEY and self.theirs:
            self.put(key, self.theirs)
        return super().put_new(key, data)


@pytest.mark.parametrize("same", [True, False])
def test_a_store_that_another_job_begins_at_the_same_moment(same: bool, images: Path) -> None:
    mine = planned(fake_config(images, "x", limit=12))
    other = mine if same else planned(fake_config(images, "x", limit=12, compute="bfloat16"))
    theirs, _ = plan_documents(other.spec, other.samples, other.teacher_files)
    objects = Raced()
    objects.theirs = theirs.to_bytes()
    if same:
        assert begin_store(objects, mine).digest == theirs.digest
    else:
        with pytest.raises(UserError, match=r"another job with other settings.*\n  compute: the store has 'bfloat16'"):
            begin_store(objects, mine)
    assert read_store_document(objects, "x").digest == theirs.digest


def test_documents_of_a_racing_job_are_not_replaced(images: Path) -> None:
    objects = MemoryObjects()
    objects.put(SAMPLES_KEY, b"theirs")
    with pytest.raises(UserError, match=r"samples\.parquet: another content"):
        begin_store(objects, planned(fake_config(images, "x")))
    assert objects.get(SAMPLES_KEY) == b"theirs"
    assert [info.key for info in objects.list(STORE_KEY)] == []
    assert check_place(objects, planned(fake_config(images, "x")), False) == (None, False)


class Held(MemoryObjects):
    """Puts begin, and end when they may: as over a slow network."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.n_at_once = self.most_at_once = 0
        self.go_on, self._count = threading.Event(), threading.Lock()
        self.go_on.set()

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        with self._count:
            self.n_at_once += 1
            self.most_at_once = max(self.most_at_once, self.n_at_once)
        self.go_on.wait()
        super().put(key, data)
        with self._count:
            self.n_at_once -= 1


@pytest.mark.parametrize("is_remote", [True, False])
def test_puts_to_a_remote_store_leave_the_threads_of_micro_batches_free(images: Path, is_remote: bool) -> None:
    store = planned(fake_config(images, "x"))
    objects = Held("s3://bucket/x" if is_remote else "/x")
    document = begin_store(objects, store)
    objects.go_on.clear()
    with ThreadPoolExecutor(2) as encoders:
        writer = ShardWriter(objects, document, encoders, None)
        statistics = np.zeros((4, 4, 5, 8))
        writing = threading.Thread(target=writer.write, args=(0, ShardBuffers(store.spec), statistics, StageClock()))
        writing.start()
        assert wait_for(lambda: objects.n_at_once > 8 if is_remote else objects.n_at_once == 2)
        another = encoders.submit(int)
        if is_remote:
            assert another.result(60) == 0
        else:  # in a folder it is they who write
            with pytest.raises(TimeoutError):
                another.result(0.3)
        objects.go_on.set()
        writing.join()
        writer.close()
    assert objects.most_at_once <= (17 if is_remote else 3)


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("gs://bucket/x", "STORE=gs://bucket/x: expected a local path, or s3://bucket/prefix"),
        ("http://host/x", "STORE=http://host/x: expected"),
    ],
)
def test_other_addresses_are_refused(store: str, said: str, images: Path) -> None:
    with pytest.raises(UserError, match=said):
        check_inputs(fake_config(images, store))


def test_a_job_that_cannot_reach_its_bucket_says_which(images: Path, bucket: str) -> None:
    with pytest.raises(UserError, match="no bucket missing-bucket-9"):
        extract(fake_config(images, "s3://missing-bucket-9/x"), ALONE)
    assert not Path("s3:").exists()

"""Jobs on a real Ray cluster, submitted, refused, joined, stopped, killed and gone on with; their store on S3."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from infra.console import ExitCode
from infra.objects import Objects, open_objects
from infra.status import Heartbeat
from pipeline.presence import read_heartbeat
from storage_schemas import open_store
from storage_schemas.digest import content_digest
from storage_schemas.keys import LOG_PREFIX
from tests.fault_proxy import FaultProxy, Rule
from tests.kills import REPO, wait_for
from tests.marked import end_marked, left_after, marked, new_mark
from tests.pipeline_jobs import THREADS, digest_of, fake_config, make_tree, run_job
from tests.ray_clusters import RayCluster, actor_processes, ray_head
from tests.s3_servers import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.ray]

N_IMAGES, N_SHARDS = 240, 30
HALF = "ARGS='--cpus-per-worker 1'"  # else the workers of one job take all of the machine, and the other's wait
PACE_S = 10.0
CLIENT_S = 900


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = tmp_path_factory.mktemp("peace") / "store"
    run_job(fake_config(images, store), THREADS)
    return digest_of(store)


@pytest.fixture(scope="module")
def cluster(moto: S3Server) -> Iterator[RayCluster]:
    """With the keys of S3 in its own environment, as a cluster of one's own has them; jobs send none."""
    with ray_head(n_cpus=4, environment={**moto.environment, "OMP_NUM_THREADS": "1"}) as head:
        yield head


class Paced(FaultProxy):
    """A store that takes its time for each commit, so that a job is at work for as long as a test needs it."""

    pace_s = 0.0

    def _applying(self, method: str, key: str, *more: Any, **conditions: Any) -> Rule | None:
        if method == "PUT" and "commits/" in key:
            time.sleep(self.pace_s)
        return super()._applying(method, key, *more, **conditions)


@pytest.fixture
def paced(moto: S3Server) -> Iterator[Paced]:
    with Paced(moto.direct, moto.proxy.access) as proxy:
        proxy.pace_s = PACE_S
        yield proxy


@pytest.fixture
def store(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{moto.make_bucket()}/acts"


class Client:
    """`make submit`, `jobs`, `logs` and `stop` without make, which would look after .venv first."""

    def __init__(self, cluster: RayCluster, moto: S3Server, proxy: FaultProxy) -> None:
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {**moto.environment, "RAY_ADDRESS": cluster.dashboard, "RAY_AUTH_MODE": "disabled"}
        self.environment["AWS_ENDPOINT_URL"] = proxy.endpoint

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "infra", *words],
            cwd=REPO,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        process = self.begin(*words)
        said, _ = process.communicate(timeout=CLIENT_S)
        return process.returncode, said

    def submit_detached(self, command: str) -> str:
        code, said = self.run("submit", command, "--detach")
        assert code == ExitCode.OK, said
        return said.splitlines()[-1]


@pytest.fixture
def client(cluster: RayCluster, moto: S3Server, paced: Paced) -> Client:
    return Client(cluster, moto, paced)


def command_of(images: Path, store: str, *more: str) -> str:
    config = fake_config(images, store)
    names = ("images", "store", "teacher", "weights", "samples_per_shard", "micro_batch")
    typed = [f"{name.upper()}={getattr(config, name)}" for name in names]
    return " ".join(["extract", *typed, "SAMPLES_PER_CHUNK=4", "DEVICE=cpu", "WORKERS=1", "DEPTH=1", *more])


def n_commits(objects: Objects) -> int:
    return len(list(objects.list("commits/")))


def await_work(objects: Objects) -> Heartbeat:
    assert wait_for(lambda: n_commits(objects) >= 2, timeout_s=CLIENT_S)
    found = read_heartbeat(objects)
    assert found is not None
    return found


def shards_by_run(objects: Objects) -> dict[str, list[int]]:
    keys = [info.key for info in objects.list(LOG_PREFIX) if info.key.endswith("/shards.jsonl")]
    logs = {key.split("/")[-2]: objects.get(key).decode().splitlines() for key in keys}
    return {run: [json.loads(line)["shard"] for line in lines] for run, lines in logs.items()}


def test_two_jobs_of_one_store(
    client: Client, cluster: RayCluster, paced: Paced, images: Path, undisturbed: str, store: str
) -> None:
    objects = open_objects(store)
    first = client.submit_detached(command_of(images, store, HALF))
    heartbeat = await_work(objects)

    code, said = client.run("submit", command_of(images, store, HALF))
    assert code == ExitCode.BAD_INPUT, said
    assert f"is being written by another job (run {heartbeat.run_id}, process {heartbeat.pid}" in said
    assert "JOIN=1" in said
    assert f"{first} runs the same command" in said

    code, said = client.run("submit", command_of(images, store, HALF, "JOIN=1", "PRECISION=float32"))
    assert code == ExitCode.BAD_INPUT, said
    assert "precision" in said

    second = client.submit_detached(command_of(images, store, HALF, "JOIN=1"))
    assert wait_for(lambda: len(shards_by_run(objects)) == 2, timeout_s=CLIENT_S)
    paced.pace_s = 0
    code, said = client.run("logs", second)
    assert code == ExitCode.OK, said
    assert f"joined run {heartbeat.run_id}" in said
    code, said = client.run("logs", first)
    assert code == ExitCode.OK, said

    assert open_store(store).is_complete
    assert content_digest(objects) == undisturbed
    done = shards_by_run(objects)
    assert sorted(shard for shards in done.values() for shard in shards) == list(range(N_SHARDS)), "each one once"
    assert len([shards for shards in done.values() if shards]) == 2, done

    code, said = client.run("submit", command_of(images, store, HALF, "PRECISION=float32"))
    assert code == ExitCode.BAD_INPUT, said
    assert "precision" in said
    code, said = client.run("jobs")
    assert code == ExitCode.OK
    states = re.findall(r"^extract-acts-\S+ +(\w+)", said, re.MULTILINE)
    assert states == ["FAILED", "SUCCEEDED", "FAILED", "FAILED", "SUCCEEDED"], said
    assert said.count("exit code 2") == 3
    assert left_after_job(cluster) == []


def left_after_job(cluster: RayCluster) -> list[str]:
    """Workers that outlive their jobs."""
    assert wait_for(lambda: not actor_processes(cluster.mark), timeout_s=60)
    return [str(process) for process in actor_processes(cluster.mark)]


def test_a_stopped_job_saves_what_is_in_flight_and_goes_on(
    client: Client, cluster: RayCluster, paced: Paced, images: Path, undisturbed: str, store: str
) -> None:
    objects = open_objects(store)
    command = command_of(images, store)
    job = client.submit_detached(command)
    heartbeat = await_work(objects)
    code, said = client.run("stop", job)
    assert code == ExitCode.OK, said
    assert "stopping: what is in flight will be finished" in said
    assert f"{job}: STOPPED" in said
    assert f'make submit CMD="{command}"' in said
    assert left_after_job(cluster) == []
    assert read_heartbeat(objects) is None, "it took its heartbeat away: nobody has to wait for it"
    n_before = n_commits(objects)
    assert 2 <= n_before < N_SHARDS
    assert len(shards_by_run(objects)[heartbeat.run_id]) == n_before, "no shard was begun and lost"

    code, said = client.run("logs", job)
    assert code == ExitCode.INTERRUPTED, said
    code, said = client.run("stop", job)
    assert (code, "has ended already: STOPPED" in said) == (ExitCode.OK, True), said
    paced.pace_s = 0
    code, said = client.run("submit", command)
    assert code == ExitCode.OK, said
    assert content_digest(objects) == undisturbed
    assert sorted(map(len, shards_by_run(objects).values())) == sorted([n_before, N_SHARDS - n_before])


def test_leaving_a_job_lets_it_go_on(client: Client, cluster: RayCluster, images: Path, store: str) -> None:
    objects = open_objects(store)
    following = client.begin("submit", command_of(images, store))
    assert following.stdout is not None
    said = ""
    while not re.search(r"extract +\d+%", said):
        line = following.stdout.readline()
        assert line, said
        said += line
    following.send_signal(signal.SIGINT)
    rest, _ = following.communicate(timeout=60)
    assert following.returncode == ExitCode.KILLED, rest
    found = re.search(r"left; (\S+) goes on", rest)
    assert found, rest
    n_before = n_commits(objects)
    assert wait_for(lambda: n_commits(objects) > n_before), "it does"
    code, told = client.run("stop", found[1])
    assert code == ExitCode.OK, told


@pytest.mark.parametrize("how", ["typed", "submitted"])
def test_a_killed_driver_on_a_cluster_leaves_no_workers(
    how: str,
    client: Client,
    cluster: RayCluster,
    paced: Paced,
    images: Path,
    undisturbed: str,
    store: str,
    tmp_path: Path,
) -> None:
    objects = open_objects(store)
    command = command_of(images, store)
    if how == "submitted":
        job = client.submit_detached(command)
        await_work(objects)
        (driver,) = drivers(cluster.mark, store)
        driver.kill()
        code, said = client.run("logs", job)
        assert code == ExitCode.ERROR, said
        assert "ended by signal 9" in said
    else:
        mark = new_mark()
        code, said = begin_typed(mark, cluster, client, command, tmp_path, objects)
        assert code == -signal.SIGKILL, said
        assert left_after(mark, 60) == []
    assert left_after_job(cluster) == []
    assert n_commits(objects) < N_SHARDS
    paced.pace_s = 0
    code, said = client.run("submit", command)
    assert code == ExitCode.OK, said
    assert content_digest(objects) == undisturbed


def drivers(mark: dict[str, str], store: str) -> list:  # type: ignore[type-arg]
    return [found for found in marked(mark) if store in found.cmdline() and "-m" in found.cmdline()]


def begin_typed(
    mark: dict[str, str], cluster: RayCluster, client: Client, command: str, folder: Path, objects: Objects
) -> tuple[int, str]:
    """The same command typed on a machine of the cluster, killed at work; its exit code and what it said."""
    flags = [part for word in command.split()[1:] for part in _flag(word)]
    told = folder / "told"
    environment = {**client.environment, **mark, "RAY_ADDRESS": cluster.address}
    with told.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "extract", *flags], cwd=REPO, env=environment, stdout=file, stderr=file
        )
    try:
        await_work(objects)
        process.kill()
        return process.wait(), told.read_text()
    finally:
        end_marked(mark)


def _flag(word: str) -> Sequence[str]:
    name, _, value = word.partition("=")
    return f"--{name.lower().replace('_', '-')}", value


def test_the_code_of_this_checkout_travels(
    client: Client, cluster: RayCluster, paced: Paced, images: Path, store: str
) -> None:
    """A cluster whose folder is another one finds the packages in what was sent, not in an installation."""
    paced.pace_s = 0
    code, said = client.run("submit", command_of(images, store, "LIMIT=8"), "--working-dir")
    assert code == ExitCode.OK, said
    assert re.search(r"sending the code of \S+, [\d.]+ MB", said), said
    packages = list(cluster.folder.glob("session_2*/runtime_resources/working_dir_files/*/pipeline/extract.py"))
    assert packages

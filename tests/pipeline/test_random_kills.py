"""Two hundred kills at random moments under Ray, in a folder and on S3, in both back ends: the undisturbed store.

Slow: about half an hour on two cores.
"""

import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from infra.objects import open_objects
from pipeline.config import ExtractConfig
from storage_schemas.digest import content_digest
from storage_schemas.keys import COMMITS_PREFIX, shard_object_keys
from storage_schemas.reader import open_store
from tests.fault_proxy import FaultProxy
from tests.kills import Driver, ray_address, shard_workers, wait_for
from tests.pipeline_jobs import THREADS, fake_arguments, fake_config, make_tree, run_job
from tests.s3_servers import shared_server

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]

N_IMAGES, SAMPLES_PER_SHARD = 400, 8
BACKENDS = ("zarr", "webdataset")
N_SHARDS = N_IMAGES // SAMPLES_PER_SHARD
N_IN_FLIGHT = 4  # two workers, two shards each
N_KILLS = 5  # of a part: none is long enough to look like a hang
N_PARTS = {"folder": 10, "moto": 5, "rclone": 5}
PARTS = [
    (where, backend, part) for part in range(10) for where in N_PARTS for backend in BACKENDS if part < N_PARTS[where]
]
ALL_KILLS: Counter[str] = Counter()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Content digests of stores made in peace, by back end."""
    folder = tmp_path_factory.mktemp("peace")
    for backend in BACKENDS:
        run_job(fake_config(images, folder / backend, format=backend), THREADS)
    return {backend: digest(str(folder / backend)) for backend in BACKENDS}


@pytest.fixture(scope="module")
def credentials() -> Iterator[None]:
    """Keys for both servers in this process, before its Ray starts: workers of a cluster bring their own."""
    import ray

    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shared_server("moto").environment.items():
            patch.setenv(name, value)
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(credentials: None, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("ray_cluster")


class Tally:
    """What was killed, and what it met."""

    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()
        self.n_uncommitted = self.n_half = 0

    def __str__(self) -> str:
        return (
            f"{dict(self.kills)}: {self.n_uncommitted} while a shard was uncommitted, {self.n_half} with half a shard"
        )


@pytest.mark.parametrize(("where", "backend", "part"), PARTS)
def test_random_kills(
    where: str,
    backend: str,
    part: int,
    cluster: None,
    images: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng, root, proxy = random.Random(f"{where} {backend} {part}"), str(tmp_path), None
    if where != "folder":
        server = shared_server(where)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        root, proxy = f"s3://{server.make_bucket()}/{secrets.token_hex(3)}", server.proxy
    config = fake_config(images, f"{root}/0", format=backend)
    tally, n_stores = Tally(), 0
    began, n_entries = time.monotonic(), len(proxy.log) if proxy else 0
    driver: Driver | None = None
    while tally.kills.total() < N_KILLS:
        if driver is None:
            arguments = fake_arguments(images, config.store or "", "--format", backend)
            driver = Driver(arguments, tmp_path / "told", ray_address())
        wait_for_a_moment(rng, driver, config)
        if driver.exit_code() is not None:
            # 3: one shard was alone on three workers that were killed, or five were killed before they were ready
            assert driver.exit_code() in (0, 3), driver.told
            if driver.exit_code() == 0:
                assert digest(config.store or "") == undisturbed[backend]
                n_stores += 1
                config = fake_config(images, f"{root}/{n_stores}", format=backend)
            driver = None
            continue
        driver = kill_something(rng, driver, config, tally)
    if driver is not None:
        driver.kill()
    wait_for(lambda: not shard_workers())  # those that outlive a killed driver for some seconds still write
    assert run_job(config, THREADS).complete
    assert digest(config.store or "") == undisturbed[backend]
    if proxy is not None:
        check_work_done(proxy, n_entries, config, n_stores + 1, tally.kills.total())
    print(f"\n{where} {backend} {tally}; {n_stores + 1} stores finished, in {time.monotonic() - began:.0f} s")
    ALL_KILLS.update(kills=tally.kills.total(), uncommitted=tally.n_uncommitted, half=tally.n_half)


def test_half_of_those_kills_hit_an_uncommitted_shard() -> None:
    print(dict(ALL_KILLS))
    assert ALL_KILLS["uncommitted"] >= ALL_KILLS["kills"] / 2
    assert ALL_KILLS["half"] >= ALL_KILLS["kills"] / 20


def wait_for_a_moment(rng: random.Random, driver: Driver, config: ExtractConfig) -> None:
    """Until something may be killed: at once (planning, connecting, creating), or when shards are being written."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 10))
        return
    n_before = n_commits(config)
    wait_for(lambda: driver.exit_code() is not None or n_commits(config) > n_before)
    time.sleep(rng.uniform(0, 0.8))


def kill_something(rng: random.Random, driver: Driver, config: ExtractConfig, tally: Tally) -> Driver | None:
    """Kill the workers, the driver or both; returns the driver if it lives."""
    target, workers = rng.choice(["worker", "driver", "both"]), shard_workers()
    if target == "worker" and not workers:
        target = "driver"
    tally.n_uncommitted += n_commits(config) < N_SHARDS
    tally.n_half += has_half_a_shard(config)
    tally.kills[target] += 1
    if target != "driver":
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    if target == "worker":
        return driver
    driver.kill()
    return None


def check_work_done(proxy: FaultProxy, n_entries: int, config: ExtractConfig, n_stores: int, n_kills: int) -> None:
    """Nothing is extracted twice but what was in flight when something was killed, by the server's count."""
    spec = open_store(config.store or "").spec
    puts = Counter(f"{e.bucket}/{e.key}" for e in proxy.log[n_entries:] if e.method == "PUT" and e.status == 200)
    again = sum(n - 1 for key, n in puts.items() if f"/{COMMITS_PREFIX}" in key)
    assert again <= N_IN_FLIGHT * n_kills
    per_shard = len(shard_object_keys(spec, 0))
    n_objects = sum(n for key, n in puts.items() if "/layer_" in key and not key.endswith("zarr.json"))
    assert n_objects <= per_shard * (N_SHARDS * n_stores + N_IN_FLIGHT * n_kills)


def n_commits(config: ExtractConfig) -> int:
    return sum(1 for _ in open_objects(config.store or "").list(COMMITS_PREFIX))


def has_half_a_shard(config: ExtractConfig) -> bool:
    """Whether some shard has objects and no commit yet."""
    keys = [info.key for info in open_objects(config.store or "").list()]
    n_begun = sum(key.startswith("layer_00/cls/") and not key.endswith("zarr.json") for key in keys)
    return n_begun > sum(key.startswith(COMMITS_PREFIX) for key in keys)


def digest(location: str) -> str:
    return content_digest(open_objects(location))

"""Workers, drivers, or both, killed with SIGKILL under Ray: the same command again ends in the undisturbed store."""

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline.extract import exit_code, extract
from pipeline.run_log import RunLog
from storage_schemas import open_store
from tests.pipeline_jobs import ON_RAY, THREADS, digest_of, fake_arguments, fake_config, leftovers, make_tree, run_job

pytestmark = pytest.mark.ray

REPO = Path(__file__).parents[2]
N_IMAGES = 400
N_KILLS, N_PARTS = 100, 20
START_TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = tmp_path_factory.mktemp("peace") / "store"
    run_job(fake_config(images, store), THREADS)
    return digest_of(store)


class Driver:
    """`python -m pipeline extract` in a process of its own, on a Ray cluster or, with "local", on a private one."""

    def __init__(self, images: Path, store: Path, address: str) -> None:
        flags = fake_arguments(images, store, "--no-dashboard", "--workers", "2", "--cpus-per-worker", "1")
        flags.remove("--no-ray")
        self._told = store.with_name(f"{store.name}.stderr")
        with self._told.open("ab") as told:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "extract", *flags],
                cwd=REPO,
                env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"},
                stdout=told,
                stderr=told,
            )

    @property
    def told(self) -> str:
        return self._told.read_text()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()


@contextmanager
def driving(driver: Driver) -> Iterator[Driver]:
    try:
        yield driver
    finally:
        driver.kill()


def shard_workers() -> list[psutil.Process]:
    """Processes of the dispatcher's actors below this test, whichever Ray they belong to."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if re.match("ray::(ShardActor|extract)", " ".join(process.cmdline())):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def n_commits(store: Path) -> int:
    return len(list((store / "commits").glob("*.json")))


def has_half_a_shard(store: Path) -> bool:
    """Whether some shard has objects and no commit yet."""
    committed = {int(path.stem) for path in (store / "commits").glob("*.json")}
    begun = {int(path.parent.name) for path in store.glob("layer_00/cls/c/*/0")}
    return bool(begun - committed)


def wait_for(what: Callable[[], bool], *, timeout_s: float = START_TIMEOUT_S) -> bool:
    """Poll until it is so; False if it never was."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.02)
    return False


def ray_address() -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def test_a_killed_worker_costs_nothing(
    ray_cluster: None, images: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = []

    def kill_first_two(self: RunLog, report, attempts: int) -> None:  # type: ignore[no-untyped-def]
        pid = int(report.worker.rpartition(":")[2])
        if len(killed) < 2 and pid not in killed:
            killed.append(pid)
            psutil.Process(pid).kill()

    monkeypatch.setattr(RunLog, "shard", kill_first_two)
    results = extract(fake_config(images, tmp_path / "store"), ON_RAY)
    assert len(killed) == 2
    assert exit_code(results) == 0
    assert digest_of(tmp_path / "store") == undisturbed


def test_a_killed_driver_takes_its_ray_along(images: Path, undisturbed: str, tmp_path: Path) -> None:
    """The Ray inside a job has nobody to end it when the job is killed: its processes must notice by themselves."""
    store = tmp_path / "store"
    with driving(Driver(images, store, "local")) as driver:
        assert wait_for(lambda: n_commits(store) >= 3 or driver.exit_code() is not None)
        assert driver.exit_code() is None, driver.told
        children = driver.children()
        driver.kill()
    assert not open_store(store).is_complete
    result = run_job(fake_config(images, store), THREADS)  # at once: the dead job's heartbeat is known to be dead
    assert result.complete
    workers = [child for child in children if is_alive(child) and "ray::extract" in " ".join(child.cmdline())]
    assert wait_for(lambda: not any(is_alive(worker) for worker in workers), timeout_s=60)
    assert digest_of(store) == undisturbed
    assert leftovers(store) == []


@pytest.mark.slow
def test_nothing_of_a_killed_drivers_ray_stays(images: Path, tmp_path: Path) -> None:
    """Ray's own agents look for their raylet once a minute."""
    with driving(Driver(images, tmp_path / "store", "local")) as driver:
        assert wait_for(lambda: n_commits(tmp_path / "store") >= 1 or driver.exit_code() is not None)
        children = driver.children()
        assert len(children) >= 5
    assert wait_for(lambda: not any(is_alive(child) for child in children), timeout_s=120)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_driver_and_worker_killed_together(ray_cluster: None, images: Path, undisturbed: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with driving(Driver(images, store, ray_address())) as driver:
        assert wait_for(lambda: (n_commits(store) >= 3 and has_half_a_shard(store)) or driver.exit_code() is not None)
        assert driver.exit_code() is None, driver.told
        driver.kill()
        for worker in shard_workers():
            worker.kill()
    assert not open_store(store).is_complete
    assert run_job(fake_config(images, store), THREADS).complete
    assert digest_of(store) == undisturbed
    assert leftovers(store) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(N_PARTS))
def test_a_hundred_random_kills(seed: int, ray_cluster: None, images: Path, undisturbed: str, tmp_path: Path) -> None:
    """In parts, so that none is long enough to look like a hang."""
    rng = random.Random(seed)
    kills: Counter[str] = Counter()
    n_uncommitted = n_half = n_stores = 0
    store, driver = tmp_path / "0", None
    began = time.monotonic()
    while sum(kills.values()) < N_KILLS // N_PARTS:
        is_early = rng.random() < 0.2  # while it plans, connects, creates, starts workers; and old workers still write
        if not is_early:
            wait_for(lambda: not shard_workers())
        n_before = n_commits(store)
        if driver is None:
            driver = Driver(images, store, ray_address())
        if is_early:
            time.sleep(rng.uniform(0, 10))
        else:
            wait_for(partial(has_moved, driver, store, n_before))
            time.sleep(rng.uniform(0, 0.8))
        if driver.exit_code() is not None:
            # 3: one shard was alone on three workers that were killed, or five were killed before they were ready
            assert driver.exit_code() in (0, 3), driver.told
            if driver.exit_code() == 0:
                assert_undisturbed(store, undisturbed)
                n_stores, store = n_stores + 1, tmp_path / str(n_stores + 1)
            driver = None
            continue
        target = rng.choice(["worker", "driver", "both"])
        workers = shard_workers()
        if target == "worker" and not workers:
            target = "driver"
        n_uncommitted += n_commits(store) < N_IMAGES // 8
        n_half += has_half_a_shard(store)
        kills[target] += 1
        if target != "driver":
            for worker in workers:
                kill_quietly(worker)
        if target != "worker":
            driver.kill()
            driver = None
    if driver is not None:
        driver.kill()
    assert run_job(fake_config(images, store), THREADS).complete
    assert_undisturbed(store, undisturbed)
    print(
        f"\n{dict(kills)}: {n_uncommitted} while a shard was uncommitted, {n_half} of them with half a shard on disk; "
        f"{n_stores + 1} stores finished, in {time.monotonic() - began:.0f} s"
    )
    ALL_KILLS.update(kills=sum(kills.values()), uncommitted=n_uncommitted, half=n_half)


ALL_KILLS: Counter[str] = Counter()


@pytest.mark.slow
def test_half_of_those_kills_hit_an_uncommitted_shard() -> None:
    print(dict(ALL_KILLS))
    assert ALL_KILLS["uncommitted"] >= ALL_KILLS["kills"] / 2
    assert ALL_KILLS["half"] >= ALL_KILLS["kills"] / 20


def has_moved(driver: Driver, store: Path, n_before: int) -> bool:
    """Whether a shard was committed since, or the driver has ended."""
    return n_commits(store) > n_before or driver.exit_code() is not None


def assert_undisturbed(store: Path, undisturbed: str) -> None:
    assert digest_of(store) == undisturbed
    assert leftovers(store) == []


def kill_quietly(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()

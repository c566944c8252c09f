"""Workers, drivers, or both, killed with SIGKILL under Ray: the same command again ends in the undisturbed store."""

from pathlib import Path

import psutil
import pytest

from pipeline.extract import exit_code, extract
from pipeline.run_log import RunLog
from storage_schemas import open_store
from tests.kills import Driver, driving, is_alive, ray_address, shard_workers, wait_for
from tests.pipeline_jobs import ON_TWO, THREADS, digest_of, fake_arguments, fake_config, leftovers, make_tree, run_job

pytestmark = pytest.mark.ray

N_IMAGES = 160  # 20 shards
N_HELD = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = tmp_path_factory.mktemp("peace") / "store"
    run_job(fake_config(images, store), THREADS)
    return digest_of(store)


def begin(images: Path, store: Path, address: str, workers: int = 2) -> Driver:
    told = store.with_name(f"{store.name}.stderr")
    return Driver(fake_arguments(images, store), told, address, workers=workers, holds=N_HELD)


def n_commits(store: Path) -> int:
    return len(list((store / "commits").glob("*.json")))


def has_half_a_shard(store: Path) -> bool:
    """Whether some shard has objects and no commit yet."""
    committed = {int(path.stem) for path in (store / "commits").glob("*.json")}
    begun = {int(path.parent.name) for path in store.glob("layer_00/cls/c/*/0")}
    return bool(begun - committed)


def test_a_killed_worker_costs_nothing(
    ray_cluster: None, images: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = []

    def kill_the_first(self: RunLog, report, attempts: int) -> None:  # type: ignore[no-untyped-def]
        if not killed:
            killed.append(int(report.worker.rpartition(":")[2]))
            psutil.Process(killed[0]).kill()

    monkeypatch.setattr(RunLog, "shard", kill_the_first)
    results = extract(fake_config(images, tmp_path / "store"), ON_TWO)
    assert len(killed) == 1
    assert exit_code(results) == 0
    assert digest_of(tmp_path / "store") == undisturbed


def test_a_killed_driver_takes_its_ray_along(images: Path, undisturbed: str, tmp_path: Path) -> None:
    """The Ray inside a job has nobody to end it when the job is killed: its processes must notice by themselves."""
    store = tmp_path / "store"
    with driving(begin(images, store, "local", workers=1)) as driver:
        assert wait_for(
            lambda: (n_commits(store) >= N_HELD and has_half_a_shard(store)) or driver.exit_code() is not None
        )
        assert driver.exit_code() is None, driver.told
        workers = driver.workers()
        assert workers
        driver.kill()
    assert not open_store(store).is_complete
    assert has_half_a_shard(store)
    result = run_job(fake_config(images, store), THREADS)  # at once: the dead job's heartbeat is known to be dead
    assert result.complete
    assert wait_for(lambda: not any(is_alive(worker) for worker in workers))
    assert digest_of(store) == undisturbed
    assert leftovers(store) == []


@pytest.mark.slow
def test_nothing_of_a_killed_drivers_ray_stays(images: Path, tmp_path: Path) -> None:
    """Ray's own agents look for their raylet once a minute."""
    with driving(begin(images, tmp_path / "store", "local")) as driver:
        assert wait_for(lambda: n_commits(tmp_path / "store") >= N_HELD or driver.exit_code() is not None)
        children = driver.children()
        assert len(children) >= 5
    assert wait_for(lambda: not any(is_alive(child) for child in children), timeout_s=120)


@pytest.mark.slow
def test_driver_and_worker_killed_together(ray_cluster: None, images: Path, undisturbed: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with driving(begin(images, store, ray_address())) as driver:
        assert wait_for(
            lambda: (n_commits(store) >= N_HELD and has_half_a_shard(store)) or driver.exit_code() is not None
        )
        assert driver.exit_code() is None, driver.told
        driver.kill()
        for worker in shard_workers():
            worker.kill()
    assert not open_store(store).is_complete
    assert run_job(fake_config(images, store), THREADS).complete
    assert digest_of(store) == undisturbed
    assert leftovers(store) == []

"""Whatever kills an extraction, and whenever: the same command again ends in the store of an undisturbed run."""

from dataclasses import replace
from pathlib import Path

import pytest

import pipeline.job
import pipeline.shard
from infra.console import ExitCode, JobError
from infra.objects import Buffer, FolderObjects, ObjectAccessError
from pipeline.config import ExtractConfig
from storage_schemas import open_store
from storage_schemas.keys import HEARTBEAT_KEY, LOG_PREFIX, STORE_KEY
from tests.crashes import DIED, FINISHED, Crash, run_and_crash
from tests.pipeline_jobs import digest_of, fake_config, leftovers, make_tree, run_job

N_IMAGES = 6  # in two shards, so a crash may find one committed, one half done, or both


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def config(images: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """A job of few objects, done in peace in its own place."""
    config = fake_config(images, tmp_path_factory.mktemp("peace") / "store", layers="0,3", samples_per_shard=4)
    run_job(config)
    return config


@pytest.fixture(scope="module")
def n_puts(config: ExtractConfig) -> int:
    """Of a whole job, outside log/: every object is put once."""
    assert config.store is not None
    return sum(1 for info in FolderObjects(config.store).list() if not info.key.startswith(LOG_PREFIX))


def crash_and_rerun(config: ExtractConfig, folder: Path, crashes: list[Crash], **again: object) -> list[Path]:
    """Each crash in a store of its own; then the same command. Returns the stores, finished."""
    stores = [folder / f"{crash.verb}-{crash.when}-{crash.n}" for crash in crashes]
    jobs = [replace(config, store=str(store)) for store in stores]
    codes = run_and_crash(list(zip(jobs, crashes)), replace(config, store=str(folder / "warm-up")))
    assert codes == [DIED] * len(crashes)
    for job, store in zip(jobs, stores):
        run_job(job)
        assert_finished_in_order(config, store)
    return stores


def assert_finished_in_order(config: ExtractConfig, store: Path) -> None:
    assert config.store is not None
    assert digest_of(store) == digest_of(config.store), store.name
    assert leftovers(store) == [], store.name
    assert not (store / HEARTBEAT_KEY).exists(), store.name


WHEN = ("before", "during", "after")


def test_killed_at_any_put(config: ExtractConfig, n_puts: int, tmp_path: Path) -> None:
    """At each put in one of the three ways; there are several puts of each sort."""
    assert n_puts > 30
    crash_and_rerun(config, tmp_path, [Crash(when=WHEN[n % 3], n=n) for n in range(1, n_puts + 1)])


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
def test_killed_in_any_way_at_any_put(when: str, config: ExtractConfig, n_puts: int, tmp_path: Path) -> None:
    crash_and_rerun(config, tmp_path, [Crash(when=when, n=n) for n in range(1, n_puts + 1)])


def test_the_puts_that_are_killed_are_all_there_are(config: ExtractConfig, n_puts: int, tmp_path: Path) -> None:
    job, beyond = replace(config, store=str(tmp_path / "store")), Crash(when="before", n=n_puts + 1)
    assert run_and_crash([(job, beyond)], replace(config, store=str(tmp_path / "warm-up"))) == [FINISHED]
    assert_finished_in_order(config, tmp_path / "store")


@pytest.mark.parametrize("prefix", ["commits/", "index.parquet", "store.json"])
def test_killed_around_what_makes_things_exist(prefix: str, config: ExtractConfig, tmp_path: Path) -> None:
    crashes = [Crash(when=when, n=1, prefix=prefix) for when in ("before", "during", "after")]
    jobs = [replace(config, store=str(tmp_path / crash.when)) for crash in crashes]
    codes = run_and_crash(list(zip(jobs, crashes)), replace(config, store=str(tmp_path / "warm-up")))
    assert codes == [DIED] * 3
    for crash in crashes:
        there = (tmp_path / crash.when / STORE_KEY).exists()
        assert there == (prefix != "store.json" or crash.when == "after")
        if there:
            store = open_store(tmp_path / crash.when)
            wanted = {"commits/": int(crash.when == "after"), "index.parquet": 2, "store.json": 0}[prefix]
            assert store.committed.sum() == wanted
            assert store.read().shape[0] == store.n_committed
    for job, crash in zip(jobs, crashes):
        run_job(job)
        assert_finished_in_order(config, tmp_path / crash.when)


@pytest.mark.parametrize("both", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_while_it_writes_its_log(both: bool, config: ExtractConfig, tmp_path: Path) -> None:
    """The last of these puts come after the store is whole; what they leave is swept all the same."""
    crashes = [
        Crash(when=when, n=n, prefix="log/")
        for n in range(1, 8)
        for when in (("during", "after") if both else (WHEN[1 + n % 2],))
    ]
    crash_and_rerun(config, tmp_path, crashes)


def test_killed_while_it_deletes_the_store_before(config: ExtractConfig, n_puts: int, tmp_path: Path) -> None:
    crashes = [Crash(when="before", n=n, verb="delete") for n in (1, 2, 12, n_puts - 1, n_puts)]
    crashes += [Crash(when="after", n=n_puts, verb="delete")]
    stores = [tmp_path / f"{crash.when}-{crash.n}" for crash in crashes]
    for store in stores:
        run_job(replace(config, store=str(store), layers="1,2"))
    jobs = [replace(config, store=str(store), overwrite=True) for store in stores]
    codes = run_and_crash(list(zip(jobs, crashes)), replace(config, store=str(tmp_path / "warm-up")))
    assert codes == [DIED] * len(crashes)
    for store, job in zip(stores, jobs):
        run_job(job)
        assert_finished_in_order(config, store)


class FailingObjects(FolderObjects):
    """A disk that is full at one put, and only then."""

    n_left = 0

    def put(self, key: str, data: Buffer | list[Buffer]) -> None:
        self._count(key)
        super().put(key, data)

    def put_new(self, key: str, data: Buffer | list[Buffer]) -> bool:
        self._count(key)
        return super().put_new(key, data)

    def _count(self, key: str) -> None:
        if not key.startswith(LOG_PREFIX):
            FailingObjects.n_left -= 1
            if FailingObjects.n_left == 0:
                raise ObjectAccessError(key, f"{self.location}/{key} could not be written: No space left on device")


@pytest.mark.parametrize("each", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_put_ends_the_job_in_one_message(
    each: int, config: ExtractConfig, n_puts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(1, n_puts + 1, each):
        job = replace(config, store=str(tmp_path / str(n)))
        with monkeypatch.context() as patched:
            patched.setattr(pipeline.job, "open_objects", FailingObjects)
            patched.setattr(pipeline.shard, "open_objects", FailingObjects)
            FailingObjects.n_left = n
            with pytest.raises(JobError, match=r"No space left on device\. What is committed stays valid") as stopped:
                run_job(job)
        assert stopped.value.exit_code == ExitCode.PROBLEMS
        assert not (tmp_path / str(n) / HEARTBEAT_KEY).exists()
        run_job(job)
        assert_finished_in_order(config, tmp_path / str(n))

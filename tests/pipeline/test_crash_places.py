"""Killed at any put, as in test_crash.py, in the other back end and on S3."""

import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from infra.objects import open_objects
from pipeline.config import ExtractConfig
from storage_schemas.digest import content_digest
from storage_schemas.keys import HEARTBEAT_KEY, LOG_PREFIX, is_owned
from tests.crashes import DIED, Crash, run_and_crash
from tests.pipeline_jobs import fake_config, make_tree, run_job
from tests.s3_servers import shared_server

N_IMAGES = 6
BACKENDS = ("zarr", "webdataset")
SERVERS_AND_BACKENDS = [
    ("moto", "zarr"),
    pytest.param("rclone", "webdataset", marks=pytest.mark.slow),
    pytest.param("moto", "webdataset", marks=pytest.mark.slow),
    pytest.param("rclone", "zarr", marks=pytest.mark.slow),
]
on_s3 = pytest.mark.parametrize(("server", "backend"), SERVERS_AND_BACKENDS)


@pytest.fixture(scope="module")
def peace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExtractConfig]:
    """A job of few objects in each back end, done in peace in a folder of its own."""
    folder = tmp_path_factory.mktemp("peace")
    images = make_tree(folder / "images", N_IMAGES)
    configs = {
        backend: fake_config(images, folder / backend, layers="3", samples_per_shard=4, format=backend)
        for backend in BACKENDS
    }
    for config in configs.values():
        run_job(config)
    return configs


def place_on(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix on a server, to which this process and its children are sent."""
    running = shared_server(server)
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{running.make_bucket()}/{secrets.token_hex(3)}"


def content_keys(location: str) -> list[str]:
    return sorted(info.key for info in open_objects(location).list() if not info.key.startswith(LOG_PREFIX))


def crash_and_rerun(config: ExtractConfig, place: str, crashes: list[Crash], folder: Path) -> None:
    """Each crash in a store of its own below a place; then the same command, which ends in the undisturbed store."""
    jobs = [replace(config, store=f"{place}/{i}") for i in range(len(crashes))]
    codes = run_and_crash(list(zip(jobs, crashes)), replace(config, store=str(folder / "warm-up")))
    assert codes == [DIED] * len(crashes)
    assert config.store is not None
    undisturbed = content_digest(open_objects(config.store))
    for job, crash in zip(jobs, crashes):
        run_job(job)
        objects = open_objects(job.store or "")
        assert content_digest(objects) == undisturbed, crash
        keys = [info.key for info in objects.list()]
        assert all(is_owned(key) for key in keys), crash
        assert HEARTBEAT_KEY not in keys, crash


def test_killed_at_any_put_of_tars(peace: dict[str, ExtractConfig], tmp_path: Path) -> None:
    config = peace["webdataset"]
    n_puts = len(content_keys(config.store or ""))
    crashes = [Crash(when=("before", "during", "after")[n % 3], n=n) for n in range(1, n_puts + 1)]
    crash_and_rerun(config, str(tmp_path / "stores"), crashes, tmp_path)


# one of each sort of object, and what makes things exist at every moment
POINTS = [
    *(Crash(when=when, n=1, prefix=prefix) for prefix in ("store.json", "index") for when in ("during", "after")),
    *(Crash(when=when, n=2, prefix="commits/") for when in ("before", "during", "after")),
    Crash(when="during", n=1, prefix="samples.parquet"),
    Crash(when="during", n=1, prefix="teacher/"),
    Crash(when="during", n=2, prefix="layer_03/patches"),
    Crash(when="after", n=2, prefix="statistics/"),
    Crash(when="during", n=2, prefix=LOG_PREFIX),
]


@pytest.mark.s3
@on_s3
def test_killed_on_s3(
    server: str, backend: str, peace: dict[str, ExtractConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_and_rerun(peace[backend], place_on(server, monkeypatch), POINTS, tmp_path)


@pytest.mark.s3
@pytest.mark.slow
@on_s3
def test_killed_at_any_put_on_s3(
    server: str, backend: str, peace: dict[str, ExtractConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_puts, place = len(content_keys(peace[backend].store or "")), place_on(server, monkeypatch)
    for when in ("before", "during", "after"):
        crashes = [Crash(when=when, n=n) for n in range(1, n_puts + 1)]
        crash_and_rerun(peace[backend], f"{place}/{when}", crashes, tmp_path / when)

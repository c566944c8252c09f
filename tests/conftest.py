"""What several test packages share: the hypothesis profile and one embedded Ray cluster for the whole session."""

import os
import secrets
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.s3_servers import S3Server, shared_server, stop_shared_servers

# Before torch is imported, here and in every process that a test starts: the matrices are tiny, and a second OpenMP
# thread on a busy core makes them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers are nice to others by 15 of themselves: on a busy machine the tests would wait for them for ever.
os.environ.setdefault("RAY_worker_niceness", "0")

# The same examples for everybody; `--hypothesis-profile=explore` tries others.
settings.register_profile(
    "here",
    deadline=None,
    database=None,
    print_blob=True,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("here"), derandomize=False)
settings.load_profile("here")


@pytest.fixture(scope="session")
def _ray_ends() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(_ray_ends: None) -> None:
    """Ray on this machine with four logical CPUs. Starting it costs seconds, so all tests share it; mark them `ray`."""
    import ray

    from infra.cluster import connect
    from tests.ray_nodes import patient_raylets

    os.environ["RAY_AUTH_MODE"] = "disabled"  # the default would write a token into the home of whoever runs the tests
    if not ray.is_initialized():
        with patient_raylets():
            connect("local", n_cpus=4, dashboard=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever runs over an S3 back end, or asks for a server, has the mark `s3`."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "s3-" in item.name or any(name in fixtures for name in ("moto", "rclone", "s3_server", "s3_location")):
            item.add_marker("s3")


@pytest.fixture(scope="session", autouse=True)
def _s3_servers_end() -> Iterator[None]:
    yield
    stop_shared_servers()


@pytest.fixture(scope="session")
def moto() -> S3Server:
    """moto's S3 server on loopback, one for all tests: make a bucket of your own."""
    return shared_server("moto")


@pytest.fixture(scope="session")
def rclone() -> S3Server:
    """rclone's S3 server on loopback, one for all tests: make a bucket of your own."""
    return shared_server("rclone")


@pytest.fixture(scope="session", params=["moto", "rclone"])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    """Each of the two in turn."""
    return shared_server(request.param)


@pytest.fixture
def s3_location(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place on each server in turn, s3://bucket/prefix; this process and its children are sent there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.make_bucket()}/{secrets.token_hex(4)}"

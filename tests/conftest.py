"""What several test packages share: the hypothesis profile and one embedded Ray cluster for the whole session."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here and in every process that a test starts: the matrices are tiny, and a second OpenMP
# thread on a busy core makes them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "here", deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
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

    os.environ["RAY_AUTH_MODE"] = "disabled"  # the default would write a token into the home of whoever runs the tests
    if not ray.is_initialized():
        connect("local", n_cpus=4, dashboard=False)

"""What several test packages share: the hypothesis profile and one embedded Ray cluster for the whole session."""

import gc
import os
import re
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests import examples, type_checks
from tests.s3_servers import S3Server, shared_server, stop_shared_servers

# Before torch is imported, here and in every process that a test starts: the matrices are tiny, and a second OpenMP
# thread on a busy core makes them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What the make that runs us was given is not for the makes that tests run.
if os.environ.pop("MAKELEVEL", None) is not None:
    for name in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS"):
        os.environ.pop(name, None)
# Ray's workers are nice to others by 15 of themselves: on a busy machine the tests would wait for them for ever.
os.environ.setdefault("RAY_worker_niceness", "0")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell switches Ctrl-C off for what it starts with &
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples for everybody; `--hypothesis-profile=every` tries more of them, `explore` others each time.
settings.register_profile(
    "here",
    max_examples=examples.SOME,
    deadline=None,
    database=None,
    print_blob=True,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("every", settings.get_profile("here"), max_examples=examples.EVERY)
settings.register_profile("explore", settings.get_profile("every"), derandomize=False)
settings.load_profile("here")


type_checks.install()

# A million objects are made by imports, and stay: to look through them again and again for garbage takes 5 s before
# the first test, and half of the time of every later search.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


class Scheduler(LoadScopeScheduling):
    """Files go to the test processes whole, those that share Ray to one process: each starts its own cluster.

    What waits for processes goes first, so that none of it is left for the end, when nobody has anything else to do.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if file in ON_RAY else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        next_one = min(self.workqueue, key=lambda scope: (scope != "ray", scope not in WAITING))  # then the fullest
        self.workqueue.move_to_end(next_one, last=False)
        super()._assign_work_unit(node)


def files_with(pattern: str) -> set[str]:
    """Files of tests in whose text it is found."""
    here = Path(__file__).parent
    found = [path for path in here.rglob("test_*.py") if re.search(pattern, path.read_text())]
    return {path.relative_to(here.parent).as_posix() for path in found}


ON_RAY = files_with("ray_cluster")
WAITING = files_with(r"\b(subprocess|multiprocessing|run_and_crash)\b")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduler:
    """How `make test` shares the tests out among processes."""
    return Scheduler(config, log)


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """What files before this one have imported is not looked through again whenever garbage is collected.

    It comes to half a million objects, and a test that collects garbage, or whose garbage is, would take a second more.
    """
    gc.collect()
    gc.freeze()


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


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever runs over an S3 back end, or asks for a server, has the mark `s3`.

    Both servers are held to the contract of objects. What is built on those runs on rclone, and on moto, which takes
    twice as long, when slow tests do.
    """
    nodeids = {item.nodeid for item in items}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "s3-" in item.name or any(name in fixtures for name in ("moto", "rclone", "s3_server", "s3_location")):
            item.add_marker("s3")
        is_second = "moto" in item.name and item.nodeid.replace("moto", "rclone") in nodeids
        if is_second and item.path.parent.name != "contract":
            item.add_marker("slow")


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

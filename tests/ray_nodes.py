"""A cluster of pretended machines: Ray nodes with a working directory, a home and an environment of their own each."""

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.s3_servers import ACCESS_KEY, SECRET_KEY, free_port

REPO = Path(__file__).parents[1]
START_TRIES = 5
SMALL = {"object_store_memory": 80 * 2**20}


@dataclass
class Nodes:
    """A cluster whose head has no cores; add nodes to it.

    Attributes:
        cluster: Ray's own.
        folder: Holds one folder per node, with its home and its working directory.
    """

    cluster: Any
    folder: Path
    _n: int = field(default=0)

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, *, s3_keys: bool = False, environment: Mapping[str, str] | None = None, **settings: Any) -> Any:
        """Start one more node.

        Args:
            s3_keys: Give its home the file with the credentials of the tests' S3 servers, as a machine's role would.
            environment: Variables of this node alone.
            settings: Ray's, such as num_cpus.
        """
        self._n += 1
        home, work = (self.folder / f"node-{self._n}" / name for name in ("home", "work"))
        for place in (home, work):
            place.mkdir(parents=True)
        if s3_keys:
            (home / ".aws").mkdir()
            text = f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
            (home / ".aws" / "credentials").write_text(text)
        with (
            _elsewhere(work, {"HOME": str(home), "PYTHONPATH": str(REPO), **(environment or {})}),
            patient_raylets(),
        ):
            return _tried(lambda: self.cluster.add_node(**{"num_cpus": 1, **SMALL, **settings}))

    def remove(self, node: Any) -> None:
        """Kill it, without a word."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, in_s: float = 60.0) -> None:
        """Announce that it will be taken away, as a spot market does."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        gcs = GcsClient(address=self.address)
        gcs.drain_node(node.node_id, reason, "spot", int((time.time() + in_s) * 1000))


_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


@contextmanager
def patient_raylets() -> Iterator[None]:
    """Nodes that are started in the body come up on a busy machine too.

    A raylet ends itself if its agents, which are programs in Python, have not chosen their ports within 15 s. Here they
    are told which, and the files by which they would tell are there before they are.
    """
    from ray._private import services

    original = services.start_raylet

    def start_raylet(*arguments: Any, **named: Any) -> Any:
        given = inspect.signature(original).bind(*arguments, **named).arguments
        for name in _AGENT_PORTS:
            given[name] = given.get(name) or free_port()
            Path(given["session_dir"], f"{name}_{given['node_id']}").write_text(str(given[name]))
        return original(**given)

    services.start_raylet = start_raylet
    try:
        yield
    finally:
        services.start_raylet = original


def _tried(start: Callable[[], Any]) -> Any:
    """On a busy machine a start now and then misses Ray's fixed limit of 15 s."""
    for _ in range(START_TRIES - 1):
        try:
            return start()
        except Exception as error:  # noqa: BLE001 - Ray raises bare Exception here; the last one is not caught
            print(f"a node did not start ({str(error).splitlines()[0]}); once more")
    return start()


@contextmanager
def _elsewhere(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """What is started in the body begins in this folder, with these variables and none that says where S3 is."""
    here, variables = os.getcwd(), dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    # Ray's workers are nice to others by 15, which on a busy machine is to wait for ever.
    os.environ |= environment | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(variables)


@contextmanager
def ray_nodes(folder: Path, **head: Any) -> Iterator[Nodes]:
    """A cluster of one node without cores, the head; ended afterwards, and with it all that were added."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # the embedded cluster that other tests share; the next one that needs it starts it again
    (folder / "head").mkdir(parents=True)
    with _elsewhere(folder / "head", {"HOME": str(folder / "head"), "PYTHONPATH": str(REPO)}), patient_raylets():
        settings = {"num_cpus": 0, "include_dashboard": False, **SMALL, **head}
        cluster = _tried(lambda: Cluster(initialize_head=True, head_node_args=settings))
    try:
        yield Nodes(cluster, folder)
    finally:
        ray.shutdown()
        cluster.shutdown()


def workers_of(node: Any) -> set[int]:
    """Ids of the processes of our actors on a node."""
    if "raylet" not in node.all_processes:  # killed
        return set()
    raylet = node.all_processes["raylet"][0].process.pid
    found = set()
    try:
        for child in psutil.Process(raylet).children(recursive=True):
            try:
                if any("ray::extract" in word or "ray::ShardActor" in word for word in child.cmdline()):
                    found.add(child.pid)
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass
    return found

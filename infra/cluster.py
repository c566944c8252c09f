"""Connect to Ray, or start it: the only place that calls `ray.init`.

With RAY_ADDRESS set (or an address given) we join that cluster; else a small private one is started in this machine
and ends with us. Ray is imported inside the functions, so that nothing else in the project needs it.

Environment we set, both only if they are not set yet: RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 (under `uv run` Ray would upload
the working directory and start every worker through uv), and, for an embedded cluster, RAY_USAGE_STATS_ENABLED=0.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from infra.console import StopFlag, UserError, interrupts_kept

OBJECT_STORE_NBYTES = 256 * 2**20  # activations never pass through it; Ray's default takes 30 % of the memory
KNOCK_TIMEOUT_S = 10.0
GET_TOKEN = "ray get-auth-token"


@dataclass(frozen=True, kw_only=True)
class Connection:
    """What we are connected to.

    Attributes:
        embedded: It runs in this machine only and was started by us.
        owned: We connected, so we disconnect; False when this process had a connection already (a notebook, a test).
        dashboard_url: Empty when there is no dashboard.
        needs_token: The dashboard asks for a token. We never print the token, only how to get it.
    """

    address: str
    embedded: bool
    owned: bool
    dashboard_url: str
    needs_token: bool

    def __str__(self) -> str:
        where = "Ray runs inside this job" if self.embedded else f"Ray cluster at {self.address}"
        if not self.dashboard_url:
            return f"{where}, without a dashboard"
        token = f' (it asks for a token; get it with "{GET_TOKEN}")' if self.needs_token else ""
        return f"{where}, dashboard: {self.dashboard_url}{token}"


def cluster_address(address: str | None = None) -> str | None:
    """The address of the cluster to join: the one given, else RAY_ADDRESS; None means to start one here.

    Raises:
        UserError: It is that of a dashboard, which takes jobs.
    """
    found = address or os.environ.get("RAY_ADDRESS") or None
    if found is not None and found.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={found} is a dashboard, which takes jobs: make submit CMD=... To join its cluster, from one "
            "of its machines, give host:6379; unset it to work on this machine"
        )
    return None if found == "local" else found


def connect(
    address: str | None = None,
    *,
    n_cpus: int | None = None,
    n_gpus: int | None = None,
    dashboard: bool = True,
    verbose: bool = False,
    say: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
) -> Connection:
    """Join the cluster at `address` or RAY_ADDRESS, or start an embedded one; a connection that exists is kept.

    Args:
        n_cpus: Of an embedded cluster; all of the machine's when None. A cluster we join already has its own, and Ray
            refuses to be told (ValueError), so this and `n_gpus` are then not passed on.
        dashboard: Whether an embedded cluster gets one, on 127.0.0.1 and the first free port from 8265.
        verbose: Show the workers' output in this terminal; otherwise it is in the dashboard's logs only.
        say: Gets the one message of a retried start.

    Raises:
        UserError: There is no cluster at the address, or Ray does not start here even at the second try.
    """
    import ray

    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        return Connection(address=here, embedded=False, owned=False, dashboard_url="", needs_token=False)
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    common: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    found = cluster_address(address)
    if found is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings = common | {
            "address": "local",
            "num_cpus": n_cpus,
            "num_gpus": n_gpus,
            "include_dashboard": dashboard,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": OBJECT_STORE_NBYTES,
        }
        context = _interruptible(lambda stopped: _start_embedded(settings, say, stopped))
    else:
        context = _interruptible(lambda stopped: _join(found, common))
    url = context.dashboard_url or ""
    return Connection(
        address=context.address_info["address"],
        embedded=found is None,
        owned=True,
        dashboard_url=f"http://{url}" if url and "://" not in url else url,
        needs_token=os.environ.get("RAY_AUTH_MODE") == "token",
    )


def disconnect(connection: Connection) -> None:
    """Leave the cluster if it was us who connected; an embedded one ends."""
    import ray

    if connection.owned:
        ray.shutdown()


@contextmanager
def connected(address: str | None = None, **settings: Any) -> Iterator[Connection]:
    """`connect`, and `disconnect` at the end whatever happens."""
    connection = connect(address, **settings)
    try:
        yield connection
    finally:
        disconnect(connection)


def check_fits(*, num_cpus: float, num_gpus: float, connection: Connection) -> None:
    """Refuse a worker that no node of an embedded cluster can ever hold; without this it would be awaited for ever.

    A cluster we joined may grow (autoscaler), so there nothing is refused.

    Raises:
        UserError: Names what was asked for and what the machine has.
    """
    import ray

    if not connection.embedded:
        return
    have = ray.cluster_resources()
    n_cpus, n_gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    if num_cpus > n_cpus or num_gpus > n_gpus:
        raise UserError(
            f"one worker needs {num_cpus:g} CPUs and {num_gpus:g} GPUs, but this machine has {n_cpus:g} CPUs and "
            f"{n_gpus:g} GPUs. Ask for less, or set RAY_ADDRESS to a larger cluster"
        )


def draining_nodes() -> set[str]:
    """Ids of nodes that will soon be taken away.

    A private call of Ray, right for 2.60. Where it does not work we lose the early notice and nothing else.
    """
    from ray.exceptions import RayError

    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except (ImportError, AttributeError, RuntimeError, RayError):
        return set()


def _interruptible(start: Callable[[StopFlag], Any]) -> Any:
    """A Ctrl-C or SIGTERM while Ray starts ends the command once it has: raised in its midst, Ray may lose it.

    A terminal sends Ctrl-C to Ray's processes too, so that the start may fail of it. On its way Ray sets a handler of
    SIGTERM that exits with a code of its own, and which it takes with it when the former one is back.
    """
    import ray

    try:
        with interrupts_kept() as stopped:
            return start(stopped)
    except (KeyboardInterrupt, SystemExit) as error:
        ray.shutdown()
        raise KeyboardInterrupt from error


def _start_embedded(settings: dict[str, Any], say: Callable[[str], None], stopped: StopFlag) -> Any:
    """Start Ray in this machine. On a busy machine a start now and then misses Ray's fixed 15 s limit; so twice."""
    import ray

    try:
        return ray.init(**settings)
    except Exception as error:  # Ray raises bare Exception here; the second failure is reported
        if stopped():
            raise
        say(f"Ray did not start ({_first_line(error)}); trying once more")
        ray.shutdown()
    try:
        return ray.init(**settings)
    except Exception as error:
        ray.shutdown()
        raise UserError(
            f"Ray does not start in this machine: {_first_line(error)}. It needs about 4 GB of free memory and a "
            "writable temporary folder. The same job runs without Ray with --no-ray"
        ) from error


def _join(address: str, settings: dict[str, Any]) -> Any:
    """Connect to a running cluster, but knock first: Ray itself tries a dead address for minutes, and silently."""
    import ray

    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "://" not in address:
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_TIMEOUT_S).close()
        return ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({_first_line(error)}). Start it, correct RAY_ADDRESS, or unset "
            "RAY_ADDRESS to run inside this machine"
        ) from error


def _first_line(error: BaseException) -> str:
    """Of the message, or its kind where that has none: Ray's own may begin with an empty line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

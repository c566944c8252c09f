"""How the work is done: with Ray or without, how many workers, with what of the machines."""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from infra.cluster import check_fits, connected, draining_nodes
from infra.console import say
from infra.machine import n_cores
from infra.ray_ahead import RayAhead
from pipeline.dispatch import Wanted
from pipeline.run_config import RunConfig
from pipeline.shard import RunnerConfig, ShardRunner

MOST_CORES = 64
"""Of a worker with a GPU: decoding 8,000 images/s takes 48 to 80 cores, and threads beyond that wait for each other."""

MOST_IDLE = 0.1
"""Share of all cores that may be left over where machines without GPUs differ in size."""


def n_threads(run: RunConfig) -> int:
    """Micro-batches in flight per worker on this machine."""
    return run.cpus_per_worker or n_cores()


@contextmanager
def ray_for(run: RunConfig, ahead: RayAhead | None = None) -> "Iterator[Demand]":
    """Ray, joined or started, that can hold such workers, and what is wanted of it; left or ended afterwards.

    Args:
        run: How the work is done.
        ahead: Ray that is on its way already; whoever started it ends it.
    """
    settings = {"dashboard": run.dashboard, "verbose": run.verbose, "say": say}
    with nullcontext(ahead.connection()) if ahead else connected(run.ray_address, **settings) as connection:
        say(str(connection))
        demand = Demand(run)
        wanted = demand()
        check_fits(num_cpus=wanted.num_cpus, num_gpus=wanted.num_gpus, connection=connection)
        yield demand


@dataclass(frozen=True)
class MachineRoom:
    """What one machine of a cluster has for workers.

    Attributes:
        cpus: Cores, as Ray counts them.
        gpus: Whole GPUs.
    """

    cpus: int
    gpus: int = 0


def machines_of_ray(without: Set[str] = frozenset()) -> list[MachineRoom]:
    """The machines that are there now and will stay. Ray is connected.

    Args:
        without: Ids of nodes to leave out.
    """
    import ray

    gone = without | draining_nodes()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in gone]
    return [MachineRoom(int(has.get("CPU", 0)), int(has.get("GPU", 0))) for has in alive]


class Demand:
    """The workers that one extraction wants, asked again while machines come and go; one for all of its stores.

    Once there were GPUs it wants GPUs, in every store: if all are gone when the next begins, it waits for others.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run, self._on_gpus = run, False

    def __call__(self, without: Set[str] = frozenset()) -> Wanted:
        """What is wanted now, on machines other than these (ids of nodes). Ray is connected."""
        found = wanted_workers(self._run, machines_of_ray(without), on_gpus=self._on_gpus)
        self._on_gpus = bool(found.num_gpus)
        return found


def wanted_workers(run: RunConfig, machines: Sequence[MachineRoom], *, on_gpus: bool = False) -> Wanted:
    """Workers for these machines: WORKERS of them if that was typed, else as many as there is room for now.

    Each gets a GPU if there are any and DEVICE allows it, and as many cores as there are for each GPU on the machine
    that has the fewest. Without GPUs, each gets as many cores as can be while at most a tenth of all cores are left
    over: one worker per machine where machines are alike.

    Where no machine has room yet, one worker is wanted all the same: it is what makes a cluster grow from nothing.

    Args:
        run: As typed.
        machines: Those that are there.
        on_gpus: GPUs are in use already: if they are gone, others are awaited, for a CPU's states differ in their bits.
    """
    with_gpus = [machine for machine in machines if machine.gpus and machine.cpus] if run.device != "cpu" else []
    if with_gpus or on_gpus or run.device.startswith("cuda"):
        cpus = run.cpus_per_worker or min([MOST_CORES, *(max(1, one.cpus // one.gpus) for one in with_gpus)])
        if not with_gpus:
            cpus = run.cpus_per_worker or 1  # of machines that are still to come
        n_fit = sum(min(one.gpus, one.cpus // cpus) for one in with_gpus)
        return _wanted(run, machines, cpus, 1, n_fit)
    cores = [machine.cpus for machine in machines if machine.cpus]
    cpus = run.cpus_per_worker or _shared_cores(cores, run.workers)
    return _wanted(run, machines, cpus, 0, sum(n // cpus for n in cores))


def _wanted(run: RunConfig, machines: Sequence[MachineRoom], num_cpus: int, num_gpus: int, n_fit: int) -> Wanted:
    largest = max(machines, key=lambda one: (one.gpus if num_gpus else 0, one.cpus), default=None)
    have = "there is no machine" if largest is None else f"the largest machine has {_room(largest.cpus, largest.gpus)}"
    n = run.workers or max(1, n_fit)
    return Wanted(n=n, num_cpus=num_cpus, num_gpus=num_gpus, n_fit=n_fit, have=have)


def _room(cpus: int | float, gpus: int | float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"


def _shared_cores(cores: Sequence[int], n_workers: int | None) -> int:
    """Cores of each worker on machines without GPUs."""
    if not cores:
        return 1
    if n_workers is not None:  # the most that lets all of them in, if they can be let in
        return next((n for n in range(max(cores), 1, -1) if sum(one // n for one in cores) >= n_workers), 1)
    most = sum(cores)
    return max(n for n in cores if n * sum(one // n for one in cores) >= (1 - MOST_IDLE) * most or n == min(cores))


@dataclass(frozen=True, kw_only=True)
class MakeRunner:
    """Makes a runner where a worker has been placed, with the cores and the device that are its own there.

    Attributes:
        config: The runner's. Without n_threads it uses the cores that it was given; with a GPU, all that the machine
            has for each of its GPUs.
    """

    config: RunnerConfig

    def __call__(self) -> ShardRunner:
        """Make it, in the worker.

        Raises:
            SourceError: No image can be read on this machine.
        """
        import ray

        given = ray.get_runtime_context().get_assigned_resources()
        config, on_gpu = self.config, bool(given.get("GPU", 0))
        if config.n_threads is None:
            config = replace(config, n_threads=max(1, int(given.get("CPU", 1)), _cores_for_each_gpu() if on_gpu else 0))
        if config.device == "auto" and not on_gpu:
            config = replace(config, device="cpu")  # Ray does not hide the GPUs of the machine
        runner = config()
        runner.check_source()
        return runner


def _cores_for_each_gpu() -> int:
    """Of the machine that this worker is on."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    has = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return min(MOST_CORES, int(has.get("CPU", 0)) // max(1, int(has.get("GPU", 1))))

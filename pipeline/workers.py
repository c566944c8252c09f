"""How the work is done: with Ray or without, how many workers, with what of the machines."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from infra.cluster import check_fits, connected
from infra.console import UserError, say
from infra.machine import n_cores


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the work is done; nothing of it changes a byte of the store.

    Attributes:
        ray_address: Cluster to join; None is RAY_ADDRESS, or a private Ray in this machine.
        no_ray: Do everything in this process.
        workers: Teacher actors; None is one per GPU, or one per machine without GPUs.
        cpus_per_worker: Cores of each; None shares out what there is.
        depth: Shards in flight per worker; bounds its memory. None is 3 on a GPU, else 2.
        shard_timeout_s: A shard that takes longer loses its worker, seconds.
        join: Share the work with the jobs that are at work on the same store.
        max_error: Stop if rounding loses more than this relative MSE in any layer and kind; None for any loss.
        device: cpu, cuda or auto.
        dashboard: Whether a private Ray has its dashboard.
        verbose: Show what workers print.
    """

    ray_address: str | None = None
    no_ray: bool = False
    workers: int | None = None
    cpus_per_worker: int | None = None
    depth: int | None = None
    shard_timeout_s: float = 3600.0
    join: bool = False
    max_error: float | None = None
    device: str = "auto"
    dashboard: bool = True
    verbose: bool = False


def check_run(run: RunConfig, *, overwrite: bool = False) -> None:
    """Refuse ways of working that cannot be, all at once.

    Args:
        run: How the work is to be done.
        overwrite: Whether a store of another identity is to be deleted first.

    Raises:
        UserError: Lists every setting that is wrong, with what it may be.
    """
    problems = [
        f"{name.upper()}={value}: expected a number of at least 1"
        for name in ("workers", "cpus_per_worker", "depth", "shard_timeout_s")
        if (value := getattr(run, name)) is not None and value < 1
    ]
    if run.max_error is not None and not 0 <= run.max_error < float("inf"):
        problems.append(f"MAX_ERROR={run.max_error:g}: expected a relative MSE such as 1e-4, at least 0")
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", run.device) is None:
        problems.append(f"DEVICE={run.device}: expected cpu, cuda or auto")
    elif run.no_ray and run.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"DEVICE={run.device}: there is no CUDA device here; expected cpu or auto")
    if run.join and overwrite:
        problems.append("JOIN=1 with --overwrite: a store that is shared is never deleted; expected one of the two")
    if problems:
        raise UserError("\n  ".join(["these settings cannot be:", *problems]))


def n_threads(run: RunConfig) -> int:
    """Micro-batches in flight per worker on this machine."""
    return run.cpus_per_worker or n_cores()


@contextmanager
def ray_for(run: RunConfig) -> Iterator[None]:
    """Ray, joined or started, that can hold such workers; left or ended afterwards."""
    with connected(run.ray_address, dashboard=run.dashboard, verbose=run.verbose, say=say) as connection:
        say(str(connection))
        cpus, gpus = actor_resources(run)
        check_fits(num_cpus=cpus, num_gpus=gpus, connection=connection)
        yield


def actor_resources(run: RunConfig) -> tuple[int, float]:
    """CPUs and GPUs of one worker: a GPU each where there are any, and a fair share of the cores. Ray is connected."""
    n_cpus, n_gpus, n_nodes = _cluster(run)
    if n_gpus:
        return run.cpus_per_worker or max(1, min(16, n_cpus // n_gpus)), 1.0
    return run.cpus_per_worker or max(1, n_cpus // (run.workers or n_nodes)), 0.0


def n_actors(run: RunConfig) -> int:
    """Workers to ask for: as many as asked, else one per GPU, else one per node. Ray is connected."""
    _, n_gpus, n_nodes = _cluster(run)
    return run.workers or n_gpus or n_nodes


def _cluster(run: RunConfig) -> tuple[int, int, int]:
    """CPUs, GPUs that may be used, and nodes that can work."""
    import ray

    total = ray.cluster_resources()
    n_gpus = 0 if run.device == "cpu" else int(total.get("GPU", 0))
    n_nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1)
    return int(total.get("CPU", 1)), n_gpus, max(1, n_nodes)

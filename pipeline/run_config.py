"""How an extraction is done, checked: nothing of it changes a byte of the store."""

import re
from dataclasses import dataclass

from infra.console import UserError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the work is done; nothing of it changes a byte of the store.

    Attributes:
        ray_address: Cluster to join; None is RAY_ADDRESS, or a private Ray in this machine.
        no_ray: Do everything in this process.
        workers: Teacher actors; None is one per GPU, or one per machine without GPUs, counted again while machines
            come and go. A cluster that makes machines on demand makes as many as are asked for here.
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
    elif run.no_ray and run.device.startswith("cuda") and not _cuda_is_here():
        problems.append(f"DEVICE={run.device}: there is no CUDA device here; expected cpu or auto")
    if run.join and overwrite:
        problems.append("JOIN=1 with --overwrite: a store that is shared is never deleted; expected one of the two")
    if problems:
        raise UserError("\n  ".join(["these settings cannot be:", *problems]))


def _cuda_is_here() -> bool:
    import torch  # seconds of import that most checks need not pay

    return torch.cuda.is_available()

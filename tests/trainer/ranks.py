"""Several processes that train together, for tests: forked from one that has torch already, connected by gloo."""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tests.s3_servers import free_port
from trainer.workers import Workers

DEADLINE_S = 280
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.trainer.preload"])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one process ended.

    Attributes:
        value: What its work returned.
        error: Class name and message of what it raised; empty otherwise.
        exit_code: Negative where a signal killed it.
        after_s: Seconds until it ended.
    """

    value: Any
    error: str
    exit_code: int
    after_s: float


def start_process(work: Callable[..., None], *args: Any) -> BaseProcess:
    """A process of its own that does work(*args), to be killed; it has this one's AWS_ variables."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = _CONTEXT.Process(target=_alone, args=(environment, work, args), daemon=True)
    process.start()
    return process


def _alone(environment: dict[str, str], work: Callable[..., None], args: tuple) -> None:
    os.environ |= environment  # those of the process that it is forked from are older
    torch.set_num_threads(1)
    work(*args)


def run_ranks(n: int, work: Callable[..., Any], *args: Any) -> list[Outcome]:
    """work(workers, *args) in n processes, each one a worker; all must end before pytest thinks that the test hangs."""
    port = free_port()
    began = time.monotonic()
    pipes: list[Connection] = []
    processes = []
    for rank in range(n):
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(sender, rank, n, port, work, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    said: dict[int, tuple[Any, str]] = {}
    ended: dict[int, float] = {}
    try:
        while len(ended) < n and time.monotonic() - began < DEADLINE_S:
            for ready in wait([pipe for rank, pipe in enumerate(pipes) if rank not in ended], timeout=1):
                rank = next(rank for rank, pipe in enumerate(pipes) if pipe is ready)
                try:
                    said[rank] = pipes[rank].recv()
                except EOFError:
                    ended[rank] = time.monotonic() - began
        assert len(ended) == n, f"workers {sorted(set(range(n)) - set(ended))} hang; the others said {said}"
    finally:
        for process in processes:
            process.kill() if process.is_alive() and process.sentinel not in wait([process.sentinel], 1) else None
            process.join()
    return [
        Outcome(
            value=said.get(rank, (None, ""))[0],
            error=said.get(rank, (None, "died"))[1],
            exit_code=processes[rank].exitcode or 0,
            after_s=ended[rank],
        )
        for rank in range(n)
    ]


def _rank(sender: Connection, rank: int, n: int, port: int, work: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        workers = Workers.found()
        with workers.joined(torch.device("cpu")):
            found = (work(workers, *args), "")
    except Exception as error:  # noqa: BLE001 - told to the test
        found = (None, f"{type(error).__name__}: {error}")
    sender.send(found)
    sender.close()

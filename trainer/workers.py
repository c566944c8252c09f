"""Several processes that train one model together: who they are, and how they agree.

The same values come from torchrun and from Ray Train, which both set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
A process alone needs no process group, and all that is here then costs it nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from infra.console import JobError, UserError

# The first worker validates while the others wait for it. A worker that dies is noticed at once by its closed
# connections, and a machine that is lost by torchrun or Ray, which then end the others: this is for all else.
TIMEOUT = timedelta(hours=2)

P = ParamSpec("P")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MESSAGE_NBYTES = 4000


@dataclass(frozen=True, kw_only=True)
class Workers:
    """One of several processes that train together, as it sees them.

    Attributes:
        rank: This process, 0 to world_size - 1. The first one, rank 0, writes the RUN; the others write nothing.
        world_size: Processes in all.
        local_rank: This process among those of its machine.
        local_world_size: Processes on this machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size or not 0 <= self.rank < self.world_size:
            raise UserError(
                f"{self} cannot be: expected RANK below WORLD_SIZE and LOCAL_RANK below LOCAL_WORLD_SIZE, which "
                "torchrun sets. Unset all four to train in one process"
            )

    @classmethod
    def alone(cls) -> "Workers":
        """One process."""
        return cls(rank=0, world_size=1, local_rank=0, local_world_size=1)

    @classmethod
    def found(cls) -> "Workers":
        """As torchrun or Ray Train has set the environment; alone without them.

        Raises:
            UserError: The variables are no numbers, or do not fit together.
        """
        found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if len(found) < len(_VARIABLES):  # other programs set one or the other for purposes of their own
            return cls.alone()
        try:
            return cls(**{name.lower(): int(value) for name, value in found.items()})
        except ValueError as error:
            raise UserError(f"expected numbers, as torchrun sets them: {found}") from error

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def __str__(self) -> str:
        return f"worker {self.rank} of {self.world_size}"

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Be connected with the others; nothing to do alone, or where Ray Train has connected them already."""
        if self.is_alone or dist.is_initialized():
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what NCCL takes where it is not told
        dist.init_process_group(backend_for(device), timeout=TIMEOUT)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers, the same bits on each."""
        if not self.is_alone:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each over all workers."""
        if self.is_alone:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, data: bytes | None) -> bytes | None:
        """What the first worker has; what the others give is ignored."""
        if self.is_alone:
            return data
        n = torch.tensor([-1 if data is None else len(data)])
        dist.broadcast(n, 0)
        if n < 0:
            return None
        buffer = torch.empty(int(n), dtype=torch.uint8)
        if self.is_first:
            assert data is not None
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else buffer
        dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    def agree(self, *, wish: bool = False, error: Exception | None = None) -> bool:
        """Wait for the others, and learn whether one of them wishes something, or failed.

        Args:
            wish: Of this worker.
            error: What kept this worker from going on; it is raised here, and named by a JobError everywhere else.

        Returns:
            Whether anyone wishes it.

        Raises:
            JobError: Another worker failed.
        """
        if not self.is_alone:
            flags = torch.tensor([wish, error is not None], dtype=torch.int32)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            wish = bool(flags[0])
            if flags[1]:
                failed = [(rank, text) for rank, text in enumerate(self._messages(error)) if text]
                if error is None:
                    rank, text = failed[0]
                    raise JobError(f"worker {rank} of {self.world_size} stopped, and so do all: {text}")
        if error is not None:
            raise error
        return wish

    def all_do(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have every worker do something and wait for the others; if one fails, all raise."""
        error = None
        try:
            work(*args, **kwargs)
        except Exception as found:
            if self.is_alone:
                raise
            error = found  # raised by `agree`, once the others know
        self.agree(error=error)

    def first_does(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have the first worker do something while the others wait; if it fails, all raise."""
        if self.is_first:
            self.all_do(work, *args, **kwargs)
        else:
            self.agree()

    def _messages(self, error: Exception | None) -> list[str]:
        """What went wrong, worker by worker; empty where nothing did."""
        text = (
            "" if error is None else str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        )
        mine = torch.zeros(_MESSAGE_NBYTES, dtype=torch.uint8)
        encoded = text.encode()[:_MESSAGE_NBYTES]
        mine[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(every, mine)
        return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in every]


def backend_for(device: torch.device) -> str:
    """What connects workers on such devices: gradients go from GPU to GPU, all that is agreed on between the hosts."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

"""What a training runs on. It changes nothing that is learned beyond rounding: none of it is in a run's config."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from infra.console import UserError
from infra.machine import n_cores

# Below so many channels a CPU's second thread saves little, and where another process has a core it costs a lot: each
# small operation then ends in a barrier that waits for the slowest thread.
_DIM_FOR_THREADS = 256


def torch_threads(dim: int, n_processes: int = 1) -> int:
    """Threads for torch on a CPU: one for small blocks, else this process's share of the cores.

    Args:
        dim: Channels of the blocks.
        n_processes: Workers on this machine.
    """
    return max(1, n_cores() // n_processes) if dim >= _DIM_FOR_THREADS else 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to train.

    Attributes:
        device: Of model and batches.
        compile: Whether to compile the model, which pays after some hundred steps on a GPU.
        micro_batch: Most samples of one forward and backward pass; a worker's share of a batch that is larger is cut,
            and its gradients are summed. Takes less memory and gives the same up to rounding. None cuts nothing.
    """

    device: torch.device
    compile: bool
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"MICRO_BATCH={self.micro_batch}: expected 1 or more samples, or nothing to cut none")

    @classmethod
    def found(cls, device: str | None = None, *, micro_batch: int | None = None, local_rank: int = 0) -> "Machine":
        """The named device, else the GPU if there is one, else the CPU.

        Args:
            device: Its name; "cuda" is the GPU of this worker.
            micro_batch: Most samples at a time.
            local_rank: Of this worker among those of its machine: each has a GPU of its own.

        Raises:
            UserError: There is no such device here, or fewer GPUs than workers.
        """
        try:
            chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise UserError(f"DEVICE={device} is not a device: expected cpu, cuda or cuda:0") from error
        if chosen.type not in ("cpu", "cuda"):
            raise UserError(f"DEVICE={device}: training runs on cpu, cuda or cuda:0, not on {chosen.type}")
        n_gpus = torch.cuda.device_count()
        if chosen.type == "cuda" and (chosen.index or 0) >= n_gpus:
            raise UserError(f"DEVICE={device}: this machine has {n_gpus} usable GPUs; leave it out, or give cpu")
        if chosen.type == "cuda" and local_rank > 0:
            if chosen.index is not None:
                raise UserError(f"DEVICE={device} is one GPU, for several workers: give cuda, or leave it out")
            if local_rank >= n_gpus:
                raise UserError(
                    f"this machine has {n_gpus} usable GPUs, and more workers than that: start at most one for each, "
                    "or give DEVICE=cpu"
                )
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", local_rank)
        return cls(device=chosen, compile=chosen.type == "cuda", micro_batch=micro_batch)

    def autocast(self, precision: str) -> AbstractContextManager:
        """Products of the model in `precision` ("float32" or "bfloat16"); its residual stream stays float32."""
        return nullcontext() if precision == "float32" else torch.autocast(self.device.type, dtype=torch.bfloat16)

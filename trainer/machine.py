"""What a training runs on. It changes nothing that is learned beyond rounding: none of it is in a run's config."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from infra.console import UserError
from infra.machine import n_cores

# Below so many channels a CPU's second thread saves little, and where another process has a core it costs a lot: each
# small operation then ends in a barrier that waits for the slowest thread.
_DIM_FOR_THREADS = 256


def torch_threads(dim: int) -> int:
    """Threads for torch on a CPU: one for small blocks, else one per core."""
    return n_cores() if dim >= _DIM_FOR_THREADS else 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to train.

    Attributes:
        device: Of model and batches.
        compile: Whether to compile the model, which pays after some hundred steps on a GPU.
    """

    device: torch.device
    compile: bool

    @classmethod
    def found(cls, device: str | None = None) -> "Machine":
        """The named device, else the GPU if there is one, else the CPU.

        Raises:
            UserError: There is no such device here.
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
        return cls(device=chosen, compile=chosen.type == "cuda")

    def autocast(self, precision: str) -> AbstractContextManager:
        """Products of the model in `precision` ("float32" or "bfloat16"); its residual stream stays float32."""
        return nullcontext() if precision == "float32" else torch.autocast(self.device.type, dtype=torch.bfloat16)

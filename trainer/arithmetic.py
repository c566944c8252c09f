"""How much arithmetic a training step is, and how much a GPU could do in that time."""

import re

import torch

from trainer.config import TrainConfig

PEAK_FLOP_PER_S = {
    "H200": 989e12,
    "H100": 989e12,
    "A100 SXM4": 312e12,
    "A100 PCIE": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bfloat16 products per second, from the vendors' data sheets, by the device's name without maker and memory.

An H100 of another form (PCIe, NVL) or a part of one (MIG) has another peak, and other words in its name.
"""

_ASIDE = re.compile(r"NVIDIA|\d+GB|HBM3E?")


def block_flop(dim: int, n_tokens: int) -> float:
    """Floating-point operations of one forward call of a SwiGLU block for one sample, products only.

    5.14e9 for ViT-B/14: 32 T d^2 of the linear layers (4 + 8 + 4 times d^2, two operations each) and 4 T^2 d of
    attention.
    """
    return 32.0 * n_tokens * dim**2 + 4.0 * n_tokens**2 * dim


def n_block_calls(n_steps: int, forcing: float) -> int:
    """Forward calls of a block for one sample of a training step, as `trainer.objectives.annealed_loss` makes them.

    Args:
        n_steps: Of the span: its states but one.
        forcing: Weight of the teacher-forced loss; where both objectives are computed they share the first step.
    """
    return 2 * n_steps - 1 if 0.0 < forcing < 1.0 else n_steps


def training_flop(config: TrainConfig, dim: int, n_tokens: int, forcing: float) -> float:
    """Of one sample of one training step: forward once and backward twice."""
    return 3.0 * n_block_calls(config.span.n_states - 1, forcing) * block_flop(dim, n_tokens)


def stated_peak(device_name: str) -> float | None:
    """The peak of a GPU as its vendor states it; None where we do not know it."""
    words = re.split(r"[\s-]+", device_name.upper().strip())
    return PEAK_FLOP_PER_S.get(" ".join(word for word in words if not _ASIDE.fullmatch(word)))


def mfu(flop_per_s: float, device: torch.device, n_devices: int) -> float | None:
    """Share of the peak of so many GPUs that is used; None on a CPU, and where the peak is not known."""
    peak = stated_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else flop_per_s / (peak * n_devices)

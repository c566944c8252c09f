"""What the depth probe minimises: cross-entropy of bins and the scale-invariant error of depths."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from trainer.probes.depth_bins import NO_BIN

#: Share of a common factor that is forgiven.
SCALE_SHARE = 0.85
#: Weight of the scale-invariant error beside the cross-entropy.
SCALE_INVARIANT_WEIGHT = 10.0
_LOG_OFFSET_M = 1e-3


def scale_invariant_error(
    predicted: Float[Tensor, "batch height width"],
    depth: Float[Tensor, "batch height width"],
    known: Bool[Tensor, "batch height width"],
    *,
    log_offset: float = _LOG_OFFSET_M,
) -> Float[Tensor, ""]:
    """mean(g^2) - 0.85 mean(g)^2 of g = ln(predicted + offset) - ln(depth + offset) over the known pixels.

    0 without any. Pixels that are not known have no gradient, whatever they hold.

    Args:
        predicted: m.
        depth: m.
        known: Where depth means anything.
        log_offset: m; keeps the logarithm of a depth near 0 finite.

    Source: seeds.md 1.11.
    """
    one = torch.ones((), device=depth.device)
    logs = torch.log(torch.where(known, predicted, one) + log_offset)
    g = logs - torch.log(torch.where(known, depth, one) + log_offset)  # exactly 0 where not known
    g = torch.where(known, g, torch.zeros_like(g))
    n_known = known.sum().clamp(min=1)
    return (g * g).sum() / n_known - SCALE_SHARE * (g.sum() / n_known) ** 2


def bin_loss(
    logits: Float[Tensor, "batch bin rows columns"], bins: Int64[Tensor, "batch rows columns"], *, ignored: int = NO_BIN
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the cells whose bin is known; 0 without any.

    Args:
        logits: Scores of bins.
        bins: The right ones.
        ignored: What marks a cell without one. The published code marks such cells with 255, which is the last bin, and
            then ignores 256, which is nothing: 256 does the same.
    """
    total = functional.cross_entropy(logits.float(), bins, ignore_index=ignored, reduction="sum")
    return total / (bins != ignored).sum().clamp(min=1)

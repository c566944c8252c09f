"""Losses between predicted and true states of one layer: loss(pred, target) on (batch, token, dim).

All are means, computed in float32 at least, so that they do not depend on batch or image size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def mse(pred: Float[Tensor, "batch token dim"], target: Float[Tensor, "batch token dim"]) -> Float[Tensor, ""]:
    """Mean of squared differences over samples, tokens and channels."""
    pred, target = _comparable(pred, target)
    return torch.square(pred - target).mean()


def cosine(pred: Float[Tensor, "batch token dim"], target: Float[Tensor, "batch token dim"]) -> Float[Tensor, ""]:
    """Minus the mean cosine between the channel vectors of predicted and true tokens; -1 is perfect.

    The published code leaves out the minus, so that its cosine alone would be trained towards opposite vectors.
    """
    pred, target = _comparable(pred, target)
    return -F.cosine_similarity(pred, target, dim=-1).mean()


def mse_cosine(pred: Float[Tensor, "batch token dim"], target: Float[Tensor, "batch token dim"]) -> Float[Tensor, ""]:
    """Half of each: 0.5 mse - 0.5 mean cosine."""
    return 0.5 * mse(pred, target) + 0.5 * cosine(pred, target)


def token_weighted(
    *, cls: float | int, registers: float | int, patches: float | int, n_registers: int = 4, has_cls: bool = True
) -> "TokenWeighted":
    """A weighted sum of the mean squared errors of CLS, register and patch tokens.

    Args:
        cls: Weight of the CLS token's mean squared error. Published: 0.34 in stage 1, 0.45 in stage 2.
        registers: Of the registers' together. Published: 0.33 and 0.10.
        patches: Of the patches' together. Published: 0.33 and 0.45.
        n_registers: Registers of the teacher. 0: the term is left out and the other weights stay as given.
        has_cls: Whether the teacher has a CLS token; the same rule.

    Returns:
        loss(pred, target); a value that can be compared and pickled.

    Raises:
        ValueError: A weight or count is negative.
    """
    return TokenWeighted(
        cls=float(cls),
        registers=float(registers),
        patches=float(patches),
        n_registers=n_registers,
        has_cls=has_cls,
    )


@dataclass(frozen=True, kw_only=True)
class TokenWeighted:
    """The loss that `token_weighted` describes and returns."""

    cls: float
    registers: float
    patches: float
    n_registers: int
    has_cls: bool

    def __post_init__(self) -> None:
        for name in ("cls", "registers", "patches", "n_registers"):
            if getattr(self, name) < 0:
                raise ValueError(f"token_weighted: {name} is {getattr(self, name)}, expected 0 or more")

    def __call__(
        self, pred: Float[Tensor, "batch token dim"], target: Float[Tensor, "batch token dim"]
    ) -> Float[Tensor, ""]:
        """Weighted loss.

        Raises:
            ValueError: There is no patch token behind the CLS and register tokens.
        """
        first_register = int(self.has_cls)
        first_patch = first_register + self.n_registers
        if pred.shape[1] <= first_patch:
            raise ValueError(
                f"token_weighted expects {first_register} CLS, {self.n_registers} register and some patch tokens, "
                f"but the states have {pred.shape[1]} tokens: set n_registers and has_cls to the teacher's"
            )
        kinds = [
            (self.cls, slice(0, first_register)),
            (self.registers, slice(first_register, first_patch)),
            (self.patches, slice(first_patch, None)),
        ]
        terms = [
            weight * mse(pred[:, tokens], target[:, tokens]) for weight, tokens in kinds if tokens.stop != tokens.start
        ]
        return torch.stack(terms).sum()


def _comparable(
    pred: Float[Tensor, "batch token dim"], target: Float[Tensor, "batch token dim"]
) -> tuple[Float[Tensor, "batch token dim"], Float[Tensor, "batch token dim"]]:
    """Both in one precision, float32 at least; never broadcast."""
    if pred.shape != target.shape:
        raise ValueError(
            f"pred has shape {tuple(pred.shape)}, target {tuple(target.shape)}: a loss compares equal shapes"
        )
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    return pred.to(dtype), target.to(dtype)

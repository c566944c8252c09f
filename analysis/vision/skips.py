"""What a block does without its skip connections: f2(f1(x)) in the place of x + f1(x), and so on.

Raghu et al. 2021 train ViTs so (figure 8): layers before the block and after it then have little in common. Here
`WithoutSkips` is such a block, for training too, and `ablate_skips` takes them from a trained model, block by block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from analysis.accumulate import finite_mean
from analysis.similarity import minibatch_cka
from infra.console import UserError
from pipeline.teacher import Teacher

_ROWS_AT_ONCE = 16  # that run together: states of all layers are held of them
_NEEDED = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")


class WithoutSkips(nn.Module):
    """A timm block's own layers, one after the other, with nothing carried past them.

    Raises:
        UserError: A block of another kind.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        if lacking := [name for name in _NEEDED if not isinstance(getattr(block, name, None), nn.Module)]:
            raise UserError(f"skips cannot be taken from a {type(block).__name__}: it has no {', '.join(lacking)}")
        self.block = block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block: Any = self.block
        x = block.ls1(block.attn(block.norm1(x), *args, **kwargs))
        return block.ls2(block.mlp(block.norm2(x)))


def crossing_cka(cka: Float64[np.ndarray, "state state"], block: int) -> float:
    """Mean CKA between the states before a block (from 0) and those after it; state 0 left out where there is another,
    as CLS is the same there for all images. NaN where no pair has a CKA."""
    return finite_mean(cka[min(1, block) : block + 1, block + 1 :])


@dataclass(frozen=True, kw_only=True)
class SkipAblation:
    """A model with the skips of one block taken away, for each block in turn, and whole.

    Attributes:
        cka: Between the states of the model so changed: (block, state, state).
        clean_cka: Of the whole model.
        accuracy: Of its own head; None where it has none or no image has a label.
        clean_accuracy: Of the whole model.
        n_images: How many.
    """

    cka: Float64[np.ndarray, "block state state"]
    clean_cka: Float64[np.ndarray, "state state"]
    accuracy: Float64[np.ndarray, " block"] | None
    clean_accuracy: float | None
    n_images: int

    def crossing(self) -> tuple[Float64[np.ndarray, " block"], Float64[np.ndarray, " block"]]:
        """Mean CKA across each block, without its skips and with them."""
        blocks = range(len(self.cka))
        without = [crossing_cka(self.cka[block], block) for block in blocks]
        return np.array(without), np.array([crossing_cka(self.clean_cka, block) for block in blocks])


@torch.no_grad()
def ablate_skips(
    teacher: Teacher,
    x: Float[Tensor, "row token dim"],
    labels: Int64[np.ndarray, " row"],
    kinds: Mapping[str, slice],
    *,
    batch_rows: int = 128,
    progress: Callable[[int], None] | None = None,
) -> SkipAblation:
    """Run a model from state 0 as it is, and with the skips of each block taken away. Nothing is trained again.

    CKA is that of the means of each kind of tokens, joined; minibatches of `batch_rows`.

    Args:
        teacher: Of timm's ordinary blocks.
        x: State 0.
        labels: -1 for none.
        kinds: Tokens whose means are compared.
        batch_rows: Images at a time.
        progress: Told 1 after each model.

    Raises:
        UserError: Blocks of another kind.
    """
    has_head = teacher.head is not None and bool((labels >= 0).any())

    def look(without: int | None) -> tuple[np.ndarray, float]:
        seen, right = [], []
        for part, named in zip(x.split(_ROWS_AT_ONCE), torch.from_numpy(labels).split(_ROWS_AT_ONCE)):
            states = _states(teacher, part.to(teacher.device), without)
            means = [[state[:, tokens].mean(dim=1) for tokens in kinds.values()] for state in states]
            seen.append(torch.stack([torch.cat(one, dim=-1) for one in means], dim=1).cpu().numpy())
            if has_head:
                right.append((teacher.logits(states[-1]).argmax(dim=1).cpu() == named)[named >= 0].numpy())
        if progress is not None:
            progress(1)
        cka = minibatch_cka(np.concatenate(seen), batch_rows=batch_rows).values
        return cka, float(np.concatenate(right).mean()) if has_head else float("nan")

    clean, clean_accuracy = look(None)
    found = [look(block) for block in range(teacher.n_layers - 1)]
    return SkipAblation(
        cka=np.stack([cka for cka, _ in found]),
        clean_cka=clean,
        accuracy=np.array([accuracy for _, accuracy in found]) if has_head else None,
        clean_accuracy=clean_accuracy if has_head else None,
        n_images=len(x),
    )


def _states(teacher: Teacher, x: Tensor, without: int | None) -> list[Tensor]:
    states = [x]
    for block in range(teacher.n_layers - 1):
        if block == without:
            states.append(WithoutSkips(teacher.model.blocks[block])(states[-1]).float())
        else:
            states.append(teacher.run_blocks(states[-1], block, block + 1))
    return states

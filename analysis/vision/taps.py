"""Every sub-layer of a ViT: seven states of each block, between the embedded sequence and the final norm.

Raghu et al. 2021 compare the outputs of all sub-layers, not of blocks alone. Hooks take them, so that a timm block of
any attention or MLP is read, as long as it is norm, attention, sum, norm, MLP, sum.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analysis.similarity import CkaAccumulator
from infra.console import UserError
from pipeline.teacher import Teacher

#: Of a block, in the order in which they are made. Branches as they are added, LayerScale included; "hidden" is what
#: the MLP's last product reads.
PARTS = ("norm1", "attention", "sum1", "norm2", "hidden", "mlp", "sum2")

_GROUP_NBYTES = 64 * 2**20  # of float64 features that are centred at a time


def tap_names(n_blocks: int) -> list[str]:
    """Of all sub-layers, in order: the embedded sequence, seven of each block, the final norm."""
    blocks = [f"block {block} {part}" for block in range(1, n_blocks + 1) for part in PARTS]
    return ["embedded", *blocks, "final norm"]


@contextmanager
def tapped(block: Any) -> Iterator[dict[str, Float[Tensor, "row token dim"]]]:
    """What a block's sub-layers give while it runs, by the names of PARTS.

    Raises:
        UserError: A block of another kind; on entering if it lacks a part, on leaving if they ran in another order.
    """
    found: dict[str, Tensor] = {}
    modules: dict[str, Any] = {
        name: getattr(block, name, None) for name in ("norm1", "drop_path1", "norm2", "drop_path2")
    }
    last_product: Any = getattr(getattr(block, "mlp", None), "fc2", None)
    lacking = [name for name, module in [*modules.items(), ("mlp.fc2", last_product)] if module is None]
    if lacking:
        raise UserError(f"sub-layers cannot be read of a {type(block).__name__}: it has no {', '.join(lacking)}")

    def output(name: str) -> Callable[..., None]:
        return lambda module, args, result: found.__setitem__(name, result)

    def entry(name: str) -> Callable[..., None]:
        return lambda module, args: found.__setitem__(name, args[0])

    hooks = [
        modules["norm1"].register_forward_hook(output("norm1")),
        modules["drop_path1"].register_forward_hook(output("attention")),
        modules["norm2"].register_forward_pre_hook(entry("sum1")),
        modules["norm2"].register_forward_hook(output("norm2")),
        last_product.register_forward_pre_hook(entry("hidden")),
        modules["drop_path2"].register_forward_hook(output("mlp")),
        block.register_forward_hook(output("sum2")),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if tuple(found) != PARTS:
        raise UserError(f"a {type(block).__name__} runs {', '.join(found)}; expected {', '.join(PARTS)}")


def token_kernel(x: Float[np.ndarray, "row token dim"]) -> tuple[Float64[np.ndarray, "row row"], float]:
    """X X' of all tokens as one representation, centred over rows, in float64; and the sum of squares before that.

    Tokens are taken a few at a time: 8 row dim bytes of each.
    """
    n, n_tokens, dim = x.shape
    kernel, square = np.zeros((n, n)), 0.0
    at_once = max(1, _GROUP_NBYTES // (8 * n * dim))
    for start in range(0, n_tokens, at_once):
        wide = x[:, start : start + at_once].reshape(n, -1).astype(np.float64)
        square += float(np.einsum("rd,rd->", wide, wide))
        wide -= wide.mean(axis=0)
        kernel += wide @ wide.T
    return kernel, square


def update_sub_layers(
    sums: CkaAccumulator,
    teacher: Teacher,
    x: Float[Tensor, "row token dim"],
    *,
    rows_at_once: int = 16,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Count one minibatch of CKA between all sub-layers, each of all tokens flattened.

    Memory: 4 row token (7 dim + hidden) bytes for the sub-layers of a block, 1.1 GB for 128 rows of ViT-B/14, beside
    the kernels, 8 sub-layers row^2.

    Args:
        sums: Of as many layers as `tap_names`.
        teacher: Of blocks that can be tapped.
        x: State 0.
        rows_at_once: That run together.
        progress: Told 1 after each block.

    Raises:
        UserError: As `tapped`.
    """
    names = tap_names(teacher.n_layers - 1)
    kernels, squares = np.empty((len(names), len(x), len(x))), np.empty(len(names))

    def keep(i: int, states: np.ndarray) -> None:
        kernels[i], squares[i] = token_kernel(states)

    keep(0, x.cpu().numpy())
    for block in range(teacher.n_layers - 1):
        parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for start in range(0, len(x), rows_at_once):
            with torch.no_grad(), tapped(teacher.model.blocks[block]) as found:
                teacher.run_blocks(x[start : start + rows_at_once].to(teacher.device), block, block + 1)
            for part, state in found.items():
                parts[part].append(state.float().cpu())
        for i, part in enumerate(PARTS):
            joined = torch.cat(parts.pop(part))
            keep(1 + block * len(PARTS) + i, joined.numpy())
        x = joined
        if progress is not None:
            progress(1)
    keep(len(names) - 1, torch.cat([teacher.final_norm(one.to(teacher.device)).cpu() for one in x.split(16)]).numpy())
    sums.update_kernels(kernels, squares)

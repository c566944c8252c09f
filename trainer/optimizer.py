"""AdamW as the published runs use it, and one clipped step of it."""

import inspect
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LightAdamW(torch.optim.AdamW):
    """torch's AdamW, by the same code, without torch's compiler.

    torch wraps these methods so that its compiler, where it meets them in what it compiles, leaves them alone; making
    or stepping any optimizer therefore imports it: 2.4 s of CPU and 860 modules, in every process that trains. We
    compile blocks and never a step, so what is wrapped is taken as it is.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-4,
    decay_matrices_only: bool = False,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.999, eps 1e-8.

    Args:
        model: Every parameter of it that asks for a gradient is trained.
        learning_rate: Start value; the loop sets it before each step.
        weight_decay: Decoupled decay per step and unit of learning rate.
        decay_matrices_only: False decays every parameter, as the published runs do: norms, biases, LayerScale and depth
            MLP too. True decays only what has two axes or more, and not the depth MLP, whose weights are scales too.
        fused: One kernel for all parameters. None picks it on GPUs and CPUs; on a CPU it takes a quarter of the time
            of one kernel per parameter and operation for a block of 768 channels, a seventh for one of 64.

    Source: seeds.md 1.8.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if fused is None:
        fused = bool(named) and all(p.device.type in ("cuda", "cpu") for _, p in named)
    groups: list[dict] = [{"params": [p for _, p in named], "weight_decay": weight_decay}]
    if decay_matrices_only:
        decayed = {name for name, p in named if p.ndim >= 2 and "depth" not in name.split(".")}
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
    return LightAdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float = 1.0) -> Float[Tensor, ""]:
    """Scale the gradients down to a global norm of at most max_norm, then take one step.

    Gradients below max_norm are left as they are. Does not wait for the device.

    Returns:
        The global norm before clipping.
    """
    norm = nn.utils.clip_grad_norm_(_parameters(optimizer), max_norm)
    optimizer.step()
    return norm


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]

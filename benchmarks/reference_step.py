"""A training step in the published style, written anew from seeds.md 1.5, 1.7 and 1.13, to be compared with ours.

What makes it slow is kept: attention that also computes its weights, float32 throughout, teacher-forced transitions in
one flattened batch beside a full roll-out, one kernel per parameter in the optimizer's step, `.item()` after each step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceBlock(nn.Module):
    """The published block with SwiGLU and depth scaling; parameter names as in published checkpoints."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, n_heads, batch_first=True)
        self.ls1, self.ls2 = _Scale(dim), _Scale(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 8 * dim), _Gate(), nn.Linear(4 * dim, dim))
        scales = nn.Linear(16, 3 * dim)
        nn.init.normal_(scales.weight, std=1e-4)
        nn.init.normal_(scales.bias, std=1e-4)
        self.t_proj = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), scales)

    def forward(self, x: Tensor, layer: Tensor) -> Tensor:
        s1, s2, s3 = (self.t_proj(layer[:, None]) + 1).unsqueeze(1).chunk(3, dim=-1)
        y = self.norm1(x)
        x = x + s1 * self.ls1(self.attn(y, y, y)[0])
        x = x + s2 * self.ls2(self.mlp(self.norm2(x)))
        return s3 * x


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class _Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def make_reference_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as published, with torch's default implementation."""
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-4)


def reference_loss(model: nn.Module, states: Tensor, start: int, teacher_forcing: float) -> Tensor:
    """teacher_forcing * one-step prediction + (1 - teacher_forcing) * roll-out, mean squared errors."""
    n_samples, n_steps = states.shape[0], states.shape[1] - 1
    layers = torch.arange(start + 1, start + n_steps + 1, dtype=torch.float32, device=states.device)
    rolled = torch.zeros((), device=states.device)
    x = states[:, 0]
    for step in range(n_steps):
        x = model(x, layers[step].expand(n_samples))
        rolled = rolled + F.mse_loss(x, states[:, step + 1]) / n_steps
    if teacher_forcing == 0:
        return rolled
    predicted = model(states[:, :-1].flatten(0, 1), layers.repeat(n_samples))
    forced = F.mse_loss(predicted, states[:, 1:].flatten(0, 1))
    return teacher_forcing * forced + (1 - teacher_forcing) * rolled


def reference_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, states: Tensor, start: int, teacher_forcing: float
) -> float:
    """One step: loss, gradients clipped to norm 1, AdamW; waits for the device to read the loss."""
    loss = reference_loss(model, states, start, teacher_forcing)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

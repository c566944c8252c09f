"""The positional attention whose training Jelassi et al. analyse, and its gradient descent with the score of its sets.

F(X) = sum_i phi(g sum_j S_ij <v, X_j>), phi(z) = z^p + nu z, S = softmax of each row of A. A stands for PᵀP: it is a
free D x D matrix whose diagonal is held fixed; v is one value vector. The loss is mean log(1 + exp(-y F)).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch.nn.functional import softplus

from analysis.positions.maps import Association, association
from analysis.positions.planted import Drawn


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How the model is trained: full-batch gradient descent.

    Attributes:
        n_steps: Of gradient descent.
        rate: Learning rate.
        attention_rate: Times this for A, whose gradient has a factor S_ij, about 1 / D, before it.
        power: p of phi, odd, 3 or more.
        linear: nu of phi.
        gain: g; D in the theory.
        scale: Of the first values of v and of A beside its diagonal.
        diagonal: Of A; None is log log d of the theory.
        learns_attention: Without, A stays as it is given.
        every: Steps between two measurements.
    """

    n_steps: int = 2000
    rate: float = 0.1
    attention_rate: float = 1.0
    power: int = 3
    linear: float = 0.03
    gain: float = 1.0
    scale: float = 1e-3
    diagonal: float | None = None
    learns_attention: bool = True
    every: int = 50


@dataclass(frozen=True, kw_only=True)
class Course:
    """What became of a training.

    Attributes:
        steps: When it was measured: 0, each `every`, and the end.
        error: Share of the test samples with another sign than y; sign 0 counts as wrong.
        alignment: |cos(v, w*)|.
        associations: Of A, at each; empty where no sets were given.
        attention: A at the end; its rows' softmax is S.
        values: v at the end.
    """

    steps: Sequence[int]
    error: Float64[np.ndarray, " measurement"]
    alignment: Float64[np.ndarray, " measurement"]
    associations: Sequence[Association]
    attention: Float64[np.ndarray, "patch patch"]
    values: Float64[np.ndarray, " dim"]


def outputs(
    x: Float[torch.Tensor, "sample patch dim"],
    attention: Float[torch.Tensor, "patch patch"],
    values: Float[torch.Tensor, " dim"],
    descent: Descent,
) -> Float[torch.Tensor, " sample"]:
    """F(X) of each sample."""
    mixed = descent.gain * (x @ values) @ attention.softmax(dim=1).T
    return (mixed**descent.power + descent.linear * mixed).sum(dim=1)


def train_simple(
    train: Drawn,
    test: Drawn,
    descent: Descent,
    *,
    seed: int,
    sets: Sequence[int] | None = None,
    attention: Float[np.ndarray, "patch patch"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Course:
    """Train on all samples at every step, from a small random v and A.

    Args:
        train: Samples; memory is theirs and as much again.
        test: Others, for the error.
        descent: How.
        seed: Of the first v and A.
        sets: For the association score; the model does not see it.
        attention: A to begin with, its diagonal held as it is; None draws one.
        progress: Told the number of steps done since it was last told.

    Raises:
        ValueError: The training diverged.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(train.x), torch.from_numpy(train.y)
    n_patches, dim = x.shape[1:]
    v = (descent.scale * torch.randn(dim, generator=generator)).requires_grad_()
    a = _first_attention(descent, n_patches, dim, generator, attention).requires_grad_(descent.learns_attention)
    kept = a.detach().diagonal().clone()
    learned = [v, a] if descent.learns_attention else [v]
    steps: list[int] = []
    errors: list[float] = []
    alignments: list[float] = []
    scores: list[Association] = []

    def measure(step: int) -> None:
        steps.append(step)
        errors.append(error_of(test, a, v, descent))
        found = v.detach().double().numpy()
        alignments.append(abs(float(found @ test.direction)) / max(float(np.linalg.norm(found)), 1e-30))
        if sets is not None:
            scores.append(association(a.detach().double().numpy(), np.asarray(sets)))

    measure(0)
    for step in range(1, descent.n_steps + 1):
        loss = softplus(-y * outputs(x, a, v, descent)).mean()
        gradients = torch.autograd.grad(loss, learned)
        with torch.no_grad():
            for one, gradient, times in zip(learned, gradients, (1.0, descent.attention_rate)):
                one -= descent.rate * times * gradient
            a.diagonal().copy_(kept)
        if step % descent.every == 0 or step == descent.n_steps:
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is {loss.item()} at step {step} with rate {descent.rate:g}: it diverged")
            measure(step)
            if progress is not None:
                progress(step - steps[-2])
    return Course(
        steps=steps,
        error=np.array(errors),
        alignment=np.array(alignments),
        associations=scores,
        attention=a.detach().double().numpy(),
        values=v.detach().double().numpy(),
    )


@torch.no_grad()
def error_of(samples: Drawn, attention: torch.Tensor, values: torch.Tensor, descent: Descent) -> float:
    """Share of samples on whose wrong side, or on neither, F lies."""
    found = outputs(torch.from_numpy(samples.x), attention, values, descent)
    return float((found * torch.from_numpy(samples.y) <= 0).double().mean())


def _first_attention(
    descent: Descent,
    n_patches: int,
    dim: int,
    generator: torch.Generator,
    given: Float[np.ndarray, "patch patch"] | None,
) -> Float32[torch.Tensor, "patch patch"]:
    if given is not None:
        return torch.from_numpy(np.asarray(given, dtype=np.float32).copy())
    drawn = descent.scale * torch.randn(n_patches, n_patches, generator=generator)
    level = math.log(max(math.log(max(dim, 3)), 1.0)) if descent.diagonal is None else descent.diagonal
    return drawn.fill_diagonal_(level)

"""What a block or a Raptor is trained for: one-step prediction, roll-out, and the mix that goes from one to the other.

Every objective asks for model(x, layer) with an integer layer, one step of one batch at a time: nothing waits for the
device, a compiled model sees one shape only, and a Raptor needs no routing on the device.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.losses import Loss
from trainer.raptor import LayerModel

States = Float[Tensor, "batch layer token dim"]

Draws = torch.Generator | Sequence[torch.Generator] | None
"""What noise is drawn from: one generator for the batch, one for each sample, or torch's global one."""


def teacher_forced_loss(
    model: LayerModel,
    states: States,
    start: int,
    loss: Loss,
    noise: float | int = 0.0,
    generator: Draws = None,
) -> Float[Tensor, ""]:
    """Mean loss of predicting each state from the teacher's true one before it.

    Args:
        model: Block, Raptor, or any model(x, layer).
        states: The teacher's, beginning at layer `start`; two layers at least. Not changed.
        start: Layer of states[:, 0].
        loss: loss(pred, target) on (batch, token, dim); a mean over samples.
        noise: Standard deviation of the Gaussian noise added to every input; 0 adds none at all.
        generator: Draws the noise, on the device of states; with one for each sample, a sample's noise is the same
            whatever else is in the batch. None is torch's global one.

    Raises:
        ValueError: Fewer than two layers, or a negative noise.

    Source: seeds.md 1.7, "TF pass". The published code predicts all steps in one flattened batch, which gives the same
    number and works for a single block only.
    """
    return _mean(_teacher_forced_terms(model, states, start, loss, _Noise(noise, generator)))


def rollout_loss(
    model: LayerModel,
    states: States,
    start: int,
    loss: Loss,
    noise: float | int = 0.0,
    generator: Draws = None,
) -> Float[Tensor, ""]:
    """Mean loss of all states that the model predicts from its own predictions, beginning at the teacher's first.

    Gradients run through the whole roll-out. Arguments and errors as for `teacher_forced_loss`.

    Source: seeds.md 1.7, "AR pass".
    """
    return _mean(_rollout_terms(model, states, start, loss, _Noise(noise, generator)))


def annealed_loss(
    model: LayerModel,
    states: States,
    start: int,
    loss: Loss,
    teacher_forcing: float | int,
    noise: float | int = 0.0,
    generator: Draws = None,
) -> Float[Tensor, ""]:
    """teacher_forcing * teacher-forced loss + (1 - teacher_forcing) * roll-out loss.

    The first step is the same in both and is computed once, so that a span of 7 steps costs 13 block calls, not 14;
    with noise, the two share the first step's draw. At 1 and at 0 only the one objective is computed.

    Args:
        teacher_forcing: In [0, 1]; from `trainer.schedules.teacher_forcing_ratio`. The others as for
            `teacher_forced_loss`.

    Raises:
        ValueError: teacher_forcing lies outside [0, 1]; and as for `teacher_forced_loss`.

    Source: seeds.md 1.7, "--teacher_force".
    """
    if not 0.0 <= teacher_forcing <= 1.0:
        raise ValueError(f"teacher_forcing is {teacher_forcing}, expected a weight from 0 to 1")
    if teacher_forcing == 1.0:
        return teacher_forced_loss(model, states, start, loss, noise, generator)
    if teacher_forcing == 0.0:
        return rollout_loss(model, states, start, loss, noise, generator)
    draw = _Noise(noise, generator)
    rolled = list(_rollout_terms(model, states, start, loss, draw))
    forced = [rolled[0], *_teacher_forced_terms(model, states, start, loss, draw, first_step=1)]
    return teacher_forcing * _mean(forced) + (1.0 - teacher_forcing) * _mean(rolled)


def brh_error(
    predicted: Float[Tensor, "batch layer token dim"], states: Float[Tensor, "batch layer token dim"]
) -> Float[Tensor, " layer"]:
    """How far a block-recurrent model is from its teacher, layer by layer: the measured epsilon of an epsilon-BRH.

    Args:
        predicted: A roll-out, its first state included.
        states: The teacher's states of the same layers.

    Returns:
        Mean over samples of the Frobenius norm (not squared) of the difference of the (token, dim) matrices, in units
        of the states; float32 at least. 0 for the first layer of a roll-out, by construction.

    Source: seeds.md 1.1; the published code never measures it.
    """
    if predicted.shape != states.shape:
        raise ValueError(
            f"predicted has shape {tuple(predicted.shape)}, states {tuple(states.shape)}: expected equal shapes"
        )
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, states.dtype), torch.float32)
    return torch.linalg.vector_norm(predicted.to(dtype) - states.to(dtype), dim=(2, 3)).mean(dim=0)


class _Noise:
    """Gaussian noise on a model's input. Standard deviation 0 hands the input through and draws nothing."""

    def __init__(self, std: float | int, generator: Draws) -> None:
        if std < 0:
            raise ValueError(f"noise is {std}, expected a standard deviation of 0 or more")
        self.std = std
        self.generator = generator

    def __call__(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        if self.std == 0:
            return x
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return x + self.std * torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
        if len(self.generator) != len(x):
            raise ValueError(f"{len(self.generator)} generators for {len(x)} samples: give one for each")
        each = [torch.randn(x.shape[1:], generator=g, device=x.device, dtype=x.dtype) for g in self.generator]
        return x + self.std * torch.stack(each)


def _teacher_forced_terms(
    model: LayerModel, states: States, start: int, loss: Loss, noise: _Noise, first_step: int = 0
) -> Iterator[Float[Tensor, ""]]:
    for step in range(first_step, _n_steps(states)):
        predicted = model(noise(states[:, step]), start + step + 1)
        yield loss(predicted, states[:, step + 1])


def _rollout_terms(
    model: LayerModel, states: States, start: int, loss: Loss, noise: _Noise
) -> Iterator[Float[Tensor, ""]]:
    x = states[:, 0]
    for step in range(_n_steps(states)):
        x = model(noise(x), start + step + 1)
        yield loss(x, states[:, step + 1])


def _n_steps(states: States) -> int:
    if states.shape[1] < 2:
        raise ValueError(
            f"states hold {states.shape[1]} layer: a step needs two, the one it takes and the one it predicts"
        )
    return states.shape[1] - 1


def _mean(terms: Iterator[Tensor] | list[Tensor]) -> Float[Tensor, ""]:
    return torch.stack(list(terms)).mean()

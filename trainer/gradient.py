"""The gradient of a whole batch, whatever parts it is computed in and however many workers share it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer import losses
from trainer.block import Block
from trainer.config import TrainConfig
from trainer.feed import Share
from trainer.machine import Machine
from trainer.objectives import annealed_loss
from trainer.optimizer import clip_and_step
from trainer.order import random64
from trainer.raptor import Raptor
from trainer.workers import Workers

_INT64_MAX = 2**63 - 1


class Gradient:
    """Adds the gradient of a batch to the parameters of a model.

    Every sample weighs 1 / config.batch_size, so the last batch of a pass, if it is smaller, weighs less; and so a
    batch has one gradient, up to rounding, for any number of workers, with unequal shares or none, and for any
    `machine.micro_batch`. Noise follows the same rule: a sample's noise depends on the run, the step and the sample.
    """

    def __init__(
        self, model: Block | Raptor, config: TrainConfig, loss: losses.Loss, machine: Machine, workers: Workers
    ) -> None:
        """Connect the model's parameters; those of the first worker become those of all."""
        self._config, self._machine, self._workers = config, machine, workers
        self.clip_norm = config.clip_norm
        self._objective: nn.Module = _Objective(_compiled(model) if machine.compile else model, config, loss)
        if not workers.is_alone:
            if machine.compile:
                # Tied weights are complete only at the end of a backward pass, so there is nothing to gain from graphs
                # that are cut where gradients could be sent early.
                torch._dynamo.config.optimize_ddp = False
            self._objective = DistributedDataParallel(self._objective, gradient_as_bucket_view=True)

    def __enter__(self) -> "Gradient":
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the other workers; to be done before the process group is destroyed.

        DDP's reducer holds the group too, and an exception's frames hold DDP. If the reducer were the last to go, it
        would end the group's threads with Python's lock in hand, and a thread that waits for that lock to drop a tensor
        would never end: the process would hang where it should say what went wrong.
        """
        if isinstance(self._objective, DistributedDataParallel):
            vars(self._objective).pop("logger")
            vars(self._objective).pop("reducer")

    def add(self, share: Share, forcing: float, noise_key: int) -> Float[Tensor, ""]:
        """Add the gradient; for all workers together.

        Args:
            share: This worker's samples.
            forcing: Weight of the teacher-forced loss.
            noise_key: Of this step's noise, the same on all workers.

        Returns:
            This share's part of the batch's mean loss; the workers' parts add up to it. On the device.
        """
        parts = list(share.parts(self._machine.micro_batch))
        total = torch.zeros((), device=self._machine.device)
        for number, part in enumerate(parts, 1):
            draws = self._draws(noise_key, part.sample_index)
            with self._sending(number == len(parts)):
                with self._machine.autocast(self._config.precision):
                    loss = self._objective(part.states, forcing, draws)
                # DDP sends means over workers, and a batch wants the sum
                (loss * (len(part) * self._workers.world_size / self._config.batch_size)).backward()
            total += loss.detach() * (len(part) / share.n_batch)
        return total

    def _sending(self, last: bool) -> AbstractContextManager:
        """Gradients go to the other workers once per step, with the last part."""
        if isinstance(self._objective, DistributedDataParallel) and not last:
            return self._objective.no_sync()
        return nullcontext()

    def _draws(self, key: int, sample_index: Int64[np.ndarray, " sample"]) -> list[torch.Generator]:
        if not self._config.noise:
            return []
        seeds = random64(key, sample_index) & np.uint64(_INT64_MAX)
        return [torch.Generator(self._machine.device).manual_seed(int(seed)) for seed in seeds]


def take_step(
    gradient: Gradient, optimizer: torch.optim.Optimizer, share: Share, forcing: float, noise_key: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """One step of training: gradient of the batch, clipping, AdamW. For all workers together.

    Args:
        gradient: Of the model that is trained.
        optimizer: Of its parameters, at the learning rate of this step.
        share: This worker's samples.
        forcing: Weight of the teacher-forced loss.
        noise_key: Of this step's noise, the same on all workers.

    Returns:
        This share's part of the batch's mean loss, and the norm of the whole gradient before clipping. On the device.
    """
    loss = gradient.add(share, forcing, noise_key)
    norm = clip_and_step(optimizer, gradient.clip_norm)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


class _Objective(nn.Module):
    """The loss as a module, so that a step is one forward pass for DDP although blocks are used many times in it."""

    def __init__(self, model: Block | Raptor, config: TrainConfig, loss: losses.Loss) -> None:
        super().__init__()
        self.model, self._start, self._noise, self._loss = model, config.span.start, config.noise, loss

    def forward(
        self,
        states: Float[Tensor, "sample state token dim"],
        forcing: float | int,
        draws: Sequence[torch.Generator],
    ) -> Float[Tensor, ""]:
        if len(states) == 0:  # zero, with a gradient of zeros: the other workers wait for one
            return torch.stack([0.0 * parameter.sum() for parameter in self.parameters()]).sum()
        return annealed_loss(self.model, states, self._start, self._loss, forcing, self._noise, draws)


def _compiled(model: Block | Raptor) -> Block | Raptor:
    """Compiled block by block, as routing is a matter of Python."""
    if isinstance(model, Block):
        return cast("Block", torch.compile(model))
    blocks = [cast("nn.Module", torch.compile(block)) for block in model.blocks]
    return Raptor(blocks, model.spans)

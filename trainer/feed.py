"""The training samples, pass after pass, as states on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from infra.console import Progress
from storage_schemas import Store
from trainer.config import TrainConfig
from trainer.machine import Machine
from trainer.stream import LayerSliceStream


class Feed:
    """Passes over the training samples, one after another, as states on the device."""

    def __init__(self, store: Store, config: TrainConfig, machine: Machine) -> None:
        self._stream = LayerSliceStream(
            store,
            config.span,
            batch_size=config.batch_size,
            seed=config.seed,
            lanes=config.lanes,
            partial=True,  # which samples take part was settled when the store was opened
        )
        self._config, self._device = config, machine.device
        self._memory: Tensor | None = None

    def progress(self, n_steps_done: int) -> Progress:
        """A progress bar over the samples of the whole run."""

        def samples_after(n_steps: int) -> int:  # the last batch of a pass may be short
            n_passes, rest = divmod(n_steps, len(self._stream))
            return n_passes * self._stream.n_samples + min(rest * self._config.batch_size, self._stream.n_samples)

        return Progress(
            total=samples_after(self._config.n_steps),
            unit="samples",
            label=f"train {self._config.span}",
            done=samples_after(n_steps_done),
        )

    @property
    def waited_s(self) -> float:
        """Seconds that the loop has waited for samples."""
        return self._stream.waited_s

    def next_states(self) -> Float[Tensor, "batch state token dim"]:
        """The next batch. On a CPU its memory is used again for the one after."""
        batch = next(self._stream, None)
        if batch is None:
            self._stream.set_epoch(self._stream.epoch + 1)
            batch = next(self._stream)
        states = batch.to(self._device, torch.float32, out=self._memory).activations
        if self._device.type == "cpu" and self._memory is None:
            self._memory = states
        return states

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, after the batch handed out last."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._stream.load_state_dict(state)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

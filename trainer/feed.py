"""The training samples, pass after pass, as states on the device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from infra.console import Progress, UserError
from storage_schemas import Store
from trainer.config import TrainConfig
from trainer.machine import Machine
from trainer.stream import LayerSliceStream
from trainer.workers import Workers


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """This worker's samples of one batch, or some of them.

    Attributes:
        states: Of the span.
        sample_index: Which samples of the store.
        n_batch: Samples of the whole batch, over all workers.
    """

    states: Float[Tensor, "sample state token dim"]
    sample_index: Int64[np.ndarray, " sample"]
    n_batch: int

    def __len__(self) -> int:
        return len(self.sample_index)

    def parts(self, most: int | None) -> Iterator["Share"]:
        """Cut into parts of at most so many samples; at least one part, which an empty share makes empty."""
        size = max(1, len(self)) if most is None else most
        for start in range(0, max(1, len(self)), size):
            rows = slice(start, start + size)
            yield Share(states=self.states[rows], sample_index=self.sample_index[rows], n_batch=self.n_batch)


class Feed:
    """Passes over the training samples, one after another, as states on the device."""

    def __init__(self, store: Store, config: TrainConfig, machine: Machine, workers: Workers) -> None:
        """Take the memory.

        Raises:
            UserError: There are more workers than the store has lanes to give them.
        """
        try:
            self._stream = LayerSliceStream(
                store,
                config.span,
                batch_size=config.batch_size,
                seed=config.seed,
                rank=workers.rank,
                world_size=workers.world_size,
                lanes=config.lanes,
                partial=True,  # which samples take part was settled when the store was opened
                n_steps=config.n_steps,
            )
        except ValueError as error:
            raise UserError(f"WORKERS={workers.world_size} cannot share {store.location}: {error}") from error
        self._config, self._device = config, machine.device
        self._memory: Tensor | None = None

    def progress(self, n_steps_done: int) -> Progress:
        """A progress bar over the samples of the whole run."""
        return Progress(
            total=self.samples_after(self._config.n_steps),
            unit="samples",
            label=f"train {self._config.span}",
            done=self.samples_after(n_steps_done),
        )

    def samples_after(self, n_steps: int) -> int:
        """Samples of so many steps, over all workers; the last batch of a pass may be short."""
        n_passes, rest = divmod(n_steps, len(self._stream))
        return n_passes * self._stream.n_samples + min(rest * self._config.batch_size, self._stream.n_samples)

    @property
    def waited_s(self) -> float:
        """Seconds that the loop has waited for samples."""
        return self._stream.waited_s

    @property
    def fetched_nbytes(self) -> int:
        """Bytes that this worker has read from the store."""
        return self._stream.bytes_fetched

    @property
    def needed_nbytes(self) -> int:
        """Stored bytes of the chunks that it asked for."""
        return self._stream.bytes_needed

    def next_share(self) -> Share:
        """This worker's share of the next batch. On a CPU its memory is used again for the one after."""
        batch = next(self._stream, None)
        if batch is None:
            self._stream.set_epoch(self._stream.epoch + 1)
            batch = next(self._stream)
        if self._memory is not None and len(self._memory) < len(batch):
            self._memory = None  # shares differ in size
        states = batch.to(self._device, torch.float32, out=self._memory).activations
        if self._device.type == "cpu" and self._memory is None:
            self._memory = states
        return Share(states=states, sample_index=batch.sample_index, n_batch=batch.n_batch)

    def no_share(self) -> Share:
        """A share without samples: with it, a worker that cannot read takes a step and keeps no other waiting."""
        spec, n_states = self._stream.store.spec, self._config.span.n_states
        states = torch.empty(0, n_states, spec.n_tokens, spec.dim, device=self._device)
        return Share(states=states, sample_index=np.empty(0, np.int64), n_batch=self._config.batch_size)

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

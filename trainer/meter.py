"""What is measured while training, without waiting for the device."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infra.console import ExitCode, JobError
from trainer.feed import Feed
from trainer.workers import Workers


class DivergedError(JobError):
    """The loss became infinite or NaN. The same steps from the last checkpoint would come to the same."""

    exit_code = ExitCode.WOULD_COME_AGAIN


class Meter:
    """Losses and gradient norms since the last line of metrics, left on the device until that line is written.

    `take` and `state_dict` are for all workers together.
    """

    def __init__(self, feed: Feed, workers: Workers) -> None:
        self._feed, self._workers = feed, workers
        self._step = 0
        self._start_anew()
        self.restart_clock()

    def add(self, step: int, loss: Tensor, norm: Tensor, n_samples: int) -> None:
        """Count one step. Does not wait for the device.

        Args:
            step: Steps done.
            loss: This worker's part of the batch's mean loss: all workers' parts add up to it.
            norm: Of the whole batch's gradient.
            n_samples: Of the whole batch.
        """
        self._step = step
        self._losses.append(loss.detach())
        self._norms.append(norm.detach())
        self._sizes.append(n_samples)
        self._n_timed += n_samples

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means over samples, which depend on the config alone, and rates, which depend on the machine. Starts anew."""
        losses, norms = self._read()
        n = sum(self._sizes)
        means = {
            "loss": math.fsum(loss * size for loss, size in zip(losses, self._sizes)) / n,
            "gradient_norm": math.fsum(norms) / len(norms),
        }
        elapsed = time.monotonic() - self._began
        waited = (self._feed.waited_s - self._waited_s) / elapsed
        elapsed, waited = self._workers.largest([elapsed, waited])  # all go at the pace of the slowest
        rates = {"samples_per_s": self._n_timed / elapsed, "loader_wait": waited}
        self._start_anew()
        self.restart_clock()
        return means, rates

    def _start_anew(self) -> None:
        # Restored ones are on the host, those of this process on the device, which is why they are kept apart.
        self._restored_losses: list[float] = []
        self._restored_norms: list[float] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._sizes: list[int] = []  # of both

    def restart_clock(self) -> None:
        """Leave out of the rates what came since the last line."""
        self._began, self._waited_s, self._n_timed = time.monotonic(), self._feed.waited_s, 0

    def state_dict(self) -> dict[str, Any]:
        """What is not logged yet, as JSON values."""
        losses, norms = self._read()
        return {"losses": losses, "norms": norms, "sizes": self._sizes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._start_anew()
        self._restored_losses, self._restored_norms = list(state["losses"]), list(state["norms"])
        self._sizes = list(state["sizes"])

    def _read(self) -> tuple[list[float], list[float]]:
        """Losses and norms on the host.

        Raises:
            DivergedError: One is infinite or NaN: what follows from it must reach neither metrics nor checkpoint.
        """
        losses, norms = self._restored_losses, self._restored_norms
        if self._losses:
            summed = self._workers.sum(torch.stack(self._losses))
            new_losses, new_norms = torch.stack([summed, torch.stack(self._norms)]).tolist()
            losses, norms = losses + new_losses, norms + new_norms
        bad = [value for value in (*losses, *norms) if not math.isfinite(value)]
        if bad:
            raise DivergedError(
                f"by step {self._step:,} the loss has become {bad[0]}; training stopped, and the last checkpoint is "
                "from before. Try a smaller learning rate, or float32, in another RUN"
            )
        return losses, norms

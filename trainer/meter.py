"""What is measured while training, without waiting for the device."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.console import ExitCode, JobError
from trainer.feed import Feed
from trainer.workers import Workers


class DivergedError(JobError):
    """The loss became infinite or NaN. The same steps from the last checkpoint would come to the same."""

    exit_code = ExitCode.WOULD_COME_AGAIN


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the steps between two lines of metrics took.

    Attributes:
        loader_s: Seconds that the slowest worker waited for the store.
        step_s: The rest of that time.
        n_samples: Over all workers.
        fetched_bytes: Read from the store, over all workers.
        needed_bytes: Stored bytes of what was asked for, over all workers.
    """

    loader_s: float = 0.0
    step_s: float = 0.0
    n_samples: int = 0
    fetched_bytes: float = 0.0
    needed_bytes: float = 0.0


class StepTimer:
    """How long a GPU is at the steps, without waiting for it.

    The host runs ahead of a GPU, so its own clock tells neither how long a step is nor whether the GPU waits for data.
    So marks are put into the GPU's queue, and read once it has passed them. On a CPU there is nothing to tell apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Time a step; its data is there."""
        if self._device.type != "cuda":
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(self._device))
        yield
        end.record(torch.cuda.current_stream(self._device))
        self._marks.append((begin, end))

    def take(self) -> float:
        """Seconds of the steps since this was last asked; the GPU must have done them. 0 on a CPU."""
        marks, self._marks = self._marks, []
        return sum(begin.elapsed_time(end) for begin, end in marks) / 1000


class Meter:
    """Losses and gradient norms since the last line of metrics, left on the device until that line is written.

    `take` and `state_dict` are for all workers together.
    """

    def __init__(self, feed: Feed, workers: Workers, device: torch.device) -> None:
        self._feed, self._workers = feed, workers
        self.timed = StepTimer(device)
        self.spent = Spent()
        self._on_gpu = device.type == "cuda"
        self._step = self._fetched = self._needed = 0
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
        elapsed, waited = self._spend()
        rates = {"samples_per_s": self.spent.n_samples / elapsed, "loader_wait": waited}
        self._start_anew()
        return means, rates

    def spend_rest(self) -> Spent:
        """What was spent since the last line, where none will follow; the device must have done its steps."""
        self._spend()
        return self.spent

    def _spend(self) -> tuple[float, float]:
        """Seconds since the last line, and which share of them was waited; they are what `spent` says."""
        elapsed = time.monotonic() - self._began
        waited, stepping = (self._feed.waited_s - self._waited_s) / elapsed, self.timed.take() / elapsed
        if self._on_gpu:  # while it has steps in its queue, the host may wait for data and nobody else does
            waited = min(waited, max(0.0, 1.0 - stepping))
        elapsed, waited = self._workers.largest([elapsed, waited])  # all go at the pace of the slowest
        self.spent = self._spent(elapsed, waited)
        self.restart_clock()
        return elapsed, waited

    def _spent(self, elapsed: float, waited: float) -> "Spent":
        fetched, needed = self._feed.fetched_nbytes, self._feed.needed_nbytes
        new = torch.tensor([fetched - self._fetched, needed - self._needed], dtype=torch.float64)
        self._fetched, self._needed = fetched, needed
        all_fetched, all_needed = self._workers.sum(new).tolist()
        return Spent(
            loader_s=waited * elapsed,
            step_s=(1.0 - waited) * elapsed,
            n_samples=self._n_timed,
            fetched_bytes=all_fetched,
            needed_bytes=all_needed,
        )

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

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave out of the rates what takes place meanwhile, which is no step."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

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

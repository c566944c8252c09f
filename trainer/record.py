"""What the first worker does beside the steps: metrics, validation, checkpoints, the result."""

import copy
import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infra.console import Progress
from trainer import losses
from trainer.block import Block
from trainer.config import TrainConfig
from trainer.data import TrainingData
from trainer.judge import Judge, describe
from trainer.machine import Machine
from trainer.meter import Spent
from trainer.raptor import Raptor
from trainer.raptor_teacher import save_ends
from trainer.run_files import Checkpoint, RunFiles
from trainer.run_log import RunLog
from trainer.telemetry import Telemetry
from trainer.validation import Baselines, Validation


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run has to show.

    Attributes:
        validation: Of the trained block or Raptor, on all validation samples.
        baselines: None without a head.
        final_loss: Mean training loss of the last logging interval.
    """

    validation: Validation
    baselines: Baselines | None
    final_loss: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainResult":
        """The inverse of to_json."""
        baselines = None if values["baselines"] is None else Baselines(**values["baselines"])
        return cls(validation=Validation(**values["validation"]), baselines=baselines, final_loss=values["final_loss"])


class Record:
    """Writes a RUN while its model is trained. Only the first worker enters it."""

    def __init__(
        self,
        run: RunFiles,
        config: TrainConfig,
        data: TrainingData,
        loss: losses.Loss,
        machine: Machine,
        model: Block | Raptor,
        progress: Progress,
        saved: Checkpoint | None,
        telemetry: Telemetry,
    ) -> None:
        """Everything is opened by entering it. `model` is, until then, the model before its first step."""
        self._run, self._config, self._data, self._model = run, config, data, model
        self._judge = Judge(config, data, loss, machine)
        self._progress, self._saved, self._open = progress, saved, ExitStack()
        self._telemetry = telemetry

    def begin(self, untrained: Mapping[str, Tensor]) -> None:
        """Say where it goes on; a new run is validated before its first step.

        Args:
            untrained: Weights before the first step.
        """
        self._untrained = untrained
        if self._saved is None:
            self._validate(0)
        else:
            self._progress.say(f"going on from step {self._saved.step:,}")

    def count(self, n_samples: int) -> None:
        """Samples of one step."""
        self._progress.advance(n_samples)
        self._telemetry.step(n_samples)

    def metrics(
        self, done: int, means: Mapping[str, float], rates: Mapping[str, float], spent: Spent, mfu: float | None
    ) -> None:
        """A line of metrics, and what it does not say of the time since the one before."""
        self._log.training(done, means, rates)
        self._telemetry.interval(means, rates, spent, mfu)
        self._progress.fields(step=f"{done:,}", loss=f"{means['loss']:.4g}", loader_wait=f"{rates['loader_wait']:.1%}")

    def rest(self, spent: Spent) -> None:
        """What was spent since the last line of metrics, where none will follow."""
        self._telemetry.spent(spent)

    def validation(self, done: int) -> None:
        """A validation on a sample."""
        found = self._validate(done)
        self._progress.say(f"step {done:,}: {describe(found)}")

    def checkpoint(self, done: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """A checkpoint."""
        self._log.flush()  # first, so that no checkpoint is ahead of the metrics
        state = {**state, "last_loss": self._log.last_loss}
        with self._telemetry.spending("checkpoint"):
            self._run.save_checkpoint(Checkpoint(step=done, tensors=tensors, state=state))

    def finish(self, about: Mapping[str, Any]) -> TrainResult:
        """The last validation and the result.

        Args:
            about: JSON values that the result shall say beside what was found.
        """
        self._progress.status("validating")
        limit = self._telemetry.judge()  # the last validation is no part of it
        with self._telemetry.spending("validation"):
            final = self._judge.whole(self._model)
        self._log.validation(self._config.n_steps, final)
        assert self._log.last_loss is not None, "the last step is always logged"
        untrained = copy.deepcopy(self._model)
        untrained.load_state_dict(self._untrained)
        result = TrainResult(
            validation=final, baselines=self._judge.baselines(untrained), final_loss=self._log.last_loss
        )
        save_ends(self._run, self._data.teacher)
        self._run.finish(self._model.state_dict(), {**result.to_json(), **about})
        self._telemetry.ended("complete")
        self._progress.say(f"this run was {limit}" if limit.limit else "this run had nothing left to do")
        return result

    def _validate(self, done: int) -> Validation:
        self._progress.status("validating")
        with self._telemetry.spending("validation"):
            found = self._judge.sample(self._model)
        self._log.validation(done, found)
        self._progress.status("")
        return found

    def __enter__(self) -> "Record":
        with ExitStack() as stack:
            self._log = stack.enter_context(RunLog(self._run, resume=self._saved))
            stack.enter_context(self._progress)
            stack.enter_context(self._telemetry)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

"""The one probe trainer: features of a frozen backbone -> readout -> loss -> clip -> AdamW, and the metric by epoch.

It can stop after any iteration and go on as if it had not: on the CPU, with the same number of threads, an interrupted
probe equals an uninterrupted one bit for bit.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infra.console import JobError, Progress, UserError
from storage_schemas import Store
from trainer.optimizer import set_learning_rate
from trainer.order import random64
from trainer.probes.backbone import Backbone
from trainer.probes.features import Features, autocast
from trainer.probes.probe_files import ProbeCheckpoint, ProbeFiles
from trainer.probes.results import ProbeResult
from trainer.probes.schedule import probe_learning_rate
from trainer.probes.task import LabelledImages, Task
from trainer.trained import Trained
from trainer.variants import RAPTOR, Model

_MOST_LINES = 30  # that tell of epochs
_LOOK_EVERY = 25  # iterations between two looks at the loss, each of which waits for the device


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is trained on what.

    Attributes:
        task: Data, readout, loss, metric, settings.
        backbone: Frozen.
        seed: Of the readout, the order and the augmentation.
        label: Of the row in a table; empty for the backbone's own.
        compat: Whether the task was opened with the published defects.
    """

    task: Task
    backbone: Backbone
    seed: int
    label: str = ""
    compat: bool = False

    def identity(self) -> dict[str, Any]:
        """What two probes must share to be the same one; JSON values."""
        return {
            "task": self.task.name,
            "settings": asdict(self.task.settings),
            "backbone": _backbone_identity(self.backbone),
            "seed": self.seed,
            "label": self.label,
            "compat": self.compat,
            "data": self._data(),
            "task_identity": dict(self.task.identity),
        }

    def result(self, history: Sequence[Mapping[str, float]], n_train: int, n_evaluation: int) -> ProbeResult:
        """Of a finished training."""
        task, backbone, trained = self.task, self.backbone, self.backbone.trained
        values = [epoch[task.metric] for epoch in history]
        best = best_epoch(values, higher_is_better=task.higher_is_better)
        names = [backbone.teacher_name] if trained is None else [f"Raptor k={len(trained.spans)}"]
        return ProbeResult(
            task=task.name,
            metric=task.metric,
            higher_is_better=task.higher_is_better,
            what="teacher" if trained is None else "raptor",
            label=self.label or names[0],
            spans=[] if trained is None else [str(span) for span in trained.spans],
            run=None if trained is None else trained.location,
            run_weights=None if trained is None else trained.weights_digest,
            teacher=backbone.teacher_name,
            teacher_weights=backbone.teacher_digest,
            seed=self.seed,
            model_seed=None if trained is None else trained.seed,
            raptor_settings={} if trained is None else _learning(trained),
            compute=backbone.teacher.compute,
            initial=values[0],
            last=values[-1],
            best=values[best],
            best_epoch=best,
            best_chosen_on_reported_samples=True,
            history=[dict(epoch) for epoch in history],
            teacher_head=task.teacher_head(),
            n_train=n_train,
            n_evaluation=n_evaluation,
            compat=self.compat,
            settings=asdict(task.settings),
            data=self._data(),
            task_identity=dict(task.identity),
        )

    def _data(self) -> dict[str, Any]:
        return {"train": data_identity(self.task.train), "evaluation": data_identity(self.task.evaluation)}


def data_identity(data: LabelledImages | Store) -> dict[str, Any]:
    """What tells this data from other data; JSON values without a location."""
    if isinstance(data, Store):
        valid = np.flatnonzero(data.valid)
        return {"store": data.document.digest, "n_samples": len(valid)}
    return dict(data.identity)


def n_samples(data: LabelledImages | Store) -> int:
    """Samples that take part."""
    return data.n_valid if isinstance(data, Store) else len(data)


def best_epoch(values: Sequence[float], *, higher_is_better: bool) -> int:
    """Of the best value; the first one, of several."""
    sign = 1 if higher_is_better else -1
    return max(range(len(values)), key=lambda epoch: (sign * values[epoch], -epoch))


def iterations_per_epoch(n_samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Steps that an epoch has."""
    return n_samples // batch_size if drop_last else -(-n_samples // batch_size)


def train_probe(
    probe: Probe, files: ProbeFiles, *, stop: Callable[[], bool] = lambda: False, checkpoint_s: float = 10.0
) -> ProbeResult | None:
    """Train from the last checkpoint, or from the beginning, to the end.

    Args:
        probe: What to do; the place must have been claimed for its identity.
        files: Where checkpoints, readouts and the result go.
        stop: Asked after every iteration; once it says yes, everything is saved and the function returns.
        checkpoint_s: Epochs that end sooner than this after the last checkpoint, seconds, are not saved.

    Returns:
        The result, or None if it was stopped; call again to go on.

    Raises:
        UserError: There are fewer training samples than a batch has, or a sample cannot be read.
        JobError: The loss or the metric became infinite or NaN; the last checkpoint is from before.
    """
    training = _Training(probe)
    saved = files.read_checkpoint()
    saved_at = time.monotonic()
    if saved is not None:
        training.load(saved)
    with Progress(
        total=training.samples_until(training.n_iterations),
        unit="samples",
        label=f"probe {probe.task.name}",
        done=training.samples_until(training.iteration),
    ) as progress:
        if saved is not None:
            progress.say(f"going on from iteration {training.iteration:,}")
        while True:
            if training.is_evaluation_due:
                training.evaluate(progress)
                if time.monotonic() - saved_at >= checkpoint_s:
                    files.save_checkpoint(training.checkpoint())
                    saved_at = time.monotonic()
                if training.is_worth_a_line:
                    progress.say(training.last_line())
            if training.iteration == training.n_iterations:
                break
            for n_samples in training.rest_of_epoch():
                progress.advance(n_samples)
                training.look(progress)
                if stop():
                    files.save_checkpoint(training.checkpoint())
                    return None
    result = probe.result(training.history, len(training.train), len(training.evaluation))
    files.finish(training.head.state_dict(), training.best, result)
    return result


class _Training:
    """A probe under way: what changes, and the steps that change it."""

    def __init__(self, probe: Probe) -> None:
        task, backbone = probe.task, probe.backbone
        self.probe, self.iteration = probe, 0
        self.history: list[dict[str, float]] = []
        settings, device = task.settings, backbone.teacher.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(probe.seed)
            self.head: nn.Module = task.make_head().to(device)
        self.best = _state_of(self.head)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.train = Features(task.train, task, backbone, seed=probe.seed, augmented=True)
        self.evaluation = Features(task.evaluation, task, backbone, seed=probe.seed, augmented=False)
        self.n_per_epoch = iterations_per_epoch(len(self.train), settings.batch_size, drop_last=settings.drop_last)
        if self.n_per_epoch == 0:
            raise UserError(
                f"there are {len(self.train):,} training samples, fewer than the {settings.batch_size:,} of a batch, "
                f"and what fills no batch is left out: give BATCH_SIZE={len(self.train)} or less"
            )
        self.n_iterations = settings.n_epochs * self.n_per_epoch
        # Restored ones are on the host, those of this process on the device, which is why they are kept apart.
        self._restored_losses: list[float] = []
        self._losses: list[Tensor] = []

    @property
    def is_evaluation_due(self) -> bool:
        """Whether an epoch is complete and not measured yet; epoch 0, the untrained readout, counts."""
        return self.iteration == len(self.history) * self.n_per_epoch

    def samples_until(self, iteration: int) -> int:
        """Samples trained on by then."""
        n_epochs, rest = divmod(iteration, self.n_per_epoch)
        batch_size = self.probe.task.settings.batch_size
        return n_epochs * min(self.n_per_epoch * batch_size, len(self.train)) + rest * batch_size

    def rest_of_epoch(self) -> Iterator[int]:
        """Take the remaining steps of the epoch that is under way; yields the samples of each."""
        settings = self.probe.task.settings
        epoch, done = divmod(self.iteration, self.n_per_epoch)
        order = epoch_order(len(self.train), self.probe.seed, epoch + 1)
        rest = order[done * settings.batch_size : self.n_per_epoch * settings.batch_size].tolist()
        self.head.train()
        with closing(self.train.batches(rest, settings.batch_size, epoch + 1)) as batches:
            for features, targets in batches:
                self._step(features, targets)
                yield len(targets)

    def _step(self, features: Tensor, targets: Tensor) -> None:
        task, settings = self.probe.task, self.probe.task.settings
        with autocast(self.probe.backbone.teacher.device, settings.precision):
            output = self.head(features)
        loss = task.loss(output.float(), targets)
        self.scaler.scale(loss).backward()
        rate = probe_learning_rate(
            self.iteration,
            base=settings.learning_rate,
            schedule=settings.schedule,
            n_iterations=self.n_iterations,
            warmup_iterations=settings.warmup_iterations,
        )
        set_learning_rate(self.optimizer, rate)
        if settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.head.parameters(), settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss.detach())
        self.iteration += 1

    def look(self, progress: Progress) -> None:
        """Now and then, and at the end of an epoch: see that the loss is a number, and show it."""
        at_end = self.iteration % self.n_per_epoch == 0
        if not at_end and self.iteration % _LOOK_EVERY:
            return
        losses = self._read_losses()
        loss = sum(losses) / len(losses)
        self._restored_losses, self._losses = [], []
        if not math.isfinite(loss):
            raise JobError(
                f"the loss is {loss} by iteration {self.iteration:,}. The last checkpoint is from before; a smaller "
                "LEARNING_RATE is the usual cure"
            )
        epoch = -(-self.iteration // self.n_per_epoch)
        progress.fields(epoch=f"{epoch}/{self.probe.task.settings.n_epochs}", loss=f"{loss:.4g}")

    def _read_losses(self) -> list[float]:
        """Since the last look, on the host."""
        return self._restored_losses + (torch.stack(self._losses).tolist() if self._losses else [])

    def evaluate(self, progress: Progress) -> None:
        """Measure the readout on all evaluation samples, and keep it if it is the best so far."""
        task, settings, device = self.probe.task, self.probe.task.settings, self.probe.backbone.teacher.device
        metric = task.make_metric()
        self.head.eval()
        progress.status("evaluating")
        order = range(len(self.evaluation))
        with torch.no_grad(), closing(self.evaluation.batches(order, settings.evaluation_batch_size, 0)) as batches:
            for features, targets in batches:
                with autocast(device, settings.precision):
                    output = self.head(features)
                metric.add(output.float(), targets)
        values = {name: float(value) for name, value in metric.values().items()}
        if not math.isfinite(values[task.metric]):
            raise JobError(
                f"the {task.metric} is {values[task.metric]} after {self.iteration:,} iterations: the readout gives no "
                "numbers, or no evaluation sample has a known target"
            )
        self.history.append({name: value for name, value in values.items() if math.isfinite(value)})
        so_far = [epoch[task.metric] for epoch in self.history]
        if best_epoch(so_far, higher_is_better=task.higher_is_better) == len(so_far) - 1:
            self.best = _state_of(self.head)
        progress.status("")
        progress.fields(**{task.metric: f"{so_far[-1]:.4f}"})

    @property
    def is_worth_a_line(self) -> bool:
        """Whether to tell of the epoch: of all, or of every n-th where there are many."""
        n_epochs, epoch = self.probe.task.settings.n_epochs, self.iteration // self.n_per_epoch
        return epoch % -(-n_epochs // _MOST_LINES) == 0 or epoch == n_epochs

    def last_line(self) -> str:
        """The last epoch in words."""
        values = ", ".join(f"{name} {value:.4f}" for name, value in self.history[-1].items())
        return f"epoch {self.iteration // self.n_per_epoch}: {values}"

    def checkpoint(self) -> ProbeCheckpoint:
        """Everything that changes."""
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.head.named_parameters():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        state = {
            "history": self.history,
            "scaler": self.scaler.state_dict(),
            "losses": self._read_losses(),
        }
        return ProbeCheckpoint(iteration=self.iteration, tensors=tensors, state=state)

    def load(self, saved: ProbeCheckpoint) -> None:
        """Undo `checkpoint`."""
        self.iteration = saved.iteration
        self.history = [dict(epoch) for epoch in saved.state["history"]]
        self.scaler.load_state_dict(saved.state["scaler"])
        self._restored_losses, self._losses = list(saved.state["losses"]), []
        self.head.load_state_dict(_within(saved.tensors, "head"))
        self.best = _within(saved.tensors, "best")
        moments = {
            index: {key: saved.tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for index, (name, _) in enumerate(self.head.named_parameters())
            if f"step.{name}" in saved.tensors
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})


def epoch_order(n_samples: int, seed: int, epoch: int) -> Tensor:
    """Places of the training samples in the order of an epoch, counted from 1: a pure function of the three."""
    words = random64(int(random64(seed, np.array([epoch]))[0]), np.arange(n_samples))
    return torch.from_numpy(np.argsort(words, kind="stable"))


def _learning(trained: Trained) -> dict[str, Any]:
    return Model(what=RAPTOR, teacher=trained.teacher_digest, settings=trained.config["train"]).learning


def _backbone_identity(backbone: Backbone) -> dict[str, Any]:
    trained = backbone.trained
    return {
        "teacher": backbone.teacher_name,
        "teacher_weights": backbone.teacher_digest,
        "pixel_size": list(backbone.teacher.pixel_size),
        "compute": backbone.teacher.compute,
        "run_weights": None if trained is None else trained.weights_digest,
    }


def _state_of(head: nn.Module) -> dict[str, Tensor]:
    return {name: copy.deepcopy(value.detach()).cpu() for name, value in head.state_dict().items()}


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): value for n, value in tensors.items() if n.startswith(f"{prefix}.")}

"""Raptors of the built-in digits for the ladder: trained once each, kept in a folder, judged over the whole depth."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from infra.console import say
from infra.objects import FolderObjects
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.run_config import RunConfig
from storage_schemas import Span, open_store
from storage_schemas.documents import sha256
from trainer.config import TrainConfig
from trainer.data import TrainingData, first_samples, open_training_data
from trainer.judge import validation_lanes
from trainer.machine import Machine
from trainer.probes.open_backbone import Places, open_backbone
from trainer.probes.probe_files import ProbeFiles
from trainer.probes.task import Asked, find_task
from trainer.probes.train_probe import Probe, train_probe
from trainer.raptor import Raptor
from trainer.recipes import digits_stage1, digits_stage2
from trainer.run_files import RunFiles
from trainer.train import make_loss, train
from trainer.trained import read_trained
from trainer.validation import ALL_TOKENS, Validation, ValidationSet, measure_baselines, validate

Spans = tuple[Span, ...]

_JUDGED = 64  # samples at a time


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """How the blocks of one rung are trained alone: what is changed of digits_stage1.

    Attributes:
        autoregressive: Anneal teacher forcing to roll-out; else each step only ever sees the teacher's states.
        depth_scaling: Whether a block knows the layer that it makes.
        cls_weighting: Weigh token kinds in the span that reaches the last layer, as the recipe does; else none.
    """

    autoregressive: bool = True
    depth_scaling: bool = True
    cls_weighting: bool = True

    def applied(self, recipe: TrainConfig) -> TrainConfig:
        """The recipe with these changes."""
        return dataclasses.replace(
            recipe,
            depth_scaling=self.depth_scaling,
            teacher_forcing_minimum=recipe.teacher_forcing_minimum if self.autoregressive else 1.0,
            loss=recipe.loss if self.cls_weighting else "mse",
        )


RECIPE = Stage1()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one Raptor is worth, rolled out from state 0 to the last one, on all held-out digits.

    Attributes:
        spans: Of its blocks.
        seed: Of its trainings.
        validation: Its accuracy is by the teacher's own head.
        run: Of stage 2; None for blocks that were only put together.
    """

    spans: Spans
    seed: int
    validation: Validation
    run: str | None = None

    @property
    def accuracy(self) -> float:
        assert self.validation.accuracy is not None, "the digits' teacher has a head"
        return self.validation.accuracy

    def with_accuracy(self, accuracy: float) -> "Found":
        """The same Raptor by another readout."""
        return dataclasses.replace(self, validation=dataclasses.replace(self.validation, accuracy=accuracy))

    @property
    def epsilon(self) -> float:
        """Of the last layer."""
        return self.validation.epsilon[-1]

    @property
    def mean_r2(self) -> float:
        """Over all tokens, mean over the layers."""
        return fmean(self.validation.r2[ALL_TOKENS])

    def last_r2(self, kind: str) -> float:
        """Of the last layer, by token kind."""
        return self.validation.r2[kind][-1]


class Runs:
    """Stores, runs and what was found, below one folder. Everything in it is done once.

    Args:
        place: The folder.
        batch_size: Samples a step of every training.
        limit: Images of each split; None is all.
    """

    def __init__(self, place: Path, *, batch_size: int, limit: int | None = None) -> None:
        self._batch_size = batch_size
        self._place = place
        self._machine = Machine.found("cpu")
        store = str(place / "store")
        self._found: dict[str, Found] = {}
        extract(
            ExtractConfig(images="digits", store=store, precision="float32", limit=limit),
            RunConfig(no_ray=True, device="cpu"),
        )
        self.depth = open_store(f"{store}/train").layers[-1]
        self._data = open_training_data(store, f"0-{self.depth}")
        self.states = self._data.train

    def teacher_accuracy(self) -> float:
        """What the teacher's head makes of its own last states, on the same digits."""
        span = Span(self.depth - 1, self.depth)
        data = self._data_of((span,))
        truth = ValidationSet(store=data.validation, teacher=data.teacher, batch_size=_JUDGED, lanes=1)
        found = measure_baselines(lambda x, layer: x, truth, span, machine=self._machine)
        assert found is not None, "the digits' teacher has a head"
        return found.teacher

    def blocks(self, spans: Spans, seed: int, n_steps: int | None, how: Stage1 = RECIPE) -> Found:
        """Blocks trained alone, put together and rolled out over the whole depth."""
        return self._judge(spans, seed, [self._block(span, seed, n_steps, how) for span in spans])

    def raptor(self, spans: Spans, seed: int, n_steps: tuple[int | None, int | None]) -> Found:
        """The same after stage 2, which begins with these blocks.

        Args:
            spans: Of the blocks.
            seed: Of both stages.
            n_steps: Of each block's training and of the joint one; None is the recipe's.
        """
        blocks = [self._block(span, seed, n_steps[0], RECIPE) for span in spans]
        data = self._data_of(spans)
        chosen = {} if n_steps[1] is None else {"n_steps": n_steps[1]}
        config = digits_stage2(spans, data.train.spec, self.depth, seed=seed, **chosen)
        digests = [read_trained(block).weights_digest for block in blocks]
        run = self._train(config, data, blocks, {"blocks": digests})
        return dataclasses.replace(self._judge(spans, seed, [run]), run=run)

    def probe(self, run: str | None, seed: int) -> float:
        """Accuracy of a linear readout trained on a Raptor's last states, after its last epoch.

        Args:
            run: Of stage 2; None probes the teacher.
            seed: Of the readout.
        """
        kind, device, store = find_task("digits"), self._machine.device, str(self._place / "store")
        problems: list[str] = []
        places = Places(run=run, teacher=None, weights=None, store=store, head=None, compute=None)
        backbone = open_backbone(places, kind, device, problems)
        assert backbone is not None, problems
        asked = Asked(images=None, store=store, head=None, compat=False, seed=seed, changes={}, device=device)
        probe = Probe(task=kind.open(asked, backbone), backbone=backbone, seed=seed)
        name = "teacher" if run is None else Path(run).name
        files = ProbeFiles(FolderObjects(self._place / "probes" / f"{name}-seed{seed}"))
        with files.exclusive():
            files.claim(probe.identity())
            result = files.read_result() or train_probe(probe, files)
        assert result is not None, "nothing asks it to stop"
        return result.last

    def _block(self, span: Span, seed: int, n_steps: int | None, how: Stage1) -> str:
        data = self._data_of((span,))
        chosen = {} if n_steps is None else {"n_steps": n_steps}
        config = how.applied(digits_stage1(span, data.train.spec, self.depth, seed=seed, **chosen))
        return self._train(config, data, [], {})

    def _train(self, config: TrainConfig, data: TrainingData, initial: Sequence[str], more: dict[str, Any]) -> str:
        """The location of a finished run of this config; it is trained where an earlier start has not done so."""
        config = dataclasses.replace(config, batch_size=self._batch_size)
        identity = {"train": config.to_json(), "data": data.identity, **more}
        digest = sha256(json.dumps(identity, sort_keys=True).encode())[:10]
        spans = "_".join(map(str, config.spans))
        name = f"{spans}-seed{config.seed}-{digest}"
        files = RunFiles(FolderObjects(self._place / "runs" / name))
        with files.exclusive():
            files.claim(identity)
            if files.read_result() is None:
                say(f"ladder: {config.recipe}, {spans}, seed {config.seed}, {config.n_steps:,} steps")
                began = time.process_time()
                # While it trains a few samples do: the whole set is judged once, over the whole depth, in `_judge`.
                few = dataclasses.replace(data, validation=first_samples(data.validation, 2 * config.batch_size))
                train(config, few, files, machine=self._machine, initial=_weights(initial, config.spans))
                say(f"ladder: that took {time.process_time() - began:.0f} s of CPU time")
        return files.location

    def _judge(self, spans: Spans, seed: int, runs: Sequence[str]) -> Found:
        key = " ".join(runs)
        if key not in self._found:
            data = self._data_of(spans)
            config = digits_stage2(spans, data.train.spec, self.depth, seed=seed)
            truth = ValidationSet(
                store=data.validation, teacher=data.teacher, batch_size=_JUDGED, lanes=validation_lanes(config)
            )
            validation = validate(
                joined(runs, spans), truth, data.span, make_loss(config, data.train.spec), machine=self._machine
            )
            self._found[key] = Found(spans=spans, seed=seed, validation=validation)
        return self._found[key]

    def _data_of(self, spans: Spans) -> TrainingData:
        return dataclasses.replace(self._data, spans=spans)


def _weights(runs: Sequence[str], spans: Spans) -> dict[str, Tensor] | None:
    """What a training of these spans begins with: as a Raptor names them, but for one block alone."""
    if not runs:
        return None
    raptor = joined(runs, spans)
    return (raptor if len(spans) > 1 else raptor.blocks[0]).state_dict()


def joined(runs: Sequence[str], spans: Spans) -> Raptor:
    """One Raptor of the blocks of several runs, in their order."""
    blocks = [block for run in runs for block in read_trained(run).raptor.blocks]
    return Raptor(blocks, spans).eval()

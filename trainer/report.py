"""What a person reads before and after a training."""

from collections.abc import Mapping, Sequence
from typing import Any

from infra.console import human_bytes
from storage_schemas.spec import KINDS
from trainer.data import TrainingData
from trainer.machine import Machine
from trainer.run_files import METRICS_KEY, WEIGHTS_KEY, RunFiles
from trainer.train import TrainConfig, make_block
from trainer.validation import ALL_TOKENS


def start_report(config: TrainConfig, data: TrainingData, run: RunFiles, machine: Machine) -> str:
    """What is about to happen."""
    block = make_block(config, data.train.spec)
    n_parameters = sum(p.numel() for p in block.parameters())
    passes = config.n_steps / -(-data.train.n_valid // config.batch_size)
    lines = [
        f"block {config.span} of {data.train.spec.teacher}: {n_parameters:,} parameters, recipe {config.recipe}, "
        f"seed {config.seed}",
        f"train on {data.train.n_valid:,} samples of {data.train.location}: {config.n_steps:,} steps of "
        f"{config.batch_size}, {passes:,.1f} passes, {config.precision} on {machine.device}",
        f"validate on {data.validation.n_valid:,} samples ({data.validated_on}); {_accuracy_note(data)}",
        f"run: {run.location}",
    ]
    return "\n".join(lines)


def finished_report(config: TrainConfig, data: TrainingData, run: RunFiles, result: Mapping[str, Any]) -> str:
    """What came out, where it is, and what to type next."""
    found, baselines = result["validation"], result["baselines"]
    lines = [
        f"block {config.span} of {data.train.spec.teacher}, {config.n_steps:,} steps, validated on "
        f"{found['n_samples']:,} samples ({data.validated_on})",
        f"loss: training {result['final_loss']:.4g}, validation {found['loss']:.4g}",
    ]
    if baselines is not None:
        lines += ["", *_accuracy_table(config, found["accuracy"], baselines)]
    lines += ["", *_r2_table(found), "", *_places(run, result), "", *_next_commands(config, data, run)]
    return "\n".join(lines)


def _accuracy_note(data: TrainingData) -> str:
    if data.teacher is None:
        return "no accuracy, as the store holds no teacher"
    if data.teacher.head is None:
        return "no accuracy, as the teacher has no head (HEAD=file gives one)"
    return "accuracy by the teacher's remaining blocks, final norm and head"


def _accuracy_table(config: TrainConfig, accuracy: float, baselines: Mapping[str, float]) -> list[str]:
    teacher = baselines["teacher"]
    rows = [
        ("teacher", teacher),
        (f"block {config.span}, rolled out", accuracy),
        ("untrained block", baselines["untrained"]),
        (f"teacher blocks {config.span.start + 1} to {config.span.stop} skipped", baselines["skipping"]),
    ]
    width = max(len(name) for name, _ in rows)
    head = f"{'accuracy':<{width}}          of the teacher's"
    return [
        head,
        *(f"{name:<{width}}  {value:7.2%}  {value / teacher if teacher else 0.0:7.1%}" for name, value in rows),
    ]


def _r2_table(found: Mapping[str, Any]) -> list[str]:
    kinds = [kind for kind in (*KINDS, ALL_TOKENS) if kind in found["r2"]]
    rows = [(kind, found["r2"][kind]) for kind in kinds] + [("as published", found["reference_r2"])]
    width = max(len("R2 of layer"), *(len(name) for name, _ in rows))
    lines = [f"{'R2 of layer':<{width}}" + "".join(f"{layer:>8}" for layer in found["layers"])]
    lines += [f"{name:<{width}}" + _numbers(values) for name, values in rows]
    return [*lines, f"{'epsilon':<{width}}" + "".join(f"{value:>8.3g}" for value in found["epsilon"])]


def _numbers(values: Sequence[float]) -> str:
    return "".join(f"{value:>8.3f}" if value > -100 else f"{value:>8.2g}" for value in values)


def _places(run: RunFiles, result: Mapping[str, Any]) -> list[str]:
    return [
        f"weights     {run.location}/{WEIGHTS_KEY} ({human_bytes(result['weights_nbytes'])})",
        f"metrics     {run.location}/{METRICS_KEY}, {run.location}/tensorboard",
    ]


def _next_commands(config: TrainConfig, data: TrainingData, run: RunFiles) -> list[str]:
    last = data.train.layers[-1]
    lines = [f"look at it  .venv/bin/tensorboard --logdir {run.location.rpartition('/')[0] or '.'}"]
    if config.span.stop < last:
        lines.append(f"next        make train BLOCK={config.span.stop}-{last}")
    return lines

"""What a person reads before and after a training."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from infra.console import human_bytes
from storage_schemas import Span, Store
from storage_schemas.spec import KINDS
from trainer.all_spans import Outcome
from trainer.config import TrainConfig
from trainer.data import TrainingData
from trainer.judge import validation_lanes
from trainer.machine import Machine
from trainer.reading_threads import is_remote
from trainer.recipes import RECIPES
from trainer.run_files import METRICS_KEY, RunFiles
from trainer.stream import stream_memory_nbytes
from trainer.train import make_model
from trainer.validation import ALL_TOKENS

_COLUMN = 10


def start_report(config: TrainConfig, data: TrainingData, run: RunFiles, machine: Machine) -> str:
    """What is about to happen."""
    n_parameters = sum(p.numel() for p in make_model(config, data.train.spec).parameters())
    passes = config.n_steps / -(-data.train.n_valid // config.batch_size)
    lines = [
        f"{name_of(config)} of {data.train.spec.teacher}: {n_parameters:,} parameters, recipe {config.recipe}, "
        f"seed {config.seed}",
        f"train on {data.train.n_valid:,} samples of {data.train.location}: {config.n_steps:,} steps of "
        f"{config.batch_size}, {passes:,.1f} passes, {config.precision} on {machine.device}",
        f"validate on {data.validation.n_valid:,} samples ({data.validated_on}); {_accuracy_note(data)}",
        f"memory for states on their way from the store: {_memory(config, data, machine)}",
        f"run: {run.location}",
    ]
    return "\n".join(lines)


def finished_report(
    config: TrainConfig,
    data: TrainingData,
    run: RunFiles,
    result: Mapping[str, Any],
    variables: Mapping[str, str] | None = None,
) -> str:
    """What came out, where it is, and what to type next.

    Args:
        config: Of the run.
        data: What it read.
        run: Where it is.
        result: What it wrote at its end.
        variables: What the person typed and the next command needs again, such as STORE; no defaults.
    """
    found, baselines = result["validation"], result["baselines"]
    lines = [
        f"{name_of(config)} of {data.train.spec.teacher}, {config.n_steps:,} steps, validated on "
        f"{found['n_samples']:,} samples ({data.validated_on})",
        f"loss: training {result['final_loss']:.4g}, validation {found['loss']:.4g}",
    ]
    if baselines is not None:
        lines += ["", *_accuracy_table(config, found["accuracy"], baselines)]
    lines += ["", *_r2_table(found), *(_before(run, found) if is_joint(config) else []), ""]
    lines += [*_places(run, result), ""]
    if is_joint(config):
        lines += _look_at(run) + _after_stage2(data.train, run, variables or {})
    else:
        lines += _next_commands(config.span, data.train, run, variables or {})
    return "\n".join(lines)


def spans_report(
    results: Sequence[tuple[str, Outcome | None, RunFiles, Mapping[str, Any] | None]], data: TrainingData
) -> str:
    """All blocks of one command beside each other.

    Args:
        results: For each its span, how it ended now (None: it was finished before), its RUN, and what it wrote at its
            end.
        data: What they read.
    """
    rows: list[tuple[str, ...]] = [("block", "", "loss", "R2", "accuracy", "of the teacher's", "run")]
    for span, outcome, run, result in results:
        ended = "finished before" if outcome is None else outcome.ended
        figures = ["", "", "", ""] if result is None else _figures(result)
        rows.append((span, ended, *figures, run.location))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    about = f"blocks of {data.train.spec.teacher}, each rolled out over its span on {data.validated_on}; R2 of its last"
    return "\n".join([f"{about} layer, all tokens", "", *lines])


def _figures(result: Mapping[str, Any]) -> list[str]:
    found, baselines = result["validation"], result["baselines"]
    shown = [f"{found['loss']:.4g}", f"{found['r2'][ALL_TOKENS][-1]:.3f}"]
    if baselines is None:
        return [*shown, "", ""]
    teacher = baselines["teacher"]
    return [*shown, f"{found['accuracy']:.2%}", f"{found['accuracy'] / teacher if teacher else 0.0:.1%}"]


def is_joint(config: TrainConfig) -> bool:
    """Whether it trains blocks that were trained alone before."""
    return len(config.spans) > 1 or config.recipe in RECIPES[2]


def name_of(config: TrainConfig) -> str:
    """What is trained, in words."""
    if not is_joint(config):
        return f"block {config.span}"
    return f"Raptor {', '.join(map(str, config.spans))}"


def _memory(config: TrainConfig, data: TrainingData, machine: Machine) -> str:
    def nbytes(store: Store, lanes: int) -> int:
        return stream_memory_nbytes(store.spec, config.span, config.batch_size, lanes=lanes, remote=is_remote(store))

    training = human_bytes(nbytes(data.train, config.lanes))
    validating = human_bytes(nbytes(data.validation, validation_lanes(config)))
    return f"{training}, and {validating} more while validating"


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
        (f"{name_of(config)}, rolled out", accuracy),
        ("before the first joint step" if is_joint(config) else "untrained block", baselines["untrained"]),
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
    width = _r2_width(found)
    lines = [f"{'R2 of layer':<{width}}" + "".join(f"{layer:>{_COLUMN}}" for layer in found["layers"])]
    lines += [f"{name:<{width}}" + _numbers(values) for name, values in rows]
    return [*lines, f"{'epsilon':<{width}}" + _numbers(found["epsilon"], ".3g")]


def _numbers(values: Sequence[float], form: str = ".3f") -> str:
    """Right-aligned columns with a space between any two."""
    texts = [format(value, form) for value in values]
    return "".join(
        f"{text if len(text) < _COLUMN else format(value, '.2g'):>{_COLUMN}}" for text, value in zip(texts, values)
    )


def _before(run: RunFiles, found: Mapping[str, Any]) -> list[str]:
    """R2 and epsilon of the stage-1 blocks, rolled out together before the first joint step, on a sample."""
    lines = [line for line in run.read_metrics() if line["step"] == 0 and "validation" in line]
    if not lines:
        return []
    first = lines[0]["validation"]
    rows = [("all", _numbers(first["r2"][ALL_TOKENS])), ("epsilon", _numbers(first["epsilon"], ".3g"))]
    title = f"before the first joint step, on {first['n_samples']:,} samples"
    return ["", title, *(f"{name:<{_r2_width(found)}}{numbers}" for name, numbers in rows)]


def _r2_width(found: Mapping[str, Any]) -> int:
    return max(map(len, ("R2 of layer", "as published", *found["r2"])))


def _places(run: RunFiles, result: Mapping[str, Any]) -> list[str]:
    return [
        f"weights     {run.location}/{result['weights_key']} ({human_bytes(result['weights_nbytes'])})",
        f"metrics     {run.location}/{METRICS_KEY}, {run.location}/tensorboard",
    ]


def _next_commands(span: Span, store: Store, run: RunFiles, variables: Mapping[str, str]) -> list[str]:
    """How to look at the curves, and a command that works on this store."""
    other = _other_span(span, store.layers)
    command = f"make train BLOCK={other}" if other else "make inspect"
    typed = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if other or name == "STORE"]
    return [*_look_at(run), f"next        {' '.join([command, *typed])}"]


def _look_at(run: RunFiles) -> list[str]:
    folder = shlex.quote(os.path.dirname(run.location) or ".")
    return [f"look at it  .venv/bin/tensorboard --logdir {folder}"]


def _after_stage2(store: Store, run: RunFiles, variables: Mapping[str, str]) -> list[str]:
    """What a finished Raptor is for."""
    digits = store.spec.teacher == "digits_vit"
    probe = {"TASK": "digits" if digits else "imagenet", "RUN": run.location}
    probe |= {name: value for name, value in variables.items() if name in ("STORE", "DEVICE", "ENDPOINT_URL")}
    probe |= {} if digits else {"IMAGES": "/data/imagenet"}
    typed = [f"{name}={shlex.quote(value)}" for name, value in probe.items()]
    return [f"next        {' '.join(['make probe', *typed])}", "and         make table"]


def _other_span(span: Span, layers: Sequence[int]) -> Span | None:
    """What follows the span in the store, as far as its layers go without a gap, else what comes before it."""
    stop = span.stop
    while stop + 1 in layers:
        stop += 1
    if stop > span.stop:
        return Span(span.stop, stop)
    start = span.start
    while start - 1 in layers:
        start -= 1
    return Span(start, span.start) if start < span.start else None

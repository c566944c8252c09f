"""The results table: what finished runs and probes measured, averaged over seeds, beside what was published.

What is averaged was trained alike: two models are one variant if they differ in their seed alone. Nothing is averaged,
or even shown together, that was measured on different data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.console import UserError
from trainer.paper import Published, has_published_spans, is_published_evaluation, is_published_probe, published, remark
from trainer.table_conflicts import conflicts
from trainer.table_sources import FoundProbe, FoundRun
from trainer.variants import BLOCK, Model, name_variants, variant_order

HEAD = "head"
ALL_TOKENS = "all"
LAST, BEST = "last", "best"
R2, MEAN_R2, REFERENCE_R2, EPSILON, LOSS = "R2", "mean R2", "R2 as published", "epsilon", "loss"
TOP_1 = "top-1"

_SHOWN = 12  # letters of a digest


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of the table: a mean over seeds. The columns of the CSV file, in their order.

    Attributes:
        variant: Name of what was measured; the same name means the same training but for the seed.
        what: "teacher", "raptor" or "block", which is a part of a Raptor.
        n_blocks: Of the model; 0 for a teacher.
        spans: Such as "0-7,7-10,10-12"; "" for a teacher.
        task: Of a probe, or "head": the roll-out through the teacher's own head, with nothing trained on it; "" for
            what is measured against the teacher's states.
        quantity: "top-1" and "mIoU" as shares of 1, "RMSE (m)", "R2", "mean R2" (over layers without layer 0), "R2 as
            published", "epsilon" (mean Frobenius norm of the error, of one image), "loss" of the roll-out.
        higher_is_better: Of the quantity.
        tokens: Token kind, or "all"; "" where it means nothing.
        layer: Of R2 and epsilon; None for the others.
        selection: "last" epoch, or "best", which was chosen on the samples that it is reported on; "" without epochs.
        n: Models.
        n_measured: Measurements: as many, or more where models were probed with several seeds.
        mean: Over models, of each one's mean over its measurements.
        std: Standard deviation over models (ddof 1); None for one model.
        seeds: Of the models, for probes model/probe, in increasing order.
        of_teacher: The mean as a share of the teacher's own; None where the teacher was not measured.
        published: What was published for such a model.
        published_std: Its standard deviation.
        published_in: Where.
    """

    variant: str
    what: str
    n_blocks: int
    spans: str
    task: str
    quantity: str
    higher_is_better: bool
    tokens: str
    layer: int | None
    selection: str
    n: int
    n_measured: int
    mean: float
    std: float | None
    seeds: str
    of_teacher: float | None
    published: float | None
    published_std: float | None
    published_in: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """All numbers, and what they were measured on.

    Attributes:
        rows: Teachers first, then Raptors by their number of blocks, then blocks.
        notes: Sentences on the data, for people.
    """

    rows: Sequence[Row]
    notes: Sequence[str]

    def of(self, **values: object) -> list[Row]:
        """The rows that have all these values."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in values.items())]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One number of one run or probe; the fields are those of Row. Those with the same `one_model` share a model."""

    model: Model
    task: str
    quantity: str
    value: float
    seed: str
    one_model: str = ""
    higher_is_better: bool = True
    tokens: str = ""
    layer: int | None = None
    selection: str = ""
    teacher_value: float | None = None
    as_published: bool = False  # whether it was measured as the published numbers were
    remark: str = ""  # on what is not quite as published

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model.key, self.task, self.quantity, self.tokens, self.layer, self.selection


def make_table(runs: Sequence[FoundRun], probes: Sequence[FoundProbe]) -> Table:
    """Average over seeds.

    Args:
        runs: Finished runs.
        probes: Finished probes.

    Raises:
        UserError: Lists everything that is there twice, with both places, and all data that do not belong together.
    """
    if problems := conflicts(runs, probes):
        raise UserError("\n  ".join(["these results do not make one table:", *problems]))
    heads = _of_teachers(runs)
    measured = [*heads.values(), *(one for run in runs for one in _of_run(run, heads)), *_of_probes(probes)]
    groups: dict[tuple[Any, ...], list[_Measured]] = {}
    for one in measured:
        groups.setdefault(one.key, []).append(one)
    models = {one.model.key: one.model for one in measured}
    names = name_variants(models.values())
    rows = [_row(names[group[0].model.key], group) for group in groups.values()]
    place = {names[key]: variant_order(model) for key, model in models.items()}
    return Table(rows=sorted(rows, key=lambda row: place[row.variant]), notes=_notes(runs, probes))


# ------------------------------------------------------------------ what was measured


def _of_run(run: FoundRun, heads: Mapping[str, _Measured]) -> Iterable[_Measured]:
    found, baselines, seed = run.validation, run.baselines, str(run.model.seed)
    if found is None:  # imported, and not validated
        return

    def one(quantity: str, value: float, **about: Any) -> _Measured:
        return _Measured(
            model=run.model, quantity=quantity, value=value, seed=seed, one_model=seed, **{"task": "", **about}
        )

    if found["accuracy"] is not None:
        known = heads.get(run.model.teacher)  # an imported run has no baselines of its own
        teacher = baselines["teacher"] if baselines is not None else known.value if known is not None else None
        yield one(
            TOP_1,
            found["accuracy"],
            task=HEAD,
            selection=LAST,
            teacher_value=teacher,
            as_published=is_published_evaluation(found["n_samples"]),
        )
    yield one(LOSS, found["loss"], higher_is_better=False)
    for tokens, values in found["r2"].items():
        yield one(MEAN_R2, float(np.mean(values)), tokens=tokens)
        for layer, value in zip(found["layers"], values):
            yield one(R2, value, tokens=tokens, layer=layer)
    for layer, value, error in zip(found["layers"], found["reference_r2"], found["epsilon"]):
        yield one(REFERENCE_R2, value, tokens=ALL_TOKENS, layer=layer)
        yield one(EPSILON, error, tokens=ALL_TOKENS, layer=layer, higher_is_better=False)


def _of_teachers(runs: Sequence[FoundRun]) -> dict[str, _Measured]:
    """What the teachers' heads get right on their own last states, by the teacher's name."""
    seen: dict[str, _Measured] = {}
    # Runs over the whole depth first: their teacher's own value is that of its stored last state.
    for run in sorted(runs, key=lambda run: run.model.what == BLOCK):
        if run.baselines is not None:
            value = run.baselines["teacher"]
            one = _Measured(
                model=Model.of_teacher(run.model.teacher, run.model.teacher_weights),
                task=HEAD,
                quantity=TOP_1,
                value=value,
                seed="",
                selection=LAST,
                teacher_value=value,
                as_published=run.validation is not None and is_published_evaluation(run.validation["n_samples"]),
            )
            seen.setdefault(run.model.teacher, one)
    return seen


def _of_probes(probes: Sequence[FoundProbe]) -> Iterable[_Measured]:
    for probe in probes:
        result = probe.result
        seed = str(result.seed) if result.model_seed is None else f"{result.model_seed}/{result.seed}"
        of_teacher = [one.result for one in probes if one.model.is_teacher_of(probe.model) and one.task == probe.task]
        for selection in (LAST, BEST):
            values = [getattr(one, selection) for one in of_teacher]
            yield _Measured(
                model=probe.model,
                task=result.task,
                quantity=result.metric,
                higher_is_better=result.higher_is_better,
                value=getattr(result, selection),
                selection=selection,
                seed=seed,
                one_model=result.run_weights or f"seed {result.model_seed}",
                teacher_value=float(np.mean(values)) if values else None,
                as_published=selection == BEST  # the best epoch is what they report
                and is_published_probe(result.task, result.settings, result.task_identity, result.n_evaluation),
                remark=remark(result.task, result.task_identity, compat=result.compat),
            )


def _row(variant: str, group: Sequence[_Measured]) -> Row:
    first = group[0]
    by_model: dict[str, list[_Measured]] = {}
    for measured in group:
        by_model.setdefault(measured.one_model, []).append(measured)
    values = [_mean([one.value for one in own]) for own in by_model.values()]
    has_teacher = all(one.teacher_value for one in group)
    shares = [_mean([one.value / (one.teacher_value or 1.0) for one in own]) for own in by_model.values()]
    known = _published(group)
    return Row(
        variant=variant,
        what=first.model.what,
        n_blocks=first.model.n_blocks,
        spans=",".join(first.model.spans),
        task=first.task,
        quantity=first.quantity,
        higher_is_better=first.higher_is_better,
        tokens=first.tokens,
        layer=first.layer,
        selection=first.selection,
        n=len(values),
        n_measured=len(group),
        mean=_mean(values),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        seeds=" ".join(sorted((one.seed for one in group if one.seed), key=_as_numbers)),
        of_teacher=_mean(shares) if has_teacher else None,
        published=None if known is None else known.mean,
        published_std=None if known is None else known.std,
        published_in="" if known is None else "; ".join(text for text in (known.source, first.remark) if text),
    )


def _published(group: Sequence[_Measured]) -> Published | None:
    """What was published for just this: the same teacher and spans, measured in the same way."""
    model = group[0].model
    if model.what == BLOCK or not has_published_spans(model.spans) or not all(one.as_published for one in group):
        return None
    return published(model.teacher, model.n_blocks, group[0].task)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _as_numbers(seed: str) -> list[int]:
    return [int(part) for part in seed.split("/")]


def _notes(runs: Sequence[FoundRun], probes: Sequence[FoundProbe]) -> list[str]:
    notes = []
    runs = [run for run in runs if run.validation is not None]  # imported weights may have been measured on nothing
    if runs:
        teachers = ", ".join(sorted({run.model.teacher for run in runs}))
        samples = " or ".join(f"{n:,}" for n in sorted({run.validation["n_samples"] for run in runs if run.validation}))
        store = runs[0].data_key[0][:_SHOWN]
        count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
        notes.append(f"Roll-out of {count} against {teachers}, trained on store {store}, on {samples} samples.")
    for task in sorted({probe.task for probe in probes}):
        of_task = [probe.result for probe in probes if probe.task == task]
        notes.append(
            f"{len(of_task)} probes on {task}: {of_task[0].n_train:,} training samples, reported on "
            f"{of_task[0].n_evaluation:,}{', with the defects of the published code' * of_task[0].compat}."
        )
    return notes

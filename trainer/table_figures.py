"""What the figures of a results table show: series cut from its rows and from the metrics of the runs."""

from collections.abc import Sequence
from typing import Any

from trainer.figures import COLOURS, Series, by_blocks_figure, by_layer_figure, curves_figure
from trainer.table import ALL_TOKENS, EPSILON, HEAD, LAST, R2, Row, Table
from trainer.table_sources import FoundRun
from trainer.variants import RAPTOR, name_variants, variant_order


def make_figures(table: Table, runs: Sequence[FoundRun]) -> dict[str, bytes]:
    """PNG files by name; those for which there are no numbers are left out.

    accuracy_and_r2.png  what Raptors keep, against their number of blocks
    r2_by_layer.png      of each variant
    epsilon_by_layer.png of each variant
    training.png         loss and validation of each run
    """
    figures = {}
    raptors = [row for row in table.rows if row.what == RAPTOR]
    plotted = _one_for_each_k(raptors)
    layers = [row.layer for row in raptors if row.quantity == R2 and row.layer is not None]
    caption = _caption(table)
    accuracy = _by_blocks(
        [row for row in plotted if row.selection == LAST and row.higher_is_better and row.of_teacher is not None]
    )
    if layers and accuracy:
        last = [row for row in plotted if row.quantity == R2 and row.layer == max(layers)]
        left_out = len({row.variant for row in raptors} - {row.variant for row in plotted})
        others = "1 other is" if left_out == 1 else f"{left_out} others are"
        note = f"\nOf several variants of one k the one with the most seeds; {others} in the table." * (left_out > 0)
        figures["accuracy_and_r2.png"] = by_blocks_figure(
            accuracy,
            _by_kind(last),
            title="What a Raptor of k blocks keeps of its teacher",
            caption=caption + note,
            accuracy_label="accuracy (% of the teacher's)",
        )
    if layers:
        figures["r2_by_layer.png"] = by_layer_figure(
            _by_layer(raptors, R2),
            title="R2 of the roll-out, by layer",
            caption=caption,
            label="R2, all tokens",
            best=1.0,
        )
        figures["epsilon_by_layer.png"] = by_layer_figure(
            _by_layer(raptors, EPSILON),
            title="Error of the roll-out, by layer",
            caption=caption,
            label="epsilon (mean Frobenius norm, one image)",
            best=0.0,
        )
    if curves := _curves(runs):
        loss, validation, n_left_out = curves
        others = "1 more variant has" if n_left_out == 1 else f"{n_left_out} more variants have"
        note = f" {others} no colour left and cannot be shown." * (n_left_out > 0)
        figures["training.png"] = curves_figure(
            loss,
            validation,
            title="Training",
            caption=f"Training loss: mean of each logging interval. Dashed: blocks alone (stage 1).{note}\n{caption}",
            validation_label="validation: R2 of the last layer",
        )
    return figures


def _caption(table: Table) -> str:
    seeds = sorted({row.n for row in table.rows if row.what == RAPTOR and row.quantity == R2})
    n = " to ".join(str(one) for one in dict.fromkeys((seeds[0], seeds[-1]))) if seeds else "no"
    bars = (
        "bars and bands are one standard deviation over seeds (ddof 1)" if max(seeds, default=1) > 1 else "no deviation"
    )
    return "\n".join([*table.notes, f"{n} {'seed' if n == '1' else 'seeds'} of each variant; {bars}."])


def _one_for_each_k(rows: Sequence[Row]) -> list[Row]:
    """The rows of one variant for each number of blocks: the one with the most seeds, the first of equals."""
    n_seeds: dict[int, dict[str, int]] = {}
    for row in rows:
        of_k = n_seeds.setdefault(row.n_blocks, {})
        of_k[row.variant] = max(row.n, of_k.get(row.variant, 0))
    chosen = {max(of_k, key=lambda variant: of_k[variant]) for of_k in n_seeds.values()}
    return [row for row in rows if row.variant in chosen]


def _by_blocks(rows: Sequence[Row]) -> list[Series]:
    """Percent of the teacher's, one series for each task."""
    tasks = list(dict.fromkeys((row.task, row.quantity) for row in rows))
    names = {HEAD: "teacher's head, untouched"}
    series = []
    for task, quantity in tasks:
        own = [row for row in rows if (row.task, row.quantity) == (task, quantity)]
        series.append(
            Series(
                name=names.get(task, f"probe on {task}, {quantity}, last epoch"),
                x=[row.n_blocks for row in own],
                y=[100 * (row.of_teacher or 0.0) for row in own],
                std=[_share_std(row) for row in own],
            )
        )
    return series


def _share_std(row: Row) -> float | None:
    if row.std is None or row.of_teacher is None or not row.mean:
        return None
    return 100 * row.std * row.of_teacher / row.mean


def _by_kind(rows: Sequence[Row]) -> list[Series]:
    kinds = [kind for kind in (ALL_TOKENS, "cls", "registers", "patches") if any(row.tokens == kind for row in rows)]
    named = {ALL_TOKENS: "all tokens", "cls": "CLS"}
    return [
        Series(
            name=named.get(kind, kind),
            x=[row.n_blocks for row in rows if row.tokens == kind],
            y=[row.mean for row in rows if row.tokens == kind],
            std=[row.std for row in rows if row.tokens == kind],
        )
        for kind in kinds
    ]


def _by_layer(rows: Sequence[Row], quantity: str) -> list[Series]:
    own = [row for row in rows if row.quantity == quantity and row.tokens == ALL_TOKENS]
    series = []
    for variant in dict.fromkeys(row.variant for row in own):
        of_variant = [row for row in own if row.variant == variant]
        series.append(
            Series(
                name=f"{variant} ({of_variant[0].spans})" if of_variant[0].spans not in variant else variant,
                x=[row.layer or 0 for row in of_variant],
                y=[row.mean for row in of_variant],
                std=[row.std for row in of_variant],
            )
        )
    return series


def _curves(runs: Sequence[FoundRun]) -> tuple[list[Series], list[Series], int] | None:
    """Loss and R2 by step of the runs with metrics, and how many variants are left out for want of colours."""
    names = name_variants([run.model for run in runs])
    shown = sorted((run for run in runs if _has_curves(run)), key=lambda run: variant_order(run.model))
    variants = list(dict.fromkeys(run.model.key for run in shown))
    loss, validation = [], []
    for run in shown:
        style = variants.index(run.model.key)
        if style >= len(COLOURS):
            continue
        n_seeds = sum(other.model.key == run.model.key for other in shown)
        seeds = f"{n_seeds} seeds" if n_seeds > 1 else f"seed {run.model.seed}"
        about: dict[str, Any] = {
            "name": f"{names[run.model.key]}, {seeds}",
            "style": style,
            "dashed": run.model.what != RAPTOR,
        }
        lines = [line for line in run.metrics if "loss" in line]
        found = [line for line in run.metrics if "validation" in line]
        steps = [line["step"] for line in found]
        last = [line["validation"]["r2"][ALL_TOKENS][-1] for line in found]
        loss.append(Series(x=[line["step"] for line in lines], y=[line["loss"] for line in lines], **about))
        validation.append(Series(x=steps, y=last, **about))
    return (loss, validation, max(0, len(variants) - len(COLOURS))) if loss else None


def _has_curves(run: FoundRun) -> bool:
    return all(any(name in line for line in run.metrics) for name in ("loss", "validation"))

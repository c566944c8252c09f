"""What the figures of a results table show: series cut from its rows and from the metrics of the runs."""

from collections.abc import Sequence

from trainer.figures import Series, by_blocks_figure, by_layer_figure, curves_figure
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
    layers = [row.layer for row in raptors if row.quantity == R2 and row.layer is not None]
    caption = _caption(table)
    accuracy = _by_blocks(
        [row for row in raptors if row.selection == LAST and row.higher_is_better and row.of_teacher is not None]
    )
    if layers and accuracy:
        last = [row for row in raptors if row.quantity == R2 and row.layer == max(layers)]
        figures["accuracy_and_r2.png"] = by_blocks_figure(
            accuracy,
            _by_kind(last),
            title="What a Raptor of k blocks keeps of its teacher",
            caption=caption,
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
            label="epsilon: mean Frobenius norm of the error (activation units)",
            best=0.0,
        )
    if curves := _curves(runs):
        figures["training.png"] = curves_figure(
            *curves,
            title="Training",
            caption=f"Training loss: mean of each logging interval. Dashed: blocks alone (stage 1).\n{caption}",
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


def _curves(runs: Sequence[FoundRun]) -> tuple[list[Series], list[Series]] | None:
    names = name_variants([run.model for run in runs])
    variants = list(dict.fromkeys(run.model.key for run in sorted(runs, key=lambda run: variant_order(run.model))))
    loss, validation = [], []
    for run in sorted(runs, key=lambda run: variant_order(run.model)):
        n_seeds = sum(other.model.key == run.model.key for other in runs)
        seeds = f"{n_seeds} seeds" if n_seeds > 1 else f"seed {run.model.seed}"
        name = f"{names[run.model.key]}, {seeds}"
        style = variants.index(run.model.key)
        lines = [line for line in run.metrics if "loss" in line]
        found = [line for line in run.metrics if "validation" in line]
        if not lines or not found:
            continue
        dashed = run.model.what != RAPTOR
        x, y = [line["step"] for line in lines], [line["loss"] for line in lines]
        loss.append(Series(name=name, x=x, y=y, style=style, dashed=dashed))
        steps, last = [line["step"] for line in found], [line["validation"]["r2"][ALL_TOKENS][-1] for line in found]
        validation.append(Series(name=name, x=steps, y=last, style=style, dashed=dashed))
    return (loss, validation) if loss else None

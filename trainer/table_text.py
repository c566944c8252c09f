"""The results table as people read it: text for a terminal, Markdown for a page, cut from the same sections."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.paper import INDEPENDENT_NYUV2, REVIT
from trainer.table import (
    ALL_TOKENS,
    BEST,
    EPSILON,
    HEAD,
    LAST,
    LOSS,
    MEAN_R2,
    R2,
    Row,
    Table,
)
from trainer.variants import BLOCK, RAPTOR, TEACHER

_SHARES = ("top-1", "mIoU")
_BEST_NOTE = (
    "* the best epoch is chosen on the samples that it is reported on, as published; the last epoch is not chosen."
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the table: a title, columns, a line for each variant, notes below."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def sections(table: Table) -> list[Section]:
    """One for each probe, one for the roll-out, one each for epsilon and R2 by layer; those with nothing left out."""
    tasks = list(dict.fromkeys(row.task for row in table.rows if row.task not in ("", HEAD)))
    parts = [_probe_section(table, task) for task in tasks]
    parts += [_rollout_section(table, (TEACHER, RAPTOR), "Rolled out over the whole depth")]
    parts += [_rollout_section(table, (BLOCK,), "Blocks alone, then the teacher's remaining blocks")]
    parts += [_layer_section(table, EPSILON, "epsilon of each layer: mean Frobenius norm of the error of one image")]
    parts += [_layer_section(table, R2, "R2 of each layer, all tokens, about the teacher's mean per channel")]
    return [part for part in parts if part.lines]


def as_text(table: Table) -> str:
    """For a terminal: aligned columns."""
    parts = ["\n".join(table.notes)]
    for section in sections(table):
        cells = [section.columns, *section.lines]
        widths = [max(len(line[i]) for line in cells) for i in range(len(section.columns))]
        lines = [_aligned(line, widths) for line in cells]
        parts.append("\n".join([section.title, *lines, *section.notes]))
    return "\n\n".join(parts)


def as_markdown(table: Table) -> str:
    """For a page."""
    parts = ["# Results", *table.notes]
    for section in sections(table):
        rule = ["---", *["--:"] * (len(section.columns) - 1)]
        rows = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
            for line in (section.columns, rule, *section.lines)
        ]
        parts += [f"## {section.title}", "\n".join(rows), *section.notes]
    return "\n\n".join(part.replace("*", "\\*") for part in parts) + "\n"


def number(value: float, quantity: str) -> str:
    """A value in the units of its quantity: shares in percent, metres with four decimals."""
    if quantity in _SHARES:
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if "(m)" in quantity or quantity in (R2, MEAN_R2) else f"{value:.4g}"


def spread(mean: float, std: float | None, quantity: str) -> str:
    """Mean ± standard deviation; one measurement has no deviation."""
    if std is None:
        return number(mean, quantity)
    if quantity in _SHARES or "(m)" in quantity or quantity in (R2, MEAN_R2):
        return f"{number(mean, quantity)} ± {number(std, quantity)}"
    return f"{mean:.4g} ± {std:.2g}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        f"{text:<{width}}" if i == 0 else f"{text:>{width}}" for i, (text, width) in enumerate(zip(line, widths))
    )
    return "  ".join([first, *others]).rstrip()


def _probe_section(table: Table, task: str) -> Section:
    last, best = ({row.variant: row for row in table.of(task=task, selection=which)} for which in (LAST, BEST))
    first = next(iter(last.values()))
    has_published = any(row.published is not None for row in best.values())
    lines = []
    for variant, row in last.items():
        top = best[variant]
        line = [
            variant,
            _count(row, "probes"),
            spread(row.mean, row.std, row.quantity),
            spread(top.mean, top.std, top.quantity),
            _share(row),
            _share(top),
        ]
        lines.append([*line, _published(top)] if has_published else line)
    unit = "%" if first.quantity in _SHARES else "m"
    better = "" if first.higher_is_better else ", less is better"
    columns = ["variant", "n", "last epoch", "best epoch*", "last, of teacher's", "best, of teacher's"]
    sources = dict.fromkeys(row.published_in for row in best.values() if row.published is not None)
    notes = [_BEST_NOTE, *(f"published: {source}" for source in sources)]
    if has_published and task == "nyuv2":
        known = ", ".join(f"{name} {value:.3f}" for name, value in INDEPENDENT_NYUV2.items())
        notes.append(f"{REVIT}: {known}")
    return Section(
        title=f"Probe on {task}: {first.quantity.replace(' (m)', '')} ({unit}{better})",
        columns=[*columns, "published*"] if has_published else columns,
        lines=lines,
        notes=notes,
    )


def _rollout_section(table: Table, kinds: Sequence[str], title: str) -> Section:
    """Accuracy with the teacher's head, R2 and epsilon of the last layer."""
    shown = [row for row in table.rows if row.what in kinds and row.task in ("", HEAD)]
    heads = {row.variant: row for row in shown if row.task == HEAD}
    has_published = any(row.published is not None for row in heads.values())
    lines = []
    for variant in dict.fromkeys(row.variant for row in shown):
        own = [row for row in shown if row.variant == variant]
        head = heads.get(variant)
        line = [
            variant,
            "-" if own[0].what == TEACHER else str(max(row.n for row in own)),
            "-" if head is None else spread(head.mean, head.std, head.quantity),
            "-" if head is None else _share(head),
            *(_cell(own, quantity, tokens) for quantity, tokens in ((R2, ALL_TOKENS), (R2, "cls"), (R2, "patches"))),
            _cell(own, MEAN_R2, ALL_TOKENS),
            _cell(own, EPSILON, ALL_TOKENS),
            _cell(own, LOSS, ""),
        ]
        lines.append([*line, _published(head)] if has_published else line)
    columns = [
        *("variant", "n", "top-1, teacher's head (%)", "of teacher's"),
        *("R2, last layer", "of CLS", "of patches", "R2, mean of layers", "epsilon, last layer", "loss"),
    ]
    sources = dict.fromkeys(row.published_in for row in heads.values() if row.published is not None)
    return Section(
        title=title,
        columns=[*columns, "published"] if has_published else columns,
        lines=lines if any(row.what != TEACHER for row in shown) else [],
        notes=[f"published: {source}" for source in sources],
    )


def _layer_section(table: Table, quantity: str, title: str) -> Section:
    rows = table.of(quantity=quantity, tokens=ALL_TOKENS)
    layers = sorted({row.layer for row in rows if row.layer is not None})
    by_place = {(row.variant, row.layer): row for row in rows}
    digits = ".3f" if quantity == R2 else ".3g"
    return Section(
        title=title,
        columns=["variant", *map(str, layers)],
        lines=[
            [
                variant,
                *(
                    format(by_place[variant, layer].mean, digits) if (variant, layer) in by_place else "-"
                    for layer in layers
                ),
            ]
            for variant in dict.fromkeys(row.variant for row in rows)
        ],
    )


def _cell(rows: Sequence[Row], quantity: str, tokens: str) -> str:
    """The value of the last layer, or of no layer."""
    found = [row for row in rows if row.quantity == quantity and row.tokens == tokens]
    if not found:
        return "-"
    row = max(found, key=lambda row: row.layer or 0)
    return spread(row.mean, row.std, quantity)


def _count(row: Row, what: str) -> str:
    """Models; and measurements, where they are more."""
    return str(row.n) if row.n_measured == row.n else f"{row.n} ({row.n_measured} {what})"


def _share(row: Row) -> str:
    return "-" if row.of_teacher is None else f"{100 * row.of_teacher:.1f} %"


def _published(row: Row | None) -> str:
    if row is None or row.published is None:
        return "-"
    decimals, scale = (1, 100) if row.quantity in _SHARES else (3, 1)
    deviation = "" if row.published_std is None else f" ± {scale * row.published_std:.{decimals}f}"
    return f"{scale * row.published:.{decimals}f}{deviation}"

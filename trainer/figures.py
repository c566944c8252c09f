"""Figures of trained Raptors as PNG bytes: plain functions over numbers.

Matplotlib is imported when one is drawn, without pyplot, and needs no display. Colours are those of Okabe and Ito,
which people tell apart however they see colours; markers differ as well.
"""

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Orange, blue, green, vermilion, purple, sky, grey; the teacher is black.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_TEXT, _GRID = "#333333", "#DDDDDD"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a figure.

    Attributes:
        name: In the legend; curves of the same name have one entry.
        x: Places.
        y: Values, of the same length.
        std: Standard deviation of each; None where one was measured. () for none at all.
        style: Series of the same style have the same colour; None: the place among the others.
        dashed: Whether to draw it dashed.
    """

    name: str
    x: Sequence[int | float]
    y: Sequence[int | float]
    std: Sequence[int | float | None] = ()
    style: int | None = None
    dashed: bool = False


def by_blocks_figure(
    accuracy: Sequence[Series], r2: Sequence[Series], *, title: str, caption: str, accuracy_label: str
) -> bytes:
    """What is kept against the number of blocks: accuracy as a share of the teacher's, and R2 of the last layer.

    Args:
        accuracy: Percent of the teacher's own, by number of blocks.
        r2: Of the last layer, by number of blocks.
        title: Over both.
        caption: Under both: data, samples, seeds.
        accuracy_label: Of the axis of accuracy.
    """
    figure, canvas = _figure(9.5, 4.6)
    left, right = figure.subplots(1, 2)
    for axes, series, label in ((left, accuracy, accuracy_label), (right, r2, "R2 of the last layer")):
        _draw_points(axes, series)
        ticks = sorted({int(x) for one in series for x in one.x})
        axes.set_xticks(ticks)
        if ticks:
            axes.set_xlim(min(ticks) - 0.4, max(ticks) + 0.4)
        axes.set(xlabel="number of blocks k", ylabel=label)
        top = 100.0 if axes is left else 1.0
        axes.axhline(top, color="black", linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            "teacher", (0.01, top), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8
        )
        _headroom(axes, top)
    for axes, series in ((left, accuracy), (right, r2)):
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _finish(figure, canvas, title, caption)


def by_layer_figure(
    series: Sequence[Series], *, title: str, caption: str, label: str, best: float | None = None
) -> bytes:
    """One line for each variant over the layers, with a band of one standard deviation.

    Args:
        series: Values by layer.
        title: Over all.
        caption: Under all.
        label: Of the axis of values.
        best: What a perfect model would have; a dashed line there.
    """
    figure, canvas = _figure(7.5, 4.6)
    axes = figure.subplots()
    for i, one in enumerate(series):
        colour, marker = _look(one, i)
        style = "--" if one.dashed else "-"
        axes.plot(
            one.x, one.y, color=colour, marker=marker, markersize=5, linewidth=1.6, linestyle=style, label=one.name
        )
        _band(axes, one, colour)
    if best is not None:
        axes.axhline(best, color="black", linewidth=1, linestyle="--", zorder=1)
    layers = sorted({int(x) for one in series for x in one.x})
    axes.set_xticks(layers[:: max(1, len(layers) // 16)])
    axes.set(xlabel="layer", ylabel=label)
    axes.legend(fontsize=8, frameon=False)
    if best == 0:
        axes.set_ylim(bottom=0)
    return _finish(figure, canvas, title, caption)


def curves_figure(
    loss: Sequence[Series], validation: Sequence[Series], *, title: str, caption: str, validation_label: str
) -> bytes:
    """Training loss, on a logarithmic axis, and what validation found, over the steps of each run.

    Args:
        loss: By step.
        validation: By step.
        title: Over both.
        caption: Under both.
        validation_label: Of the right axis.
    """
    figure, canvas = _figure(10.0, 4.6)
    left, right = figure.subplots(1, 2)
    for axes, series in ((left, loss), (right, validation)):
        for i, one in enumerate(series):
            colour, marker = _look(one, i)
            style = "--" if one.dashed else "-"
            few = marker if axes is right else None
            axes.plot(
                one.x, one.y, color=colour, linewidth=1.3, linestyle=style, marker=few, markersize=3.5, label=one.name
            )
        axes.set_xlabel("optimizer step")
    left.set(yscale="log", ylabel="training loss")
    _plain_log_ticks(left)
    right.set_ylabel(validation_label)
    left.set_xlim(left=0)
    right.set_xlim(left=0)
    by_name = dict(zip(*reversed(left.get_legend_handles_labels())))
    names = [textwrap.fill(name, 34) for name in by_name]
    figure.legend(by_name.values(), names, fontsize=8, frameon=False, loc="outside right center")
    return _finish(figure, canvas, title, caption)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    return figure, FigureCanvasAgg(figure)


def _finish(figure: Any, canvas: Any, title: str, caption: str) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(caption, x=0.02, horizontalalignment="left", fontsize=8, color=_TEXT)
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A second for the place of a legend is long, on a busy machine no matter.
        warnings.filterwarnings("ignore", "Creating legend with loc", UserWarning)
        canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _plain_log_ticks(axes: Any) -> None:
    """0.05, 0.1, 0.2 in the place of powers of ten, which a loss that falls less than tenfold would have one of."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _look(one: Series, place: int) -> tuple[str, str]:
    style = place if one.style is None else one.style
    return COLOURS[style % len(COLOURS)], MARKERS[style % len(MARKERS)]


def _draw_points(axes: Any, series: Sequence[Series]) -> None:
    """Means with bars of one standard deviation, a little beside each other where several share a place."""
    for i, one in enumerate(series):
        colour, marker = _look(one, i)
        x = np.asarray(one.x) + 0.06 * (i - (len(series) - 1) / 2)
        bars = [0.0 if std is None else std for std in one.std] if any(one.std) else None
        axes.errorbar(
            x, one.y, yerr=bars, color=colour, marker=marker, markersize=7, linewidth=1.4, capsize=4, label=one.name
        )


def _band(axes: Any, one: Series, colour: str) -> None:
    if any(std is not None for std in one.std):
        y, std = np.asarray(one.y), np.asarray([s or 0.0 for s in one.std])
        axes.fill_between(one.x, y - std, y + std, color=colour, alpha=0.2, linewidth=0)


def _headroom(axes: Any, top: float) -> None:
    """A little room above the teacher's line, and below the lowest point."""
    low, high = axes.get_ylim()
    span = max(top, high) - low
    axes.set_ylim(low - 0.02 * span, max(top, high) + 0.06 * span)

"""Figures as PNG bytes. Matplotlib is imported when one is drawn, without pyplot, and needs no display."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from analysis.partitions import Groups, spans_text

_OUTLINE, _MARK, _PLAIN = "#ffffff", "#d95f02", "#4c566a"


def phases_figure(
    distance: Float64[np.ndarray, "layer layer"],
    groups: Groups,
    *,
    title: str,
    caption: str,
    score_name: str,
    score: float,
    controls: Mapping[str, Sequence[float]],
) -> bytes:
    """Heat map of the distances between layers with the groups outlined; beside it what they and the controls score.

    Args:
        distance: Rows are layers 1 to L.
        groups: Rows of each block.
        title: Over the heat map.
        caption: Under all: data, number of images, the command.
        score_name: Of the axis of scores.
        score: Of the groups.
        controls: Scores of random partitions, by the name of their kind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, 5.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    canvas = FigureCanvasAgg(figure)
    heat, strip = figure.subplots(1, 2, width_ratios=(2.4, 1))
    n_layers = len(distance)
    image = heat.imshow(distance, cmap="viridis", vmin=0.0, extent=(0.5, n_layers + 0.5, n_layers + 0.5, 0.5))
    heat.add_collection(LineCollection(_outlines(groups), colors=_OUTLINE, linewidths=2.5))
    ticks = range(1, n_layers + 1, -(-n_layers // 16))
    heat.set(xticks=ticks, yticks=ticks, xlabel="layer", ylabel="layer")
    heat.set_title(title, fontsize=11)
    figure.colorbar(image, ax=heat, label="mean of 1 - cosine similarity", fraction=0.046, pad=0.03)
    _draw_scores(strip, spans_text(groups), score, controls)
    strip.set_ylabel(score_name.replace("_", " "))
    figure.supxlabel(caption, x=0.02, horizontalalignment="left", fontsize=8, color="#333333")
    out = io.BytesIO()
    canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _draw_scores(axes: Any, name: str, score: float, controls: Mapping[str, Sequence[float]]) -> None:
    axes.axhline(score, color=_MARK, linewidth=1, linestyle=":")
    axes.scatter([0], [score], color=_MARK, s=60, zorder=3)
    for x, scores in enumerate(controls.values(), start=1):
        axes.scatter(x + np.linspace(-0.18, 0.18, len(scores)), scores, color=_PLAIN, s=22, alpha=0.8)
    names = [name.replace(",", "\n").replace(" | ", "\n"), *(kind.replace(" ", "\n") for kind in controls)]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("against random partitions", fontsize=11)


def _outlines(groups: Groups) -> list[list[tuple[float, float]]]:
    """Edges of the cells whose row and column lie in one group, where the next cell's do not."""
    group_of = {row: i for i, group in enumerate(groups) for row in group}
    n = len(group_of)

    def inside(row: int, column: int) -> bool:
        return 0 <= row < n and 0 <= column < n and group_of[row] == group_of[column]

    edges = []
    for row in range(n):
        for column in range(n):
            if not inside(row, column):
                continue
            left, right, top, bottom = column + 0.5, column + 1.5, row + 0.5, row + 1.5
            around = [
                ((row - 1, column), [(left, top), (right, top)]),
                ((row + 1, column), [(left, bottom), (right, bottom)]),
                ((row, column - 1), [(left, top), (left, bottom)]),
                ((row, column + 1), [(right, top), (right, bottom)]),
            ]
            edges += [edge for beside, edge in around if not inside(*beside)]
    return edges

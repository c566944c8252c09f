"""Figures of a report as SVG, from arrays alone. Matplotlib is imported when one is drawn, without pyplot."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4c566a")
_CUT = "#d55e00"

Curve = tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"], Float[np.ndarray, " point"] | None]
"""x, y and half the height of a band about y, or None."""


def heat_maps(
    matrices: Mapping[str, Float[np.ndarray, "row column"]],
    *,
    rows: Sequence[int],
    columns: Sequence[int],
    unit: str,
    limits: tuple[float, float],
    cuts: Sequence[float] = (),
    axis_names: tuple[str, str] = ("layer", "layer"),
) -> bytes:
    """Matrices over layers side by side, on one scale of colours.

    Args:
        matrices: By the title of each.
        rows: Layer numbers.
        columns: Layer numbers.
        unit: Name and unit of the values.
        limits: Values of the first and the last colour.
        cuts: Where lines are drawn, between layers.
        axis_names: Of columns and rows.
    """
    columns_of_axes = min(2, len(matrices))
    n_rows = -(-len(matrices) // 2)
    figure, axes = _canvas(n_rows * columns_of_axes, width=9.6, height=4.6 * n_rows, columns=columns_of_axes)
    extent = (columns[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5, rows[0] - 0.5)
    for one, (title, matrix) in zip(axes, matrices.items()):
        image = one.imshow(matrix, cmap="viridis", vmin=limits[0], vmax=limits[1], extent=extent)
        one.set(xlabel=axis_names[0], ylabel=axis_names[1], title=title, xticks=_ticks(columns), yticks=_ticks(rows))
        for cut in cuts:
            one.axvline(cut, color="white", linewidth=1.2)
            one.axhline(cut, color="white", linewidth=1.2)
    for one in axes[len(matrices) :]:
        one.set_axis_off()
    figure.colorbar(image, ax=axes, label=unit, fraction=0.046, pad=0.03)
    return _svg(figure)


def model_maps(
    matrices: Mapping[str, Float[np.ndarray, "layer layer"]],
    *,
    layers: Mapping[str, Sequence[int]],
    cuts: Mapping[str, Sequence[float]],
    unit: str,
    limits: tuple[float, float],
    axis_name: str = "layer",
) -> bytes:
    """Matrices over layers of models of any depth side by side, on one scale of colours.

    Args:
        matrices: By the name of each model.
        layers: Its layer numbers.
        cuts: Where lines are drawn, between its layers.
        unit: Name and unit of the values.
        limits: Values of the first and the last colour.
        axis_name: Of rows and columns.
    """
    columns = min(3, len(matrices))
    n_rows = -(-len(matrices) // columns)
    figure, axes = _canvas(n_rows * columns, width=9.6, height=9.6 / (columns + 0.4) * n_rows, columns=columns)
    for one, (name, matrix) in zip(axes, matrices.items()):
        image = one.imshow(matrix, cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        ticks = range(0, len(matrix), max(1, -(-len(matrix) // (16 if columns == 1 else 8))))
        labels = [layers[name][i] for i in ticks]
        one.set(title=name, xlabel=axis_name, ylabel=axis_name)
        one.set_xticks(ticks, labels)
        one.set_yticks(ticks, labels)
        for cut in cuts[name]:
            one.axvline(cut, color="white", linewidth=1.2)
            one.axhline(cut, color="white", linewidth=1.2)
    for one in axes[len(matrices) :]:
        one.set_axis_off()
    figure.colorbar(image, ax=axes, label=unit, fraction=0.046, pad=0.03)
    return _svg(figure)


def curves(
    lines: Mapping[str, Curve],
    *,
    x_name: str,
    y_name: str,
    cuts: Sequence[float] = (),
    log_y: bool = False,
    log_x: bool = False,
    dashed: Sequence[str] = (),
) -> bytes:
    """Lines with bands over one axis; `cuts` are dotted verticals. Those named in `dashed` have the others' colours."""
    figure, (axes,) = _canvas(1, width=8, height=4.2)
    _draw_curves(axes, {name: line for name, line in lines.items() if name not in dashed}, cuts)
    if dashed:
        _draw_curves(axes, {name: lines[name] for name in dashed}, (), linestyle="--")
    axes.set(xlabel=x_name, ylabel=y_name)
    if log_y:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
    return _svg(figure)


def pictures(
    values: Mapping[str, Float[np.ndarray, "height width"]], *, unit: str, limits: tuple[float, float], columns: int = 2
) -> bytes:
    """Pictures without axes side by side, each with its title, on one scale of colours; NaN is left white.

    Args:
        values: By the title of each.
        unit: Name and unit of the values.
        limits: Values of the first and the last colour.
        columns: Pictures side by side.
    """
    columns = min(columns, len(values))
    n_rows = -(-len(values) // columns)
    figure, axes = _canvas(n_rows * columns, width=9.6, height=9.0 / columns * n_rows, columns=columns)
    for one, (title, picture) in zip(axes, values.items()):
        image = one.imshow(picture, cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        one.set_title(title, fontsize=10)
    for one in axes:
        one.set_axis_off()
    figure.colorbar(image, ax=axes, label=unit, fraction=0.046, pad=0.03)
    return _svg(figure)


def signed_maps(
    matrices: Mapping[str, Float[np.ndarray, "channel channel"]], *, unit: str, largest: float, axis_name: str
) -> bytes:
    """Square matrices of both signs side by side, zero in the middle of one scale of colours; NaN is left white.

    Args:
        matrices: By the title of each.
        unit: Name and unit of the values.
        largest: Value of the last colour, and less than zero of the first.
        axis_name: Of rows and columns, that are counted from 1.
    """
    columns = min(4, len(matrices))
    n_rows = -(-len(matrices) // columns)
    figure, axes = _canvas(n_rows * columns, width=9.6, height=9.6 / (columns + 0.3) * n_rows, columns=columns)
    for one, (title, matrix) in zip(axes, matrices.items()):
        extent = (0.5, len(matrix) + 0.5, len(matrix) + 0.5, 0.5)
        image = one.imshow(matrix, cmap="RdBu_r", vmin=-largest, vmax=largest, extent=extent, interpolation="nearest")
        one.set_title(title, fontsize=10)
        one.set_xlabel(axis_name)
    axes[0].set_ylabel(axis_name)
    for one in axes[len(matrices) :]:
        one.set_axis_off()
    figure.colorbar(image, ax=axes, label=unit, fraction=0.046, pad=0.03)
    return _svg(figure)


def paths_on_plane(
    points: Float[np.ndarray, "image layer 2"], labels: Sequence[int], *, x_name: str, y_name: str
) -> bytes:
    """One line for each image through its layers, in the colour of its class; a dot where it ends."""
    figure, (axes,) = _canvas(1, width=8, height=6)
    classes = sorted(set(labels))
    for path, label in zip(points, labels):
        colour = _COLOURS[classes.index(label) % len(_COLOURS)]
        axes.plot(path[:, 0], path[:, 1], color=colour, linewidth=0.9, alpha=0.55)
        axes.plot(path[-1:, 0], path[-1:, 1], "o", color=colour, markersize=5)
    for i, label in enumerate(classes):
        axes.plot([], [], "o-", color=_COLOURS[i % len(_COLOURS)], label=f"class {label}")
    axes.set(xlabel=x_name, ylabel=y_name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, frameon=False)
    return _svg(figure)


def depth_overview(
    distance: Float[np.ndarray, "layer layer"],
    cka: Float[np.ndarray, "state state"],
    speeds: Mapping[str, Curve],
    *,
    layers: Sequence[int],
    states: Sequence[int],
    cuts: Sequence[float],
    jumps: Mapping[str, Sequence[float]],
) -> bytes:
    """Phases, jumps of the angular speed and CKA, one above the other on one axis of layers.

    Args:
        distance: Between layers.
        cka: Between states.
        speeds: By token kind, radians per layer; x is between the two layers of a step.
        layers: Rows of `distance`.
        states: Rows of `cka`.
        cuts: Between the phases.
        jumps: Where the speeds of each kind are cut.
    """
    figure, axes = _canvas(3, width=7.2, height=14, ratios=(2.2, 1.3, 2.2), share_x=True)
    panels = [
        (axes[0], distance, layers, "distance: mean of 1 - cosine", (0, None)),
        (axes[2], cka, states, "linear CKA, unbiased", (0, 1)),
    ]
    for one, matrix, names, unit, (low, high) in panels:
        extent = (names[0] - 0.5, names[-1] + 0.5, names[-1] + 0.5, names[0] - 0.5)
        image = one.imshow(matrix, cmap="viridis", vmin=low, vmax=high, extent=extent, aspect="auto")
        for cut in cuts:
            one.axvline(cut, color=_CUT, linewidth=1.4)
            one.axhline(cut, color=_CUT, linewidth=1.4)
        one.set(ylabel="layer", yticks=_ticks(names))
        figure.colorbar(image, ax=one, label=unit, location="top", fraction=0.05, pad=0.02, shrink=0.7)
    _draw_curves(axes[1], speeds, cuts)
    for i, (kind, places) in enumerate(jumps.items()):
        colour = _COLOURS[list(speeds).index(kind) % len(_COLOURS)]
        axes[1].plot(
            places,
            [1.02 + 0.045 * i] * len(places),
            "v",
            color=colour,
            markersize=7,
            clip_on=False,
            transform=axes[1].get_xaxis_transform(),
        )
    axes[1].set_ylabel("angular speed, rad per layer")
    axes[2].set(xlabel="layer", xlim=(states[0] - 0.5, states[-1] + 0.5), xticks=_ticks(states))
    return _svg(figure)


def depth_curves(
    lines: Mapping[str, Float[np.ndarray, " point"]],
    *,
    x: Sequence[float],
    x_name: str,
    y_name: str,
    log_y: bool = False,
) -> bytes:
    """Lines of places in order of depth over one axis, coloured from the first (dark) to the last (light)."""
    figure, (axes,) = _canvas(1, width=8, height=4.6)
    for name, colour, values in zip(lines, _depth_colours(len(lines)), lines.values(), strict=True):
        axes.plot(x, values, marker="o", markersize=3, linewidth=1.5, color=colour, label=name)
    axes.set(xlabel=x_name, ylabel=y_name)
    if log_y:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def plane_paths(
    paths: Mapping[str, Float[np.ndarray, "point 2"]], *, points: Sequence[str], axis_names: tuple[str, str]
) -> bytes:
    """Ways through a plane, coloured from the first (dark) to the last (light); names at the ends of the last one.

    Args:
        paths: By name, each with one place for each of `points`.
        points: Their names.
        axis_names: Of the two directions, with units.
    """
    figure, (axes,) = _canvas(1, width=8, height=5.4)
    for name, colour, path in zip(paths, _depth_colours(len(paths)), paths.values(), strict=True):
        axes.plot(path[:, 0], path[:, 1], marker="o", markersize=3.5, linewidth=1.5, color=colour, label=name)
        axes.plot(*path[0], marker="s", markersize=6, color=colour)
    for at in (0, -1):
        axes.annotate(points[at], path[at], xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _depth_colours(n: int) -> Sequence[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / max(n - 1, 1)) for i in range(n)]


def _draw_curves(axes: Any, lines: Mapping[str, Curve], cuts: Sequence[float], linestyle: str = "-") -> None:
    for i, (name, (x, y, band)) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(x, y, linestyle, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=name)
        if band is not None and np.isfinite(band).all():
            axes.fill_between(x, y - band, y + band, color=colour, alpha=0.15, linewidth=0)
    for cut in cuts:
        axes.axvline(cut, color=_CUT, linewidth=1.2, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=9, frameon=False)


def _ticks(layers: Sequence[int]) -> Sequence[int]:
    return layers[:: max(1, -(-len(layers) // 16))]


def _canvas(
    n: int,
    *,
    width: float,
    height: float,
    columns: int = 1,
    ratios: Sequence[float] | None = None,
    share_x: bool = False,
) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasSVG(figure)
    axes = figure.subplots(n // columns, columns, squeeze=False, sharex=share_x, height_ratios=ratios)
    return figure, list(axes.flat)


def _svg(figure: Any) -> bytes:
    import matplotlib

    out = io.BytesIO()
    # The salt: or identifiers in the file would be drawn at random.
    with matplotlib.rc_context({"svg.hashsalt": "figure"}), warnings.catch_warnings():
        # A second for the place of a legend is long, on a busy machine no matter.
        warnings.filterwarnings("ignore", "Creating legend with loc", UserWarning)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()

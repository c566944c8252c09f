"""What a page shows of trainings: losses, similarity, fits over the epochs, ways of the CLS token, and statements."""

from collections.abc import Callable, Sequence

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, heat_maps, plane_paths
from analysis.training.runs import Point, Run
from analysis.training.spectra_sections import percent
from analysis.training.taps import tap_names, tap_title

Column = tuple[str, Callable[[Point], Cell]]


def paths_section(run: Run, origin: Origin) -> Section:
    """The CLS token's way through depth at every checkpoint, on the plane of the last one."""
    plane = run.last.measured.plane
    names = [tap_title(tap) for tap in tap_names(len(run.last.measured.cls_path) - 2)[1:]]
    paths = {f"epoch {point.epoch}": plane.project(point.measured.cls_path) for point in run.points}
    share = f"{percent(plane.explained.sum())} of the variance of the CLS states of epoch {run.last.epoch}"
    rows: list[Sequence[Cell]] = [
        [point.epoch, name, float(x), float(y)]
        for point, path in zip(run.points, paths.values(), strict=True)
        for name, (x, y) in zip(names, path, strict=True)
    ]
    lengths = {name: float(np.linalg.norm(np.diff(path, axis=0), axis=1).sum()) for name, path in paths.items()}
    listed = ", ".join(f"{name} {length:.3g}" for name, length in lengths.items())
    return Section(
        title=f"Way of the CLS token ({run.name})",
        text=[f"The plane holds {share}. Length of the way in it: {listed}, in units of the states."],
        parts=[
            Figure(
                title="CLS token through depth",
                svg=plane_paths(
                    paths,
                    points=names,
                    axis_names=(
                        f"first principal direction, {percent(plane.explained[0])} of the variance",
                        f"second, {percent(plane.explained[1])}",
                    ),
                ),
                caption="Mean over images, from the positions (square) over the blocks to the final norm; all "
                "checkpoints on the plane of the last. The patch embedding has no CLS token, and is left out.",
                origin=origin,
            ),
            Table(
                name=f"cls_paths_{_slug(run.name)}",
                title="CLS token through depth",
                caption="Coordinates of the mean state in the plane.",
                columns=["epoch", "tap", "first", "second"],
                rows=rows,
                origin=origin,
            ),
        ],
    )


def training_section(runs: Sequence[Run], origin: Origin) -> Section:
    """Similarity of layers, contrast of phases, fit of a Raptor and losses over the epochs of one or more trainings."""
    has_fit = any(point.measured.raptor is not None for run in runs for point in run.points)
    parts: list[Figure | Table] = []
    for title, caption, quantities in (*_FIGURES, *(_FITS if has_fit else ())):
        if len(runs) == 1:
            parts.append(_over_epochs(title, caption, quantities, runs, origin))
        else:  # a figure for each quantity, with a line for each run
            parts += [_over_epochs(f"{title}, {one}", caption, [one], runs, origin) for one in quantities]
    if len(runs) == 1:
        parts.append(_similarity_maps(runs[0], origin))
    parts.append(training_table("training", runs, origin))
    text = [statement for run in runs for statement in (*_untrained(run), *_overfitting(run))]
    return Section(title="Similarity, fit and losses over training", text=text, parts=parts)


def training_table(name: str, runs: Sequence[Run], origin: Origin) -> Table:
    """One row for each checkpoint of each run, with everything that the curves are drawn from."""
    return Table(
        name=name,
        title="Checkpoints",
        caption="Losses in nats without augmentation; similarity is the mean cosine between two layers of 1 to L; "
        "contrast that within phases less that across; R2 the mean over layers 1 to L.",
        columns=["run", "stochastic depth", "seed", *(title for title, _ in COLUMNS), "phases"],
        rows=[
            [
                run.name,
                point.checkpoint.config.drop_path,
                point.checkpoint.config.seed,
                *(value(point) for _, value in COLUMNS),
                point.measured.phases.blocks,
            ]
            for run in runs
            for point in run.points
        ],
        origin=origin,
    )


def fit_of(point: Point, kind: str, *, one_mean: bool = False) -> float:
    """Mean R2 of a kind over layers 1 to L; NaN without a Raptor, or where no layer's states vary."""
    raptor = point.measured.raptor
    values = None if raptor is None else (raptor.r2_one_mean if one_mean else raptor.r2)[kind]
    return float("nan") if values is None or not np.isfinite(values).any() else float(np.nanmean(values))


def _similarity(kind: str) -> Callable[[Point], Cell]:
    return lambda point: point.measured.similarity(kind)


def _fit(kind: str, one_mean: bool = False) -> Callable[[Point], Cell]:
    return lambda point: fit_of(point, kind, one_mean=one_mean)


def _raptor_accuracy(point: Point) -> Cell:
    raptor = point.measured.raptor
    return float("nan") if raptor is None or raptor.accuracy is None else raptor.accuracy


COLUMNS: Sequence[Column] = (
    ("epoch", lambda point: point.epoch),
    ("train loss", lambda point: point.checkpoint.train.loss),
    ("val loss", lambda point: point.checkpoint.val.loss),
    ("train accuracy", lambda point: point.checkpoint.train.accuracy),
    ("val accuracy", lambda point: point.checkpoint.val.accuracy),
    ("similarity cls", _similarity("cls")),
    ("similarity patches", _similarity("patches")),
    ("contrast", lambda point: point.measured.phases.contrast),
    ("association", lambda point: point.measured.phases.score),
    ("association, random cuts", lambda point: point.measured.phases.random_mean),
    ("R2 cls", _fit("cls")),
    ("R2 patches", _fit("patches")),
    ("R2 cls, one mean", _fit("cls", one_mean=True)),
    ("R2 patches, one mean", _fit("patches", one_mean=True)),
    ("Raptor accuracy", _raptor_accuracy),
)
_BY_NAME = dict(COLUMNS)
_FIGURES = (
    (
        "Loss",
        "Cross-entropy, nats, of images as they are: no augmentation, no dropped branch.",
        ("train loss", "val loss"),
    ),
    (
        "Similarity of layers",
        "Mean cosine between the states of two layers of 1 to L, over images and tokens.",
        ("similarity cls", "similarity patches"),
    ),
    (
        "Contrast of phases",
        "Mean cosine between layers of one phase less that between layers of different phases; CLS and patch mean.",
        ("contrast",),
    ),
)
_FITS = (
    (
        "Fit of a Raptor",
        "R2 of the rolled-out states on held-out images, mean over layers 1 to L, each channel about its own mean.",
        ("R2 cls", "R2 patches"),
    ),
    (
        "Fit of a Raptor, one mean",
        "The same about one mean over all channels, as the Raptor paper measures.",
        ("R2 cls, one mean", "R2 patches, one mean"),
    ),
)


def _over_epochs(title: str, caption: str, quantities: Sequence[str], runs: Sequence[Run], origin: Origin) -> Figure:
    lines: dict[str, Curve] = {}
    for run in runs:
        x = np.array([point.epoch for point in run.points], dtype=np.float64)
        for quantity in quantities:
            name = quantity if len(runs) == 1 else run.name
            lines[name] = (x, np.array([_BY_NAME[quantity](point) for point in run.points], dtype=np.float64), None)
    return Figure(
        title=f"{title} over training",
        svg=curves(lines, x_name="epoch (0: untrained)", y_name=title.lower()),
        caption=caption,
        origin=origin,
    )


def _similarity_maps(run: Run, origin: Origin) -> Figure:
    chosen = sorted({0, len(run.points) // 2, len(run.points) - 1})
    maps = {
        f"{kind}, epoch {run.points[i].epoch}": run.points[i].measured.cosines[kind]
        for i in chosen
        for kind in ("cls", "patches")
    }
    layers = range(len(run.last.measured.cosines["cls"]))
    return Figure(
        title="Cosine similarity between layers over training",
        svg=heat_maps(maps, rows=layers, columns=layers, unit="mean cosine", limits=(-0.2, 1.0)),
        caption="Mean over images and tokens; 0 is what enters the first block, the same for all images in CLS.",
        origin=origin,
    )


def _untrained(run: Run) -> list[str]:
    """The paper: an untrained ViT is easier to reconstruct than a trained one."""
    first, last = run.points[0], run.last
    if first.epoch != 0 or last.epoch == 0 or first.measured.raptor is None:
        return []
    names = ("R2 cls", "R2 patches", "R2 cls, one mean", "R2 patches, one mean")
    pairs = {name: (_number(first, name), _number(last, name)) for name in names}
    holds = {name: untrained > trained for name, (untrained, trained) in pairs.items()}
    listed = "; ".join(f"{name} {a:.3f} against {b:.3f}" for name, (a, b) in pairs.items())
    return [
        f"{run.name}, untrained against epoch {last.epoch}: {listed}. The Raptor paper finds untrained ViTs easier to "
        f"reconstruct: here so in {sum(holds.values())} of {len(holds)}."
    ]


def _overfitting(run: Run) -> list[str]:
    """The paper: once overfitting starts, similarity and fit fall together."""
    best, last = run.least_val_loss, run.last
    if best.epoch == last.epoch:
        losses = f"{last.checkpoint.val.loss:.3f}; training loss {last.checkpoint.train.loss:.3f}"
        return [
            f"{run.name}: held-out loss is least at the last checkpoint, epoch {last.epoch} ({losses}): it has not "
            "begun to rise."
        ]
    names = ["similarity cls", "similarity patches"]
    names += ["R2 cls", "R2 patches"] if last.measured.raptor is not None else []
    falls = {name: (_number(best, name), _number(last, name)) for name in names}
    listed = "; ".join(f"{name} {a:.3f} to {b:.3f}" for name, (a, b) in falls.items())
    n_falling = sum(b < a for a, b in falls.values())
    return [
        f"{run.name}: held-out loss is least at epoch {best.epoch} ({best.checkpoint.val.loss:.3f}) and "
        f"{last.checkpoint.val.loss:.3f} at epoch {last.epoch}; from there to here {listed}. The Raptor paper says "
        f"that similarity and fit fall together once overfitting starts: {n_falling} of {len(falls)} fall here."
    ]


def _number(point: Point, column: str) -> float:
    return float(_BY_NAME[column](point))  # type: ignore[arg-type]


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)

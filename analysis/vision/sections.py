"""What a report shows of a teacher's sub-layers, places of tokens and skips, with statements of Raghu et al. 2021."""

from collections.abc import Iterable

import numpy as np

from analysis.accumulate import finite_mean
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, heat_maps, model_maps, pictures
from analysis.similarity import Cka, dropped_text
from analysis.verdicts import no_verdict, verdict
from analysis.vision.measure import Localised
from analysis.vision.skips import SkipAblation
from analysis.vision.taps import PARTS, tap_names
from infra.console import UserError


def sub_layer_section(found: Cka, n_blocks: int, origin: Origin) -> Section:
    """CKA between all sub-layers."""
    names, values = tap_names(n_blocks), found.values
    name = f"{len(names)} sub-layers"
    sums = [i for i, name in enumerate(names) if name.endswith("sum2")]
    quarter = max(1, n_blocks // 4)
    across = finite_mean(values[np.ix_(sums[:quarter], sums[-quarter:])])
    rows: list[list[Cell]] = [[name, *map(float, row)] for name, row in zip(names, values)]
    return Section(
        title="Sub-layers",
        text=[
            f"Mean CKA between outputs of the lowest {quarter} and the highest {quarter} blocks: {across:.3f}. Raghu "
            "et al. report that lower and upper layers of a ViT are much alike; counted as such above 0.5. "
            + verdict(across > 0.5, n_images=found.n_rows, values=[across]),
            f"Mean CKA of a state with what the next block's attention adds to it: {_next(values, 'attention'):.3f}, "
            f"and with the sum of both: {_next(values, 'sum1'):.3f}. Such differences are the grid of the figure.",
        ],
        parts=[
            Figure(
                title="Linear CKA between all sub-layers",
                svg=model_maps(
                    {name: values},
                    layers={name: range(len(names))},
                    cuts={name: []},
                    unit="linear CKA, unbiased",
                    limits=(0, 1),
                    axis_name="sub-layer",
                ),
                caption="All tokens of an image as one vector. 0: embedded sequence; then of each block "
                f"{', '.join(PARTS)}; last, the final norm. Branches as they are added. {found.n_batches} batches"
                f"{dropped_text(found)}, minibatch CKA with the unbiased HSIC.",
                origin=origin,
            ),
            Table(
                name="sub_layer_cka",
                title="CKA between sub-layers",
                caption="Rows and columns are sub-layers.",
                columns=["sub-layer", *names],
                rows=rows,
                origin=origin,
            ),
        ],
    )


def _next(values: np.ndarray, part: str) -> float:
    """Mean CKA between the output of each block, the embedding first, and a part of the block that follows."""
    before = np.arange(0, len(values) - 2, len(PARTS))
    return finite_mean(values[before, before + 1 + PARTS.index(part)])


def localisation_section(found: Localised, origin: Origin, *, has_cls: bool) -> Section:
    """How well tokens keep to their own places.

    Args:
        found: Of the store.
        origin: Of the images.
        has_cls: Whether the teacher has a CLS token, as those of the statement have.

    Raises:
        UserError: At no layer does a token have a CKA with its own patch.
    """
    layers = list(found.by_layer)
    x = np.array(layers, dtype=np.float64)
    shares = np.array([one.own_share() for one in found.by_layer.values()])
    contrasts = np.array([one.contrast() for one in found.by_layer.values()])
    if not np.isfinite(shares).any():
        raise UserError("every patch has the same pixels, or every token the same states, in all images")
    rows, columns = found.grid
    n_patches = rows * columns
    last = found.by_layer[layers[-1]]
    known = int(np.isfinite(np.diagonal(last.cka)).sum())
    places = {
        "corner": (0, 0),
        "border": (0, columns // 2),
        "inside": (rows // 4, columns // 4),
        "centre": (rows // 2, columns // 2),
    }
    maps = {
        f"layer {layer}, {name}": found.by_layer[layer].cka[row * columns + column].reshape(found.grid)
        for layer in _some(layers, 3)
        for name, (row, column) in places.items()
    }
    seen = "all" if found.n_seen == found.n_values else f"{found.n_seen} of {found.n_values}"
    shown: dict[str, Curve] = {"own patch is the nearest": (x, shares, None)}
    lines: dict[str, Curve] = {"own less other patches": (x, contrasts, None)}
    return Section(
        title="Localisation",
        text=[
            f"At the last layer {shares[-1]:.0%} of the tokens resemble the pixels of their own patch most, of "
            f"{known} whose pixels differ between images; chance is {1 / n_patches:.1%}. Raghu et al. report that "
            "tokens of a ViT with CLS keep to their places up to the last layer, and those of one with mean pooling "
            "less; counted as such above a half. "
            + (
                verdict(bool(shares[-1] > 0.5), n_images=origin.n_images, values=[shares[-1]])
                if has_cls
                else no_verdict("this teacher has no CLS")
            ),
            f"The share is highest at layer {layers[int(np.nanargmax(shares))]} ({np.nanmax(shares):.0%}) and below a "
            f"half at {sum(share < 0.5 for share in shares)} of {len(layers)} layers.",
        ],
        parts=[
            Figure(
                title="CKA of one token with each patch's pixels",
                svg=pictures(
                    maps, unit="linear CKA, unbiased", limits=(0, max(0.05, _largest(maps.values()))), columns=4
                ),
                caption="Each picture is the grid of patches, for one token at one layer: at a corner, a border, "
                "inside and at the centre. White: a patch whose pixels are the same in all images. Pixels come back "
                f"from state 0 in {seen} directions of a patch's values.",
                origin=origin,
            ),
            Figure(
                title="Tokens at their own places",
                svg=curves(shown, x_name="layer", y_name="share of tokens"),
                caption="Share of the tokens whose most similar patch of the image, by CKA, is their own.",
                origin=origin,
            ),
            Figure(
                title="Contrast of localisation",
                svg=curves(lines, x_name="layer", y_name="CKA"),
                caption="Mean CKA of tokens with their own patch's pixels, less that with the other patches.",
                origin=origin,
            ),
            Table(
                name="localisation",
                title="Localisation",
                caption="By layer: share of tokens nearest to their own patch, and the contrast of CKA.",
                columns=["layer", "own share", "contrast"],
                rows=[[layer, float(a), float(b)] for layer, a, b in zip(layers, shares, contrasts)],
                origin=origin,
            ),
        ],
    )


def skip_section(found: SkipAblation, images: str, origin: Origin) -> Section:
    """What is left when a block loses its skip connections.

    Args:
        found: Of some images.
        images: What these are to the teacher, a sentence.
        origin: Of the images.
    """
    without, clean = found.crossing()
    n_blocks = len(without)
    blocks = np.arange(1.0, n_blocks + 1)
    lower, known = int((without < clean)[1:].sum()), int(np.isfinite(without[1:]).sum())
    lines: dict[str, Curve] = {
        "without the block's skips": (blocks, without, None),
        "the whole model": (blocks, clean, None),
    }
    parts: list[Figure | Table] = [
        Figure(
            title="CKA across a block without its skips",
            svg=curves(lines, x_name="block", y_name="linear CKA, unbiased"),
            caption="Mean CKA between the states before a block and those after it. Both skips of the block are taken "
            "away; nothing is trained again.",
            origin=origin,
        )
    ]
    chosen = some_of(n_blocks, 4)
    states = range(n_blocks + 1)
    maps = {f"block {i + 1} without skips": found.cka[i] for i in chosen}
    parts.append(
        Figure(
            title="CKA between layers without the skips of one block",
            svg=heat_maps(maps, rows=states, columns=states, unit="linear CKA, unbiased", limits=(0, 1)),
            caption="States 0 to the last. Means of the tokens of each kind, joined.",
            origin=origin,
        )
    )
    text = [
        f"Without a block's skips the CKA across it is lower than in the whole model for {lower} of {known} blocks "
        f"from the second on, {finite_mean(without[1:]):.3f} against {finite_mean(clean[1:]):.3f} on average. "
        "Raghu et al. report a collapse in ViTs that were trained so. "
        + no_verdict("nothing is trained again; make skips trains ViTs without skips, on digits, and judges them")
    ]
    if found.accuracy is not None and found.clean_accuracy is not None:
        drawn: dict[str, Curve] = {
            "without the block's skips": (blocks, found.accuracy, None),
            "the whole model": (blocks, np.full(n_blocks, found.clean_accuracy), None),
        }
        parts.append(
            Figure(
                title="Accuracy without the skips of one block",
                svg=curves(drawn, x_name="block", y_name="accuracy"),
                caption="Of the teacher's own head.",
                origin=origin,
            )
        )
        text.append(
            f"Accuracy falls from {found.clean_accuracy:.3f} to between {found.accuracy.min():.3f} and "
            f"{found.accuracy.max():.3f}: blocks that have learned to add to the stream cannot carry it alone. {images}"
        )
    accuracies = [None] * n_blocks if found.accuracy is None else [float(one) for one in found.accuracy]
    rows: list[list[Cell]] = [[i + 1, float(without[i]), float(clean[i]), accuracies[i]] for i in range(n_blocks)]
    parts.append(
        Table(
            name="skip_ablation",
            title="Without skips",
            caption="By block: mean CKA across it without its skips and with them, and the accuracy without them.",
            columns=["block", "CKA without", "CKA with", "accuracy"],
            rows=rows,
            origin=origin,
        )
    )
    return Section(title="Without skip connections", text=text, parts=parts)


def some_of(n: int, n_shown: int) -> list[int]:
    """At most so many of 0 to n - 1, evenly, both ends included."""
    return np.unique(np.linspace(0, n - 1, min(n, n_shown)).round().astype(int)).tolist()


def _some(layers: list[int], n_shown: int) -> list[int]:
    return [layers[i] for i in some_of(len(layers), n_shown)]


def _largest(maps: Iterable[np.ndarray]) -> float:
    return max(float(np.nanmax(one, initial=0.0)) for one in maps)

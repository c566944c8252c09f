"""What a report shows of models that run: self-correction, layer swaps, a Raptor beside its teacher."""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.compare import Comparison
from analysis.interventions import Tracked
from analysis.model_runs import EPSILONS, N_DRAWS, N_SWAPPED, Swaps
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, heat_maps
from analysis.verdicts import verdict

# What counts as a paper's statement: a share of states that contract, and shares of the accuracy without a swap.
_CONTRACTS = 0.75
_KEEPS, _COLLAPSES = 0.9, 0.5


def self_correction_section(found: Mapping[str, Sequence[Tracked]], origin: Origin) -> Section:
    """Ratios of angles, by model."""
    parts: list[Figure | Table] = []
    text, rows = [], list[list[Cell]]()
    for name, tracked in found.items():
        starts = sorted({one.start for one in tracked})
        for kind in tracked[0].angles:
            lines: dict[str, Curve] = {}
            for epsilon in EPSILONS:
                ratios = np.array([one.ratio(kind) for one in tracked if one.epsilon == epsilon])
                lines[f"push of {epsilon:g} |x|"] = (np.array(starts, float), ratios, None)
                rows += [[name, kind, start, epsilon, float(r)] for start, r in zip(starts, ratios)]
            parts.append(
                Figure(
                    title=f"Self-correction of {name}, {kind}",
                    svg=curves(lines, x_name="layer of the push", y_name="angle at the end over angle at the push"),
                    caption="Every token is pushed by a Gaussian vector of so many lengths of its own; below 1 the "
                    "model bends the path back, above 1 it drives it away.",
                    origin=origin,
                )
            )
        small = [one.ratio(kind) for one in tracked for kind in one.angles if one.epsilon == EPSILONS[0]]
        text.append(
            f"{name}: of pushes of {EPSILONS[0]:g} |x|, {sum(r < 1 for r in small)} of {len(small)} (states, kinds) "
            "end at a smaller angle than they began. The Raptor paper reports weak contraction; counted as such from "
            f"{_CONTRACTS:.0%} of them on. "
            + verdict(np.mean([r < 1 for r in small]) >= _CONTRACTS, n_images=origin.n_images, values=small)
        )
    parts.append(
        Table(
            name="self_correction",
            title="Self-correction",
            caption="Angle at the end over angle at the push.",
            columns=["model", "kind", "start", "epsilon", "ratio"],
            rows=rows,
            origin=origin,
        )
    )
    return Section(title="Self-correction", text=text, parts=parts)


def swap_section(swaps: Swaps, images: str, origin: Origin) -> Section:
    """Accuracy after swaps, within phases and across.

    Args:
        swaps: Of some images.
        images: What these are to the teacher, a sentence.
        origin: Of the images.
    """
    lines: dict[str, Curve] = {"no swap": (np.array(N_SWAPPED, float), np.full(len(N_SWAPPED), swaps.clean), None)}
    rows: list[list[Cell]] = [["none", 0, 0, swaps.clean]]
    text, kept = [images], dict[str, np.ndarray]()
    for where, name in (("intra", "within a phase"), ("inter", "across phases")):
        means = np.array([np.mean(one) if len(one := swaps.by_kind[where, n]) else np.nan for n in N_SWAPPED])
        spread = np.array([np.std(one) if len(one := swaps.by_kind[where, n]) else np.nan for n in N_SWAPPED])
        kept[where] = means / swaps.clean if swaps.clean else np.full(len(means), np.nan)
        lines[name] = (np.array(N_SWAPPED, float), means, spread)
        rows += [[where, n, i, one] for n in N_SWAPPED for i, one in enumerate(swaps.by_kind[where, n])]
        text.append(
            f"{name}: accuracy {', '.join(f'{one:.3f}' for one in means)} with {', '.join(map(str, N_SWAPPED))} "
            f"layers swapped, {swaps.clean:.3f} without."
        )
    text.append(
        "The Raptor paper reports that swaps within a phase keep the accuracy and swaps across collapse it; counted as "
        f"such where, with any of these numbers of layers, the ones keep {_KEEPS:.0%} of it or more and the others "
        f"{_COLLAPSES:.0%} or less. "
        + verdict(
            bool((kept["intra"] >= _KEEPS).all() and (kept["inter"] <= _COLLAPSES).all()),
            n_images=origin.n_images,
            values=[*kept["intra"], *kept["inter"]],
        )
    )
    return Section(
        title="Layer swap",
        text=text,
        parts=[
            Figure(
                title="Accuracy after a layer swap",
                svg=curves(lines, x_name="layers replaced by another of the model's blocks", y_name="accuracy"),
                caption=f"Mean of {N_DRAWS} draws, band one standard deviation; no retraining, the teacher's own head.",
                origin=origin,
            ),
            Table(
                name="layer_swap",
                title="Layer swap",
                caption="One row for each draw.",
                columns=["where", "layers swapped", "draw", "accuracy"],
                rows=rows,
                origin=origin,
            ),
        ],
    )


def raptor_section(name: str, found: Comparison, origin: Origin) -> Section:
    """A Raptor's own path beside its teacher's."""
    x = np.array(found.layers, dtype=np.float64)
    cosines: dict[str, Curve] = {kind: (x, one.mean, one.std) for kind, one in found.cosines.items()}
    speeds: dict[str, Curve] = {
        kind: ((x[1:] + x[:-1]) / 2, one.speed.mean, one.speed.std) for kind, one in found.dynamics.items()
    }
    last = ", ".join(f"{kind} {one.mean[-1]:.3f}" for kind, one in found.cosines.items())
    best = found.cka[1:].argmax(axis=1)
    diagonal = int((best == np.arange(1, len(found.layers))).sum())
    kinds = ", ".join(found.cosines)
    return Section(
        title=f"Raptor beside teacher: {name}",
        text=[
            f"Cosine of its last state to the teacher's: {last}.",
            f"For {diagonal} of {len(found.layers) - 1} layers of the teacher the most similar layer of the Raptor, by "
            "CKA, is the one of the same number.",
        ],
        parts=[
            Figure(
                title="Linear CKA, teacher and Raptor",
                svg=heat_maps(
                    {kinds.replace(", ", "+"): found.cka},
                    rows=found.layers,
                    columns=found.layers,
                    unit="linear CKA, unbiased",
                    limits=(0, 1),
                    axis_names=("layer of the Raptor", "layer of the teacher"),
                ),
                caption="Minibatch CKA with the unbiased HSIC; the Raptor is rolled out from the teacher's state 0.",
                origin=origin,
            ),
            Figure(
                title="Cosine to the teacher's state",
                svg=curves(cosines, x_name="layer", y_name="cosine"),
                caption="Same image, same layer; patch means are those of the model's own patches. Bands: one "
                "standard deviation over images.",
                origin=origin,
            ),
            Figure(
                title="Angular speed of the Raptor",
                svg=curves(speeds, x_name="layer", y_name="radians per layer"),
                caption="As for the teacher. Bands: one standard deviation over images.",
                origin=origin,
            ),
            Table(
                name="raptor_cka",
                title="CKA, teacher and Raptor",
                caption="Rows: teacher's layers.",
                columns=["layer", *map(str, found.layers)],
                rows=[[layer, *map(float, row)] for layer, row in zip(found.layers, found.cka)],
                origin=origin,
            ),
            Table(
                name="raptor_cosine",
                title="Cosine to the teacher's state",
                caption="Mean and deviation over images.",
                columns=["kind", "layer", "mean", "std"],
                rows=[
                    [kind, layer, float(one.mean[i]), float(one.std[i])]
                    for kind, one in found.cosines.items()
                    for i, layer in enumerate(found.layers)
                ],
                origin=origin,
            ),
        ],
    )

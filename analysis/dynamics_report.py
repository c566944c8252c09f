"""What a report shows of depth as time: directions, norms, speeds, coherence, ranks of updates, basins of classes."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.dynamics import update_ranks
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.phase_report import Phases
from analysis.plots import Curve, curves
from analysis.report import curve_of, of_layers, of_steps, phase_cuts
from analysis.spectra import Covariances
from analysis.sums import Findings, step_middles
from analysis.verdicts import MARGIN, no_verdict, verdict

_LATE_RISE = 0.05


def dynamics_section(findings: Findings, phases: Phases, origin: Origin) -> Section:
    """Directions, norms, speeds, coherence, ranks of updates."""
    layers, cuts = findings.layers, phase_cuts(phases)
    x = np.asarray(layers, dtype=np.float64)
    middles = step_middles(layers)
    band = "Bands: one standard deviation over images."

    def figure(title: str, lines: Mapping[str, Curve], y_name: str, caption: str) -> Figure:
        drawn = curves(lines, x_name="layer", y_name=y_name, cuts=cuts)
        return Figure(title=title, svg=drawn, caption=f"{caption} Dotted: phases.", origin=origin)

    ranks = {kind: [update_ranks(values) for values in found.eigenvalues()] for kind, found in findings.updates.items()}
    stable = {kind: (middles, np.array([one.stable for one in of_kind]), None) for kind, of_kind in ranks.items()}
    effective = {kind: (middles, np.array([one.effective for one in of_kind]), None) for kind, of_kind in ranks.items()}
    parts: list[Figure | Table] = [
        figure(
            "Cosine to the final direction",
            of_layers(findings, "to_final"),
            "cosine to the last layer",
            f"Mean over images and tokens. {band}",
        ),
        figure("Norm", of_layers(findings, "norm"), "length of the state", f"Mean over images and tokens. {band}"),
        figure(
            "Angular speed",
            of_steps(findings, "speed"),
            "radians per layer",
            f"Angle between a token's directions at l and l + 1, drawn between them. {band}",
        ),
    ]
    many = [kind for kind in ("registers", "patches") if kind in findings.dynamics]
    if many:
        coherence = {f"{kind}, states": curve_of(x, findings.dynamics[kind].state_coherence) for kind in many}
        coherence |= {f"{kind}, updates": curve_of(middles, findings.dynamics[kind].update_coherence) for kind in many}
        parts.append(
            figure(
                "Coherence of an image's tokens",
                coherence,
                "length of the mean direction",
                f"1 where all tokens of an image point, or move, one way; 0 where they cancel. {band}",
            )
        )
    parts += [
        figure(
            "Stable rank of updates",
            stable,
            "stable rank",
            "Of the matrix of all tokens' angular updates u(l + 1) - u(l), pooled over images, not centred.",
        ),
        figure(
            "Effective rank of updates",
            effective,
            "effective rank",
            "exp of the entropy of its normalised singular values; the table has that of the squared ones too.",
        ),
    ]
    if findings.basins is not None:
        basins = findings.basins
        parts.append(
            figure(
                "Class basins",
                {
                    "within: to the own class's mean direction": curve_of(x, basins.within),
                    "between the mean directions of two classes": (x, basins.between, None),
                },
                "angle, radians",
                f"{basins.n_classes} classes; mean directions of the first half of the images, angles of the second. "
                "Bands: one standard deviation over images.",
            )
        )
        parts.append(
            figure(
                "Nearest class direction",
                {"accuracy": (x, basins.accuracy.mean, None)},
                "accuracy",
                f"Share of the second half's {basins.accuracy.n:,} images nearest to their own class.",
            )
        )
    rows: list[list[Cell]] = []
    for kind, found in findings.dynamics.items():
        for i, layer in enumerate(layers):
            step = i < len(layers) - 1
            rank = ranks[kind][i] if step else None
            rows.append(
                [
                    kind,
                    layer,
                    float(found.to_final.mean[i]),
                    float(found.norm.mean[i]),
                    float(found.state_coherence.mean[i]),
                    float(found.speed.mean[i]) if step else None,
                    float(found.update_coherence.mean[i]) if step else None,
                    *([rank.stable, rank.effective, rank.effective_squared] if rank else [None] * 3),
                ]
            )
    parts.append(
        Table(
            name="dynamics",
            title="Dynamics",
            caption="Per kind and layer; speed (rad), update coherence and ranks of the step to the next layer.",
            columns=[
                "kind",
                "layer",
                "cosine to final",
                "norm",
                "state coherence",
                "speed",
                "update coherence",
                "stable rank",
                "effective rank",
                "effective rank of squares",
            ],
            rows=rows,
            origin=origin,
        )
    )
    return Section(
        title="Dynamics",
        text=[
            *(
                _rank_statement(kind, [one.stable for one in of_kind], layers, findings.updates[kind])
                for kind, of_kind in ranks.items()
            ),
            *_speed_statement(findings),
            *_coherence_statement(findings),
        ],
        parts=parts,
    )


def _speed_statement(findings: Findings) -> list[str]:
    """Who turns when, where all three kinds are there."""
    speeds = {kind: found.speed.mean[1:] for kind, found in findings.dynamics.items()}
    if not {"cls", "registers", "patches"} <= set(speeds) or len(speeds["cls"]) < 3:
        return []
    third = max(1, len(speeds["cls"]) // 3)
    means = {kind: float(speeds[kind].mean()) for kind in ("registers", "patches", "cls")}
    late, usual = float(speeds["cls"][-third:].mean()), float(speeds["cls"][:-third].mean())
    holds = means["patches"] > (1 + MARGIN) * means["registers"] and late > (1 + MARGIN) * usual
    return [
        f"Mean angular speed from layer {findings.layers[1]} on, radians: registers {means['registers']:.3g}, patches "
        f"{means['patches']:.3g}; cls {late:.3g} in the last {third} steps, {usual:.3g} before. The Raptor paper "
        "reports slow registers, faster patches, and a CLS that turns sharply in the last layers; counted as such "
        f"where both the second and the third number exceed the one they are set beside by {MARGIN:.0%}. "
        + verdict(holds, n_images=findings.n_images_wide)
    ]


def _coherence_statement(findings: Findings) -> list[str]:
    """Whether patches gather in the last layers."""
    found = findings.dynamics.get("patches")
    if found is None or len(findings.layers) < 4:
        return []
    mean, start = found.state_coherence.mean[1:], len(findings.layers[1:]) * 2 // 3
    early, late = float(mean[start] - mean[0]), float(mean[-1] - mean[start])
    return [
        f"Coherence of an image's patches goes from {mean[0]:.3f} at layer {findings.layers[1]} over {mean[start]:.3f} "
        f"at layer {findings.layers[1 + start]} to {mean[-1]:.3f}. The Raptor paper reports a sharp rise late in "
        f"depth; counted as such where the last third rises by {_LATE_RISE} or more, and by more than all before it. "
        + verdict(late >= _LATE_RISE and late > early, n_images=findings.n_images_wide)
    ]


def _rank_statement(kind: str, stable: Sequence[float], layers: Sequence[int], updates: Covariances) -> str:
    """Whether ranks fall with depth; as in the phases, the step from the embedding is left out."""
    inner = stable[1:]
    lowest = int(np.nanargmin(inner)) if np.isfinite(inner).any() else 0
    falls = sum(after < before for before, after in itertools.pairwise(inner))
    dim = updates.mean.shape[1]
    if len(inner) < 2:
        judged = no_verdict("there is one step after that from layer 0")
    elif updates.n < dim:
        judged = no_verdict(f"{updates.n} vectors of {dim} channels, whose number bounds the rank")
    else:
        judged = verdict(inner[-1] < (1 - MARGIN) * inner[0], values=inner)
    return (
        f"{kind}: the stable rank of updates goes from {inner[0]:.3g} (step from layer {layers[1]}; {stable[0]:.3g} "
        f"from layer {layers[0]}) to {inner[-1]:.3g} (into layer {layers[-1]}); it falls at {falls} of "
        f"{len(inner) - 1} layers and is lowest, {inner[lowest]:.3g}, at the step from layer {layers[1 + lowest]}. The "
        "Raptor paper reports a fall with depth, to about 6 for DINOv2 ViT-B; counted as a fall where the last is "
        f"lower than the first by {MARGIN:.0%}, the step from layer 0 left out. {judged}"
    )

"""What a report shows of its findings: sections of figures with captions, tables, and statements with their numbers."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from analysis.accumulate import Moments
from analysis.dynamics import speed_phases, update_ranks
from analysis.measure import Findings, step_middles
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.partitions import segments_of, spans_text
from analysis.phase_report import Phases
from analysis.plots import Curve, curves, depth_overview, heat_maps
from analysis.similarity import dropped_text
from analysis.spectra import N_SINGULAR, Covariances, expected_participation_ratio, spectrum
from analysis.verdicts import MARGIN, no_verdict, verdict

_LATE_RISE = 0.05


def phase_cuts(phases: Phases) -> list[float]:
    """Where phases meet on an axis of layers: between the last layer of one and the first of the next."""
    segments = segments_of(phases.chosen.groups)
    return [] if segments is None else [start + 0.5 for start, _ in segments[1:]]


def speed_jumps(findings: Findings, n_phases: int) -> dict[str, list[float]]:
    """For each kind, where its angular speed is best cut into so many phases: the layers that these steps start from.

    As in the phases, layer 0 is left out: the first block's step from the embedding is many times the others.
    """
    inner = findings.layers[1:]
    if n_phases >= len(inner):
        return {}
    speeds = {kind: dynamics.speed.mean[1:] for kind, dynamics in findings.dynamics.items()}
    return {kind: [float(inner[i]) for i in speed_phases(speed, n_phases)] for kind, speed in speeds.items()}


def chance_hits(cuts: Sequence[float], places: Sequence[int]) -> float:
    """How many of the cuts have one of as many places within half a layer, on average over all choices of places.

    The sum over cuts of 1 - C(n - near, k) / C(n, k), for k of n places, of which `near` are that close to the cut.

    Args:
        cuts: Between the phases.
        places: All at which speeds can be cut.
    """
    n, k = len(places), min(len(cuts), len(places))
    near = [sum(abs(cut - place) <= 0.5 for place in places) for cut in cuts]
    return sum(1 - math.comb(n - one, k) / math.comb(n, k) for one in near)


def overview_section(findings: Findings, phases: Phases, origin: Origin) -> Section:
    """Phases, speed jumps and CKA blocks on one axis."""
    name = list(findings.cka)[-1]
    cuts = phase_cuts(phases)
    jumps = speed_jumps(findings, len(phases.chosen.groups))
    speeds = _of_steps(findings, "speed")
    figure = depth_overview(
        findings.distance[1:, 1:],
        findings.cka[name].values,
        speeds,
        layers=findings.layers[1:],
        states=findings.layers,
        cuts=cuts,
        jumps=jumps,
    )
    text = [
        f"Phases: {spans_text(phases.chosen.groups)}, {len(phases.chosen.groups)} blocks of states by "
        f"{phases.objective.replace('_', ' ')} (score {phases.chosen.score:.4g})."
    ]
    if jumps and cuts:
        near = {kind: [min(abs(cut - place) for place in places) for cut in cuts] for kind, places in jumps.items()}
        listed = "; ".join(f"{kind} at {', '.join(f'{p:g}' for p in jumps[kind])}" for kind in near)
        hits = sum(distance <= 0.5 for of_kind in near.values() for distance in of_kind)
        total = sum(map(len, near.values()))
        text.append(
            f"Angular speed is best cut into as many phases: {listed}. {hits} of {total} phase boundaries have "
            "such a cut within half a layer, where as many cuts at random would be so near to "
            f"{len(jumps) * chance_hits(cuts, findings.layers[2:-1]):.1f} on average."
        )
    text += _crossing_statement(findings, cuts)
    return Section(
        title="Phases, angular speed and CKA",
        text=text,
        parts=[
            Figure(
                title="Three views of one depth",
                svg=figure,
                caption="Above, distance between layers (mean over CLS and patch mean of 1 - cosine) with the phases "
                "outlined; middle, angular speed in radians per layer, each triangle where that kind's speed is best "
                f"cut; below, minibatch CKA of {name} with the same outlines.",
                origin=origin,
            )
        ],
    )


def similarity_section(findings: Findings, phases: Phases, origin: Origin) -> Section:
    """Cosines and CKA between layers."""
    layers, cuts = findings.layers, phase_cuts(phases)
    cosines = {kind: found.mean for kind, found in findings.cosines.items()}
    cka = {name: found.values for name, found in findings.cka.items()}
    parts: list[Figure | Table] = [
        Figure(
            title="Cosine similarity between layers",
            svg=heat_maps(cosines, rows=layers, columns=layers, unit="mean cosine", limits=(-0.2, 1.0), cuts=cuts),
            caption="Mean over images (and tokens) of the cosine between a token's states at two layers, 1 on the "
            "diagonal. No final norm. Lines: phases.",
            origin=origin,
        )
    ]
    text = []
    if cka:
        first = next(iter(findings.cka.values()))
        parts.append(
            Figure(
                title="Linear CKA between layers",
                svg=heat_maps(cka, rows=layers, columns=layers, unit="linear CKA, unbiased", limits=(0, 1), cuts=cuts),
                caption=f"Minibatch CKA with the unbiased HSIC over {first.n_batches} batches ({first.n_rows:,} "
                f"images{dropped_text(first)}), no unit. White where a layer's features are the same for all images.",
                origin=origin,
            )
        )
        for name, found in findings.cka.items():
            constant = [layer for layer, own in zip(layers, np.diagonal(found.values)) if np.isnan(own)]
            if constant:
                text.append(f"{name} is the same for all images at layer {', '.join(map(str, constant))}: no CKA.")
    parts += [
        _matrix_table(f"cosine_{kind}", f"Cosine, {kind}", values, layers, origin) for kind, values in cosines.items()
    ]
    parts += [_matrix_table(f"cka_{name}", f"CKA, {name}", values, layers, origin) for name, values in cka.items()]
    return Section(title="Similarity", text=text, parts=parts)


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
            _of_layers(findings, "to_final"),
            "cosine to the last layer",
            f"Mean over images and tokens. {band}",
        ),
        figure("Norm", _of_layers(findings, "norm"), "length of the state", f"Mean over images and tokens. {band}"),
        figure(
            "Angular speed",
            _of_steps(findings, "speed"),
            "radians per layer",
            f"Angle between a token's directions at l and l + 1, drawn between them. {band}",
        ),
    ]
    many = [kind for kind in ("registers", "patches") if kind in findings.dynamics]
    if many:
        coherence = {f"{kind}, states": _curve(x, findings.dynamics[kind].state_coherence) for kind in many}
        coherence |= {f"{kind}, updates": _curve(middles, findings.dynamics[kind].update_coherence) for kind in many}
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
                    "within: to the own class's mean direction": _curve(x, basins.within),
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


def spectra_section(findings: Findings, phases: Phases, origin: Origin) -> Section:
    """Six scalars and spectra of the states' covariance."""
    layers, cuts = findings.layers, phase_cuts(phases)
    x = np.asarray(layers, dtype=np.float64)
    scalars = {kind: [asdict(one) for one in found.scalars()] for kind, found in findings.covariances.items()}
    names = list(next(iter(scalars.values()))[0])
    parts: list[Figure | Table] = []
    for name in names:
        lines: dict[str, Curve] = {
            kind: (x, np.array([one[name] for one in of_kind]), None) for kind, of_kind in scalars.items()
        }
        title = name.replace("_", " ")
        unit = f"{title}, nats" if name == "entropy" else title
        parts.append(
            Figure(
                title=title.capitalize(),
                svg=curves(lines, x_name="layer", y_name=unit, cuts=cuts),
                caption="Of the covariance of states pooled over images (and tokens). Dotted: phases.",
                origin=origin,
            )
        )
    rows: list[list[Cell]] = []
    for kind, found in findings.covariances.items():
        eigenvalues = found.eigenvalues()
        chosen = sorted({0, len(layers) // 3, 2 * len(layers) // 3, len(layers) - 1})
        decays: dict[str, Curve] = {}
        for i in chosen:
            decay = spectrum(eigenvalues[i]).decay[:N_SINGULAR]
            if np.isfinite(decay).all():
                decays[f"layer {layers[i]}"] = (np.arange(1.0, len(decay) + 1), decay, None)
        parts.append(
            Figure(
                title=f"Singular values, {kind}",
                svg=curves(decays, x_name="rank of the direction", y_name="singular value over the first", log_y=True),
                caption=f"The first {N_SINGULAR} singular values of the centred states over the first, "
                f"{found.n:,} vectors. A layer whose states are all the same has none.",
                origin=origin,
            )
        )
        rows += [[kind, layer, found.n, *one.values(), _isotropic(found)] for layer, one in zip(layers, scalars[kind])]
    parts.append(
        Table(
            name="spectra",
            title="Six scalars",
            caption="Per kind and layer; n is the number of vectors, the limit about the participation ratio of "
            "as many independent isotropic ones.",
            columns=["kind", "layer", "n", *(name.replace("_", " ") for name in names), "isotropic limit"],
            rows=rows,
            origin=origin,
        )
    )
    return Section(
        title="Spectra",
        text=[
            f"{kind}: {found.n:,} vectors of {found.mean.shape[1]} channels; so many independent ones without a "
            f"preferred direction have a participation ratio of about {_isotropic(found):.1f} (Marchenko and Pastur). "
            "Kinds with other limits are to be compared as shares of theirs."
            for kind, found in findings.covariances.items()
        ],
        parts=parts,
    )


def _isotropic(found: Covariances) -> float:
    return expected_participation_ratio(found.mean.shape[1], found.n)


def _crossing_statement(findings: Findings, cuts: Sequence[float]) -> list[str]:
    crossing = np.isin(step_middles(findings.layers)[1:], cuts)
    if not crossing.any() or crossing.all():
        return []
    speeds = {kind: found.speed.mean[1:] for kind, found in findings.dynamics.items()}
    listed = "; ".join(
        f"{kind} {speed[crossing].mean():.3g} against {speed[~crossing].mean():.3g}" for kind, speed in speeds.items()
    )
    return [
        f"Mean angular speed of the steps into a new phase against those within one, radians: {listed}. The Raptor "
        "paper reports jumps at the boundaries of its phases; counted as such where the first is larger by "
        f"{MARGIN:.0%} for every kind. Both leave out the step from layer 0. "
        + verdict(
            all(speed[crossing].mean() > (1 + MARGIN) * speed[~crossing].mean() for speed in speeds.values()),
            n_images=min(found.speed.n for found in findings.dynamics.values()),
        )
    ]


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
    first, last = stable[0], stable[-1]
    falls = sum(after < before for before, after in itertools.pairwise(stable))
    lowest = int(np.nanargmin(stable)) if np.isfinite(stable).any() else 0
    dim = updates.mean.shape[1]
    if updates.n < dim:
        judged = no_verdict(f"{updates.n} vectors of {dim} channels, whose number bounds the rank")
    else:
        judged = verdict(last < (1 - MARGIN) * first, values=stable)
    return (
        f"{kind}: the stable rank of updates goes from {first:.3g} (step from layer {layers[0]}) to {last:.3g} (into "
        f"layer {layers[-1]}); it falls at {falls} of {len(stable) - 1} layers and is lowest, {stable[lowest]:.3g}, at "
        f"the step from layer {layers[lowest]}. The Raptor paper reports a fall with depth, to about 6 for DINOv2 "
        f"ViT-B; counted as a fall where the last is lower than the first by {MARGIN:.0%}. {judged}"
    )


def _matrix_table(name: str, title: str, values: np.ndarray, layers: Sequence[int], origin: Origin) -> Table:
    return Table(
        name=name.replace("+", "_"),
        title=title,
        caption="Rows and columns are layers.",
        columns=["layer", *map(str, layers)],
        rows=[[layer, *map(float, row)] for layer, row in zip(layers, values)],
        origin=origin,
    )


def _curve(x: np.ndarray, moments: Moments) -> Curve:
    return x, moments.mean, moments.std


def _of_layers(findings: Findings, name: str) -> dict[str, Curve]:
    x = np.asarray(findings.layers, dtype=np.float64)
    return {kind: _curve(x, getattr(found, name)) for kind, found in findings.dynamics.items()}


def _of_steps(findings: Findings, name: str) -> dict[str, Curve]:
    x = step_middles(findings.layers)
    return {kind: _curve(x, getattr(found, name)) for kind, found in findings.dynamics.items()}

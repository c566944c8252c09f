"""What a report shows of layers beside each other: phases, speeds and CKA on one axis, and similarity."""

import math
from collections.abc import Sequence

import numpy as np

from analysis.accumulate import Moments
from analysis.dynamics import speed_phases
from analysis.page import Figure, Origin, Section, Table
from analysis.partitions import segments_of, spans_text
from analysis.phase_report import Phases, even_score
from analysis.plots import Curve, depth_overview, heat_maps
from analysis.similarity import dropped_text
from analysis.sums import Findings, step_middles
from analysis.verdicts import MARGIN, verdict


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
    speeds = of_steps(findings, "speed")
    figure = depth_overview(
        findings.distance[1:, 1:],
        findings.cka[name].values,
        speeds,
        layers=findings.layers[1:],
        states=findings.layers,
        cuts=cuts,
        jumps=jumps,
    )
    text = []
    if len(phases.chosen.groups) > 1:
        text.append(
            f"Phases: {spans_text(phases.chosen.groups)}, {len(phases.chosen.groups)} blocks of states by "
            f"{phases.objective.replace('_', ' ')} (score {phases.chosen.score:.4g}; a depth with the same "
            f"similarities that moves evenly is cut with {even_score(phases):.4g} at best)."
        )
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


def _matrix_table(name: str, title: str, values: np.ndarray, layers: Sequence[int], origin: Origin) -> Table:
    return Table(
        name=name.replace("+", "_"),
        title=title,
        caption="Rows and columns are layers.",
        columns=["layer", *map(str, layers)],
        rows=[[layer, *map(float, row)] for layer, row in zip(layers, values)],
        origin=origin,
    )


def curve_of(x: np.ndarray, moments: Moments) -> Curve:
    return x, moments.mean, moments.std


def of_layers(findings: Findings, name: str) -> dict[str, Curve]:
    x = np.asarray(findings.layers, dtype=np.float64)
    return {kind: curve_of(x, getattr(found, name)) for kind, found in findings.dynamics.items()}


def of_steps(findings: Findings, name: str) -> dict[str, Curve]:
    x = step_middles(findings.layers)
    return {kind: curve_of(x, getattr(found, name)) for kind, found in findings.dynamics.items()}

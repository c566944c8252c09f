"""What a report shows of the covariance of states: six scalars and spectra by layer."""

from dataclasses import asdict

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.phase_report import Phases
from analysis.plots import Curve, curves
from analysis.report import phase_cuts
from analysis.spectra import N_SINGULAR, Covariances, expected_participation_ratio, spectrum
from analysis.sums import Findings


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

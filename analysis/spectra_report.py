"""What a report shows of the covariance of states: six scalars and spectra by layer."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.phase_report import Phases
from analysis.plots import Curve, curves, signed_maps
from analysis.report import phase_cuts
from analysis.spectra import (
    N_SINGULAR,
    Covariances,
    Spectrum,
    covariance_maps,
    expected_participation_ratio,
    spectral_scalars,
    spectrum,
)
from analysis.sums import Findings

_N_LISTED = 20  # eigenvalues in the table, as published


def spectra_section(findings: Findings, phases: Phases, origin: Origin) -> Section:
    """Six scalars and spectra of the states' covariance."""
    layers, cuts = findings.layers, phase_cuts(phases)
    x = np.asarray(layers, dtype=np.float64)
    eigenvalues = {kind: found.eigenvalues() for kind, found in findings.covariances.items()}
    scalars = {kind: [asdict(spectral_scalars(one)) for one in of_kind] for kind, of_kind in eigenvalues.items()}
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
    first_rows: list[list[Cell]] = []
    for kind, found in findings.covariances.items():
        spectra = [spectrum(values) for values in eigenvalues[kind]]
        parts += _spectrum_figures(kind, found, spectra, layers, origin)
        rows += [[kind, layer, found.n, *one.values(), _isotropic(found)] for layer, one in zip(layers, scalars[kind])]
        first_rows += [
            [kind, layer, i + 1, float(value**2), float(value), float(decay), float(share), float(total)]
            for layer, one in zip(layers, spectra)
            for i, (value, decay, share, total) in enumerate(
                zip(one.singular_values[:_N_LISTED], one.decay, one.explained, one.explained.cumsum())
            )
        ]
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
    parts.append(
        Table(
            name="eigenvalues",
            title="First eigenvalues",
            caption=f"Of the covariance, per kind and layer, the first {_N_LISTED}: in squares of the states' units, "
            "their square roots, these over the first, the share of the variance, and the share up to there.",
            columns=["kind", "layer", "rank", "eigenvalue", "singular value", "decay", "explained", "up to there"],
            rows=first_rows,
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


def _spectrum_figures(
    kind: str, found: Covariances, spectra: Sequence[Spectrum], layers: Sequence[int], origin: Origin
) -> list[Figure]:
    """Singular values, explained variance and the covariance itself at a few layers."""
    chosen = sorted({0, len(layers) // 3, 2 * len(layers) // 3, len(layers) - 1})
    decays, shares = {}, {}
    for i in chosen:
        if np.isfinite(spectra[i].decay).all():
            ranks = np.arange(1.0, len(spectra[i].decay[:N_SINGULAR]) + 1)
            decays[f"layer {layers[i]}"] = (ranks, spectra[i].decay[:N_SINGULAR], None)
            shares[f"layer {layers[i]}"] = (ranks, spectra[i].explained.cumsum()[:N_SINGULAR], None)
    maps, n_shown = covariance_maps(found, chosen)
    which = "All channels" if n_shown == found.mean.shape[1] else f"The {n_shown} channels of most variance"
    constant = "A layer whose states are all the same has none."
    return [
        Figure(
            title=f"Singular values, {kind}",
            svg=curves(decays, x_name="rank of the direction", y_name="singular value over the first", log_y=True),
            caption=f"The first {N_SINGULAR} singular values of the centred states over the first, "
            f"{found.n:,} vectors. {constant}",
            origin=origin,
        ),
        Figure(
            title=f"Explained variance, {kind}",
            svg=curves(shares, x_name="number of directions", y_name="share of the variance"),
            caption=f"Of the first directions together, up to {N_SINGULAR} of {found.mean.shape[1]}. {constant}",
            origin=origin,
        ),
        Figure(
            title=f"Covariance, {kind}",
            svg=signed_maps(
                {f"layer {layers[i]}": one for i, one in zip(chosen, maps)},
                unit="over mean variance",
                largest=1.0,
                axis_name="channel",
            ),
            caption=f"{which}, in the order of their variance at the last layer. Over the mean variance of all "
            "channels of that layer, no unit; beyond 1 the colour is the last. White: a layer whose states are all the "
            "same.",
            origin=origin,
        ),
    ]


def _isotropic(found: Covariances) -> float:
    return expected_participation_ratio(found.mean.shape[1], found.n)

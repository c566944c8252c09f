"""What a gallery shows: maps of each encoder's layers, its phases, and encoders against each other."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from analysis.accumulate import finite_mean
from analysis.gallery.encoders import Alike
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.partitions import segments_of, spans_text
from analysis.phase_report import Phases, even_score
from analysis.plots import heat_maps, model_maps
from analysis.similarity import Cka, dropped_text
from analysis.verdicts import MARGIN, verdict


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """One encoder of a gallery.

    Attributes:
        teacher: The model's name.
        location: Of its store.
        dim: Channels.
        alike: Similarity of its layers.
        phases: Cut of layers 1 on; None where there are too few for so many phases, or some are missing.
        origin: Of its numbers.
    """

    teacher: str
    location: str
    dim: int
    alike: Alike
    phases: Phases | None
    origin: Origin


def encoders_section(found: Mapping[str, Encoder], origin: Origin) -> Section:
    """One row for each, and how clear its phases are."""
    kinds = _kinds(found)
    rows: list[list[Cell]] = []
    for name, one in found.items():
        cosines: list[Cell] = [one.alike.mean_cosine(kind) if kind in one.alike.cosines else None for kind in kinds]
        scores: list[Cell] = [None] * 4
        if one.phases is not None and len(one.phases.chosen.groups) > 1:
            spans, score = spans_text(one.phases.chosen.groups), one.phases.chosen.score
            scores = [spans, score, even_score(one.phases), _best_random(one.phases)]
        rows.append([name, one.teacher, one.location, len(one.alike.layers), one.dim, *cosines, *scores])
    text = [f"{name}: {one.teacher}, {one.location}, {len(one.alike.layers)} layers." for name, one in found.items()]
    return Section(
        title="Encoders",
        text=[*text, *_block_statement(found)],
        parts=[
            Table(
                name="encoders",
                title="Encoders",
                caption="Mean cosine is that of different layers but layer 0. Score: of the phases, of the best cut of "
                "an evenly moving depth, and of the best of some random contiguous partitions into as many.",
                columns=[
                    *("encoder", "teacher", "store", "layers", "dim"),
                    *(f"mean cosine, {kind}" for kind in kinds),
                    *("phases", "score", "score if even", "best random"),
                ],
                rows=rows,
                origin=origin,
            )
        ],
    )


def _block_statement(found: Mapping[str, Encoder]) -> list[str]:
    """Whether the layers of encoders lie in blocks, or drift."""
    cut = [one for one in found.values() if one.phases is not None and len(one.phases.chosen.groups) > 1]
    if not cut:
        return []
    above = [(one.phases.chosen.score - 1, even_score(one.phases) - 1) for one in cut if one.phases is not None]
    ratios = [own / even if even > 0 else np.nan for own, even in above]
    clear = sum(ratio >= 1 + MARGIN for ratio in ratios)
    return [
        f"The phases of {clear} of {len(cut)} encoders score higher than the best cut of a depth with the same "
        f"similarities that moves evenly, by {MARGIN:.0%} or more of what that has above 1, the score of layers that "
        "are all alike. (The best cut beats random partitions of any depth.) The Raptor paper reports blocks of "
        "similar layers in every encoder it looks at; counted as such where all are clear. "
        + verdict(clear == len(cut), n_images=min(one.origin.n_images for one in cut), values=ratios)
    ]


def maps_section(found: Mapping[str, Encoder], origin: Origin) -> Section:
    """Similarity of each encoder's layers, side by side."""
    parts: list[Figure | Table] = []
    layers = {name: one.alike.layers for name, one in found.items()}
    cuts = {name: _cuts(one.phases) for name, one in found.items()}
    for kind in _kinds(found):
        maps = {name: one.alike.cosines[kind].mean for name, one in found.items() if kind in one.alike.cosines}
        parts.append(
            Figure(
                title=f"Cosine between layers, {kind}",
                svg=model_maps(maps, layers=layers, cuts=cuts, unit="mean cosine", limits=(-0.2, 1.0)),
                caption="Mean over images (and tokens) of the cosine between a token's states at two layers. Lines: "
                "phases.",
                origin=origin,
            )
        )
        parts += [
            _matrix(f"cosine_{kind}_{name}", f"Cosine, {kind}, {name}", layers[name], values, found[name].origin)
            for name, values in maps.items()
        ]
    cka = {name: one.alike.cka for name, one in found.items() if one.alike.cka is not None}
    if cka:
        values = {name: one.values for name, one in cka.items()}
        parts.append(
            Figure(
                title="Linear CKA between layers",
                svg=model_maps(values, layers=layers, cuts=cuts, unit="linear CKA, unbiased", limits=(0, 1)),
                caption="Of CLS and patch means joined, where there are both. White: a layer that is the same for all "
                f"images. Lines: phases. {_counted(cka)}",
                origin=origin,
            )
        )
        parts += [
            _matrix(f"cka_{name}", f"CKA, {name}", layers[name], values[name], found[name].origin) for name in cka
        ]
    return Section(title="Layers of each encoder", text=[], parts=parts)


def between_section(
    found: Mapping[tuple[str, str], Float64[np.ndarray, "layer other"]],
    encoders: Mapping[str, Encoder],
    origins: Mapping[tuple[str, str], Origin],
    left_out: list[str],
) -> Section:
    """CKA between the layers of each two encoders that saw the same images."""
    parts: list[Figure | Table] = []
    text = list(left_out)
    for (first, second), values in found.items():
        rows, columns = encoders[first].alike.layers, encoders[second].alike.layers
        title = f"{first} and {second}"
        parts.append(
            Figure(
                title=f"Linear CKA, {title}",
                svg=heat_maps(
                    {title: values},
                    rows=rows,
                    columns=columns,
                    unit="linear CKA, unbiased",
                    limits=(0, 1),
                    axis_names=(f"layer of {second}", f"layer of {first}"),
                ),
                caption="On the same images, of the one-token kinds that both have, joined.",
                origin=origins[first, second],
            )
        )
        parts.append(
            Table(
                name=f"cka_{first}_{second}",
                title=f"CKA, {title}",
                caption=f"Rows are layers of {first}, columns of {second}.",
                columns=["layer", *map(str, columns)],
                rows=[[layer, *map(float, row)] for layer, row in zip(rows, values)],
                origin=origins[first, second],
            )
        )
        text.append(_depth_statement(first, second, values))
    return Section(title="Encoders against each other", text=text, parts=parts)


def _depth_statement(first: str, second: str, values: np.ndarray) -> str:
    known = [i for i in range(1, len(values)) if np.isfinite(values[i]).any()]
    best = np.array([np.nanargmax(values[i]) for i in known])
    away = np.abs(best / (values.shape[1] - 1) - np.array(known) / (len(values) - 1))
    return (
        f"{first} and {second}: mean CKA {finite_mean(values[1:, 1:]):.3f}; for {int((away <= 0.2).sum())} of "
        f"{len(known)} layers of {first} the most similar layer of {second} lies at the same share of the "
        "depth, within a fifth."
    )


def _counted(cka: Mapping[str, Cka]) -> str:
    listed = "; ".join(f"{name}: {one.n_rows:,}{dropped_text(one)}" for name, one in cka.items())
    return f"Images: {listed}."


def _kinds(found: Mapping[str, Encoder]) -> list[str]:
    return list(dict.fromkeys(kind for one in found.values() for kind in one.alike.cosines))


def _cuts(phases: Phases | None) -> list[float]:
    segments = None if phases is None else segments_of(phases.chosen.groups)
    return [] if segments is None else [start + 0.5 for start, _ in segments[1:]]


def _best_random(phases: Phases) -> float | None:
    scores = [one.score for one in phases.controls["random contiguous"]]
    return max(scores) if scores else None


def _matrix(name: str, title: str, layers: tuple[int, ...], values: np.ndarray, origin: Origin) -> Table:
    return Table(
        name=name,
        title=title,
        caption="Rows and columns are layers.",
        columns=["layer", *map(str, layers)],
        rows=[[layer, *map(float, row)] for layer, row in zip(layers, values)],
        origin=origin,
    )

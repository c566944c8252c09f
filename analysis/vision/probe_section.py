"""What a report shows of linear probes, with the statements of Raghu et al. 2021."""

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, pictures
from analysis.verdicts import no_verdict, verdict
from analysis.vision.measure import N_SHOTS, LayerProbes
from analysis.vision.sections import some_of

_N_SHOWN = 6
_AHEAD = 0.02  # of accuracies


def probe_section(found: LayerProbes, origin: Origin) -> Section:
    """Accuracy of linear probes by layer and token."""
    x = np.array(found.layers, dtype=np.float64)
    lines: dict[str, Curve] = {name: (x, values, None) for name, values in found.pooled.items()}
    for name, values in (("registers", found.registers), ("patches", found.patches)):
        if values.shape[1]:
            lines[f"{name}, each by itself"] = (x, values.mean(axis=1), values.std(axis=1))
    lines["shuffled labels"] = (x, found.shuffled.mean(axis=1), found.shuffled.std(axis=1))
    single = found.patches[-1].mean()
    best = max(found.pooled, key=lambda name: float(found.pooled[name][-1]))
    top = found.pooled[best][-1]
    text = [
        f"At the last layer single patches name {single:.1%} rightly on average, {best} {top:.1%}; chance is "
        f"{found.chance:.1%}. Raghu et al. report that single patches of a ViT with CLS are poor probes in the last "
        "layers (6 to 12 %, where tokens of other models give 44 to 58 %); counted as such below half of the best. "
        + _of_shots(found, bool(single < top / 2))
    ]
    if "cls" in found.pooled:
        cls, mean = found.pooled["cls"], found.pooled["mean of all"]
        ahead = [layer for layer, a, b in zip(found.layers, cls, mean) if a > b]
        text.append(
            f"CLS is ahead of the mean of all tokens at {len(ahead)} of {len(found.layers)} layers; at the last one it "
            f"is {cls[-1]:.1%} against {mean[-1]:.1%}. Raghu et al. report that the mean of a ViT with CLS stays "
            f"behind in the last layers; counted as such from {_AHEAD:.0%} of the images at the last one on. "
            + _of_shots(found, bool(cls[-1] >= mean[-1] + _AHEAD))
        )
    rows: list[list[Cell]] = [
        [layer, name, float(values[i])] for name, values in found.pooled.items() for i, layer in enumerate(found.layers)
    ]
    rows += [
        [layer, f"register {j + 1}", float(found.registers[i, j])]
        for i, layer in enumerate(found.layers)
        for j in range(found.registers.shape[1])
    ]
    rows += [
        [layer, f"patch {place}", float(found.patches[i, j])]
        for i, layer in enumerate(found.layers)
        for j, place in enumerate(found.places)
    ]
    rows += [[layer, "shuffled labels", float(one.mean())] for layer, one in zip(found.layers, found.shuffled)]
    parts: list[Figure | Table] = [
        Figure(
            title="Linear probes by layer",
            svg=curves(lines, x_name="layer", y_name="accuracy"),
            caption=f"Ridge regression to -1 and +1 on {found.n_fit} images ({N_SHOTS} of each class where there are "
            f"as many), its strength chosen on further ones, accuracy on {found.n_test} images of {found.tested_on}. "
            f"Bands: one standard deviation over tokens. Shuffled labels: the mean of all tokens, fitted to "
            f"{found.shuffled.shape[1]} permutations of the labels.",
            origin=origin,
        )
    ]
    if len(found.places) == found.grid[0] * found.grid[1]:
        maps = {f"layer {found.layers[i]}": found.patches[i].reshape(found.grid) for i in some_of(len(x), _N_SHOWN)}
        parts.append(
            Figure(
                title="Probes of single patches",
                svg=pictures(maps, unit="accuracy", limits=(0, 1), columns=3),
                caption="Each picture is the grid of patches: accuracy of a probe of that token alone.",
                origin=origin,
            )
        )
    parts.append(
        Table(
            name="probes",
            title="Linear probes",
            caption="Accuracy by layer and representation.",
            columns=["layer", "representation", "accuracy"],
            rows=rows,
            origin=origin,
        )
    )
    return Section(title="Linear probes", text=text, parts=parts)


def _of_shots(found: LayerProbes, holds: bool) -> str:
    """A verdict on a teacher as theirs, where as many images of each class were fitted as by Raghu et al."""
    if "cls" not in found.pooled:
        return no_verdict("this teacher has no CLS")
    if found.least_shots < N_SHOTS:
        return no_verdict(f"they fit {N_SHOTS} images of each class, here one has {found.least_shots}")
    return verdict(holds, n_images=found.n_test)

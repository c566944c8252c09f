"""What a report shows of paths along depth: to their final direction, by class, and as a linear system."""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.dynamics import Basins, Dynamics
from analysis.linear_depth import LinearSpan
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.paths import BothDynamics, Paths, TokenPaths, rises_as_s
from analysis.plots import Curve, curves, paths_on_plane, plane_paths
from analysis.verdicts import no_verdict, verdict

WINDOW = 4
_CLOSE = 0.02  # of two cosines
_COMPACT = 0.9  # ratio of angles at the last layer over that at the first
_LEAST_OF_A_CLASS = 5  # images, on average


def final_direction_text(name: str, found: Mapping[str, Dynamics], layers: Sequence[int]) -> str:
    """Whether the cosine to the final direction rises as the Raptor paper says."""
    listed, shaped = [], []
    n_images = min(one.to_final.n for one in found.values())
    for kind, one in found.items():
        gamma = one.to_final.mean
        steps = np.diff(gamma)
        at = int(steps.argmax())
        shaped.append(rises_as_s(gamma))
        listed.append(
            f"{kind} from {gamma[0]:.2f} over {gamma[len(gamma) // 2]:.2f} at layer {layers[len(gamma) // 2]}, rising "
            f"at {int((steps >= 0).sum())} of {len(steps)} steps, steepest from layer {layers[at]} to {layers[at + 1]}"
        )
    return (
        f"Cosine to the final direction, {name}: {'; '.join(listed)}. The Raptor paper reports an S-shaped rise to 1; "
        "counted as such where no step falls and the steepest is neither the first nor the last. "
        + (no_verdict("of two steps or one") if len(layers) < 4 else verdict(all(shaped), n_images=n_images))
    )


def normed_section(found: BothDynamics, layers: Sequence[int], cuts: Sequence[float], origin: Origin) -> Section:
    """Directions after the final norm, beside those of raw states."""
    x = np.asarray(layers, dtype=np.float64)
    after = {kind: f"{kind}, after the norm" for kind in found.normed}
    raw: dict[str, Curve] = {kind: (x, one.to_final.mean, None) for kind, one in found.raw.items()}
    gamma: dict[str, Curve] = {after[kind]: (x, one.to_final.mean, None) for kind, one in found.normed.items()}
    speed: dict[str, Curve] = {
        kind: ((x[1:] + x[:-1]) / 2, one.speed.mean, one.speed.std) for kind, one in found.normed.items()
    }
    rows: list[list[Cell]] = [
        [
            kind,
            layer,
            float(found.raw[kind].to_final.mean[i]),
            float(found.raw[kind].to_final.std[i]),
            float(one.to_final.mean[i]),
            float(one.to_final.std[i]),
            float(one.speed.mean[i]) if i < len(layers) - 1 else None,
        ]
        for kind, one in found.normed.items()
        for i, layer in enumerate(layers)
    ]
    return Section(
        title="Dynamics after the final norm",
        text=[final_direction_text("after the final norm", found.normed, layers)],
        parts=[
            Figure(
                title="Cosine to the final direction, raw and after the final norm",
                svg=curves(
                    gamma | raw, x_name="layer", y_name="cosine to the last layer", cuts=cuts, dashed=list(raw)
                ),
                caption="Lines: the teacher's final norm was applied to the states of every layer; dashed: the same "
                "states without it. Mean over images and tokens. Dotted: phases.",
                origin=origin,
            ),
            Figure(
                title="Angular speed, after the final norm",
                svg=curves(speed, x_name="layer", y_name="radians per layer", cuts=cuts),
                caption="The teacher's final norm applied to the states of every layer. Bands: one standard deviation "
                "over images. Dotted: phases.",
                origin=origin,
            ),
            Table(
                name="dynamics_normed",
                title="Dynamics after the final norm",
                caption="Per kind and layer; speed (rad) of the step to the next layer, after the norm.",
                columns=["kind", "layer", "raw cosine to final", "its deviation", "cosine to final",
                         "deviation of that", "speed"],
                rows=rows,
                origin=origin,
            ),
        ],
    )  # fmt: skip


def token_paths_section(found: TokenPaths, layers: Sequence[int], origin: Origin) -> Section:
    """Mean ways of a few tokens on one plane."""
    rows: list[list[Cell]] = [
        [name, layer, float(x), float(y)]
        for name, points in found.points.items()
        for layer, (x, y) in zip(layers, points)
    ]
    axes = [f"principal direction {i + 1} ({share:.0%})" for i, share in enumerate(found.explained)]
    return Section(
        title="Paths of tokens",
        text=[
            f"The plane holds {found.explained.sum():.0%} of the variance of {', '.join(found.points)} over images and "
            "layers: raw states, so that their growth with depth is part of it."
        ],
        parts=[
            Figure(
                title="Mean paths of single tokens",
                svg=plane_paths(
                    found.points,
                    points=[f"layer {layer}" for layer in layers],
                    axis_names=(f"{axes[0]}, units of the states", axes[1]),
                ),
                caption="Mean over images of a token's state at each layer, from the first (square) to the last, on "
                "the two principal directions of all of them; in brackets their shares of the variance. Patches lie "
                "where tokens 10, 50 and 100 of 197 do, which the Transformer Geometry Observatory draws.",
                origin=origin,
            ),
            Table(
                name="token_paths",
                title="Mean paths of single tokens",
                caption="Coordinates on the plane of the figure, in the states' units; patches are counted from 1, "
                "row by row.",
                columns=["token", "layer", "first", "second"],
                rows=rows,
                origin=origin,
            ),
        ],
    )


def paths_section(
    kind: str, paths: Paths, raw: Mapping[str, Dynamics], basins: Basins | None, layers: Sequence[int], origin: Origin
) -> Section:
    """Where paths of classes go, with what the whole pass found of them."""
    text = [final_direction_text("raw states", raw, layers)]
    if basins is not None:
        ratio, right = basins.separation, basins.accuracy.mean
        chance = 1 / basins.n_classes
        least = chance + 3 * np.sqrt(chance * (1 - chance) / max(1, basins.accuracy.n))
        if basins.accuracy.n < _LEAST_OF_A_CLASS * basins.n_classes:
            judged = no_verdict(f"{basins.accuracy.n} images of {basins.n_classes} classes")
        else:
            holds = ratio[-1] < min(1, _COMPACT * ratio[1]) and right[-1] > least
            judged = verdict(holds, n_images=basins.accuracy.n, values=[ratio[1], ratio[-1]])
        text.append(
            f"Angle to the own class's direction over that between classes: {ratio[1]:.3g} at layer {layers[1]}, "
            f"{ratio[-1]:.3g} at layer {layers[-1]}; nearest to the own class {right[1]:.1%} and {right[-1]:.1%}, "
            f"{chance:.1%} by chance. The Raptor paper reports that paths enter compact regions of their classes; "
            f"counted as such where the ratio ends below 1 and below {_COMPACT} times that at layer {layers[1]}, and "
            f"the share nearest to the own class above {least:.1%}, three standard errors over chance. {judged}"
        )
    if not len(paths.labels):
        return Section(title="Paths", text=[*text, f"No image has a class: no paths of {kind} are drawn."], parts=[])
    rows: list[list[Cell]] = [
        [i, int(label), layer, float(x), float(y)]
        for i, (label, path) in enumerate(zip(paths.labels, paths.points))
        for layer, (x, y) in zip(layers, path)
    ]
    names = [f"principal direction {i + 1} of the final directions ({s:.0%})" for i, s in enumerate(paths.explained)]
    return Section(
        title="Paths",
        text=text,
        parts=[
            Figure(
                title=f"Paths of {kind} by class",
                svg=paths_on_plane(paths.points, paths.labels.tolist(), x_name=names[0], y_name=names[1]),
                caption=f"Directions u(x) of {kind} from the first layer to the last (dot), one line an image, on the "
                "plane in which the final directions spread most; in brackets the share of their spread. No unit.",
                origin=origin,
            ),
            Table(
                name="paths",
                title=f"Paths of {kind}",
                caption="Coordinates on the plane of the figure.",
                columns=["image", "class", "layer", "first", "second"],
                rows=rows,
                origin=origin,
            ),
        ],
    )


def linear_section(
    windows: Mapping[str, Sequence[LinearSpan]], phases: Mapping[str, Sequence[LinearSpan]], origin: Origin
) -> Section:
    """Depth as a linear system.

    Args:
        windows: By kind, the operators of every few steps.
        phases: By kind, the operators of each phase.
        origin: Of all images; half of them are fitted.
    """
    reach: dict[str, Curve] = {}
    for kind, found in windows.items():
        x = np.array([one.start for one in found], dtype=np.float64)
        reach[f"{kind}, K^{_steps(found)}"] = (x, np.array([one.by_power[-1] for one in found]), None)
        reach[f"{kind}, endpoint map"] = (x, np.array([one.by_endpoint[-1] for one in found]), None)
        reach[f"{kind}, no map"] = (x, np.array([one.by_identity[-1] for one in found]), None)
    moduli: dict[str, Curve] = {
        f"{kind}, {one.start}-{one.stop}": (np.arange(1.0, len(one.operator) + 1), np.abs(one.eigenvalues()), None)
        for kind, found in phases.items()
        for one in found
    }
    rows: list[list[Cell]] = [
        [kind, what, one.start, one.stop, p + 1, float(one.by_power[p]), float(one.by_endpoint[p]),
         float(one.by_identity[p])]
        for what, by_kind in (("window", windows), ("phase", phases))
        for kind, found in by_kind.items()
        for one in found
        for p in range(len(one.by_power))
    ]  # fmt: skip
    eigen_rows: list[list[Cell]] = [
        [kind, one.start, one.stop, i + 1, float(value.real), float(value.imag), float(abs(value))]
        for kind, found in phases.items()
        for one in found
        for i, value in enumerate(one.eigenvalues())
    ]
    steps = _steps(next(iter(windows.values())))
    return Section(
        title="Depth as a linear system",
        text=_linear_text(windows),
        parts=[
            Figure(
                title=f"Prediction {steps} steps ahead",
                svg=curves(reach, x_name="layer of the first state", y_name="cosine to the true state"),
                caption=f"K is one operator fitted to the {steps} steps from each layer on (first half of the images), "
                f"applied {steps} times to the first state (second half); the endpoint map is fitted to start and end "
                "alone; no map is the first state itself.",
                origin=origin,
            ),
            Figure(
                title="Eigenvalues of one operator a phase",
                svg=curves(moduli, x_name="rank of the eigenvalue", y_name="modulus"),
                caption="Of the operator fitted to all steps of a phase. 1: a direction stays; below, it dies away.",
                origin=origin,
            ),
            Table(
                name="linear_depth",
                title="Predictions of the operators",
                caption="Mean cosine to the true state, images that were not fitted.",
                columns=["kind", "of", "start", "stop", "steps ahead", "power", "endpoint map", "no map"],
                rows=rows,
                origin=origin,
            ),
            Table(
                name="linear_eigenvalues",
                title="Eigenvalues",
                caption="Of the operator of each phase.",
                columns=["kind", "start", "stop", "rank", "real", "imaginary", "modulus"],
                rows=eigen_rows,
                origin=origin,
            ),
        ],
    )


def _linear_text(windows: Mapping[str, Sequence[LinearSpan]]) -> list[str]:
    text = []
    means = {}
    source = "The paper on dynamic mode decomposition along depth reports"
    for kind, found in windows.items():
        gaps = np.array([(one.by_endpoint - one.by_power).max() for one in found])
        means[kind] = float(np.mean([one.by_power[-1] for one in found]))
        first, last = found[0], found[-1]
        too_few = _too_few(first)
        text.append(
            f"{kind}: powers of one operator stay within {max(0.0, gaps.max()):.3f} of the endpoint map over up to "
            f"{_steps(found)} steps, {int((gaps <= _CLOSE).sum())} of {len(found)} starts within {_CLOSE}. {source} "
            f"{_CLOSE} for up to 4 steps on one large model. "
            + (too_few or verdict(bool((gaps <= _CLOSE).all()), n_images=first.n_fitted))
        )
        text.append(
            f"{kind}: cosine {first.by_power[-1]:.3f} from layer {first.start}, {last.by_power[-1]:.3f} into layer "
            f"{last.stop}, where no map at all has {last.by_identity[-1]:.3f}. {source} less with depth; "
            f"counted as less from {_CLOSE} on. "
            + (
                no_verdict("one operator spans all layers")
                if len(found) < 2
                else too_few or verdict(last.by_power[-1] <= first.by_power[-1] - _CLOSE, n_images=first.n_fitted)
            )
        )
    if len(means) > 1 and "cls" in means:
        listed = ", ".join(f"{kind} {value:.3f}" for kind, value in means.items())
        ahead = all(means["cls"] >= value + _CLOSE for kind, value in means.items() if kind != "cls")
        one = windows["cls"][0]
        text.append(
            f"Mean over starts: {listed}. {source} CLS as the most linear; counted as such where it is ahead by "
            f"{_CLOSE}. " + (_too_few(one) or verdict(ahead, n_images=one.n_fitted))
        )
    return text


def _too_few(span: LinearSpan) -> str:
    """That operators are not judged, where images are fewer than what each has to be told; empty where they are not."""
    dim = len(span.operator)
    if span.n_fitted >= dim:
        return ""
    return no_verdict(f"fitted to {span.n_fitted} images, where an operator of {dim} channels takes as many")


def _steps(found: Sequence[LinearSpan]) -> int:
    return found[0].stop - found[0].start

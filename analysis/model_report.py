"""What a report shows of models that run: self-correction, layer swaps, a Raptor beside its teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Int64

from analysis.attention import Looks
from analysis.compare import Comparison
from analysis.interventions import Tracked, run_order, swapped_orders, token_kinds, track_perturbation
from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.partitions import Groups
from analysis.plots import Curve, curves, heat_maps
from analysis.verdicts import MARGIN, no_verdict, verdict
from pipeline.teacher import Teacher

EPSILONS = (0.01, 0.05, 0.1, 0.2)
N_DRAWS = 4
_ROWS_AT_ONCE = 16
N_SWAPPED = (1, 2, 3)
# What counts as a paper's statement: a share of states that contract, and shares of the accuracy without a swap.
_CONTRACTS = 0.75
_KEEPS, _COLLAPSES = 0.9, 0.5


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """Accuracy with blocks in the place of others: one number for each draw; NaN draws where there is no such swap."""

    clean: float
    by_kind: Mapping[tuple[str, int], Sequence[float]]


def self_correction(
    model: Teacher,
    x: Float32[torch.Tensor, "row token dim"],
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Tracked]:
    """Pushes of every size at every state of one model's own path from x, which is state 0.

    A few images at a time, whose states of all layers are held. `progress` is told their number.
    """
    parts = x.split(_ROWS_AT_ONCE)
    by_part = []
    for i, part in enumerate(parts):
        by_part.append(_corrections(model, part, seed + i))
        if progress is not None:
            progress(len(part))
    shares = np.array([len(part) for part in parts]) / len(x)
    found = []
    for same in zip(*by_part):  # one push of all parts; their angles are means over images
        angles = {kind: shares @ np.stack([one.angles[kind] for one in same]) for kind in same[0].angles}
        found.append(replace(same[0], angles=angles))
    return found


def _corrections(model: Teacher, x: Float32[torch.Tensor, "row token dim"], seed: int) -> list[Tracked]:
    kinds = token_kinds(has_cls=model.has_cls, n_registers=model.n_registers, n_patches=model.n_patches)
    path = [x]
    with torch.no_grad():
        for layer in range(model.n_layers - 1):
            path.append(model.run_blocks(path[-1], layer, layer + 1))
        return [
            track_perturbation(model, path[start], start, epsilon=epsilon, kinds=kinds, seed=seed, clean=path[start:])
            for start in range(model.n_layers - 1)
            for epsilon in EPSILONS
        ]


def swap_accuracies(
    model: Teacher,
    x: Float32[torch.Tensor, "row token dim"],
    labels: Int64[np.ndarray, " row"],
    groups: Groups,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Swaps:
    """Accuracy of the model's own head after swaps within and across the phases.

    Args:
        model: With a head.
        x: State 0.
        labels: -1 for none: such images are left out.
        groups: Blocks of each phase.
        seed: Of the swaps.
        progress: Told 1 after each order of blocks.

    Raises:
        ValueError: The model has no head, or no image has a label.
    """
    known = labels >= 0
    if not known.any():
        raise ValueError(f"none of {len(labels)} images has a label; expected one or more")
    x, labels = x[torch.from_numpy(known).to(x.device)], labels[known]

    def accuracy(order: tuple[int, ...]) -> float:
        with torch.no_grad():
            parts = [model.logits(run_order(model, part, order)).argmax(dim=1).cpu() for part in x.split(_ROWS_AT_ONCE)]
            named = torch.cat(parts).numpy()
        if progress is not None:
            progress(1)
        return float((named == labels).mean())

    by_kind = {}
    for where in ("intra", "inter"):
        for n in N_SWAPPED:
            orders = _orders(groups, n, where, seed)
            by_kind[where, n] = [accuracy(order) for order in orders]
    return Swaps(clean=accuracy(tuple(range(model.n_layers - 1))), by_kind=by_kind)


def _orders(groups: Groups, n: int, where: str, seed: int) -> list[tuple[int, ...]]:
    try:
        return list(swapped_orders(groups, n, "intra" if where == "intra" else "inter", n_draws=N_DRAWS, seed=seed))
    except ValueError:  # one phase has no other, phases of one block have no second block
        return []


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


def attention_section(found: Looks, origin: Origin) -> Section:
    """How far heads look, and what skip connections carry against what branches add."""
    n_blocks, n_heads = found.distance.mean.shape
    blocks = np.arange(1.0, n_blocks + 1)
    ordered = np.sort(found.distance.mean, axis=1)
    shown = sorted({0, 1, n_blocks - 2, n_blocks - 1} & set(range(n_blocks)))
    heads = np.arange(1.0, n_heads + 1)
    by_head: dict[str, Curve] = {f"block {i + 1}": (heads, ordered[i], None) for i in shown}
    by_block: dict[str, Curve] = {
        "most local head": (blocks, ordered[:, 0], None),
        "mean over heads": (blocks, ordered.mean(axis=1), None),
        "most global head": (blocks, ordered[:, -1], None),
    }
    elsewhere: dict[str, Curve] = {"mean over heads": (blocks, found.elsewhere.mean.mean(axis=1), None)}
    parts: list[Figure | Table] = [
        Figure(
            title="Mean attention distance, heads sorted",
            svg=curves(by_head, x_name="head, from the most local", y_name="distance, px"),
            caption="The two lowest and the two highest blocks. Attention among patches, rows scaled to sum to 1.",
            origin=origin,
        ),
        Figure(
            title="Mean attention distance by block",
            svg=curves(by_block, x_name="block", y_name="distance, px"),
            caption="As above.",
            origin=origin,
        ),
        Figure(
            title="Attention of patches on CLS and registers",
            svg=curves(elsewhere, x_name="block", y_name="share of attention"),
            caption="What the distances leave out.",
            origin=origin,
        ),
    ]
    rows: list[list[Cell]] = [
        [block + 1, head, float(found.distance.mean[block, head]), float(found.elsewhere.mean[block, head])]
        for block in range(n_blocks)
        for head in range(n_heads)
    ]
    parts.append(
        Table(
            name="attention_distance",
            title="Attention distance",
            caption="px, and the share on other tokens.",
            columns=["block", "head", "distance", "elsewhere"],
            rows=rows,
            origin=origin,
        )
    )
    ratio_rows: list[list[Cell]] = []
    text = [_reach_statement(ordered, origin.n_images)]
    for name, ratios in (("attention", found.attention_ratio), ("mlp", found.mlp_ratio)):
        lines: dict[str, Curve] = {kind: (blocks, one.mean, one.std) for kind, one in ratios.items()}
        parts.append(
            Figure(
                title=f"Skip connection over {name} branch",
                svg=curves(lines, x_name="block", y_name="|z| / |f(z)|", log_y=True),
                caption="Length of what the skip carries over that of what the branch adds, mean of tokens. "
                "Bands: one standard deviation over images.",
                origin=origin,
            )
        )
        ratio_rows += [[name, kind, i + 1, float(one.mean[i])] for kind, one in ratios.items() for i in range(n_blocks)]
        if "cls" in ratios:
            half = n_blocks // 2
            listed = "; ".join(
                f"{kind} {ratios[kind].mean[:half].mean():.3g} in the first half of the blocks, "
                f"{ratios[kind].mean[half:].mean():.3g} in the second"
                for kind in ("cls", "patches")
            )
            text.append(
                f"{name} branch, |z| / |f(z)|: {listed}. Raghu et al. report CLS above patches first, and below "
                f"after; counted as such where each is so by {MARGIN:.0%}. "
                + verdict(_crosses(ratios["cls"].mean, ratios["patches"].mean), n_images=origin.n_images)
            )
    parts.append(
        Table(
            name="skip_ratios",
            title="Skip over branch",
            caption="Mean over images and tokens of |z| / |f(z)|.",
            columns=["branch", "kind", "block", "ratio"],
            rows=ratio_rows,
            origin=origin,
        )
    )
    return Section(title="Attention and branches", text=text, parts=parts)


def _crosses(cls: np.ndarray, patches: np.ndarray) -> bool:
    """Whether CLS is above patches in the first half of the blocks and below them in the second."""
    half = len(cls) // 2
    (first, after), (first_patches, after_patches) = ((one[:half].mean(), one[half:].mean()) for one in (cls, patches))
    return bool(first > (1 + MARGIN) * first_patches and after_patches > (1 + MARGIN) * after)


def _reach_statement(ordered: np.ndarray, n_images: int) -> str:
    low, high = ordered[:2], ordered[-2:]
    local = ordered.max() / 2
    if len(ordered) < 4:
        judged = no_verdict(f"{len(ordered)} blocks have no two lowest beside two highest")
    else:
        judged = verdict(low.min() < local <= low.max() and high.min() >= local, n_images=n_images)
    return (
        f"Heads of the two lowest blocks reach {low.min():.3g} to {low.max():.3g} px, of the two highest "
        f"{high.min():.3g} to {high.max():.3g} px. Raghu et al. report local and global heads in the lowest blocks, "
        f"global ones in the highest; counted as local below {local:.3g} px, half of the farthest of all. {judged}"
    )

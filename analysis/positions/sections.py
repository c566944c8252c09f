"""What the page of `make positions` shows of each experiment, with the paper's statement beside what was found."""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, pictures
from analysis.positions.experiments import SMALL, WIDE, Numbers, mean_and_spread
from analysis.positions.maps import THRESHOLD, Locality, encoding_similarity, locality, mosaic

_BANDS = "Bands: one standard deviation over seeds."


def planted_section(found: Sequence[Numbers], origin: Origin) -> Section:
    """Sets are learned: J4. One mapping for each seed."""
    return Section(
        title="Learning planted sets",
        text=[
            f"{SMALL.n_patches} patches of {SMALL.dim} values in {SMALL.n_patches // SMALL.set_size} sets of "
            f"{SMALL.set_size}; a patch outside of the label's set carries a false sign with probability {SMALL.q:g}.",
            _planted_statement(found),
        ],
        parts=[
            _courses("Error and association over training", found, origin),
            _attentions("Attention after training", found[0], origin),
            _course_table("planted_course", "Course of training", found, origin),
        ],
    )


def gaussian_section(found: Sequence[Numbers], origin: Origin) -> Section:
    """Without sets there is nothing to associate: J5."""
    first, last = _ends(found, "error")
    _, overlap = _ends(found, "overlap")
    chance = found[0]["chance"]
    learned, random = last < 0.75 * first, abs(overlap - chance) < 0.15
    return Section(
        title="The control: no sets in the data",
        text=[
            "Jelassi et al.: patches that are independent Gaussian vectors, labelled by a cubic convolution of one "
            "layer, are learned too, while PᵀP stays without structure. Here "
            f"{'that holds' if learned and random else 'that does not hold'}: the error falls from {first:.3f} to "
            f"{last:.3f}, and of the companions that the planted sets would give a patch {overlap:.2f} are among its "
            f"most similar ones, {chance:.2f} by chance. (Holding means: three quarters of the error or less, and "
            "within 0.15 of chance.)"
        ],
        parts=[
            _courses("Error and association over training", found, origin),
            _attentions("Attention after training", found[0], origin),
            _course_table("gaussian_course", "Course of training", found, origin),
        ],
    )


def transfer_section(found: Sequence[Numbers], origin: Origin) -> Section:
    """Linear rules err, attention does not, and what it has learned of places helps with new data: J6 and J7."""
    linear = float(np.mean([min(one["linear"]) for one in found]))
    best = found[0]["sum_rule"]
    _, attention = _ends(found, "error")
    few = np.array(found[0]["few"], dtype=np.float64)
    kept, kept_spread = mean_and_spread([one["kept"] for one in found])
    anew, anew_spread = mean_and_spread([one["anew"] for one in found])
    wins = sum(a < b for one in found for a, b in zip(one["kept"], one["anew"]))
    pairs = len(few) * len(found)
    rows: list[list[Cell]] = [
        [seed, int(n), float(a), float(b)]
        for seed, one in enumerate(found)
        for n, a, b in zip(one["few"], one["kept"], one["anew"])
    ]
    return Section(
        title="Linear rules, and transfer",
        text=[
            f"{WIDE.n_patches} patches of {WIDE.dim} values in {WIDE.n_patches // WIDE.set_size} sets of "
            f"{WIDE.set_size}, false signs with probability {WIDE.q:g}.",
            "Jelassi et al., theorem 3.1: every generalised linear model errs on an eighth or more. Here "
            f"{'that holds' if min(linear, best) >= 1 / 8 else 'that does not hold'}: logistic regression, at the "
            f"best of its penalties for the test data, errs on {linear:.3f}, and the sum of all patches along the "
            f"label's own direction on {best:.3f} (exact); positional attention reaches {attention:.3f}.",
            "Theorem 5.1: with the same sets and a new direction, attention that was learned before needs few "
            f"samples. Here {'that holds' if wins > 0.9 * pairs else 'that does not hold'}: at {int(few[0])} samples "
            f"the error is {kept[0]:.3f} with it, {anew[0]:.3f} with attention that begins anew, and it is lower in "
            f"{wins} of {pairs} pairs of the same samples and first values. (Holding means: in more than 9 of 10.)",
        ],
        parts=[
            Figure(
                title="Error on new data by number of samples",
                svg=curves(
                    {
                        "attention kept from before": (few, kept, kept_spread),
                        "attention learned anew": (few, anew, anew_spread),
                        "the sum along the true direction": (few, np.full(len(few), best), None),
                    },
                    x_name="samples of the new data",
                    y_name="error",
                    log_x=True,
                ),
                caption=f"Same sets of patches, another direction of the label. {_BANDS}",
                origin=origin,
            ),
            _courses("Error and association where it was learned", found, origin),
            Table(
                name="transfer",
                title="Error on new data",
                caption="One row for each pair of trainings.",
                columns=["seed", "samples", "attention kept", "attention anew"],
                rows=rows,
                origin=origin,
            ),
            _course_table("transfer_course", "Course where it was learned", found, origin),
        ],
    )


def vit_section(
    name: str, found: Mapping[str, Sequence[Numbers]], pixels: Numbers, grid: tuple[int, int], origin: Origin
) -> Section:
    """Positional attention against ordinary attention: J10.

    Args:
        name: Of the images.
        found: "ordinary" and "positional", each one mapping for each seed.
        pixels: The baseline.
        grid: Rows and columns of patches.
        origin: Of all numbers.
    """
    accuracies = {kind: np.array([one["accuracy"] for one in seeds]) for kind, seeds in found.items()}
    means = {kind: float(values.mean()) for kind, values in accuracies.items()}
    baseline = float(pixels["accuracy"])
    gap = means["ordinary"] - means["positional"]
    above = min(means.values()) > baseline
    losses: dict[str, Curve] = {}
    for kind, seeds in found.items():
        mean, spread = mean_and_spread([one["losses"] for one in seeds])
        losses[kind] = (np.arange(1.0, len(mean) + 1), mean, spread)
    n_seeds = len(accuracies["ordinary"])
    rows: list[list[Cell]] = [
        [kind, seed, float(value)] for kind, values in accuracies.items() for seed, value in enumerate(values)
    ]
    listed = "; ".join(f"{kind} {means[kind]:.2%}{_deviation(values)}" for kind, values in accuracies.items())
    return Section(
        title="Attention by position against ordinary attention",
        text=[
            f"{name}, top-1 on other images after the last epoch, {_seeds(n_seeds)}: {listed}; logistic regression on "
            f"pixels {baseline:.2%}. The gap is {100 * gap:.2f} points.",
            "Jelassi et al. report 68.9 % against 71.9 % on ImageNet, and similar numbers of both on CIFAR and SVHN. "
            f"That both learn more than a baseline without convolutions {'holds' if above else 'does not hold'} here.",
        ],
        parts=[
            Figure(
                title="Training loss",
                svg=curves(losses, x_name="epoch", y_name="cross entropy, nats", log_y=True),
                caption=f"Mean of an epoch, with augmentation. {_BANDS}",
                origin=origin,
            ),
            *_maps_of_vits({kind: np.array(seeds[0]["after"]) for kind, seeds in found.items()}, grid, origin),
            Table(
                name="accuracy",
                title="Accuracy",
                caption="Of each training.",
                columns=["attention", "seed", "accuracy"],
                rows=[*rows, ["logistic regression on pixels", None, baseline]],
                origin=origin,
            ),
        ],
    )


def permuted_section(
    found: Mapping[str, Sequence[Numbers]], grid: tuple[int, int], origin: Origin, what: str = "patches"
) -> Section:
    """Structure follows a permutation of the patches: J9.

    Args:
        found: "in order" and "permuted", each one mapping for each seed.
        grid: Rows and columns.
        origin: Of all numbers.
        what: Is permuted: patches, or pixels where a patch is one.
    """
    maps: dict[str, np.ndarray] = {}
    rows: list[list[Cell]] = []
    scores: dict[str, list[Locality]] = {}
    for seed, (plain, permuted) in enumerate(zip(found["in order"], found["permuted"])):
        of_seed = {
            "before training": np.array(plain["before"]),
            "in order": np.array(plain["after"]),
            "permuted, as the model sees them": np.array(permuted["after"]),
            "permuted, put back": np.array(permuted["after"])[np.argsort(permuted["order"])],
        }
        for kind, positions in of_seed.items():
            similarity = encoding_similarity(positions)
            one = locality(similarity, grid)
            scores.setdefault(kind, []).append(one)
            rows.append([kind, seed, one.neighbours, one.chance, one.correlation, one.above, one.discs])
            if seed == 0:
                maps[kind] = mosaic(similarity, grid)
    near = {kind: float(np.mean([one.neighbours for one in ones])) for kind, ones in scores.items()}
    chance = scores["in order"][0].chance
    seen, back = near["permuted, as the model sees them"], near["permuted, put back"]
    holds = back > 2 * seen and back > 2 * chance
    return Section(
        title=f"Permuted {what}",
        text=[
            f"Jelassi et al.: trained on images whose {what} are permuted, a ViT still learns which belong together, "
            f"and the permutation undone, the map is local. Here {'that holds' if holds else 'that does not hold'}: "
            f"of a patch's neighbours in the picture {back:.0%} are among its most similar positions, {seen:.0%} of "
            f"its neighbours in the sequence; {near['in order']:.0%} without a permutation, "
            f"{near['before training']:.0%} before training, {chance:.0%} by chance. (Holding means: more than twice "
            "both.)"
        ],
        parts=[
            Figure(
                title="Similarity of position embeddings",
                svg=pictures(maps, unit="<p_i, p_j> / (|p_i| |p_j|)", limits=(-1, 1)),
                caption="Ordinary attention, seed 0. Each small map is one patch's similarity to all others and stands "
                "where that patch does. No unit.",
                origin=origin,
            ),
            Table(
                name="permuted",
                title="How local the similarity is",
                caption="neighbours: share of a patch's up to 8 neighbours among as many most similar patches, and "
                f"what chance would find; correlation: of similarity with distance; above: share of pairs above "
                f"{THRESHOLD:g}; discs: 1 where those are the nearest there could be, 0 where they are as far as any.",
                columns=["positions", "seed", "neighbours", "chance", "correlation", "above", "discs"],
                rows=rows,
                origin=origin,
            ),
        ],
    )


def _planted_statement(found: Sequence[Numbers]) -> str:
    _, error = _ends(found, "error")
    best = [max(one["rows"]) for one in found]
    when = [one["steps"][int(np.argmax(one["rows"]))] for one in found]
    start, end = _ends(found, "rows")
    low = float(np.mean([min(one["error"]) for one in found]))
    holds = min(best) > 0.99 and low < 0.05
    return (
        "Jelassi et al., theorems 4.1 and 4.2: gradient descent learns the sets, Top_C of each row of PᵀP is the "
        f"patch's own set, and the model generalises. Here {'that holds' if holds else 'that does not hold'}: "
        f"{start:.0%} of rows before training, at most {np.mean(best):.0%}, after {np.mean(when):,.0f} steps, and "
        f"{end:.0%} at the end, where the error on other samples is {error:.4f}. (Means of {_seeds(len(found))}. "
        "Holding means: all rows at some step, for each seed, and an error below 0.05.)"
    )


def _courses(title: str, found: Sequence[Numbers], origin: Origin) -> Figure:
    steps = np.array(found[0]["steps"], dtype=np.float64)
    names = {
        "error on other samples": "error",
        "|cos(v, w*)|": "alignment",
        "rows whose top C are their set": "rows",
        "share of companions on top": "overlap",
    }
    lines: dict[str, Curve] = {}
    for name, key in names.items():
        mean, spread = mean_and_spread([one[key] for one in found])
        lines[name] = (steps, mean, spread)
    lines["share by chance"] = (steps, np.full(len(steps), found[0]["chance"]), None)
    return Figure(
        title=title,
        svg=curves(lines, x_name="step of gradient descent", y_name="share, or cosine"),
        caption=f"Full-batch gradient descent. {_BANDS}",
        origin=origin,
    )


def _attentions(title: str, one: Numbers, origin: Origin) -> Figure:
    """A and its softmax, patches of one set side by side."""
    order = np.argsort(np.array(SMALL.sets), kind="stable")
    matrix = np.array(one["attention"])[order][:, order]
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    scaled = np.clip((matrix - others.mean()) / (3 * others.std()), -1, 1)
    weights = np.exp(matrix - matrix.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    shown = {"A, about its mean, over 3 deviations": scaled, "softmax of its rows, over the largest": weights}
    shown = {name: values / np.abs(values).max() for name, values in shown.items()}
    return Figure(
        title=title,
        svg=pictures(shown, unit="as over each", limits=(-1, 1)),
        caption="Seed 0; rows and columns are patches, those of one planted set side by side. The diagonal is held "
        "fixed in training. No unit.",
        origin=origin,
    )


def _course_table(name: str, title: str, found: Sequence[Numbers], origin: Origin) -> Table:
    rows: list[list[Cell]] = [
        [seed, step, *(float(one[key][i]) for key in ("error", "alignment", "rows", "overlap"))]
        for seed, one in enumerate(found)
        for i, step in enumerate(one["steps"])
    ]
    return Table(
        name=name,
        title=title,
        caption="rows: share of patches whose C most similar are their set; overlap: share of companions on top.",
        columns=["seed", "step", "error", "alignment", "rows", "overlap"],
        rows=rows,
        origin=origin,
    )


def _maps_of_vits(positions: Mapping[str, np.ndarray], grid: tuple[int, int], origin: Origin) -> list[Figure | Table]:
    similarity = {kind: encoding_similarity(values) for kind, values in positions.items()}
    rows: list[list[Cell]] = []
    for kind, values in similarity.items():
        one = locality(values, grid)
        rows.append([kind, one.neighbours, one.chance, one.correlation, one.above, one.discs])
    return [
        Figure(
            title="Similarity of position embeddings after training",
            svg=pictures(
                {kind: mosaic(values, grid) for kind, values in similarity.items()},
                unit="<p_i, p_j> / (|p_i| |p_j|)",
                limits=(-1, 1),
            ),
            caption="Seed 0. Each small map is one patch's similarity to all others, at that patch's place. No unit.",
            origin=origin,
        ),
        Table(
            name="vit_positions",
            title="How local it is",
            caption="Seed 0; columns as in the table of permuted patches.",
            columns=["attention", "neighbours", "chance", "correlation", "above", "discs"],
            rows=rows,
            origin=origin,
        ),
    ]


def _ends(found: Sequence[Numbers], key: str) -> tuple[float, float]:
    return float(np.mean([one[key][0] for one in found])), float(np.mean([one[key][-1] for one in found]))


def _deviation(values: np.ndarray) -> str:
    return f" (deviation {values.std(ddof=1):.2%})" if len(values) > 1 else ""


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"

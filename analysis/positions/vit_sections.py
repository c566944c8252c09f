"""What the page of `make positions` shows of small ViTs, with the paper's statement beside what was found."""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, pictures
from analysis.positions.experiments import Numbers, mean_and_spread
from analysis.positions.maps import THRESHOLD, Locality, encoding_similarity, locality, mosaic
from analysis.positions.sections import bands, seeds_text
from analysis.verdicts import verdict


def vit_section(
    name: str,
    found: Mapping[str, Sequence[Numbers]],
    pixels: Numbers,
    grid: tuple[int, int],
    n_test: int,
    origin: Origin,
) -> Section:
    """Positional attention against ordinary attention: J10.

    Args:
        name: Of the images.
        found: "ordinary" and "positional", each one mapping for each seed.
        pixels: The baseline.
        grid: Rows and columns of patches.
        n_test: Images that accuracies are shares of.
        origin: Of all numbers.
    """
    accuracies = {kind: np.array([one["accuracy"] for one in seeds]) for kind, seeds in found.items()}
    means = {kind: float(values.mean()) for kind, values in accuracies.items()}
    baseline = float(pixels["accuracy"])
    gap = means["ordinary"] - means["positional"]
    above, error = min(means.values()) - baseline, np.sqrt(baseline * (1 - baseline) / n_test)
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
            f"{name}, top-1 on other images after the last epoch, {seeds_text(n_seeds)}: {listed}; logistic regression "
            f"on pixels {baseline:.2%}. Ordinary less positional: {100 * gap:.2f} points.",
            "Jelassi et al. report 68.9 % against 71.9 % on ImageNet, and similar numbers of both on CIFAR and SVHN. "
            "That both learn more than a baseline without convolutions is counted where the mean of each is above it "
            f"by the standard error of a share of {n_test:,} images, {100 * error:.2f} points; here the lower one is "
            f"{100 * above:+.2f} points from it. {verdict(above > error, n_images=n_test)}",
        ],
        parts=[
            Figure(
                title="Training loss",
                svg=curves(losses, x_name="epoch", y_name="cross entropy, nats", log_y=True),
                caption=f"Mean of an epoch, with augmentation. {bands(n_seeds)}",
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


def _deviation(values: np.ndarray) -> str:
    return f" (deviation {values.std(ddof=1):.2%})" if len(values) > 1 else ""

"""What the page of `make positions` shows of planted data, with the paper's statement beside what was found."""

from collections.abc import Sequence

import numpy as np

from analysis.page import Cell, Figure, Origin, Section, Table
from analysis.plots import Curve, curves, pictures
from analysis.positions.experiments import SMALL, WIDE, Numbers, mean_and_spread


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
                caption=f"Same sets of patches, another direction of the label. {bands(len(found))}",
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
        f"{end:.0%} at the end, where the error on other samples is {error:.4f}. (Means of {seeds_text(len(found))}. "
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
        caption=f"Full-batch gradient descent. {bands(len(found))}",
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


def _ends(found: Sequence[Numbers], key: str) -> tuple[float, float]:
    return float(np.mean([one[key][0] for one in found])), float(np.mean([one[key][-1] for one in found]))


def bands(n_seeds: int) -> str:
    """What the bands about curves are, for a caption."""
    return "Bands: one standard deviation over seeds." if n_seeds > 1 else "One seed."


def seeds_text(n: int) -> str:
    """How many seeds there were, in words."""
    return "one seed" if n == 1 else f"{n} seeds"

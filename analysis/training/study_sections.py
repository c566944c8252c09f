"""What stochastic depth does to the layers of a teacher: one point for each training, at its last checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Float64

from analysis.page import Figure, Origin, Section
from analysis.plots import Curve, curves
from analysis.training.runs import Run
from analysis.training.sections import COLUMNS, training_table

_BY_NAME = dict(COLUMNS)
#: From here on the paper calls the dynamics of a training aberrant.
ABERRANT = 0.7
#: Difference of held-out accuracy from which on teachers are said to have learned unequally.
UNEQUAL = 0.05
_QUANTITIES = {
    "Similarity of layers": ("similarity cls", "similarity patches"),
    "Contrast of phases": ("contrast",),
    "Fit of a Raptor": ("R2 cls", "R2 patches"),
    "Fit of a Raptor, one mean": ("R2 cls, one mean", "R2 patches, one mean"),
    "Accuracy": ("val accuracy", "Raptor accuracy"),
}
_CAPTIONS = {
    "Similarity of layers": "Mean cosine between two layers of 1 to L, held-out images.",
    "Contrast of phases": "Mean cosine within phases less that across; CLS and patch mean.",
    "Fit of a Raptor": "R2 rolled out on held-out images, mean over layers 1 to L, each channel about its own mean.",
    "Fit of a Raptor, one mean": "The same about one mean over all channels, as the Raptor paper measures.",
    "Accuracy": "Of held-out digits: the teacher, and its head on the Raptor's last state.",
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One quantity over chances of a dropped branch.

    Attributes:
        chances: Ascending.
        mean: Over seeds.
        std: Over seeds; NaN for one.
    """

    chances: Float64[np.ndarray, " chance"]
    mean: Float64[np.ndarray, " chance"]
    std: Float64[np.ndarray, " chance"]

    @property
    def n_rising(self) -> int:
        """Steps to the next chance at which the mean rises."""
        return sum(bool(after > before) for before, after in pairwise(self.mean))

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of the mean with the chance: 1 where it always rises; NaN where it never changes."""
        return rank_correlation(self.chances, self.mean)


def rank_correlation(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"]) -> float:
    """Spearman's: correlation of ranks, equal values sharing the mean of theirs; NaN where either is constant."""
    ranks = [(np.sum(one[:, None] > one, axis=1) + np.sum(one[:, None] >= one, axis=1)) / 2.0 for one in (x, y)]
    centred = [one - one.mean() for one in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else float("nan")


def sweep(runs: Mapping[float, Sequence[Run]], column: str) -> Sweep:
    """A column of the table of checkpoints at the last one of each run, by chance of a dropped branch."""
    chances = sorted(runs)
    values = [np.array([float(_BY_NAME[column](run.last)) for run in runs[p]]) for p in chances]  # type: ignore[arg-type]
    return Sweep(
        chances=np.array(chances),
        mean=np.array([one.mean() for one in values]),
        std=np.array([one.std(ddof=1) if len(one) > 1 else np.nan for one in values]),
    )


def study_section(runs: Mapping[float, Sequence[Run]], origin: Origin) -> Section:
    """Similarity, phases, fit and accuracy against the chance that a residual branch is dropped in training.

    Args:
        runs: By chance, one or more seeds each, two chances or more.
        origin: Of all of it.
    """
    has_fit = all(run.last.measured.raptor is not None for of_chance in runs.values() for run in of_chance)
    parts = []
    text = [_criterion(min(len(of_chance) for of_chance in runs.values()))]
    for title, columns in _QUANTITIES.items():
        shown = [column for column in columns if has_fit or not column.startswith(("R2", "Raptor"))]
        if not shown:
            continue
        found = {column: sweep(runs, column) for column in shown}
        lines: dict[str, Curve] = {column: (one.chances, one.mean, one.std) for column, one in found.items()}
        parts.append(
            Figure(
                title=f"{title} against stochastic depth",
                svg=curves(lines, x_name="chance that a residual branch is dropped", y_name=title.lower()),
                caption=f"{_CAPTIONS[title]} Bands: one standard deviation over seeds.",
                origin=origin,
            )
        )
        text += [_statement(column, one) for column, one in found.items()]
    text += _unequal(sweep(runs, "val accuracy"))
    text += _aberrant([p for p in runs if p >= ABERRANT])
    last = [Run(name=run.name, points=[run.last]) for p in sorted(runs) for run in runs[p]]
    return Section(
        title="Stochastic depth", text=text, parts=[*parts, training_table("stochastic_depth", last, origin)]
    )


def _statement(column: str, found: Sweep) -> str:
    correlation, steps = found.rank_correlation, len(found.mean) - 1
    if found.n_rising == steps:
        verdict = "holds"
    elif correlation > 0 and found.mean[-1] > found.mean[0]:
        verdict = "holds on the whole, not at every step"
    else:
        verdict = "does not hold"
    listed = ", ".join(f"{value:.3f} at {p:g}" for p, value in zip(found.chances, found.mean, strict=True))
    return (
        f"{column[0].upper()}{column[1:]} rises with stochastic depth, says the Raptor paper: {verdict}. {listed}; "
        f"rank correlation {correlation:.2f}."
    )


def _criterion(n_seeds: int) -> str:
    seeds = "one teacher each, so that chance is not told from effect" if n_seeds == 1 else f"means of {n_seeds} seeds"
    return (
        f"Counted as holding: a value that rises at every step to the next chance; on the whole: one that ends higher "
        f"than it began, with a positive rank correlation ({seeds})."
    )


def _unequal(accuracy: Sweep) -> list[str]:
    """A warning where the teachers that are compared have not learned equally much."""
    low, high = accuracy.mean.min(), accuracy.mean.max()
    if high - low <= UNEQUAL:
        return []
    return [
        f"The teachers have not learned equally much: held-out accuracy {low:.1%} to {high:.1%}, more than "
        f"{100 * UNEQUAL:.0f} points apart. What differs among them may come from that; more EPOCHS= bring them closer."
    ]


def _aberrant(chances: Sequence[float]) -> list[str]:
    if not chances:
        return []
    listed = ", ".join(f"{p:g}" for p in sorted(chances))
    return [
        f"The paper calls trainings with {ABERRANT:g} and more aberrant, and so are those with {listed} to be read."
    ]

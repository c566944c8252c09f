"""The experiments with positions, each a function of its settings, and a folder that keeps what has been done."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from analysis.positions.baseline import linear_error, sum_rule_error
from analysis.positions.images import LabelledImages
from analysis.positions.planted import Drawn, Planted, draw_gaussian, draw_planted, grid_sets
from analysis.positions.simple_model import Course, Descent, train_simple
from analysis.positions.vit_training import VitTraining, linear_accuracy, train_vit
from infra.console import JobError, Progress
from infra.objects import ObjectMissingError, Objects

_MAX_RECORD_NBYTES = 64 * 2**20

#: Four squares of 2 x 2 on 4 x 4 patches, as in figure 1b; q = ln d / D at d = D².
SMALL = Planted(sets=grid_sets(4, 2), dim=100, q=0.347)
#: Sixteen such squares on 8 x 8: false signs are so many that linear rules err an eighth or more.
WIDE = Planted(sets=grid_sets(8, 2), dim=16, q=0.25)

Numbers = Mapping[str, Any]
"""What an experiment found: numbers, lists and such mappings of them, as JSON has them."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One piece of work that is done whole or not at all.

    Attributes:
        name: Unique within a page; the same with other settings is another experiment.
        settings: All that the numbers depend on.
        run: Makes them; told a text of how far it is.
    """

    name: str
    settings: Mapping[str, Any]
    run: Callable[[Callable[[str], None]], Numbers] = field(repr=False)

    @property
    def key(self) -> str:
        """Of the object that keeps its numbers: the same settings, the same key."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"experiments/{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def planted_experiment(n: int, n_steps: int, seed: int) -> Experiment:
    """J4: association and error of the simple model while it learns planted sets."""
    descent = Descent(n_steps=n_steps, rate=0.1, every=max(1, n_steps // 40))
    settings = {"data": asdict(SMALL), "descent": asdict(descent), "n": n, "seed": seed}

    def run(tell: Callable[[str], None]) -> Numbers:
        train, test = _train_and_test(SMALL, n, n, seed)
        course = train_simple(train, test, descent, seed=seed, sets=SMALL.sets, progress=_steps(tell, n_steps))
        return {**_numbers(course), "attention": course.attention.tolist()}

    return Experiment(name=f"planted-seed{seed}", settings=settings, run=run)


def gaussian_experiment(n: int, n_steps: int, seed: int) -> Experiment:
    """J5: the same of data without sets, scored by the sets that the others have."""
    descent = Descent(n_steps=n_steps, rate=0.1, every=max(1, n_steps // 40))
    n_patches, dim = SMALL.n_patches, SMALL.dim
    settings = {"data": [n_patches, dim], "descent": asdict(descent), "n": n, "seed": seed}

    def run(tell: Callable[[str], None]) -> Numbers:
        rng = np.random.default_rng([seed, 1])
        train = draw_gaussian(n_patches, dim, n, rng)
        test = draw_gaussian(n_patches, dim, n, rng, train.direction)
        course = train_simple(train, test, descent, seed=seed, sets=SMALL.sets, progress=_steps(tell, n_steps))
        return {**_numbers(course), "attention": course.attention.tolist()}

    return Experiment(name=f"gaussian-seed{seed}", settings=settings, run=run)


def transfer_experiment(n: int, n_steps: int, few: Sequence[int], seed: int) -> Experiment:
    """J6 and J7: linear rules and attention on many patches; then a new direction over the same sets, few samples.

    Each small training starts from the same v and the same samples twice: with the attention that was learned, held
    fast, and with one that is drawn anew and learns.
    """
    # At a rate like that of v, A is still even when v has fitted the linear rule and the loss has no slope left.
    descent = Descent(n_steps=n_steps, rate=0.3, attention_rate=2_000.0, every=max(1, n_steps // 20))
    settings = {"data": asdict(WIDE), "descent": asdict(descent), "n": n, "few": list(few), "seed": seed}

    def run(tell: Callable[[str], None]) -> Numbers:
        train, test = _train_and_test(WIDE, n, n, seed)
        tell("linear rules")
        linear = linear_error(train, test).tolist()
        source = train_simple(train, test, descent, seed=seed, sets=WIDE.sets, progress=_steps(tell, n_steps))
        held = replace(descent, learns_attention=False)
        kept, anew = [], []
        for count in few:
            tell(f"{count} samples")
            some, others = _train_and_test(WIDE, count, n, seed + 1_000)
            kept.append(train_simple(some, others, held, seed=seed, attention=source.attention).error[-1])
            anew.append(train_simple(some, others, descent, seed=seed).error[-1])
        return {
            **_numbers(source),
            "linear": linear,
            "sum_rule": sum_rule_error(WIDE),
            "few": list(few),
            "kept": [float(one) for one in kept],
            "anew": [float(one) for one in anew],
        }

    return Experiment(name=f"transfer-seed{seed}", settings=settings, run=run)


def vit_experiment(images: LabelledImages, training: VitTraining) -> Experiment:
    """J9 and J10: a small ViT, its accuracy and what its positions have become."""
    order = "permuted" if training.permuted else "in-order"

    def run(tell: Callable[[str], None]) -> Numbers:
        done = 0

        def progress(n: int) -> None:
            nonlocal done
            done += n
            tell(f"epoch {done} of {training.n_epochs}")

        found = train_vit(images, training, progress=progress)
        return {
            "accuracy": found.accuracy,
            "losses": found.losses.tolist(),
            "before": found.before.tolist(),
            "after": found.after.tolist(),
            "order": found.order.tolist(),
        }

    settings = {"images": images.digest, "training": asdict(training)}
    return Experiment(name=f"vit-{training.attention}-{order}-seed{training.seed}", settings=settings, run=run)


def pixels_experiment(images: LabelledImages) -> Experiment:
    """J10's baseline: logistic regression on pixels."""
    return Experiment(
        name="pixels",
        settings={"images": images.digest},
        run=lambda tell: {"accuracy": linear_accuracy(images)},
    )


def run_experiments(experiments: Sequence[Experiment], kept: Objects) -> dict[str, Numbers]:
    """Do those that are not kept yet, each saved once it is done; what was interrupted begins again.

    Args:
        experiments: In this order.
        kept: Where numbers are kept.

    Returns:
        By name.

    Raises:
        JobError: A training diverged; names the experiment.
        UserError: As the trainings.
        ObjectError: As `kept`.
    """
    found = {one.name: _read(one, kept) for one in experiments}
    n_done = sum(numbers is not None for numbers in found.values())
    with Progress(total=len(experiments), unit="experiments", label="positions", done=n_done) as progress:
        for one in experiments:
            if found[one.name] is None:
                progress.status(one.name)
                try:
                    numbers = one.run(partial(_show, progress, one.name))
                except ValueError as error:
                    raise JobError(f"{one.name}: {error}") from error
                record = {"settings": one.settings, "numbers": numbers}
                kept.put(one.key, json.dumps(record).encode())
                found[one.name] = _read(one, kept)
                progress.advance()
        progress.status("")
    return {name: numbers for name, numbers in found.items() if numbers is not None}


def _show(progress: Progress, name: str, text: str) -> None:
    progress.status(f"{name}: {text}")


def mean_and_spread(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Over seeds, the first axis; a standard deviation with n - 1, NaN of one seed."""
    array = np.asarray(values, dtype=np.float64)
    spread = array.std(axis=0, ddof=1) if len(array) > 1 else np.full(array.shape[1:], np.nan)
    return array.mean(axis=0), spread


def _read(one: Experiment, kept: Objects) -> Numbers | None:
    """What was kept of it; None also of a record that is not whole, which is then made again."""
    try:
        record = json.loads(kept.get(one.key, at_most=_MAX_RECORD_NBYTES))
    except (ObjectMissingError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("settings") == json.loads(json.dumps(one.settings))
    return record.get("numbers") if same else None


def _train_and_test(setup: Planted, n: int, n_test: int, seed: int) -> tuple[Drawn, Drawn]:
    rng = np.random.default_rng(seed)
    train = draw_planted(setup, n, rng)
    return train, draw_planted(setup, n_test, rng, train.direction)


def _numbers(course: Course) -> dict[str, Any]:
    return {
        "steps": list(course.steps),
        "error": course.error.tolist(),
        "alignment": course.alignment.tolist(),
        "rows": [one.rows for one in course.associations],
        "overlap": [one.overlap for one in course.associations],
        "chance": course.associations[0].chance,
    }


def _steps(tell: Callable[[str], None], total: int) -> Callable[[int], None]:
    done = 0

    def progress(n: int) -> None:
        nonlocal done
        done += n
        tell(f"step {done:,} of {total:,}")

    return progress

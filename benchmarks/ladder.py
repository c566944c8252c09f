"""Raptors of the built-in digits: how many blocks, what each part of the recipe adds, and where the cuts are best.

Three questions, one table: k blocks cut by phases, before and after stage 2; the published ablation in its cumulative
order; the spans that phases find against random ones. An hour on two cores; interrupted, the same command goes on.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import torch

from analysis.distances import layer_distances
from analysis.partitions import Groups, groups_of, random_contiguous, spans_text
from analysis.phases import contiguous_segments
from benchmarks.ladder_runs import RECIPE, Found, Runs, Spans, Stage1
from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from storage_schemas import Span

DEFAULT_FOLDER = Path("data/ladder")
TEACHER_FORCING, AUTOREGRESSIVE, DEPTH, CLS, STAGE2, PROBE = RUNGS = (
    "teacher forcing only",
    "+ autoregressive",
    "+ depth scaling",
    "+ CLS weighting",
    "+ second stage",
    "+ probe of its own",
)
_STAGE1 = {
    TEACHER_FORCING: Stage1(autoregressive=False, depth_scaling=False, cls_weighting=False),
    AUTOREGRESSIVE: Stage1(depth_scaling=False, cls_weighting=False),
    DEPTH: Stage1(cls_weighting=False),
    CLS: RECIPE,
}
_SHOWN = {CLS: "stage 1 alone", STAGE2: "after stage 2", PROBE: "the same, by a probe"}
NOTES = (
    "Recipes digits_stage1 and digits_stage2. Every Raptor is rolled out from state 0 to state 12 on the 359 held-out "
    "digits, and the teacher's final norm and head name the class; share is of the teacher's own accuracy there. One "
    "digit is 0.28 points. R2 is 1 - squared error / squared deviation from the mean per channel; epsilon is the mean "
    "Frobenius norm of the error of the last layer. Values are means over seeds, ± their standard deviation (ddof 1).",
    "`by a probe`: a linear readout begun at random and trained on the Raptor's own last states of the training digits "
    "(TASK=digits), after its last epoch; its share is of the same probe on the teacher.",
    "The ladder is cumulative and of the blocks of phases: `+ CLS weighting` is stage 1 of the recipe (it changes the "
    "last span alone), `+ second stage` the whole of it.",
    "Partitions: all with the same shortened trainings and one seed. `random` are contiguous cuts, drawn evenly, all "
    "different, of at least two layers a block; there are 9 such cuts into two and 28 into three, that of phases among "
    "them.",
)


@dataclass(frozen=True, kw_only=True)
class LadderBenchmark:
    """Sizes of this benchmark.

    Attributes:
        ks: Numbers of blocks.
        ladder_k: Blocks of the ablation, one of ks.
        partition_ks: Numbers of blocks whose spans are compared with random ones.
        n_random: Random partitions of each; fewer where there are no more.
        seeds: Of blocks and ladder.
        partition_seeds: Of the partitions.
        n_steps: Of a block's training and of the joint one; None is the recipe's.
        partition_n_steps: The same for the partitions.
        batch_size: Samples a step of every training.
        limit: Images of each split; None is all.
    """

    ks: tuple[int, ...] = (1, 2, 3)
    ladder_k: int = 3
    partition_ks: tuple[int, ...] = (3, 2)
    n_random: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    partition_seeds: tuple[int, ...] = (0,)
    n_steps: tuple[int | None, int | None] = (200, 300)
    partition_n_steps: tuple[int, int] = (40, 80)
    batch_size: int = 16
    limit: int | None = None


QUICK = LadderBenchmark(
    ks=(1, 2),
    ladder_k=2,
    partition_ks=(2,),
    n_random=1,
    seeds=(0,),
    n_steps=(1, 1),
    partition_n_steps=(1, 1),
    batch_size=4,
    limit=64,  # a batch of the probe
)


def run(config: LadderBenchmark, folder: Path | None = None) -> Result:
    """Extract, train, judge, compare; what `folder` holds already is not done again.

    Args:
        config: Sizes.
        folder: For store and runs, half a gigabyte; None is a temporary one.
    """
    temporary = tempfile.TemporaryDirectory(prefix="bench-ladder-") if folder is None else nullcontext(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the door of the trainer does for blocks so small
    try:
        with temporary as place:
            return _run(config, Runs(Path(place), batch_size=config.batch_size, limit=config.limit))
    finally:
        torch.set_num_threads(threads)


def _run(config: LadderBenchmark, runs: Runs) -> Result:
    distance = layer_distances(runs.states).distance
    cuts = {k: groups_of(contiguous_segments(distance, k)) for k in {*config.ks, config.ladder_k, *config.partition_ks}}
    spans = {k: spans_of(groups) for k, groups in cuts.items()}
    randoms = {
        k: [spans_of(groups) for groups in random_contiguous(cuts[k], config.n_random)] for k in config.partition_ks
    }

    def at(k: int, rung: str, seed: int) -> Found:
        if rung in (STAGE2, PROBE):
            found = runs.raptor(spans[k], seed, config.n_steps)
            return found if rung == STAGE2 else found.with_accuracy(runs.probe(found.run, seed))
        return runs.blocks(spans[k], seed, config.n_steps[0], _STAGE1[rung])

    def shortened(partition: Spans) -> list[Found]:
        return [runs.raptor(partition, seed, config.partition_n_steps) for seed in config.partition_seeds]

    # One seed of everything comes first, so that what was interrupted shows all three parts.
    by_k: dict[tuple[int, str], list[Found]] = {(k, rung): [] for k in config.ks for rung in _SHOWN}
    ladder: dict[str, list[Found]] = {rung: [] for rung in RUNGS}
    partitions: dict[int, dict[Spans, list[Found]]] = {}
    for seed in config.seeds:
        for (k, rung), found in by_k.items():
            found.append(at(k, rung, seed))
        for rung, found in ladder.items():
            found.append(at(config.ladder_k, rung, seed))
        if not partitions:
            partitions = {k: {cut: shortened(cut) for cut in [spans[k], *randoms[k]]} for k in config.partition_ks}
    return _result(config, runs.teacher_accuracy(), runs.probe(None, 0), by_k, ladder, partitions)


def spans_of(groups: Groups) -> Spans:
    """Contiguous groups of layers as spans of states."""
    return tuple(map(Span.parse, spans_text(groups).split(",")))


def _result(
    config: LadderBenchmark,
    teacher: float,
    teacher_probe: float,
    by_k: dict[tuple[int, str], list[Found]],
    ladder: dict[str, list[Found]],
    partitions: dict[int, dict[Spans, list[Found]]],
) -> Result:
    rows = [
        _row(f"k = {k}", _SHOWN[rung], found, teacher_probe if rung == PROBE else teacher)
        for (k, rung), found in by_k.items()
    ]
    rows += [
        _row(f"ladder, k = {config.ladder_k}", rung, found, teacher_probe if rung == PROBE else teacher)
        for rung, found in ladder.items()
    ]
    for k, cuts in partitions.items():
        own, *others = cuts.values()
        rows.append(_row(f"partitions, k = {k}", "phases", own, teacher))
        rows.append(_row(f"partitions, k = {k}", f"random, all {len(others)}", [f for o in others for f in o], teacher))
        rows += [_row(f"partitions, k = {k}", "random", found, teacher) for found in others]
    return Result(
        name="ladder",
        title=f"Raptors of digits_vit, whose own accuracy on the held-out digits is {teacher:.2%}",
        machine=this_machine(),
        settings=asdict(config),
        rows=rows,
        goals=[
            *_block_goals(by_k, {STAGE2: teacher, PROBE: teacher_probe}),
            *_ladder_goals(ladder),
            *_partition_goals(partitions),
        ],
        notes=NOTES,
        details={
            "teacher": teacher,
            "teacher_by_a_probe": teacher_probe,
            "by_k": [{"k": k, "rung": rung, "found": _json(found)} for (k, rung), found in by_k.items()],
            "ladder": [{"rung": rung, "found": _json(found)} for rung, found in ladder.items()],
            "partitions": [
                {"k": k, "found": [_json(found) for found in cuts.values()]} for k, cuts in partitions.items()
            ],
        },
    )


def _block_goals(by_k: dict[tuple[int, str], list[Found]], teacher: dict[str, float]) -> list[Goal]:
    goals = []
    for k, least in ((2, 98.0), (3, 98.5)):
        for rung, whose in ((STAGE2, "the teacher's head"), (PROBE, "a probe")):
            if (k, rung) in by_k:
                share = 100 * _mean(by_k[k, rung], _accuracy) / teacher[rung]
                what = f"k = {k} after stage 2, share of the teacher's accuracy by {whose}, %"
                goals.append(Goal(what=what, found=share, at_least=least))
    return goals


def _ladder_goals(ladder: dict[str, list[Found]]) -> list[Goal]:
    goals = []
    for before, after in pairwise(RUNGS):
        points = 100 * (_mean(ladder[after], _accuracy) - _mean(ladder[before], _accuracy))
        goals.append(Goal(what=f"{after}: points of accuracy gained", found=points, at_least=0))
    return goals


def _partition_goals(partitions: dict[int, dict[Spans, list[Found]]]) -> list[Goal]:
    goals = []
    for k, cuts in partitions.items():
        own, *others = [_mean(found, lambda one: one.mean_r2) for found in cuts.values()]
        better = sum(other > own for other in others)
        what = f"k = {k}: R2 of all layers, phases less the mean of random ones ({better} of {len(others)} are better)"
        goals.append(Goal(what=what, found=own - fmean(others), at_least=0))
    return goals


def _row(part: str, configuration: str, found: Sequence[Found], teacher: float) -> dict[str, Cell]:
    def cell(value: Callable[[Found], float], digits: int) -> str:
        values = [value(one) for one in found]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):.{digits}f}{spread}"

    spans = {",".join(map(str, one.spans)) for one in found}
    return {
        "part": part,
        "configuration": configuration,
        "spans": spans.pop() if len(spans) == 1 else "-",
        "accuracy, %": cell(lambda one: 100 * one.accuracy, 2),
        "share of teacher, %": cell(lambda one: 100 * one.accuracy / teacher, 2),
        "R2 of CLS": cell(lambda one: one.last_r2("cls"), 3),
        "of registers": cell(lambda one: one.last_r2("registers"), 3),
        "of patches, last layer": cell(lambda one: one.last_r2("patches"), 3),
        "R2 of all layers": cell(lambda one: one.mean_r2, 3),
        "epsilon": cell(lambda one: one.epsilon, 2),
    }


def _mean(found: Sequence[Found], value: Callable[[Found], float]) -> float:
    return fmean(map(value, found))


def _accuracy(found: Found) -> float:
    return found.accuracy


def _json(found: Sequence[Found]) -> list[dict[str, object]]:
    return [
        {"spans": list(map(str, one.spans)), "seed": one.seed, "validation": one.validation.to_json()} for one in found
    ]

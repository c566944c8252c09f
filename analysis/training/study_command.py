"""`make study`: teachers trained with more and less stochastic depth, and what became of their layers.

teacher with checkpoints -> their curves, for each chance and seed, and for one training that shall overfit; one page.
Each part is a command of a door that a person could type, so that what is done is not done again.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.page import Origin, Section, save_page
from analysis.partitions import MIN_SIZE
from analysis.parts import Part, Parts, claim, hold, place_problems
from analysis.places import make_command
from infra.console import ExitCode, Progress, UserError, human_duration, say, stop_on_signals
from infra.machine import n_cores
from infra.objects import open_objects

DEFAULT_STUDY = "data/study"
DROP_PATHS = "0,0.1,0.2,0.4,0.6"
_BATCH = 32
_OVERFIT_IMAGES, _OVERFIT_FACTOR = 128, 8
_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class _Training:
    """One teacher: its name, such as p0.3-seed0, and what make teacher is told of it beside seed and place."""

    name: str
    title: str
    seed: int
    n_epochs: int
    options: Sequence[str]


def study_command(
    *,
    study: str = DEFAULT_STUDY,
    drop_paths: str = DROP_PATHS,
    epochs: int = 30,
    seeds: int = 1,
    k: int = 3,
    raptor_steps: int = 200,
    limit: int | None = None,
) -> int:
    """Stochastic depth against similarity of layers, clarity of phases and fit of a Raptor, on digits.

    Also an untrained teacher (epoch 0 of each) and one that overfits (128 digits, no augmentation). On one core a
    training takes 15 s of processor time an epoch, and its four checkpoints 3 minutes each with 200 steps of a Raptor:
    1 h 50 min in all for the default. Interrupt it whenever you like: the same command goes on where it was.

    Args:
        study: Local folder for everything that it makes.
        drop_paths: Chances that a residual branch is dropped, the same in all blocks, with commas; more may be added.
        epochs: Of each teacher, batches of 32.
        seeds: Teachers for each chance; with 2 or more there are standard deviations.
        k: Phases, and blocks of a Raptor.
        raptor_steps: Steps of 16 images of each Raptor; 0: none.
        limit: Only the first so many training digits, for a trial.
    """
    chances = _chances(drop_paths)
    folder = Path(study)
    if problems := _problems(study, drop_paths, chances, epochs, seeds, k, raptor_steps, limit):
        raise UserError("\n  ".join(["make study cannot start:", *problems]))
    typed = {
        "STUDY": study if study != DEFAULT_STUDY else None,
        "DROP_PATHS": drop_paths if drop_paths != DROP_PATHS else None,
        "EPOCHS": epochs if epochs != 30 else None,
        "SEEDS": seeds if seeds != 1 else None,
        "K": k if k != 3 else None,
        "RAPTOR_STEPS": raptor_steps if raptor_steps != 200 else None,
        "LIMIT": limit,
    }
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the parts: one core each, as many as there are cores
    trainings = _trainings(chances, seeds, epochs, limit)
    with stop_on_signals() as stopping, hold(folder, stopping, "STUDY") as lock:
        if lock is not None:
            choices = {"epochs": epochs, "k": k, "raptor_steps": raptor_steps, "limit": limit}
            claim(folder, choices, "STUDY")
        if lock is None or not _run(folder, trainings, k, raptor_steps, stopping, lock):
            say(f"stopped; everything is saved in {folder}. The same command goes on")
            return ExitCode.INTERRUPTED
    sections = _sections(folder, trainings, k, raptor_steps, make_command("study", typed))
    facts = {"study": study, "command": make_command("study", typed)}
    save_page(open_objects(study), "Stochastic depth, digits_vit on digits", facts, sections)
    took = human_duration(time.monotonic() - began)
    print(f"saved  {study}/report.html, {study}/tables/*.csv, after {took}; of each training: {study}/curves/")
    return ExitCode.OK


def _chances(drop_paths: str) -> list[float]:
    try:
        return sorted({float(one) for one in drop_paths.split(",")})
    except ValueError:
        return []


def _problems(
    study: str,
    drop_paths: str,
    chances: Sequence[float],
    epochs: int,
    seeds: int,
    k: int,
    raptor_steps: int,
    limit: int | None,
) -> list[str]:
    problems = []
    if "://" in study:
        problems.append(f"STUDY={study}: expected a folder of this machine")
    else:
        problems += place_problems(Path(study), "STUDY")
    if len(chances) < 2 or not all(0 <= one < 1 for one in chances):
        problems.append(f"DROP_PATHS={drop_paths}: expected two or more chances from 0 to below 1, such as 0,0.2,0.5")
    if epochs < 1:
        problems.append(f"EPOCHS={epochs}: expected 1 or more")
    if seeds < 1:
        problems.append(f"SEEDS={seeds}: expected 1 or more")
    if not 1 <= k <= 12 // MIN_SIZE:
        problems.append(f"K={k}: expected 1 to {12 // MIN_SIZE} phases")
    if raptor_steps < 0:
        problems.append(f"RAPTOR_STEPS={raptor_steps}: expected 0 or more")
    if limit is not None and limit < _BATCH:
        problems.append(f"LIMIT={limit}: expected {_BATCH} or more images, a batch")
    return problems


def _trainings(chances: Sequence[float], seeds: int, epochs: int, limit: int | None) -> list[_Training]:
    few = ["--n-train", str(limit)] if limit is not None else []
    found = [
        _Training(
            name=f"p{p:g}-seed{seed}",
            title=f"p = {p:g}" if seeds == 1 else f"p = {p:g}, seed {seed}",
            seed=seed,
            n_epochs=epochs,
            options=["--drop-path", f"{p:g}", "--no-bfloat16", *few],
        )
        for p in chances
        for seed in range(seeds)
    ]
    n_overfit = str(min(_OVERFIT_IMAGES, limit or _OVERFIT_IMAGES))
    overfit = _Training(
        name="overfit-seed0",
        title="overfitted",
        seed=0,
        n_epochs=_OVERFIT_FACTOR * epochs,
        options=["--drop-path", "0", "--no-bfloat16", "--n-train", n_overfit, "--no-augment"],
    )
    return [*found, overfit]


def kept_epochs(n_epochs: int) -> list[int]:
    """Untrained, after a tenth, after three tenths, and the last."""
    return sorted({0, n_epochs // 10, 3 * n_epochs // 10, n_epochs})


def _run(
    folder: Path,
    trainings: Sequence[_Training],
    k: int,
    raptor_steps: int,
    stopping: Callable[[], bool],
    lock: int,
) -> bool:
    parts = [part for one in trainings for part in _parts(folder, one, k, raptor_steps)]
    say(f"make study in {folder}, {n_cores()} parts at a time; interrupt it whenever you like, and repeat it to go on")
    with Progress(total=len(parts), unit="parts", label="study", every_s=_EVERY_S) as progress:
        return Parts(folder, at_once=n_cores(), progress=progress, stopping=stopping, lock=lock).run(parts)


def _parts(folder: Path, training: _Training, k: int, raptor_steps: int) -> list[Part]:
    teacher, curves = _teacher_folder(folder, training), _curves_folder(folder, training)
    kept = ",".join(map(str, kept_epochs(training.n_epochs)))
    options = ["--epochs", str(training.n_epochs), "--batch-size", str(_BATCH), *training.options]
    train = Part(
        name=f"teacher {training.name}",
        arguments=["trainer", "teacher", "--out", str(teacher), "--seed", str(training.seed), "--keep", kept, *options],
        command=make_command(
            "teacher", {"OUT": teacher, "SEED": training.seed, "KEEP": kept, "ARGS": " ".join(options)}
        ),
        made=teacher / "digits_vit_head.safetensors",
        size=2,
    )
    asked = {"checkpoints": teacher, "out": curves, "k": k, "raptor-steps": raptor_steps, "seed": training.seed}
    measure = Part(
        name=f"curves {training.name}",
        arguments=[
            "analysis",
            "curves",
            *(word for name, value in asked.items() for word in (f"--{name}", str(value))),
        ],
        command=make_command("curves", {name.upper().replace("-", "_"): value for name, value in asked.items()}),
        made=curves / "report.html",
        needs=[train.name],
        size=1,
    )
    return [train, measure]


def _teacher_folder(folder: Path, training: _Training) -> Path:
    return folder / "teachers" / training.name


def _curves_folder(folder: Path, training: _Training) -> Path:
    return folder / "curves" / training.name


def _sections(folder: Path, trainings: Sequence[_Training], k: int, raptor_steps: int, command: str) -> list[Section]:
    from analysis.training.measure import MeasureSettings  # torch and timm take seconds to import
    from analysis.training.runs import Run, check_same_images, measure_run
    from analysis.training.sections import training_section
    from analysis.training.study_sections import study_section
    from trainer.teacher_checkpoints import read_checkpoints

    runs: dict[str, Run] = {}
    for one in trainings:
        settings = MeasureSettings(k=k, raptor_steps=raptor_steps, seed=one.seed)
        checkpoints = read_checkpoints(_teacher_folder(folder, one))
        measured = open_objects(str(_curves_folder(folder, one)))
        runs[one.name] = measure_run(one.title, checkpoints, measured, settings)  # all of it is there
    check_same_images([run.last.measured for run in runs.values()], "study")
    by_chance: dict[float, list[Run]] = {}
    for run in list(runs.values())[:-1]:
        by_chance.setdefault(run.last.checkpoint.config.drop_path, []).append(run)
    n_images = runs[trainings[0].name].last.measured.n_images
    n_seeds = len(next(iter(by_chance.values())))
    data = f"digits, held-out; teachers in {folder}, {n_seeds} for each chance"
    origin = Origin(data=data, n_images=n_images, seed=0, command=command)
    return [study_section(by_chance, origin), training_section(list(runs.values()), origin)]

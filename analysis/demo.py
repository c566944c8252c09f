"""`make demo`: the whole story on the built-in digits, as a chain of the doors that a person would use one by one.

extract -> phases -> stage 1 for the spans of all k -> stage 2 -> probes -> table and figures. Blocks that two Raptors
share are trained once.
"""

import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.parts import Part, Parts, claim, hold, place_problems
from infra.console import ExitCode, Progress, UserError, human_duration, say, stop_on_signals
from infra.machine import n_cores

DEFAULT_DEMO = "data/demo"
N_BLOCKS = (1, 2, 3)
_STAGE1_STEPS = 200  # enough for blocks that go on to stage 2; the recipe's 600 are for blocks on their own
_EVERY_S = 10.0


def demo_command(
    *, demo: str = DEFAULT_DEMO, seeds: int = 1, limit: int | None = None, steps: int | None = None
) -> int:
    """The whole story on the built-in digits: extract, phases, Raptors of 1, 2 and 3 blocks, probes, table, figures.

    Interrupt it whenever you like: the same command goes on where it was, and does nothing twice.

    Args:
        demo: Local folder for everything that it makes.
        seeds: Raptors of each kind; with 3 the table has standard deviations and it takes three times as long.
        limit: Only the first so many images of each split.
        steps: Of each training; None: 200 of stage 1, and the recipe's own number of stage 2.
    """
    folder = Path(demo)
    if problems := _problems(demo, seeds, limit, steps):
        raise UserError("\n  ".join(["make demo cannot start:", *problems]))
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the parts: one core each, as many as there are cores
    with stop_on_signals() as stopping, hold(folder, stopping) as lock:
        if lock is not None:
            claim(folder, {"limit": limit, "steps": steps}, "DEMO")  # Raptors may be added (SEEDS)
        if lock is None or not _run(folder, seeds, limit, steps, stopping, lock):
            say(f"stopped; everything is saved in {folder}. The same command goes on")
            return ExitCode.INTERRUPTED
    _show_table(folder)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = human_duration(used.ru_utime + used.ru_stime)
    print(_closing(folder, f"{human_duration(time.monotonic() - began)}, {cpu} of processor time"))
    return ExitCode.OK


def _problems(demo: str, seeds: int, limit: int | None, steps: int | None) -> list[str]:
    problems = []
    if "," in demo:
        problems.append(f"DEMO={demo}: expected a path without a comma, which stands between the RUNS of a Raptor")
    if "://" in demo:
        problems.append(f"DEMO={demo}: expected a folder of this machine")
    else:
        problems += place_problems(Path(demo), "DEMO")
    if seeds < 1:
        problems.append(f"SEEDS={seeds}: expected 1 or more")
    if limit is not None and limit < 64:
        problems.append(f"LIMIT={limit}: expected 64 or more images, for probes that fill a batch")
    if steps is not None and steps < 1:
        problems.append(f"STEPS={steps}: expected 1 or more")
    return problems


def _run(
    folder: Path, seeds: int, limit: int | None, steps: int | None, stopping: Callable[[], bool], lock: int
) -> bool:
    """All parts; False if it was asked to stop before their end."""
    say(f"make demo in {folder}, {n_cores()} parts at a time; interrupt it whenever you like, and repeat it to go on")

    def run(label: str, parts: Sequence[Part]) -> bool:
        with Progress(total=len(parts), unit="parts", label=label, every_s=_EVERY_S) as progress:
            return Parts(folder, at_once=n_cores(), progress=progress, stopping=stopping, lock=lock).run(parts)

    if not run("store and phases", _store_parts(folder, limit)):
        return False
    blocks = {k: _read_blocks(folder, k) for k in N_BLOCKS}
    for k, spans in blocks.items():
        say(f"phases of k={k}: BLOCKS={','.join(spans)}")
    return run("Raptors", [part for seed in range(seeds) for part in _model_parts(folder, blocks, seed, steps)])


def _store_parts(folder: Path, limit: int | None) -> list[Part]:
    store = folder / "stores/digits"
    extract = Part(
        name="extract",
        arguments=["pipeline", "extract", "--store", str(store), "--no-ray", *_given("limit", limit)],
        command=_make("extract", STORE=store, NO_RAY=1, LIMIT=limit),
        made=store / "val/store.json",
    )
    phases = [
        Part(
            name=f"phases k={k}",
            arguments=["analysis", "phases", "--k", str(k), "--store", str(store), "--out", str(folder / "phases")],
            command=_make("phases", K=k, STORE=store, OUT=folder / "phases"),
            made=folder / f"phases/k{k}.json",
            needs=["extract"],
        )
        for k in N_BLOCKS
    ]
    return [extract, *phases]


def _read_blocks(folder: Path, k: int) -> list[str]:
    """The spans that make phases has found."""
    return json.loads((folder / f"phases/k{k}.json").read_text())["blocks"]


def _model_parts(folder: Path, blocks: dict[int, list[str]], seed: int, steps: int | None) -> list[Part]:
    """Stage 1 for every span, stage 2 and a probe for every k, a probe of the teacher."""
    store = str(folder / "stores/digits")
    spans = list(dict.fromkeys(span for k in blocks for span in blocks[k]))
    stage1 = [
        _training(
            "train",
            f"block {span} seed {seed}",
            folder / f"runs/{span}-seed{seed}",
            [span],
            block=span,
            store=store,
            seed=seed,
            steps=steps or _STAGE1_STEPS,
        )
        for span in spans
    ]
    stage2 = [
        _training(
            "raptor",
            f"raptor k={k} seed {seed}",
            folder / f"runs/raptor-k{k}-seed{seed}",
            found,
            needs=[f"block {span} seed {seed}" for span in found],
            blocks=",".join(found),
            runs=",".join(str(folder / f"runs/{span}-seed{seed}") for span in found),
            store=store,
            seed=seed,
            steps=steps,
        )
        for k, found in blocks.items()
    ]
    probes = [_probe(folder, "teacher", seed)] if seed == 0 else []
    probes += [_probe(folder, f"k={k}", seed, f"raptor k={k} seed {seed}") for k in blocks]
    return [*stage1, *stage2, *probes]


def _training(
    door: str, name: str, run: Path, spans: Sequence[str], needs: Sequence[str] = (), **options: object
) -> Part:
    flags = [word for option, value in {**options, "run": run}.items() for word in _given(option, value)]
    return Part(
        name=name,
        arguments=["trainer", door, *flags],
        command=_make(door, **{option.upper(): value for option, value in {**options, "run": run}.items()}),
        made=run / "result.json",
        needs=needs,
        size=int(spans[-1].partition("-")[2]) - int(spans[0].partition("-")[0]),
    )


def _probe(folder: Path, what: str, seed: int, needs: str = "") -> Part:
    out = folder / f"probes/{what.replace('=', '')}-seed{seed}"
    options: dict[str, object] = {"task": "digits", "store": folder / "stores/digits", "seed": seed, "out": out}
    if needs:
        options["run"] = folder / f"runs/{needs.replace(' seed ', '-seed').replace(' k=', '-k')}"
    return Part(
        name=f"probe {what} seed {seed}",
        arguments=["trainer", "probe", *(word for name, value in options.items() for word in _given(name, value))],
        command=_make("probe", **{name.upper(): value for name, value in options.items()}),
        made=out / "result.json",
        needs=[needs] if needs else [],
    )


def _given(name: str, value: object) -> list[str]:
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def _make(target: str, **variables: object) -> str:
    return " ".join(
        [
            "make",
            target,
            *(f"{name}={shlex.quote(str(value))}" for name, value in variables.items() if value is not None),
        ]
    )


def _show_table(folder: Path) -> None:
    from trainer.commands.table import table_command

    print()
    sys.stdout.flush()
    table_command(runs=str(folder / "runs"), probes=str(folder / "probes"), out=str(folder / "table"))


def _closing(folder: Path, took: str) -> str:
    figures = sorted([*folder.glob("table/*.png"), *folder.glob("phases/*.png")])
    return "\n".join(
        [
            "",
            "figures",
            *(f"  {path}" for path in figures),
            f"This took {took}; logs are in {folder}/log.",
            "",
            "with real images, the same by hand (docs/recipe.md says what to expect of each):",
            "  make plan    IMAGES=/data/imagenet STORE=/nvme/imagenet",
            "  make extract IMAGES=/data/imagenet STORE=/nvme/imagenet",
            "  make phases  STORE=/nvme/imagenet K=3",
            "  make train   STORE=/nvme/imagenet BLOCK=all BLOCKS=0-7,7-10,10-12",
            "  make raptor  STORE=/nvme/imagenet BLOCKS=0-7,7-10,10-12",
            "  make probe   TASK=imagenet IMAGES=/data/imagenet STORE=/nvme/imagenet RUN=...",
            "  make table   RUNS=data/runs/imagenet PROBES=data/probes/imagenet",
        ]
    )

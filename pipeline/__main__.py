"""The door of this package: `python -m pipeline extract | plan | verify`. The Makefile calls only this."""

import shlex
import sys
import time
from typing import Annotated

import tyro

from infra.console import ExitCode, JobError, Progress, human_bytes, human_duration, run_door, say
from infra.objects import ObjectError, open_objects
from pipeline.extract import exit_code, extract
from pipeline.plan import describe, plan_store
from pipeline.repair import repair as repair_stores
from pipeline.settings import ExtractConfig, check_inputs, make_teacher, plan_stores, store_root
from pipeline.summary import summarise
from pipeline.workers import RunConfig, n_threads
from storage_schemas.errors import Problem
from storage_schemas.find import find_stores
from storage_schemas.reader import open_store
from storage_schemas.verify import verify_store

_Config = Annotated[ExtractConfig, tyro.conf.arg(name="")]
_Run = Annotated[RunConfig, tyro.conf.arg(name="")]


def run_extract(config: _Config, run: _Run) -> int:
    """Extract hidden states of images into a store. Run it again to go on after anything."""
    results = extract(config, run)
    print(summarise(results, store_root(config)))
    return exit_code(results)


def run_plan(config: _Config, run: _Run) -> int:
    """Say what an extraction would take, and write nothing."""
    check_inputs(config)
    for planned in plan_stores(config, make_teacher(config), say):
        weights_nbytes = sum(len(data) for data in planned.teacher_files.values())
        plan = plan_store(
            planned.spec,
            weights_nbytes=weights_nbytes,
            n_states=planned.n_states,
            depth=run.depth or 2,
            n_threads=n_threads(run),
        )
        for line in [*describe(plan, planned.spec, planned.location), *(f"  note: {n}" for n in planned.notes)]:
            print(line)
    return ExitCode.OK


def run_verify(config: _Config, run: _Run, repair: bool = False) -> int:
    """Re-read and check every object of a store, or of stores train and val; with --repair, mend what is wrong.

    Args:
        config: The store; to repair also the images, and what the extraction was given where it was not the default.
        run: How to extract again.
        repair: Rewrite damaged documents and extract bad shards again.
    """
    root = store_root(config)
    if repair:
        results = repair_stores(config, run)
        print(summarise(results, root))
        return exit_code(results)
    try:
        problems = [p for split, location in find_stores(root).items() for p in _verify(location, split)]
    except ObjectError as error:
        raise JobError(str(error)) from error
    if not problems:
        return ExitCode.OK
    print(f"{len(problems)} problems. Mend them: make verify STORE={shlex.quote(root)} IMAGES=<as extracted> REPAIR=1")
    return ExitCode.PROBLEMS


def _verify(location: str, split: str) -> list[Problem]:
    began, checked = time.monotonic(), 0
    with Progress(total=100, unit="%", label=f"verify {split}".strip()) as progress:

        def on_object(done: int, total: int) -> None:
            nonlocal checked
            progress.advance(100 * done // total - 100 * checked // total, n_bytes=0)
            checked = done

        problems = verify_store(open_objects(location), progress=on_object)
    if not problems:
        seconds = human_duration(time.monotonic() - began)
        store = open_store(location)
        n_committed, n_shards = int(store.committed.sum()), store.spec.n_shards
        sound = "sound" if store.is_complete else f"sound so far, {n_committed:,} of {n_shards:,} shards are committed"
        print(f"{location}: {sound}; {human_bytes(checked)} re-read and checked in {seconds}")
        if not store.is_complete:
            print("  The make extract that began it goes on with the missing ones.")
        return []
    shards = {problem.shard for problem in problems if problem.shard is not None}
    print(f"{location} has {len(problems)} problems" + (f" in {len(shards)} shards:" if shards else ":"))
    for problem in problems:
        print(f"  {problem}")
    return problems


def main(args: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    commands = {"extract": run_extract, "plan": run_plan, "verify": run_verify}
    return run_door(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m pipeline", args=args))


if __name__ == "__main__":
    sys.exit(main())

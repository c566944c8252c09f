"""`python -m benchmarks [extraction|stream|step|all]`: measure, print tables with ratios, save them."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import extraction, step, stream
from benchmarks.report import RESULTS, Result
from infra.console import UserError, run_door


@dataclass(frozen=True, kw_only=True)
class Options:
    """Side-by-side benchmarks; every number is a ratio within one run.

    Attributes:
        what: Which one.
        quick: Tiny sizes, to see that everything runs; its numbers say nothing about speed.
        dir: Where temporary data goes, up to 4 GB, deleted afterwards; the system's place if not given.
        out: Where results are saved; benchmarks/results if not given, and nowhere for quick ones.
    """

    what: Annotated[Literal["extraction", "stream", "step", "all"], tyro.conf.Positional] = "all"
    quick: bool = False
    dir: Path | None = None
    out: Path | None = None


def main(options: Options) -> int:
    """Run, print, save. A missed goal is printed, and is no failure of the command."""
    if options.dir is not None and not options.dir.is_dir():
        raise UserError(f"--dir {options.dir} is no folder; make it, or leave --dir out")
    for name in ("extraction", "stream", "step") if options.what == "all" else (options.what,):
        print(f"benchmark {name} ...", flush=True)
        result = _run(name, options)
        print(result.to_text())
        if options.out is not None or not options.quick:
            print(f"saved {result.save(options.out or RESULTS).name} and .json\n", flush=True)
    return 0


def _run(name: str, options: Options) -> Result:
    if name == "stream":
        return stream.run(stream.QUICK if options.quick else stream.StreamBenchmark(), options.dir)
    if name == "step":
        return step.run(step.QUICK if options.quick else step.StepBenchmark())
    return extraction.run(extraction.QUICK if options.quick else extraction.ExtractionBenchmark(), options.dir)


if __name__ == "__main__":
    sys.exit(run_door(lambda: main(tyro.cli(Options, prog="python -m benchmarks"))))

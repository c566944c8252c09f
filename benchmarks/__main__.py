"""`python -m benchmarks [NAME|all]`: measure, print tables with ratios, save them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import (
    cka,
    clients,
    codecs,
    extraction,
    fidelity,
    ladder,
    loader_wait,
    precision,
    scale,
    scaling,
    step,
    stream,
    stream_s3,
    whole_report,
)
from benchmarks.report import RESULTS, Result
from infra.console import UserError, leave, run_door

Name = Literal[
    "extraction",
    "stream",
    "stream-s3",
    "loader-wait",
    "clients",
    "step",
    "codecs",
    "precision",
    "fidelity",
    "ladder",
    "cka",
    "report",
    "scale",
    "scaling",
    "all",
]
ALL = (
    "extraction",
    "stream",
    "stream-s3",
    "loader-wait",
    "clients",
    "step",
    "codecs",
    "precision",
    "cka",
    "report",
    "scale",
    "scaling",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Side-by-side benchmarks; every number is a ratio within one run.

    Attributes:
        what: Which one; `all` leaves out fidelity and ladder, which take an hour and go on where they were interrupted.
        quick: Tiny sizes, to see that everything runs; its numbers say nothing about speed.
        dir: Where temporary data goes, up to 4 GB, deleted afterwards; the system's place if not given. Fidelity and
            ladder keep their stores and runs there; data/fidelity and data/ladder if not given.
        steps: Of each training of fidelity; the recipe's if not given.
        out: Where results are saved; benchmarks/results if not given, and nowhere for quick ones.
    """

    what: Annotated[Name, tyro.conf.Positional] = "all"
    quick: bool = False
    dir: Path | None = None
    steps: int | None = None
    out: Path | None = None


def main(options: Options) -> int:
    """Run, print, save. A missed goal is printed, and is no failure of the command."""
    if options.dir is not None and not options.dir.is_dir():
        raise UserError(f"--dir {options.dir} is no folder; make it, or leave --dir out")
    for name in ALL if options.what == "all" else (options.what,):
        print(f"benchmark {name} ...", flush=True)
        result = _run(name, options)
        print(result.to_text())
        if options.out is not None or not options.quick:
            print(f"saved {result.save(options.out or RESULTS).name} and .json\n", flush=True)
    return 0


def _run(name: str, options: Options) -> Result:
    if name == "stream":
        return stream.run(stream.QUICK if options.quick else stream.StreamBenchmark(), options.dir)
    if name == "stream-s3":
        return stream_s3.run(stream_s3.QUICK if options.quick else stream_s3.StreamS3Benchmark())
    if name == "cka":
        return cka.run(cka.QUICK if options.quick else cka.CkaBenchmark())
    if name == "report":
        return whole_report.run(whole_report.QUICK if options.quick else whole_report.ReportBenchmark(), options.dir)
    if name == "loader-wait":
        return loader_wait.run(loader_wait.QUICK if options.quick else loader_wait.LoaderWaitBenchmark(), options.dir)
    if name == "clients":
        return clients.run(clients.QUICK if options.quick else clients.ClientsBenchmark())
    if name == "step":
        return step.run(step.QUICK if options.quick else step.StepBenchmark())
    if name == "codecs":
        return codecs.run(codecs.QUICK if options.quick else codecs.CodecsBenchmark())
    if name == "precision":
        return precision.run(precision.QUICK if options.quick else precision.PrecisionBenchmark())
    if name == "scale":
        return scale.run(scale.QUICK if options.quick else scale.ScaleBenchmark())
    if name == "scaling":
        return scaling.run(scaling.QUICK if options.quick else scaling.ScalingBenchmark(), options.dir)
    if name == "fidelity":
        config = fidelity.QUICK if options.quick else fidelity.FidelityBenchmark()
        folder = options.dir or (None if options.quick else fidelity.DEFAULT_FOLDER)
        return fidelity.run(config, folder, n_steps=options.steps)
    if name == "ladder":
        folder = options.dir or (None if options.quick else ladder.DEFAULT_FOLDER)
        return ladder.run(ladder.QUICK if options.quick else ladder.LadderBenchmark(), folder)
    return extraction.run(extraction.QUICK if options.quick else extraction.ExtractionBenchmark(), options.dir)


if __name__ == "__main__":
    leave(run_door(lambda: main(tyro.cli(Options, prog="python -m benchmarks"))))

"""A whole report on the digits: every section, with a Raptor beside its teacher, as one command makes it.

`make report STORE=... RUN=...` from its start to its end, imports included, of a store that is extracted for it. The
Raptor's training takes a few steps alone: what a report does with it does not depend on how well it fits.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.page import PAGE
from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from infra.console import JobError

_MOST_S = 300.0
_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class ReportBenchmark:
    """Sizes.

    Attributes:
        limit: Digits of each split that are extracted; None for all 1,797.
        model_limit: Images where models run; None for the report's own default.
        steps: Of the Raptor's training.
    """

    limit: int | None = None
    model_limit: int | None = None
    steps: int = 8


QUICK = ReportBenchmark(limit=40, model_limit=4, steps=1)


@dataclass(frozen=True, kw_only=True)
class Used:
    """What one command took: seconds, seconds of all processors, peak resident memory in bytes (Linux; 0 elsewhere)."""

    wall_s: float
    cpu_s: float
    peak_nbytes: int


def timed(arguments: Sequence[str]) -> Used:
    """Run a command of ours and wait for it.

    Raises:
        JobError: It failed; shows the end of what it printed.
    """
    with tempfile.TemporaryFile() as printed:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=printed, stderr=subprocess.STDOUT)
        ended, peak = 0, 0
        while not ended:
            peak = max(peak, _peak_nbytes(process.pid))
            time.sleep(_POLL_S)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)  # of this child alone
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            tail = "\n  ".join(printed.read().decode(errors="replace").splitlines()[-15:])
            raise JobError(f"python -m {' '.join(arguments)} ended with code {process.returncode}:\n  {tail}")
    return Used(wall_s=wall_s, cpu_s=used.ru_utime + used.ru_stime, peak_nbytes=peak)


def _peak_nbytes(pid: int) -> int:
    """As the kernel keeps it; what wait4 says would count this process's own memory, from before the child began."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def run(config: ReportBenchmark, folder: Path | None) -> Result:
    """Extract, train a few steps, and time the report."""
    machine = this_machine()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store, raptor, out = f"{place}/stores/digits", f"{place}/run", Path(place) / "report"
        some = [] if config.limit is None else ["--limit", str(config.limit)]
        few = [] if config.model_limit is None else ["--model-limit", str(config.model_limit)]
        timed(["pipeline", "extract", "--store", store, "--no-ray", *some])
        timed(["trainer", "train", "--block", "0-12", "--store", store, "--run", raptor, "--steps", str(config.steps)])
        used = timed(["analysis", "report", "--store", store, "--run", raptor, "--out", str(out), *few])
        page = (out / PAGE).read_text()
        n_tables = len(list((out / "tables").iterdir()))
    row: dict[str, Cell] = {
        "what": "report with a Raptor",
        "seconds": used.wall_s,
        "processor seconds": used.cpu_s,
        "peak memory, MB": used.peak_nbytes / 1e6,
        "page, MB": len(page) / 1e6,
        "sections": page.count("<section"),
        "figures": page.count("<figure>"),
        "tables": n_tables,
    }
    return Result(
        name="report",
        title="A whole report on the digits",
        machine=machine,
        settings=asdict(config),
        rows=[row],
        goals=[Goal(what="processor seconds for the whole report", found=used.cpu_s, at_most=_MOST_S)],
        notes=[
            "From the start of the command to its end, imports included. Peak memory is that of its process.",
            "The goal is five minutes, and counts processor seconds: what one idle core would take. Seconds are those "
            "of this machine with whatever else ran on it.",
        ],
    )

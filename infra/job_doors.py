"""`make submit`, `make jobs`, `make logs` and `make stop`."""

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from infra.console import ExitCode, UserError, human_bytes, human_duration, say
from infra.job_code import pack_code
from infra.job_command import JobCommand, endpoint_warning, parse_command
from infra.job_follow import follow, last_line, stop
from infra.jobs import (
    GRACE_S,
    JobRow,
    connect_jobs,
    dashboard_address,
    exit_code,
    find_job,
    job_rows,
    submission_of,
    submit,
)
from infra.s3_settings import read_settings

_Job = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB")]
_Cmd = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CMD")]
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def submit_command(
    cmd: _Cmd,
    ray_address: str | None = None,
    detach: bool = False,
    working_dir: bool = False,
    cpus: float | None = None,
    gpus: float = 0,
    grace: int = GRACE_S,
    python: str = "python",
) -> int:
    """Run a make target as a job of a Ray cluster, and follow it. Ctrl-C leaves it running.

    Args:
        cmd: A target with its variables, such as "extract IMAGES=s3://b/images STORE=s3://b/acts".
        ray_address: Of the cluster's dashboard, http://HOST:8265; None is RAY_ADDRESS, else the cluster that ray start
            has begun on this machine.
        detach: Return at once, with the job's id.
        working_dir: Send the code of this checkout along; else the cluster's own is used.
        cpus: Cores kept for the command itself; None is 1 for commands that work themselves, and 0 for those that have
            workers. A job that asks for some is PENDING until they are free.
        gpus: GPUs kept for the command itself, such as 1 for a probe.
        grace: Seconds that the job may take to finish what is in flight when it is stopped.
        python: The interpreter on the cluster.
    """
    command = parse_command(cmd, makefile=Path("Makefile").absolute())
    if grace < 1:
        raise UserError(f"GRACE={grace}: expected seconds, at least 1")
    address = dashboard_address(ray_address)
    client = connect_jobs(address)
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.zip"
        submission = submission_of(
            command,
            address=address,
            environment=s3_environment(command),
            python=python,
            working_dir=code if working_dir else None,
            num_cpus=cpus,
            num_gpus=gpus,
            grace_s=grace,
        )
        for warning in _warnings(client, command, submission.environment, address):
            say(f"note: {warning}")
        if working_dir:
            say(f"sending the code of {Path.cwd()}, {human_bytes(pack_code(Path.cwd(), code))}")
        job = submit(client, submission)
    typed = f"RAY_ADDRESS={ray_address}" if ray_address else ""
    say(f"{job} is submitted to {address}: {submission.entrypoint}")
    say(_what_next(job, str(command), typed))
    if detach:
        print(job)
        return ExitCode.OK
    return _follow(client, job, str(command), typed)


def jobs_command(ray_address: str | None = None) -> int:
    """List the jobs of a cluster, newest first.

    Args:
        ray_address: As of submit.
    """
    client = connect_jobs(dashboard_address(ray_address))
    rows = [
        replace(row, message=last_line(client, row.job)) if row.submitted and row.state == "RUNNING" else row
        for row in job_rows(client)
    ]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    print(describe_rows(rows, now=time.time(), width=width))
    return ExitCode.OK


def logs_command(job: _Job, ray_address: str | None = None) -> int:
    """Show what a job says, from its beginning, and follow it to its end. Ctrl-C leaves it running.

    Args:
        job: Its id; make jobs lists them.
        ray_address: As of submit.
    """
    client = connect_jobs(dashboard_address(ray_address))
    row = find_job(client, job)
    if not row.submitted:
        raise UserError(f"JOB={job} was not submitted but typed on some machine: what it says is there")
    return _follow(client, job, row.command, f"RAY_ADDRESS={ray_address}" if ray_address else "")


def stop_command(job: _Job, ray_address: str | None = None) -> int:
    """Ask a job to stop: it finishes and saves what is in flight, and this command waits until it has.

    Args:
        job: Its id; make jobs lists them.
        ray_address: As of submit.
    """
    client = connect_jobs(dashboard_address(ray_address))
    before = find_job(client, job)
    if not before.lives:
        say(f"{job} has ended already: {before.state}")
        return ExitCode.OK
    say(f"{job}: asked to stop; it finishes what is in flight (Ctrl-C here only stops waiting)")
    row = stop(client, job, say)
    _tell_ended(row)
    if row.state == "PENDING":
        say("It waits for room and has not begun; it ends as soon as it would begin")
    if row.state == "STOPPED":
        say(f"What it has committed or saved is valid. To go on: make submit CMD={quoted(row.command)}")
    return ExitCode.OK


def s3_environment(command: JobCommand) -> dict[str, str]:
    """What a job needs to find the S3 server that this machine uses. Never keys: everybody sees a job's environment."""
    if not command.uses_s3:
        return {}
    settings = read_settings()
    unsigned = os.environ.get("AWS_SKIP_SIGNATURE") or os.environ.get("AWS_NO_SIGN_REQUEST")
    found = {"AWS_ENDPOINT_URL": settings.endpoint, "AWS_REGION": settings.region, "AWS_SKIP_SIGNATURE": unsigned}
    return {name: value for name, value in found.items() if value}


def _warnings(client: Any, command: JobCommand, environment: Mapping[str, str], address: str) -> list[str]:
    said = list(command.warnings)
    endpoint = endpoint_warning(environment, address, command.words)
    said += [endpoint] if endpoint else []
    if command.uses_s3 and any(name in os.environ for name in _KEYS):
        said.append("the keys in your environment are not sent; the job uses those of the cluster's machines")
    twins = [row.job for row in job_rows(client) if row.lives and row.command == str(command)]
    if twins and command.variables.get("JOIN") != "1":
        said.append(f"{' and '.join(twins)} runs the same command; without JOIN=1 only one can have the place")
    return said


def _follow(client: Any, job: str, command: str, typed: str) -> int:
    try:
        row = follow(client, job, _write)
    except KeyboardInterrupt:
        say(f"\nleft; {job} goes on.\n{_what_next(job, command, typed)}")
        return ExitCode.KILLED
    if row.state == "FAILED" and "No module named" in last_line(client, job):
        say("The cluster's Python lacks the project, or what it needs. WORKING_DIR=1 sends the code of this checkout")
    _tell_ended(row)
    return exit_code(row)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell_ended(row: JobRow) -> None:
    took = human_duration(max(0.0, (row.ended or time.time()) - row.began))
    say(f"{row.job}: {row.state} after {took}" + (f"; {row.message}" if row.message else ""))


def _what_next(job: str, command: str, typed: str) -> str:
    where = f" {typed}" if typed else ""
    return "\n".join(
        [
            f"  follow it:  make logs JOB={job}{where}",
            f"  stop it:    make stop JOB={job}{where}",
            f"  after that: make submit CMD={quoted(command)}{where} goes on",
        ]
    )


def quoted(command: str) -> str:
    """A command in quotes that a shell, and then make, leaves alone."""
    text = command.replace("$", "$$")
    return f'"{text}"' if not set(text) & set('"\\$`!') else shlex.quote(text)


def describe_rows(rows: list[JobRow], *, now: float, width: int) -> str:
    """The table of `make jobs`."""
    if not rows:
        return "no job was submitted to this cluster yet"
    head = ("JOB", "STATE", "SINCE", "TOOK", "COMMAND")
    lines = []
    for row in rows:
        took = human_duration(max(0.0, (row.ended or now) - row.began))
        lines.append((row.job, row.state, time.strftime("%m-%d %H:%M", time.localtime(row.began)), took, row.command))
    sizes = [max(len(line[column]) for line in (head, *lines)) for column in range(4)]
    said = []
    for line, message in zip([head, *lines], ["", *(row.message for row in rows)]):
        text = "  ".join([*(word.ljust(size) for word, size in zip(line, sizes)), line[4]])
        said.append(_cut(text, width))
        if message:
            said.append(_cut(f"    {message}", width))
    return "\n".join(said)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(1, width - 3)] + "..."

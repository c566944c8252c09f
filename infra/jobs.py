"""Jobs of a Ray cluster: submit one, list them. `infra.job_follow` follows and stops them.

Thin over `ray.job_submission`, which speaks HTTP with the dashboard of the cluster's head. Nothing secret is sent: what
a job is told (its command, its variables, its environment) can be read by everybody who sees the dashboard.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.console import ExitCode, JobError, UserError, say
from infra.job_command import TARGETS, JobCommand, is_loopback

KNOCK_TIMEOUT_S = 10.0
GRACE_S = 600
AGENT_TIMEOUT_S = 90.0
_AGENT_WAIT_S = 2.0  # Ray itself waits some 10 s before it says that there is none
_NO_AGENT = (
    "the cluster's head has no agent that starts jobs. It takes a while after the start; for good it is so where "
    "another Ray of that machine has its port: ray start --head --dashboard-agent-listen-port=<a free one>"
)
EXPECTED = "Expected RAY_ADDRESS=http://HOST:8265, the address of the cluster's dashboard"
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's: SIGTERM, then so many seconds (3 if nobody says), then SIGKILL
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What the cluster is asked to run.

    Attributes:
        name: Its id begins with this.
        entrypoint: A line for a shell.
        command: The same, as typed behind make.
        environment: Variables of the job and its workers; never keys.
        working_dir: Zip file of the code; None: it is there already.
        num_cpus: Cores kept for the command itself, wherever there are some free; 0 puts it on the head at once.
        num_gpus: GPUs kept for the command itself.
    """

    name: str
    entrypoint: str
    command: str
    environment: Mapping[str, str] = field(default_factory=dict)
    working_dir: Path | None = None
    num_cpus: float = 0
    num_gpus: float = 0


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """A job as people ask for it.

    Attributes:
        job: Its id.
        state: Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        began: Seconds since 1970.
        ended: The same; None while it runs.
        command: As typed behind make, else the line that runs.
        message: Why it is so, or how far it is, on one line.
        submitted: Whether it can be followed and stopped from here.
        exit_code: Of its command, once it has ended by itself.
    """

    job: str
    state: str
    began: float
    ended: float | None
    command: str
    message: str
    submitted: bool
    exit_code: int | None = None

    @property
    def lives(self) -> bool:
        return self.state not in _ENDED


def dashboard_address(given: str | None = None) -> str:
    """Where the dashboard is: as given, else RAY_ADDRESS, else of the cluster that `ray start` began on this machine.

    Raises:
        UserError: It is no such address, or there is none.
    """
    found = given or os.environ.get("RAY_ADDRESS") or ""
    if not found:
        return _dashboard_here()
    if not found.startswith(("http://", "https://")):
        raise UserError(f"RAY_ADDRESS={found} is where programs join a cluster; jobs go to its dashboard. {EXPECTED}")
    parts = urlsplit(found)
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
        raise UserError(f"RAY_ADDRESS={found} is more than an address. {EXPECTED}")
    return found.rstrip("/")


def _dashboard_here() -> str:
    """Ask the cluster that `ray start` has begun here; one inside a running job is none to send others to."""
    from ray._common.utils import get_ray_address_file
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.exceptions import RayError

    nobody = f"no Ray cluster was started on this machine. {EXPECTED}; or start one here: .venv/bin/ray start --head"
    file = Path(get_ray_address_file(None))
    if not file.exists():
        raise UserError(nobody)
    address = file.read_text().strip()
    try:
        _knock(f"tcp://{address}")
        return get_address_for_submission_client(address)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UserError(f"{nobody}. (The last one that was begun, {address}, does not answer: {error})") from error


def _knock(url: str) -> None:
    """Raise OSError unless somebody listens; Ray itself would try for ever."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), timeout=KNOCK_TIMEOUT_S).close()


def connect_jobs(address: str) -> Any:
    """A `ray.job_submission.JobSubmissionClient` of this very address.

    Raises:
        UserError: Nobody answers there, it is no Ray, or it wants a token that we have not got.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # or Ray would let RAY_ADDRESS win over what it is given
    try:
        _knock(address)
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"{address} asks for a token, or has refused ours. Put the cluster's into a file and type: "
            "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=<file>"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray dashboard answers at {address} ({first_line(error)}). {EXPECTED}") from error


def no_answer() -> tuple[type[Exception], ...]:
    """What Ray's client raises when the cluster, or the way there, fails."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    return OSError, RuntimeError, ClientError, AuthenticationError


@contextmanager
def answering(otherwise: str) -> Iterator[None]:
    """For what asks the cluster.

    Args:
        otherwise: What a person must know, or can do, if it does not answer.

    Raises:
        JobError: It does not.
    """
    try:
        yield
    except no_answer() as error:
        raise JobError(f"the cluster answers no more ({first_line(error)}); {otherwise}") from error


def first_line(error: BaseException) -> str:
    """What it says, on one line; its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def submission_of(
    command: JobCommand,
    *,
    address: str,
    environment: Mapping[str, str],
    python: str = "python",
    working_dir: Path | None = None,
    num_cpus: float | None = None,
    num_gpus: float = 0,
    grace_s: int = GRACE_S,
) -> Submission:
    """What to ask the cluster for.

    Args:
        command: As typed.
        address: Of the dashboard.
        environment: Of S3; see `s3_environment`.
        python: The interpreter there.
        working_dir: Zip file of the code.
        num_cpus: For the command itself; None is 1 where it works itself, and 0 where it only tells workers what to do.
        num_gpus: The same; a probe may want one.
        grace_s: How long the job may take to finish what is in flight when it is stopped.
    """
    variables = {**environment, _STOP_WAIT: str(grace_s)}
    if is_loopback(address) and python == "python":
        # A cluster on this machine has our interpreter; at the other end of a tunnel there is no such folder, and PATH
        # goes on to the next.
        variables["PATH"] = f"{Path(sys.executable).parent}:${{PATH}}"
    if num_cpus is None:
        num_cpus = 1 if TARGETS[command.target].in_driver else 0
    return Submission(
        name=command.name,
        entrypoint=command.entrypoint(python),
        command=str(command),
        environment=variables,
        working_dir=working_dir,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def submit(client: Any, submission: Submission, *, now: float | None = None) -> str:
    """Send it; returns its id, such as extract-digits-1121-191502.

    Raises:
        UserError: The cluster refuses it.
        JobError: The cluster answers no more: the job may be there or not.
    """
    stamp = time.strftime("%m%d-%H%M%S", time.gmtime(now))
    runtime_env: dict[str, Any] = {"env_vars": dict(submission.environment)}
    if submission.working_dir is not None:
        runtime_env["working_dir"] = str(submission.working_dir)
    attempt = 1
    agent_end = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        job = "-".join([submission.name, stamp, *([str(attempt)] if attempt > 1 else [])])
        try:
            return client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=job,
                runtime_env=runtime_env,
                metadata={"make": submission.command},
                entrypoint_num_cpus=submission.num_cpus,
                entrypoint_num_gpus=submission.num_gpus,
            )
        except RuntimeError as error:
            if "No available agent" in str(error):
                if time.monotonic() > agent_end:
                    raise UserError(f"{_NO_AGENT}: {error}") from error
                say("the cluster's head has no agent yet that starts jobs; asking again")
                time.sleep(_AGENT_WAIT_S)
            elif "already exists" in str(error):
                attempt += 1
            else:
                raise UserError(f"the cluster refuses the job: {error}") from error
        except no_answer() as error:
            raise JobError(
                f"the cluster answers no more ({first_line(error)}); whether {job} was submitted, make jobs tells"
            ) from error


def job_rows(client: Any) -> list[JobRow]:
    """All jobs that the cluster knows, newest first.

    Raises:
        JobError: The cluster answers no more.
    """
    with answering("the same command may be typed again"):
        return sorted(map(job_row, client.list_jobs()), key=lambda row: -row.began)


def find_job(client: Any, job: str) -> JobRow:
    """One job.

    Raises:
        UserError: There is none of this name; lists those there are.
        JobError: The cluster answers no more.
    """
    rows = job_rows(client)
    for row in rows:
        if row.job == job:
            return row
    there = ", ".join(row.job for row in rows if row.submitted) or "none"
    raise UserError(f"JOB={job}: the cluster knows no such job; there are: {there}")


def job_row(details: Any) -> JobRow:
    """From what Ray tells of a job."""
    submitted = details.submission_id is not None
    command = (details.metadata or {}).get("make", "")
    return JobRow(
        job=details.submission_id or details.job_id or "",
        state=str(details.status.value),
        began=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        command=command or details.entrypoint,
        message=_message(details) if submitted else "typed elsewhere: not submitted, so it is stopped there",
        submitted=submitted,
        exit_code=details.driver_exit_code,
    )


def _message(details: Any) -> str:
    code = details.driver_exit_code
    if details.status.value == "FAILED" and code is not None:
        return code_meaning(code)
    if details.status.value in ("SUCCEEDED", "STOPPED", "RUNNING"):
        return ""  # Ray says the same once more
    return " ".join((details.message or "").split())


def code_meaning(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    known = next((found for found in ExitCode if found == code), None)
    if known is not None:
        return f"exit code {code}: {known.meaning}"
    number = -code if code < 0 else code - 128 if code > 128 else 0
    return f"exit code {code}" + (f": ended by signal {number}" if number else "")


def exit_code(row: JobRow) -> int:
    """How a followed job ended, as an exit code of ours."""
    if row.state == "SUCCEEDED":
        return ExitCode.OK
    if row.state == "STOPPED":
        return ExitCode.INTERRUPTED
    return next((code for code in ExitCode if code == row.exit_code and code), ExitCode.ERROR)

"""Jobs: what may be submitted, what is sent, and what is said of them. No cluster is started here."""

import asyncio
import math
import os
import shlex
import signal
import subprocess
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.__main__ import COMMANDS, main
from infra.cluster import cluster_address
from infra.console import ExitCode, JobError, UserError
from infra.job_code import MAX_NBYTES, pack_code
from infra.job_command import TARGETS, endpoint_warning, parse_command
from infra.job_doors import describe_rows, quoted, s3_environment
from infra.job_follow import RECONNECTS, follow, stop
from infra.jobs import (
    JobRow,
    connect_jobs,
    dashboard_address,
    exit_code,
    find_job,
    job_rows,
    submission_of,
    submit,
)

ROOT = Path(__file__).parents[2]
MAKEFILE = ROOT / "Makefile"
EXTRACT = "extract IMAGES=s3://b/images STORE=s3://b/acts"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORE", "IMAGES", "RUN", "OUT", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize(
    "typed",
    [
        f"{EXTRACT} LIMIT=100 JOIN=1 LAYERS=0,6,12 ARGS='--overwrite'",
        "extract STORE=s3://b/acts TEACHER=run:s3://b/runs/r",
        "train BLOCK=all STORE=s3://b/acts RUN=s3://b/runs STEPS=10",
        "raptor BLOCKS=0-7,7-12 STORE=s3://b/acts RUN=s3://b/runs/raptor",
        "probe TASK=digits RUN=s3://b/runs/r OUT=s3://b/probes/p",
        "verify STORE=s3://b/acts",
        "copy STORE=s3://b/acts TO=s3://b/copy LIMIT=10",
        "convert STORE=s3://b/acts TO=s3://b/copy FORMAT=webdataset",
        "phases STORE=s3://b/acts OUT=s3://b/phases K=3",
        "table RUNS=s3://b/runs PROBES=s3://b/probes OUT=s3://b/table",
    ],
)
def test_a_job_runs_the_words_of_make(typed: str) -> None:
    found = parse_command(typed, makefile=MAKEFILE)
    line = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", *shlex.split(typed)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    python, *words = shlex.split(line.replace("\\\n", " "))
    assert python == ".venv/bin/python"
    assert shlex.split(found.entrypoint("/there/python")) == ["/there/python", *words]
    assert str(found) == typed.replace("'", "")
    assert found.warnings == ()


def test_every_target_is_one_of_the_makefile_and_is_tested() -> None:
    for target in TARGETS:
        assert f"\n{target}: $(READY)" in MAKEFILE.read_text(), target


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", ["nothing is given", "extract, train"]),
        ("extract 'STORE=s3://b/x", ["quotes do not match"]),
        ("extrac STORE=s3://b/x", ["'extrac' is no target", "did you mean extract"]),
        ("demo", ["'demo' is no target"]),
        ("extract STORE=s3://b/x LIMIT", ["'LIMIT' is no variable; expected NAME=value"]),
        ("extract STORE=s3://b/x; rm", ["'rm' is no variable"]),
        ("extract STORE=s3://b/x STORE=s3://b/y", ["STORE is given twice: 's3://b/x' and 's3://b/y'"]),
        ("extract STORE=s3://b/x IMAGE=digits", ["make extract takes no IMAGE; did you mean IMAGES?"]),
        ("extract STORE=s3://b/x BLOCK=0-7", ["make extract takes no BLOCK"]),
        ("extract STORE=s3://b/x PYTHON=/bin/sh", ["takes no PYTHON"]),
        ("extract STORE=s3://b/x SHELL=/bin/sh", ["takes no SHELL"]),
        ("extract STORE=s3://b/x RAY_ADDRESS=auto", ["RAY_ADDRESS=auto: it says where the job goes"]),
        ("extract STORE=s3://b/x NO_RAY=1", ["a job runs on the cluster"]),
        ("extract", ["STORE must be given: by default it is a folder below data/"]),
        ("extract STORE=data/x", ["STORE=data/x is a path of this folder", str(Path("data/x").absolute())]),
        ("train BLOCK=0-7 STORE=s3://b/x", ["RUN must be given"]),
        ("copy TO=s3://b/x", ["STORE must be given"]),
        ("copy STORE=s3://b/x TO=copy", ["TO=copy is a path of this folder"]),
        ("extract STORE=s3://b/x TEACHER=run:data/runs/r", ["TEACHER=data/runs/r is a path of this folder"]),
        ("extract STORE=s3://b/x WEIGHTS=~/w.pt", ["WEIGHTS=~/w.pt is a path of this folder"]),
        ("extract STORE=s3://b/x IMAGES=https://me:secret@h/x", ["IMAGES: the address holds a password"]),
        ("extract STORE=s3://b/x ARGS='--images pictures'", ["IMAGES=pictures is a path of this folder"]),
        *[
            (f"extract STORE=s3://b/x {typed}", [said])
            for typed, said in [
                ("ENDPOINT_URL=http://me:secret@h:9000", "ENDPOINT_URL: the address holds a password"),
                ("ENDPOINT_URL=HTTP://me:se/cret@h:9000", "ENDPOINT_URL: the address holds a password"),
                ("IMAGES=s3://secret@b/x", "IMAGES: the address holds a password"),
                ("ARGS='--endpoint-url http://me:secret@h:9000'", "ARGS: the address holds a password"),
                ("ARGS='--endpoint-url=http://me:secret@h:9000'", "ARGS: the address holds a password"),
                ("IMAGE=http://me:secret@h:9000", "takes no IMAGE"),
                ("JOIN=http://me:secret@h:9000", "JOIN: the address holds a password"),
                ("'IMAGES=https://h/x?a=1&X-Amz-Signature=secret'", "IMAGES: the address is signed"),
                ("IMAGES=https://h/x?X-Amz-Credential=secret%2Fx", "IMAGES: the address is signed"),
                ("IMAGES=https://h/x?AWSAccessKeyId=secret", "IMAGES: the address is signed"),
                ("IMAGES=https://h/x%3Fx-amz-signature%3Dsecret", "IMAGES: the address is signed"),
                ("WEIGHTS=https://h/x.pt?sig=secret", "WEIGHTS: the address is signed"),
            ]
        ],
        ("table RUNS=s3://b/r,https://me:secret@h/x PROBES=s3://b/p OUT=s3://b/o", ["RUNS: the address holds"]),
        ("copy STORE=s3://b/x TO=https://me:secret@h/x", ["TO: the address holds a password"]),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(typed: str, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_command(typed, makefile=MAKEFILE)
    for part in said:
        assert part in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "typed", ["IMAGES=s3://b/me@home/x", "IMAGES=https://h:9000/a:b@c?page=2", "'IMAGES=s3://b/x-0?.tar'"]
)
def test_an_address_without_secrets_may_look_odd(typed: str) -> None:
    assert parse_command(f"extract STORE=s3://b/x {typed}", makefile=MAKEFILE).target == "extract"


def with_local_mk(folder: Path, text: str) -> Path:
    """This project's Makefile, with a local.mk beside it."""
    makefile = folder / "Makefile"
    makefile.write_text(MAKEFILE.read_text())
    (folder / "local.mk").write_text(text)
    return makefile


def test_secrets_of_local_mk_are_found_too(tmp_path: Path) -> None:
    makefile = with_local_mk(tmp_path, "ENDPOINT_URL = http://me:secret@h:9000\n")
    with pytest.raises(UserError, match="ENDPOINT_URL: the address holds a password") as error:
        parse_command("extract STORE=s3://b/x", makefile=makefile)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("override PYTHON := python3\n", "python3 -m pipeline extract"),
        ("override PYTHON :=\n", "m pipeline extract"),
        ("override ARGS = 'a\n", "cannot be taken apart"),
    ],
)
def test_a_local_mk_with_a_python_of_its_own_is_refused_in_words(tmp_path: Path, text: str, runs: str) -> None:
    with pytest.raises(UserError, match=f"make extract would run .*{runs}"):
        parse_command("extract STORE=s3://b/x", makefile=with_local_mk(tmp_path, text))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        parse_command("extract IMAGE=x STORE=data/x NO_RAY=1 HEAD=h.pt", makefile=MAKEFILE)
    assert len(str(error.value).splitlines()) == 5


def test_variables_of_the_environment_count_as_with_make_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "s3://b/acts")
    monkeypatch.setenv("MAKEFLAGS", " -- CMD=extract")
    monkeypatch.setenv("ARGS", "--detach")  # of the make submit that runs us
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    found = parse_command("extract", makefile=MAKEFILE)
    assert found.words == ("-m", "pipeline", "extract", "--store", "s3://b/acts")
    monkeypatch.setenv("STORE", "data/x")
    with pytest.raises(UserError, match="STORE=data/x is a path of this folder"):
        parse_command("extract", makefile=MAKEFILE)


def test_a_dollar_is_a_dollar_and_make_runs_nothing(tmp_path: Path) -> None:
    spared = tmp_path / "spared"
    typed = f"extract STORE=s3://b/x IMAGES='/i/$(shell touch {spared})'"
    assert f"/i/$(shell touch {spared})" in parse_command(typed, makefile=MAKEFILE).words
    assert not spared.exists()


def test_a_folder_that_all_may_share_is_let_through_with_a_note() -> None:
    found = parse_command("extract STORE=/shared/acts", makefile=MAKEFILE)
    assert [note.split(":")[0] for note in found.warnings] == ["STORE=/shared/acts"]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (EXTRACT, "extract-acts"),
        ("verify STORE=s3://b/Digits_2/train", "verify-digits-2-train"),
        ("train BLOCK=0-7 STORE=s3://b/acts RUN=s3://b/runs/0-7-seed0", "train-0-7-seed0"),
    ],
)
def test_an_id_says_what_the_job_is_about(typed: str, name: str) -> None:
    assert parse_command(typed, makefile=MAKEFILE).name == name


def test_what_is_sent_holds_the_place_of_s3_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example:9000")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    command = parse_command(EXTRACT, makefile=MAKEFILE)
    environment = s3_environment(command)
    assert environment == {"AWS_ENDPOINT_URL": "http://storage.example:9000", "AWS_REGION": "eu-central-1"}
    sent = Sent()
    submit(sent, submission_of(command, address="http://head:8265", environment=environment, grace_s=77))
    assert sent.last["runtime_env"] == {"env_vars": {**environment, "RAY_JOB_STOP_WAIT_TIME_S": "77"}}
    assert "the-" not in str(sent.last)


def test_a_machine_without_keys_does_not_make_the_cluster_anonymous() -> None:
    assert "AWS_SKIP_SIGNATURE" not in s3_environment(parse_command(EXTRACT, makefile=MAKEFILE))
    assert s3_environment(parse_command("extract STORE=/shared/x", makefile=MAKEFILE)) == {}


def test_an_endpoint_of_this_machine_is_told_of_only_when_the_cluster_is_elsewhere() -> None:
    words = parse_command(f"{EXTRACT} ENDPOINT_URL=http://127.0.0.1:9000", makefile=MAKEFILE).words
    assert "http://127.0.0.1:9000" in endpoint_warning({}, "http://head:8265", words)
    assert endpoint_warning({}, "http://localhost:8265", words) == ""
    assert "localhost" in endpoint_warning({"AWS_ENDPOINT_URL": "http://localhost:9"}, "http://head:8265", ())


class Sent:
    """A cluster that takes jobs whose ids are free."""

    def __init__(self, *taken: str) -> None:
        self._taken = set(taken)
        self.last: dict[str, Any] = {}

    def submit_job(self, **what: Any) -> str:
        self.last = what
        if what["submission_id"] in self._taken:
            raise RuntimeError(f"Job with submission_id {what['submission_id']} already exists.")
        return what["submission_id"]


class Waking:
    """A cluster that has an agent when it is asked for the at-th time."""

    def __init__(self, at: float) -> None:
        self.at, self.n_requests = at, 0

    def submit_job(self, **what: Any) -> str:
        self.n_requests += 1
        if self.n_requests < self.at:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job.")
        return what["submission_id"]


def test_a_head_that_has_just_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.jobs._AGENT_WAIT_S", 0)
    submission = submission_of(parse_command(EXTRACT, makefile=MAKEFILE), address="http://head:1", environment={})
    waking = Waking(at=3)
    assert submit(waking, submission, now=0) == "extract-acts-0101-000000"
    assert waking.n_requests == 3
    monkeypatch.setattr("infra.jobs.AGENT_TIMEOUT_S", 0)
    with pytest.raises(UserError, match="another Ray of that machine has its port"):
        submit(Waking(at=math.inf), submission, now=0)


def test_ids_are_never_used_twice() -> None:
    submission = submission_of(parse_command(EXTRACT, makefile=MAKEFILE), address="http://head:1", environment={})
    assert submit(Sent(), submission, now=0) == "extract-acts-0101-000000"
    taken = ("extract-acts-0101-000000", "extract-acts-0101-000000-2")
    assert submit(Sent(*taken), submission, now=0) == "extract-acts-0101-000000-3"


@pytest.mark.parametrize(("typed", "cpus"), [(EXTRACT, 0), ("verify STORE=s3://b/acts", 1)])
def test_a_command_that_works_itself_keeps_a_core(typed: str, cpus: int) -> None:
    command = parse_command(typed, makefile=MAKEFILE)
    assert submission_of(command, address="http://head:1", environment={}).num_cpus == cpus
    assert submission_of(command, address="http://head:1", environment={}, num_cpus=3).num_cpus == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("auto", "RAY_ADDRESS=auto is where programs join"),
        ("head:6379", "Expected RAY_ADDRESS=http://HOST:8265"),
        ("ray://head:10001", "where programs join"),
        ("http://head:8265/jobs", "more than an address"),
        ("http://", "more than an address"),
    ],
)
def test_an_address_that_takes_no_jobs_is_refused(given: str, said: str) -> None:
    with pytest.raises(UserError, match=r"jobs go to its dashboard|more than an address") as error:
        dashboard_address(given)
    assert said in str(error.value)


def test_the_address_is_the_given_one_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "https://b:1/")
    assert dashboard_address() == "https://b:1"
    assert dashboard_address("http://a:8265") == "http://a:8265"


def test_an_address_for_jobs_is_none_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(UserError, match="is a dashboard, which takes jobs: make submit"):
        cluster_address()


def test_no_cluster_here_and_none_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no Ray cluster was started on this machine"):
        dashboard_address()
    with pytest.raises(UserError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9"):
        connect_jobs("http://127.0.0.1:9")


def test_the_doors_say_it_with_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "nothing", "--ray-address", "http://127.0.0.1:9"]) == ExitCode.BAD_INPUT
    assert "'nothing' is no target" in capsys.readouterr().err
    assert main(["jobs", "--ray-address", "http://127.0.0.1:9"]) == ExitCode.BAD_INPUT
    assert {"submit", "jobs", "logs", "stop"} <= set(COMMANDS)


class Cluster:
    """Jobs as Ray tells of them; `logs` is a job's log, of which each look shows more."""

    def __init__(self, *jobs: Any, logs: tuple[str, ...] = (), breaks_after: int | None = None) -> None:
        self.jobs = list(jobs)
        self._logs, self._breaks_after, self.stopped = list(logs), breaks_after, False

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def get_job_info(self, job: str) -> Any:
        (found,) = [one for one in self.jobs if one.submission_id == job]
        if self.stopped and len(self._logs) == 1:
            found.status = SimpleNamespace(value="STOPPED")
        return found

    def get_job_logs(self, job: str) -> str:
        return self._logs.pop(0) if len(self._logs) > 1 else self._logs[0]

    def stop_job(self, job: str) -> bool:
        self.stopped = True
        return True

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for n_sent, piece in enumerate(self._logs):
            if self._breaks_after == n_sent:
                self._breaks_after = None
                raise RuntimeError("the connection is gone")
            yield piece


def details(job: str | None, state: str, *, began: float = 0.0, **more: Any) -> Any:
    known = {
        "submission_id": job,
        "job_id": "02000000",
        "status": SimpleNamespace(value=state),
        "entrypoint": "python -m pipeline extract",
        "metadata": {"make": EXTRACT} if job else {},
        "message": "Job is currently running.",
        "start_time": int(1000 * began),
        "end_time": None,
        "driver_exit_code": None,
    }
    return SimpleNamespace(**{**known, **more})


def test_the_table_has_the_newest_first_and_says_why() -> None:
    cluster = Cluster(
        details("extract-a", "FAILED", began=100, end_time=165_000, driver_exit_code=2, message="a long log"),
        details("extract-b", "PENDING", began=200, message="waiting for\nresources"),
        details(None, "RUNNING", began=150),
    )
    said = describe_rows(job_rows(cluster), now=260, width=1000).splitlines()
    assert [line.split()[0] for line in said[1::2]] == ["extract-b", "02000000", "extract-a"]
    assert said[2].strip() == "waiting for resources"
    assert "not submitted" in said[4]
    assert said[6].strip() == f"exit code 2: {ExitCode.BAD_INPUT.meaning}"
    assert "1 min 05 s" in said[5]
    assert said[5].endswith(EXTRACT)
    narrow = describe_rows(job_rows(cluster), now=260, width=40)
    assert max(map(len, narrow.splitlines())) == 40
    assert describe_rows([], now=0, width=80) == "no job was submitted to this cluster yet"


def test_an_unknown_job_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match="JOB=x: the cluster knows no such job; there are: extract-a"):
        find_job(Cluster(details("extract-a", "RUNNING"), details(None, "RUNNING")), "x")


def test_a_log_is_shown_once_though_the_connection_breaks() -> None:
    said: list[str] = []
    cluster = Cluster(details("j", "SUCCEEDED"), logs=("one\n", "two\nthr", "ee\n"), breaks_after=2)
    assert follow(cluster, "j", said.append, poll_s=0).state == "SUCCEEDED"
    assert "".join(said) == "one\ntwo\nthree\n"


def test_a_cluster_that_is_gone_is_told_and_not_waited_for_for_ever() -> None:
    class Gone(Cluster):
        def get_job_info(self, job: str) -> Any:
            raise ConnectionResetError("no route to the head")

    for ask in (lambda gone: follow(gone, "j", print, poll_s=0), lambda gone: stop(gone, "j", print, poll_s=0)):
        with pytest.raises(JobError, match=r"answers no more \(no route to the head\)"):
            ask(Gone(details("j", "RUNNING"), logs=("a\n",)))


class Breaking(Cluster):
    """Whose log breaks off again and again, each time with or without something new; the job may live for all that."""

    def __init__(self, state: str, *, pieces: int = 0, broken: int, knows: bool = True) -> None:
        super().__init__(details("j", state), logs=("",))
        self.pieces, self.broken, self.knows, self.n = pieces, broken, knows, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.n += 1
        for number in range(min(self.n, self.pieces)):
            yield f"{number}\n"
        if self.n <= self.broken:
            raise ConnectionResetError("the proxy has had enough")
        self.jobs[0].status = SimpleNamespace(value="SUCCEEDED")

    def get_job_info(self, job: str) -> Any:
        if not self.knows and self.n <= self.broken:
            raise ConnectionResetError("no route to the head")
        return super().get_job_info(job)


def test_a_job_that_lives_is_followed_however_often_the_connection_breaks() -> None:
    assert follow(Breaking("RUNNING", broken=5 * RECONNECTS), "j", print, poll_s=0).state == "SUCCEEDED"


def test_a_log_that_goes_on_is_followed_however_often_the_connection_breaks() -> None:
    said: list[str] = []
    n = 3 * RECONNECTS
    row = follow(Breaking("RUNNING", pieces=n, broken=n, knows=False), "j", said.append, poll_s=0)
    assert (row.state, "".join(said)) == ("SUCCEEDED", "".join(f"{number}\n" for number in range(n)))


def test_leaving_is_not_lost_in_a_client_that_swallows_it() -> None:
    class Deaf(Cluster):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            yield "at work\n"
            os.kill(os.getpid(), signal.SIGINT)
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(200)
            while True:
                yield "still at work\n"
                await asyncio.sleep(0.01)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        follow(Deaf(details("j", "RUNNING")), "j", lambda text: None, poll_s=0)
    assert time.monotonic() - began < 100


@pytest.mark.parametrize(("knows", "said"), [(True, "has ended there: FAILED"), (False, "may still run there")])
def test_a_log_of_which_nothing_more_comes_is_given_up(knows: bool, said: str) -> None:
    cluster = Breaking("FAILED", pieces=3, broken=10**6, knows=knows)
    with pytest.raises(JobError, match=f"j {said}"):
        follow(cluster, "j", print, poll_s=0)
    assert cluster.n == 3 + RECONNECTS


class Speechless(Cluster):
    """A cluster that has lost the log of its first job."""

    def get_job_logs(self, job: str) -> str:
        if job == self.jobs[0].submission_id:
            raise RuntimeError("Request failed with status code 500: no such file\nTraceback ...")
        return "step 7"


def _serve(monkeypatch: pytest.MonkeyPatch, cluster: Any) -> None:
    monkeypatch.setattr("infra.job_doors.connect_jobs", lambda address: cluster)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")


def test_one_log_that_is_lost_hides_no_other_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _serve(monkeypatch, Speechless(details("extract-a", "RUNNING", began=2), details("extract-b", "RUNNING", began=1)))
    assert main(["jobs"]) == ExitCode.OK
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[2::2]] == [
        "its log cannot be shown: Request failed with status code 500: no such file",
        "step 7",
    ]


def test_a_job_that_failed_ends_so_even_if_its_log_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _serve(monkeypatch, Speechless(details("j", "FAILED", driver_exit_code=3), logs=("all it said\n",)))
    assert main(["logs", "j"]) == ExitCode.PROBLEMS
    assert "all it said" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ConnectionResetError("no route to the head"), RuntimeError("status code 503")])
@pytest.mark.parametrize("words", [["jobs"], ["logs", "j"], ["stop", "j"], ["submit", EXTRACT]])
def test_a_cluster_that_stops_answering_is_one_line_and_no_traceback(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(Cluster):
        def list_jobs(self) -> list[Any]:
            raise error

    _serve(monkeypatch, Gone())
    assert main(words) == ExitCode.PROBLEMS
    assert f"error: the cluster answers no more ({error})" in capsys.readouterr().err


def test_a_job_that_may_have_been_taken_is_told_with_its_id() -> None:
    class Gone(Sent):
        def submit_job(self, **what: Any) -> str:
            raise ConnectionResetError("no route to the head")

    submission = submission_of(parse_command(EXTRACT, makefile=MAKEFILE), address="http://head:1", environment={})
    with pytest.raises(JobError, match="whether extract-acts-0101-000000 was submitted, make jobs tells"):
        submit(Gone(), submission, now=0)


def test_a_job_that_has_no_room_yet_is_told_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.job_follow._ROOM_S", 0.0)
    cluster = Cluster(details("j", "PENDING"), logs=("", "x"))
    assert stop(cluster, "j", print, poll_s=0.01).state == "PENDING"
    assert cluster.stopped


def test_stopping_waits_and_tells_what_the_job_says_meanwhile() -> None:
    cluster = Cluster(details("j", "RUNNING"), logs=("a\n", "a\nstopping\nsav", "a\nstopping\nsaved\n"))
    said: list[str] = []
    row = stop(cluster, "j", said.append, poll_s=0)
    assert cluster.stopped
    assert (row.state, said) == ("STOPPED", ["stopping", "saved"])
    assert exit_code(row) == ExitCode.INTERRUPTED


def test_a_job_that_was_typed_elsewhere_is_stopped_there() -> None:
    with pytest.raises(UserError, match="stop it there with Ctrl-C"):
        stop(Cluster(details(None, "RUNNING")), "02000000", print)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, ExitCode.INTERRUPTED),
        ("FAILED", 3, ExitCode.PROBLEMS),
        ("FAILED", 75, ExitCode.INTERRUPTED),
        ("FAILED", -9, ExitCode.ERROR),
        ("FAILED", None, ExitCode.ERROR),
    ],
)
def test_following_a_job_ends_as_the_job_did(state: str, code: int | None, expected: int) -> None:
    row = JobRow(job="j", state=state, began=0, ended=1, command="", message="", submitted=True, exit_code=code)
    assert exit_code(row) == expected


@pytest.mark.parametrize(
    "command", [EXTRACT, "extract IMAGES='/a b' STORE=s3://b/x", "extract IMAGES='/$x'", "e A='\"'"]
)
def test_what_is_said_to_be_typed_again_means_the_same(command: str) -> None:
    shell = subprocess.run(
        ["make", "--no-print-directory", "-f", "-", "-n", "x", f"CMD={shlex.split(quoted(command))[0]}"],
        input="x:\n\techo '$(subst ','\\'',$(CMD))'\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shlex.split(shell)[1] == command


def test_the_zip_holds_the_packages_and_is_the_same_each_time(tmp_path: Path) -> None:
    n_bytes = pack_code(ROOT, tmp_path / "a.zip")
    pack_code(ROOT, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    names = set(zipfile.ZipFile(tmp_path / "a.zip").namelist())
    assert {"pipeline/extract.py", "infra/read_rows.c", "trainer/probes/__init__.py"} <= names
    assert any(name.startswith("pipeline/weights/") for name in names)
    assert not [name for name in names if name.startswith((".", "data/", "tests/")) or "__pycache__" in name]
    assert n_bytes < 20 * 10**6


def test_too_much_code_is_refused_with_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_NBYTES == 100 * 2**20
    (tmp_path / "p").mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.setuptools]\npackages = ["p", "p.q"]\n')
    (tmp_path / "p" / "big.bin").write_bytes(os.urandom(20_000))
    monkeypatch.setattr("infra.job_code.MAX_NBYTES", 10_000)
    with pytest.raises(UserError, match=r"20\.\d kB as a zip.*at most 10\.0 kB") as error:
        pack_code(tmp_path, tmp_path / "x.zip")
    assert "20.0 kB  p/big.bin" in str(error.value)
    with pytest.raises(UserError, match="uploads the checkout"):
        pack_code(tmp_path / "p", tmp_path / "x.zip")

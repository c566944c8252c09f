"""Trainings side by side: who begins when, what is retried, what a stop does; and a real one that is killed."""

import contextlib
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from infra.console import ExitCode, Progress, run_door
from infra.objects import MemoryObjects, ObjectError, ObjectInfo
from tests.trainer.tiny import CPU, write_tiny_pair
from trainer.__main__ import main
from trainer.all_spans import TRIES, Outcome, Process, SpanRun, process_environment, train_side_by_side
from trainer.data import open_training_data
from trainer.run_files import Checkpoint, RunFiles
from trainer.train import train


@dataclass
class Script:
    """What becomes of each attempt of a training: exit codes, and the step saved before each; whose machine is lost."""

    codes: Sequence[int]
    steps: Sequence[int] = ()
    lost: Sequence[int] = ()


@dataclass
class Stage:
    """Attempts that end as a script says, two looks after they began."""

    scripts: dict[str, Script]
    begun: list[tuple[str, int]] = field(default_factory=list)
    at_work: set[str] = field(default_factory=set)
    most: int = 0
    asked: list[str] = field(default_factory=list)

    def launch(self, job: SpanRun, slot: int) -> "Played":
        assert job.name not in self.at_work
        self.begun.append((job.name, slot))
        self.at_work.add(job.name)
        self.most = max(self.most, len(self.at_work))
        n = sum(name == job.name for name, _ in self.begun) - 1
        return Played(self, job, n)


class Played:
    def __init__(self, stage: Stage, job: SpanRun, n: int) -> None:
        self.stage, self.job, self.n, self.looks, self.stopped = stage, job, n, 0, False

    def __str__(self) -> str:
        return f"attempt {self.n + 1}"

    def poll(self) -> int | None:
        self.looks += 1
        if self.stopped:
            self.stage.at_work.discard(self.job.name)
            return ExitCode.INTERRUPTED
        if self.looks < 3:
            return None
        script = self.stage.scripts[self.job.name]
        if self.job.name in self.stage.at_work:
            self.stage.at_work.discard(self.job.name)
            if self.n < len(script.steps):
                tensors = {"model": {"w": torch.zeros(1)}}
                self.job.run.save_checkpoint(Checkpoint(step=script.steps[self.n], tensors=tensors, state={}))
        return script.codes[self.n]

    def waits_for(self) -> str:
        return "a GPU" if self.looks < 2 else ""

    def lost(self) -> bool:
        return self.n in self.stage.scripts[self.job.name].lost

    def ask_to_stop(self) -> None:
        self.stopped = True
        self.stage.asked.append(self.job.name)

    def words(self) -> str:
        return f"last words of {self.job.name}"


def play(
    scripts: dict[str, Script], *, at_once: int = 2, stop: Callable[[], bool] = lambda: False
) -> tuple[list[Outcome], Stage, str]:
    stage, said = Stage(scripts), io.StringIO()
    jobs = [SpanRun(name=n, run=RunFiles(MemoryObjects()), n_steps=100, arguments=()) for n in scripts]
    with Progress(total=300, unit="steps", label="test", stream=said, every_s=60.0) as progress:
        outcomes = train_side_by_side(
            jobs, stage.launch, at_once=at_once, progress=progress, stop=stop, poll_s=0.0, pause_s=0.0
        )
    return outcomes, stage, said.getvalue()


def test_all_finish_at_most_so_many_at_a_time_and_in_order() -> None:
    outcomes, stage, _ = play({name: Script([0]) for name in ("0-4", "4-7", "7-10", "10-12")})
    assert [(outcome.name, outcome.ended, outcome.n_attempts) for outcome in outcomes] == [
        (name, "finished", 1) for name in ("0-4", "4-7", "7-10", "10-12")
    ]
    assert stage.most == 2
    assert {slot for _, slot in stage.begun} == {0, 1}
    assert [name for name, _ in stage.begun] == ["0-4", "4-7", "7-10", "10-12"]


def test_one_that_fails_begins_again_and_the_others_do_not_notice() -> None:
    outcomes, stage, said = play({"0-7": Script([-9, 1, 0], steps=[10, 20]), "7-12": Script([0])})
    assert [(outcome.ended, outcome.n_attempts) for outcome in outcomes] == [("finished", 3), ("finished", 1)]
    assert [name for name, _ in stage.begun].count("7-12") == 1
    assert "block 0-7 was killed by signal 9; it goes on from step 10" in said
    assert "block 0-7 ended with exit code 1; it goes on from step 20" in said
    assert "attempt 3, from step 20" in said
    assert "last words of 0-7" in said


def test_it_is_given_up_after_attempts_in_a_row_that_saved_nothing_new() -> None:
    """What is saved counts, not how often it died."""
    outcomes, _, said = play({"0-7": Script([3] * 9, steps=[10, 10, 20]), "7-12": Script([0])})
    assert outcomes[0] == Outcome(name="0-7", ended="failed", n_attempts=2 + TRIES, words="last words of 0-7")
    assert outcomes[1].ended == "finished"
    assert "given up" in said


def test_machines_that_are_taken_away_cost_no_attempt() -> None:
    """However often, and with nothing new saved; what it does wrong itself still counts, before and after."""
    n = 3 * TRIES
    outcomes, _, said = play({"0-7": Script([-9] * n + [0], lost=range(n)), "7-12": Script([0])})
    assert [(outcome.ended, outcome.n_attempts) for outcome in outcomes] == [("finished", n + 1), ("finished", 1)]
    assert said.count("block 0-7 lost its machine; it goes on from step 0") == n
    outcomes, _, _ = play({"0-7": Script([3, -9, 3, -9, 3, 0], lost=[1, 3])})
    assert (outcomes[0].ended, outcomes[0].n_attempts) == ("failed", TRIES + 2)
    # A checkpoint that a lost attempt has saved is new all the same.
    outcomes, _, _ = play({"0-7": Script([3, 3, -9, 3, 3, 0], steps=[0, 0, 10], lost=[2])})
    assert (outcomes[0].ended, outcomes[0].n_attempts) == ("finished", 6)


def test_what_has_not_begun_is_said_to_wait() -> None:
    told: list[str] = []

    class Told(Progress):
        def status(self, text: str) -> None:
            told.append(text)

    stage = Stage({"0-4": Script([0]), "4-7": Script([0]), "7-12": Script([0])})
    jobs = [SpanRun(name=n, run=RunFiles(MemoryObjects()), n_steps=100, arguments=()) for n in stage.scripts]
    with Told(total=300, unit="steps", label="test", stream=io.StringIO(), every_s=60.0) as progress:
        train_side_by_side(jobs, stage.launch, at_once=2, progress=progress, stop=lambda: False, poll_s=0.0)
    assert told[0] == "0 running, 2 waiting for a GPU, 1 waiting"
    assert "2 running, 1 waiting" in told


def test_bad_input_is_not_tried_again() -> None:
    outcomes, _, _ = play({"0-7": Script([ExitCode.BAD_INPUT])})
    assert (outcomes[0].ended, outcomes[0].n_attempts) == ("failed", 1)


def test_a_loss_that_became_nan_is_not_tried_again_even_after_a_checkpoint() -> None:
    outcomes, _, said = play({"0-7": Script([-9, ExitCode.WOULD_COME_AGAIN], steps=[10, 20]), "7-12": Script([0])})
    assert outcomes[0] == Outcome(name="0-7", ended="failed", n_attempts=2, words="last words of 0-7")
    assert outcomes[1].ended == "finished"
    assert "block 0-7 ended with exit code 4; given up" in said


class Unseen(MemoryObjects):
    """A place that cannot be listed for a while, as S3 is now and then."""

    blind = False

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if self.blind:
            raise ObjectError(prefix, "503 SlowDown")
        return super().list(prefix)


def test_where_the_place_of_the_runs_cannot_be_seen_all_is_trained_on() -> None:
    """What is saved is asked as an attempt begins and once it has ended: an error there must end no other training."""
    said, places = io.StringIO(), {"0-7": Unseen(), "7-12": Unseen()}
    stage = Stage({"0-7": Script([-9, 0]), "7-12": Script([0])})
    jobs = [SpanRun(name=name, run=RunFiles(place), n_steps=100, arguments=()) for name, place in places.items()]

    def launch(job: SpanRun, slot: int) -> Played:
        for place in places.values():
            place.blind = True
        return stage.launch(job, slot)

    with Progress(total=200, unit="steps", label="test", stream=said, every_s=60.0) as progress:
        outcomes = train_side_by_side(
            jobs, launch, at_once=2, progress=progress, stop=lambda: False, poll_s=0.0, pause_s=0.0
        )
    assert [(outcome.ended, outcome.n_attempts) for outcome in outcomes] == [("finished", 2), ("finished", 1)]
    assert "cannot be seen now: 503 SlowDown" in said.getvalue()


def test_a_stop_reaches_all_that_run_and_begins_no_more() -> None:
    looks = iter(range(10**6))
    outcomes, stage, _ = play({n: Script([0]) for n in ("0-4", "4-7", "7-12")}, stop=lambda: next(looks) >= 2)
    assert [outcome.ended for outcome in outcomes] == ["stopped"] * 3
    assert sorted(stage.asked) == ["0-4", "4-7"]
    assert outcomes[2].n_attempts == 0


# ---------------------------------------------------------------- real processes


RECIPE = "digits_stage1"  # a checkpoint every 100 steps


def options(store: str, run: RunFiles, block: str, n_steps: int) -> tuple[str, ...]:
    named = {
        "block": block,
        "store": store,
        "run": run.location,
        "steps": n_steps,
        "recipe": RECIPE,
        "device": "cpu",
        "threads": 1,
    }
    return ("train", *(text for name, value in named.items() for text in (f"--{name}", str(value))))


DIES = f"""#!{sys.executable}
# As python -m trainer, but for the signal that comes to this process after its first checkpoint.
import os, signal, sys
sys.path.insert(0, os.getcwd())
from infra.console import run_door
from trainer.__main__ import main
from trainer.run_files import RunFiles
save = RunFiles.save_checkpoint
def save_and_die(*given, **named):
    save(*given, **named)
    os.kill(os.getpid(), signal.SIGKILL)
RunFiles.save_checkpoint = save_and_die
assert sys.argv[1:3] == ["-m", "trainer"]
sys.exit(run_door(lambda: main(sys.argv[3:])))
"""


def test_two_jobs_share_nothing_and_a_killed_one_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D12: two spans side by side, one killed after a checkpoint: both give the bits of a run alone in its process."""
    from infra.objects import FolderObjects
    from trainer.commands.start import make_config

    store, n_steps = write_tiny_pair(tmp_path / "store"), 110
    dies = tmp_path / "dies"
    dies.write_text(DIES)
    dies.chmod(0o755)
    spans = ["0-2", "2-3"]
    alone = {}
    for span in spans:
        data = open_training_data(store, span)
        run = RunFiles(MemoryObjects())
        torch.set_num_threads(1)
        assert train(make_config(data, 1, RECIPE, n_steps, 0), data, run, machine=CPU) is not None
        alone[span] = run.read_weights()
    jobs = [
        SpanRun(name=span, run=(run := RunFiles(FolderObjects(tmp_path / span))), n_steps=n_steps,
                arguments=options(store, run, span, n_steps))
        for span in spans
    ]  # fmt: skip
    begun: list[str] = []

    def launch(job: SpanRun, slot: int) -> Process:
        with monkeypatch.context() as patch:
            if not begun:
                patch.setattr(sys, "executable", str(dies))
            begun.append(job.name)
            return Process(job.arguments, tmp_path / f"{job.name}.log", process_environment(ray=False))

    with Progress(total=2 * n_steps, unit="steps", label="test", stream=io.StringIO()) as progress:
        outcomes = train_side_by_side(jobs, launch, at_once=2, progress=progress, stop=lambda: False, pause_s=0.0)
    assert sorted(begun) == ["0-2", "0-2", "2-3"]
    assert jobs[0].run.saved_step() == n_steps
    assert [(outcome.ended, outcome.n_attempts) for outcome in outcomes] == [("finished", 2), ("finished", 1)]
    for job in jobs:
        found = job.run.read_weights()
        assert found.keys() == alone[job.name].keys()
        assert all(torch.equal(found[name], value) for name, value in alone[job.name].items())


@pytest.mark.parametrize("ray", [False, True])
def test_a_process_gets_the_keys_of_s3_and_of_ray_only_where_it_shall(
    ray: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it really finds in its environment, told by a program in the place of Python."""
    given = {
        "AWS_ACCESS_KEY_ID": "an id",
        "AWS_SECRET_ACCESS_KEY": "a secret",
        "AWS_SESSION_TOKEN": "a token",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_REGION": "here",
        "RAY_ADDRESS": "127.0.0.1:1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    tells = tmp_path / "tells"
    tells.write_text("#!/bin/sh\nenv\n")
    tells.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tells))
    process = Process([], tmp_path / "words.log", process_environment(ray=ray))
    while (code := process.poll()) is None:
        time.sleep(0.01)
    assert code == 0
    told = dict(line.split("=", 1) for line in (tmp_path / "words.log").read_text().splitlines() if "=" in line)
    expected = {name: value for name, value in given.items() if ray or name != "RAY_ADDRESS"}
    assert {name: told[name] for name in given if name in told} == expected


def test_a_process_saves_and_ends_when_its_standard_input_does(tmp_path: Path) -> None:
    """As it does when the program that started it is killed; nothing goes on unseen, nothing is lost."""
    from infra.objects import FolderObjects

    store, run = write_tiny_pair(tmp_path / "store"), RunFiles(FolderObjects(tmp_path / "run"))
    arguments = options(store, run, "0-2", 100_000)
    process = Process(arguments, tmp_path / "words.log", process_environment(ray=False))
    while run.read_config() is None:
        assert process.poll() is None, process.words()
        time.sleep(0.1)
    assert process._process.stdin is not None
    process._process.stdin.close()
    process._process.stdin = None
    while (code := process.poll()) is None:
        time.sleep(0.05)
    assert code == ExitCode.INTERRUPTED, process.words()
    assert "everything is saved" in process.words()
    assert run.saved_step() > 0


@pytest.mark.slow
def test_ctrl_c_saves_all_children_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """A real SIGINT to the real command: its own exit code, every run saved, nobody left behind; then to the end."""
    from infra.objects import FolderObjects

    store, runs = write_tiny_pair(tmp_path / "store"), tmp_path / "runs"
    named = {
        "block": "all",
        "blocks": "0-2,2-3",
        "store": store,
        "run": runs,
        "recipe": RECIPE,
        "steps": 3000,
        "at-once": 2,
        "device": "cpu",
        "threads": 1,
    }
    command = [sys.executable, "-m", "trainer", "train"]
    command += [text for name, value in named.items() for text in (f"--{name}", str(value))]
    environment = process_environment(ray=False)
    of = [RunFiles(FolderObjects(runs / f"{span}-seed0")) for span in ("0-2", "2-3")]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
    try:
        while not all(run.saved_step() for run in of):
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == ExitCode.INTERRUPTED, (tmp_path / "said").read_text()
    finally:
        process.kill()
    assert not any(child.is_running() for child in children)
    assert "stopped; everything is saved. The same command goes on" in (tmp_path / "said").read_text()
    saved = [run.saved_step() for run in of]
    assert any(step % 100 for step in saved), "saved where they were, not at a checkpoint that was due"
    assert any(run.read_result() is None for run in of)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == ExitCode.OK, ended.stderr
    assert "make raptor BLOCKS=0-2,2-3" in ended.stdout
    for run, step in zip(of, saved):
        assert run.read_result() is not None
        steps = [line["step"] for line in run.read_metrics() if "loss" in line]
        assert steps == sorted(set(steps)), "no step was done twice"
        assert 0 < step <= steps[-1] == 3000


# ---------------------------------------------------------------- several workers for each


def all_blocks(store: str, runs: Path, **more: object) -> list[str]:
    """BLOCK=all WORKERS=2, as the Makefile types it."""
    named = {"block": "all", "blocks": "0-2", "store": store, "run": runs, "recipe": RECIPE, "steps": 4, "workers": 2}
    return ["train", *(text for name, value in (named | more).items() for text in (f"--{name}", str(value)))]


@pytest.mark.parametrize(("typed", "given"), [({}, []), ({"device": "cuda"}, ["--device", "cuda"])])
def test_workers_of_a_block_get_their_devices_from_ray(
    typed: dict[str, object], given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four GPUs here: a block that was told one of them would train with all its workers on that one."""
    import trainer.commands.train_all as door

    launched: list[tuple[str, ...]] = []

    class Noted(Process):
        def __init__(self, arguments: Sequence[str], *_: object) -> None:
            launched.append(tuple(arguments))

    def all_of(jobs: Sequence[SpanRun], launch: Callable[..., object], **_: object) -> list[Outcome]:
        for job in jobs:
            launch(job, 0)
        return [Outcome(name=job.name, ended="failed", n_attempts=1) for job in jobs]

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(door, "Process", Noted)
    monkeypatch.setattr(door, "train_side_by_side", all_of)
    words = all_blocks(write_tiny_pair(tmp_path / "store"), tmp_path / "runs", blocks="0-2,2-3", **typed)
    assert run_door(lambda: main(words)) == ExitCode.PROBLEMS
    assert len(launched) == 2
    for arguments in launched:
        assert arguments[arguments.index("--workers") + 1] == "2"
        found = arguments.index("--device") if "--device" in arguments else len(arguments)
        assert list(arguments[found : found + 2]) == given


@pytest.mark.slow
@pytest.mark.ray
def test_all_blocks_with_two_workers_each_through_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real thing: a process for the block, Ray inside it, two workers of Ray Train, a finished run."""
    from infra.objects import FolderObjects

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    seen: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RayTrainWorker" in " ".join(child.cmdline()):
                        seen.add(child.pid)

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    code = run_door(lambda: main(all_blocks(write_tiny_pair(tmp_path / "store"), tmp_path / "runs")))
    ended.set()
    looker.join()
    words = (tmp_path / "runs" / "0-2-seed0.log").read_text()
    assert code == ExitCode.OK, words
    assert "block 0-2: finished" in capsys.readouterr().err
    assert len(seen) == 2
    assert "Ray runs inside this job" in words
    assert RunFiles(FolderObjects(tmp_path / "runs" / "0-2-seed0")).read_result() is not None

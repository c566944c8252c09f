"""BLOCK=all on a Ray cluster: one task for each span, in a process of its own; what a stop and a kill do to it."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
import torch

from infra.console import ExitCode, Progress, UserError, run_door
from infra.objects import FolderObjects, MemoryObjects
from tests.trainer.test_all_spans import RECIPE, options
from tests.trainer.tiny import CPU, write_tiny_pair
from trainer.__main__ import main
from trainer.all_spans import SpanRun, train_side_by_side
from trainer.commands.start import make_config
from trainer.data import open_training_data
from trainer.run_files import RunFiles
from trainer.spans_ray import Task, _is_taken_away, room_of_cluster
from trainer.train import train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ONE_CPU = {"num_cpus": 1.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_pair(tmp_path_factory.mktemp("store"))


def wait_for(condition: Callable[[], object], what: str, at_most_s: float = 300.0) -> None:
    end = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def trainings(location: str) -> list[psutil.Process]:
    """Processes of this machine that train into a RUN."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "trainer" in words and location in words and "--run" in words:
            found.append(process)
    return found


def one_job(store: str, folder: Path, n_steps: int) -> SpanRun:
    run = RunFiles(FolderObjects(folder))
    return SpanRun(name="0-2", run=run, n_steps=n_steps, arguments=options(store, run, "0-2", n_steps))


def weights_alone(store: str, n_steps: int) -> dict[str, torch.Tensor]:
    data, run = open_training_data(store, "0-2"), RunFiles(MemoryObjects())
    torch.set_num_threads(1)
    assert train(make_config(data, 1, RECIPE, n_steps, 0), data, run, machine=CPU) is not None
    return dict(run.read_weights())


def test_each_span_is_a_task_of_the_cluster(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the door, with places relative to a folder that the cluster's workers are not in."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "store").symlink_to(store)
    monkeypatch.chdir(tmp_path / "here")
    address = ray.get_runtime_context().gcs_address
    typed = {
        "block": "all",
        "blocks": "0-2,2-3",
        "store": "store",
        "run": "runs",
        "recipe": RECIPE,
        "steps": 4,
        "device": "cpu",
        "ray-address": address,
    }
    arguments = ["train", *(text for name, value in typed.items() for text in (f"--{name}", str(value)))]
    code = run_door(lambda: main(arguments))
    out, err = capsys.readouterr()
    assert code == ExitCode.OK, err
    assert "2 blocks to train, 2 at a time (4 cores, 1 for each)" in err
    assert "block 0-2: a task of the cluster" in err
    for span in ("0-2", "2-3"):
        assert RunFiles(FolderObjects(tmp_path / "here" / "runs" / f"{span}-seed0")).read_result() is not None
    assert "make raptor BLOCKS=0-2,2-3" in out


def test_room_follows_what_the_cluster_has() -> None:
    room = room_of_cluster(None, 1, None)
    assert (room.at_once, room.resources, room.arguments) == (4, ONE_CPU, ("--device", "cpu", "--threads", "1"))
    assert room_of_cluster("cpu", 2, None).at_once == 2
    assert room_of_cluster("cpu", 64, None).resources == {"num_cpus": 4.0}, "no more than a machine of it has"
    several = room_of_cluster("cpu", 1, 2)
    assert (several.at_once, several.resources) == (2, {"num_cpus": 0.0}), "its workers take the cores"


def test_a_gpu_that_is_asked_for_by_name_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come with the next machine; a training must not begin on a CPU in its place."""
    one_gpu = {"num_cpus": 1.0, "num_gpus": 1.0}
    room = room_of_cluster("cuda", 1, None)
    assert (room.at_once, room.resources, room.arguments) == (None, one_gpu, ("--device", "cuda"))
    assert "no GPU now; they wait" in room.why
    assert room_of_cluster("cuda", 1, 2).arguments == ("--device", "cuda")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0, "GPU": 8.0})
    for device in (None, "cuda"):
        room = room_of_cluster(device, 1, None)
        assert (room.at_once, room.resources, room.arguments) == (8, one_gpu, ("--device", "cuda"))
    assert room_of_cluster("cuda", 1, 4).at_once == 2
    assert room_of_cluster("cpu", 1, None).resources == ONE_CPU


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda:0", "type DEVICE=cuda"),
        ("cuda:7", "type DEVICE=cuda"),
        ("gpu", "expected cpu or cuda"),
        ("mps", "not on mps"),
    ],
)
def test_devices_that_no_cluster_has_are_refused(device: str, said: str) -> None:
    with pytest.raises(UserError, match=f"DEVICE={device}.*{said}"):
        room_of_cluster(device, 1, None)


def test_a_device_is_refused_with_all_else_before_a_run_is_claimed(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, runs = ray.get_runtime_context().gcs_address, tmp_path / "runs"
    typed = {"block": "all", "blocks": "0-2", "store": store, "run": runs, "at-once": 0, "device": "cuda:0"}
    words = [text for name, value in typed.items() for text in (f"--{name}", str(value))]
    assert run_door(lambda: main(["train", *words, "--ray-address", address])) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err
    assert "AT_ONCE=0" in err
    assert "DEVICE=cuda:0 is one GPU of one machine" in err
    assert not runs.exists()


def test_a_task_waits_for_what_it_needs_until_it_has_begun(tmp_path: Path) -> None:
    store = str(tmp_path / "nothing")  # which a training says at once
    never = Task(one_job(store, tmp_path / "never", 4), {"num_cpus": 1.0, "num_gpus": 1.0}, {})
    begun = Task(one_job(store, tmp_path / "run", 4), ONE_CPU, {})
    assert begun.waits_for() in ("cores", "")
    wait_for(lambda: not begun.waits_for(), "a task to begin")
    assert begun._node == ray.get_runtime_context().get_node_id()
    assert never.waits_for() == "a GPU"
    never.ask_to_stop()
    wait_for(lambda: begun.poll() is not None and never.poll() is not None, "both to end")
    assert begun.poll() == ExitCode.BAD_INPUT, begun.words()
    assert "is not a store" in begun.words()
    assert not begun.lost()
    assert not never.lost()


def test_a_machine_that_is_gone_or_going_is_told_from_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ray.get_runtime_context().get_node_id()
    assert not _is_taken_away(here)
    assert not _is_taken_away(None)
    assert _is_taken_away("of a machine that is gone")
    monkeypatch.setattr("trainer.spans_ray.draining_nodes", lambda: {here})
    assert _is_taken_away(here)


@pytest.mark.slow
def test_a_stop_saves_all_in_the_cluster(store: str, tmp_path: Path) -> None:
    """One that runs saves; one that still waits for a core never begins; neither leaves a process behind."""
    job = one_job(store, tmp_path / "run", 100_000)
    queued = one_job(store, tmp_path / "queued", 100_000)
    running, waiting = Task(job, {"num_cpus": 4.0}, {}), Task(queued, {"num_cpus": 4.0}, {})
    wait_for(lambda: job.run.saved_step(), "a checkpoint")
    before = job.run.saved_step()
    waiting.ask_to_stop()
    running.ask_to_stop()
    wait_for(lambda: running.poll() is not None and waiting.poll() is not None, "both to end")
    assert running.poll() == ExitCode.INTERRUPTED, running.words()
    assert "everything is saved" in running.words()
    assert job.run.saved_step() > before
    assert waiting.poll() != ExitCode.OK
    assert queued.run.read_config() is None
    assert not trainings(job.run.location)


@pytest.mark.slow
def test_a_killed_worker_of_ray_goes_on_from_the_last_checkpoint(store: str, tmp_path: Path) -> None:
    """SIGKILL to Ray's own worker, above our process, which saves and ends by itself; the bits are those of one run."""
    n_steps = 600
    job = one_job(store, tmp_path / "run", n_steps)
    begun: list[Task] = []

    def launch(run: SpanRun, slot: int) -> Task:
        begun.append(Task(run, ONE_CPU, {}))
        return begun[-1]

    def kill_after_a_checkpoint() -> None:
        wait_for(lambda: job.run.saved_step(), "a checkpoint")
        parent = trainings(job.run.location)[0].parent()
        assert parent is not None
        assert "ray::" in parent.name() or "ray::" in " ".join(parent.cmdline())
        os.kill(parent.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_after_a_checkpoint, daemon=True)
    killer.start()
    said = io.StringIO()
    with Progress(total=n_steps, unit="steps", label="test", stream=said, every_s=60.0) as progress:
        outcomes = train_side_by_side([job], launch, at_once=1, progress=progress, stop=lambda: False, pause_s=2.0)
    killer.join()
    assert [outcome.ended for outcome in outcomes] == ["finished"], said.getvalue()
    assert outcomes[0].n_attempts >= 2
    assert "was killed by signal 9" in said.getvalue(), "its machine is still there, so this counts"
    expected = weights_alone(store, n_steps)
    assert all(torch.equal(value, expected[name]) for name, value in job.run.read_weights().items())
    assert not trainings(job.run.location)

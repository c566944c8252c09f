"""Ray Train around the loop: a worker that is killed makes the run go on by itself, and nothing else changes."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from infra.cluster import connected
from infra.console import JobError, UserError
from infra.objects import FolderObjects, open_objects
from tests.ray_nodes import patient_raylets
from tests.trainer.ranks import run_ranks
from tests.trainer.test_workers import all_samples, go
from tests.trainer.tiny import tiny_config, write_tiny_pair
from trainer.config import TrainConfig
from trainer.data import TrainingData, open_training_data
from trainer.feed import Feed, Share
from trainer.meter import DivergedError
from trainer.ray_train import _resources, train_on_ray
from trainer.run_files import RunFiles
from trainer.workers import Workers

# of Ray's own making, when its data context is made
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

CONFIG = tiny_config(log_every=1, n_steps=9, checkpoint_every=3, validate_every=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_pair(tmp_path_factory.mktemp("store"))


@dataclass(frozen=True)
class Watched:
    """Opens the data, and has this worker write down its samples and, once, die.

    Attributes:
        store: What to open.
        notes: Folder for one file per worker and start of it.
        kill_at: The second worker dies before its so many-th step, the first time; None: it lives.
    """

    store: str
    notes: str
    kill_at: int | None = None

    def __call__(self, device: torch.device) -> TrainingData:
        rank, attempt = int(os.environ["RANK"]), 0
        while (notes := Path(self.notes) / f"{attempt}-{rank}.jsonl").exists():
            attempt += 1
        notes.touch()
        original, n_steps = Feed.next_share, 0

        def next_share(feed: Feed) -> Share:
            nonlocal n_steps
            n_steps += 1
            if rank == 1 and attempt == 0 and n_steps == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            share = original(feed)
            with notes.open("a") as file:
                file.write(json.dumps(share.sample_index.tolist()) + "\n")
            return share

        Feed.next_share = next_share  # type: ignore[method-assign]
        return open_training_data(self.store, "0-2", device=device)

    def samples(self, attempt: int) -> list[list[list[int]]]:
        """By worker and step."""
        files = sorted(Path(self.notes).glob(f"{attempt}-*.jsonl"))
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def claimed_run(store: str, place: Path | str, config: TrainConfig = CONFIG) -> RunFiles:
    run = RunFiles(open_objects(str(place)))
    run.claim({"train": config.to_json(), "data": open_training_data(store, "0-2").identity})
    return run


@pytest.fixture
def quick_ray(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


@pytest.fixture
def ray_with_keys(s3_location: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys are never sent to workers, who find them where they are; here in what Ray was started with."""
    import ray

    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.shutdown()
    with patient_raylets(), connected("local", n_cpus=4, dashboard=False):
        yield


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    quick_ray: None, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at the sixth step; from the checkpoint of step 3 on, the weights become those of an undisturbed run."""
    run = claimed_run(store, tmp_path / "run")
    watched = Watched(store, str(tmp_path), kill_at=6)
    assert train_on_ray(CONFIG, watched, run.location, n_workers=2, device="cpu")
    expected = all_samples(go(2, store, str(tmp_path / "undisturbed"), CONFIG))
    before, after = watched.samples(0), watched.samples(1)
    assert not watched.samples(2), "one death is one new start"
    assert len(before[1]) == 5
    assert all_samples([shares[:5] for shares in before]) == expected[:5]
    assert all_samples(after) == expected[3:]
    undisturbed = RunFiles(FolderObjects(tmp_path / "undisturbed"))
    weights = undisturbed.read_weights()
    assert all(torch.equal(value, weights[name]) for name, value in run.read_weights().items())
    losses = [[line["loss"] for line in of.read_metrics() if "loss" in line] for of in (run, undisturbed)]
    assert losses[0] == losses[1]
    said = capsys.readouterr().err
    assert "going on from step 3" in said


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_that_would_come_again_ends_it_at_once(quick_ray: None, store: str, tmp_path: Path) -> None:
    config = tiny_config(log_every=1, peak_learning_rate=1e30)
    run, watched = claimed_run(store, tmp_path / "run", config), Watched(store, str(tmp_path))
    with pytest.raises(DivergedError, match="the loss has become"):
        train_on_ray(config, watched, run.location, n_workers=2, device="cpu")
    assert watched.samples(0)
    assert not watched.samples(1)


@pytest.mark.ray
@pytest.mark.slow
def test_it_stops_when_asked_and_goes_on_with_another_number(quick_ray: None, store: str, tmp_path: Path) -> None:
    config = tiny_config(log_every=50, n_steps=3000, checkpoint_every=3000, validate_every=5000, lanes=4)
    run, watched = claimed_run(store, tmp_path / "run", config), Watched(store, str(tmp_path))
    stop = lambda: len(watched.samples(0)) == 2 and len(watched.samples(0)[0]) > 20  # noqa: E731
    assert not train_on_ray(config, watched, run.location, n_workers=2, device="cpu", stop=stop)
    saved = run.newest_checkpoint()
    assert saved is not None
    assert 20 < saved.step < 3000
    asked = 0

    def at_once() -> bool:
        nonlocal asked
        asked += 1
        return bool(watched.samples(1) and len(watched.samples(1)[0]) > 5)

    assert not train_on_ray(config, watched, run.location, n_workers=1, device="cpu", stop=at_once)
    first, second = all_samples(watched.samples(0)), all_samples(watched.samples(1))
    whole = all_samples(go(1, store, str(tmp_path / "one"), config, n_steps=len(first) + len(second)))
    assert first + second == whole


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_no_other_machine_sees_is_refused(quick_ray: None, store: str, tmp_path: Path) -> None:
    """As on a cluster of several machines, whose folders differ: the place that was claimed is not there."""
    with pytest.raises(JobError, match="not there on the machine of the first worker"):
        train_on_ray(CONFIG, Watched(store, str(tmp_path)), str(tmp_path / "elsewhere"), n_workers=2, device="cpu")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.s3
def test_a_run_in_s3_resumes_too(s3_location: str, ray_with_keys: None, tmp_path: Path) -> None:
    store = write_tiny_pair(f"{s3_location}/store")
    run = claimed_run(store, f"{s3_location}/run")
    watched = Watched(store, str(tmp_path), kill_at=5)
    assert train_on_ray(CONFIG, watched, run.location, n_workers=2, device="cpu")
    assert run.read_result() is not None
    assert len(all_samples(watched.samples(1))) == 6


def test_what_the_cluster_cannot_hold_is_refused() -> None:
    """Ray itself would wait for ever, in silence."""
    with pytest.raises(UserError, match="WORKERS=3 need a GPU each, but Ray has 2 GPUs here"):
        _resources({"CPU": 8, "GPU": 2}, 3, None, grows=False)
    with pytest.raises(UserError, match="need a GPU each, but Ray has 0 GPUs"):
        _resources({"CPU": 8}, 1, "cuda", grows=False)
    with pytest.raises(UserError, match="Ray has 0 CPUs here"):
        _resources({}, 1, None, grows=False)


def test_workers_take_what_there_is() -> None:
    assert _resources({"CPU": 8, "GPU": 2}, 2, None, grows=False) == (True, {"CPU": 1.0, "GPU": 1})
    assert _resources({"CPU": 8, "GPU": 2}, 2, "cpu", grows=False) == (False, {"CPU": 1.0})
    assert _resources({"CPU": 2}, 4, None, grows=False) == (False, {"CPU": 0.5})
    assert _resources({"CPU": 2}, 4, "cuda", grows=True) == (True, {"CPU": 1.0, "GPU": 1})


def test_ranks_are_seen_to_fail(tmp_path: Path) -> None:
    """So that the equalities above mean something: the harness tells a dead process from a finished one."""
    alive, dead = run_ranks(2, _last_dies, tmp_path)
    assert alive.value == "alive"
    assert (dead.error, dead.exit_code) == ("died", -signal.SIGKILL)


def _last_dies(workers: Workers, notes: Path) -> str:
    (notes / f"{workers.rank} joined").touch()
    while len(list(notes.iterdir())) < workers.world_size:  # one that leaves takes along who is still connecting
        time.sleep(0.01)
    if not workers.is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"

"""Several workers, one model: the same losses as one, whoever holds them; and none is left waiting at the end."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.console import UserError
from infra.objects import FolderObjects, ObjectAccessError
from storage_schemas import Span
from tests.trainer.ranks import Outcome, run_ranks
from tests.trainer.tiny import tiny_config, write_tiny_pair
from trainer.claim import claimed
from trainer.config import TrainConfig
from trainer.data import open_training_data
from trainer.feed import Feed, Share
from trainer.machine import Machine, torch_threads
from trainer.run_files import RunFiles
from trainer.train import train
from trainer.workers import Workers, backend_for

BRIEF: dict[str, Any] = {"log_every": 1, "n_steps": 5, "validate_every": 50, "teacher_forcing_steps": 3}
CONFIG = tiny_config(**BRIEF | {"validate_every": 2, "checkpoint_every": 2})
CPU = torch.device("cpu")


def slow(*values: Any) -> Any:
    """A parameter for `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_pair(tmp_path_factory.mktemp("store"))


class Samples:
    """Remembers which samples each step had."""

    def __init__(self, monkeypatched: type[Feed] = Feed) -> None:
        self.by_step: list[list[int]] = []
        original = monkeypatched.next_share

        def next_share(feed: Feed) -> Share:
            share = original(feed)
            self.by_step.append(share.sample_index.tolist())
            return share

        self.undo = lambda: setattr(monkeypatched, "next_share", original)
        monkeypatched.next_share = next_share  # type: ignore[method-assign]


def train_there(
    workers: Workers,
    store: str,
    place: str,
    config: TrainConfig = CONFIG,
    micro_batch: int | None = None,
    n_steps: int | None = None,
    compile: bool = False,
) -> list[list[int]]:
    """Train, up to `n_steps` of this process; returns the samples of its steps."""
    samples = Samples()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == n_steps and workers.rank == workers.world_size - 1  # one wish is enough

    try:
        data = open_training_data(store, ",".join(map(str, config.spans)), variable="BLOCKS")
        machine = Machine(device=CPU, compile=compile, micro_batch=micro_batch)
        run = RunFiles(FolderObjects(place))
        identity = {"train": config.to_json(), "data": data.identity}
        with claimed(run, identity, workers):
            result = train(config, data, run, machine=machine, workers=workers, stop=stop)
        assert (result is None) == (n_steps is not None)
        if result is not None:
            assert run.read_result()["final_loss"] == result.final_loss  # on every worker
    finally:
        samples.undo()
    return samples.by_step


def go(n: int, *args: Any, **kwargs: Any) -> list[list[list[int]]]:
    """The samples of each worker's steps."""
    if n == 1:
        return [train_there(Workers.alone(), *args, **kwargs)]
    outcomes = run_ranks(n, Keywords(kwargs), *args)
    assert [outcome.error for outcome in outcomes] == [""] * n
    return [outcome.value for outcome in outcomes]


class Keywords:
    """train_there with keywords, picklable."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs

    def __call__(self, workers: Workers, *args: Any) -> Any:
        return train_there(workers, *args, **self.kwargs)


def metrics(place: str, name: str = "loss") -> list[float]:
    return [line[name] for line in RunFiles(FolderObjects(place)).read_metrics() if name in line]


def assert_same_training(place: str, expected: str, rel: float = 1e-6) -> None:
    assert metrics(place) == pytest.approx(metrics(expected), rel=rel)
    assert metrics(place, "gradient_norm") == pytest.approx(metrics(expected, "gradient_norm"), rel=10 * rel)
    found, wanted = (RunFiles(FolderObjects(where)).read_result() for where in (place, expected))
    assert found["validation"]["loss"] == pytest.approx(wanted["validation"]["loss"], rel=10 * rel)


def all_samples(by_rank: list[list[list[int]]]) -> list[list[int]]:
    """The samples of each step, over all workers."""
    return [sorted(index for share in shares for index in share) for shares in zip(*by_rank, strict=True)]


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [({}, (2,)), ({"batch_size": 3, "n_steps": 7}, (4,)), slow({}, (4,))],
    ids=["16 samples", "3 samples", "16 samples of 4"],
)
def test_any_number_of_workers_has_the_same_losses(
    store: str, tmp_path: Path, changes: dict[str, Any], numbers: tuple[int, ...]
) -> None:
    """With noise, which goes with the sample. Of 3 samples, one of 4 workers at least has none, and shares differ."""
    config = tiny_config(**BRIEF | changes)
    one = go(1, store, str(tmp_path / "1"), config)
    for n in numbers:
        several = go(n, store, str(tmp_path / str(n)), config)
        assert all_samples(several) == all_samples(one)
        sizes = np.array([[len(share) for share in shares] for shares in several])
        assert (sizes.min(0) < sizes.max(0)).any(), "unequal shares were wanted"
        assert (sizes == 0).any() or config.batch_size == 16
        assert_same_training(str(tmp_path / str(n)), str(tmp_path / "1"))


def test_the_number_of_workers_may_change_on_the_way(store: str, tmp_path: Path) -> None:
    """4 workers, then 2, then 1: the same samples in the same order, the same losses."""
    undisturbed = go(1, store, str(tmp_path / "1"))
    place = str(tmp_path / "changing")
    seen = all_samples(go(4, store, place, n_steps=1))
    seen += all_samples(go(2, store, place, n_steps=2))
    assert RunFiles(FolderObjects(place)).newest_checkpoint().step == 3
    seen += all_samples(go(1, store, place))
    assert seen == all_samples(undisturbed)
    assert_same_training(place, str(tmp_path / "1"))


def test_two_workers_that_stop_and_go_on_equal_two_that_do_not(store: str, tmp_path: Path) -> None:
    """D7 for several workers: bit for bit, as the CPU adds in one order."""
    go(2, store, str(tmp_path / "undisturbed"))
    go(2, store, str(tmp_path / "stopped"), n_steps=3)
    go(2, store, str(tmp_path / "stopped"))
    found, expected = (RunFiles(FolderObjects(tmp_path / name)) for name in ("stopped", "undisturbed"))
    assert metrics(found.location) == metrics(expected.location)
    weights = expected.read_weights()
    assert weights.keys() == found.read_weights().keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.read_weights().items())


@pytest.mark.parametrize("micro_batch", [5, slow(1), slow(100)])
def test_gradient_accumulation_changes_rounding_only(store: str, tmp_path: Path, micro_batch: int) -> None:
    go(1, store, str(tmp_path / "whole"))
    go(1, store, str(tmp_path / "parts"), micro_batch=micro_batch)
    assert_same_training(str(tmp_path / "parts"), str(tmp_path / "whole"))
    if micro_batch == 100:
        assert metrics(str(tmp_path / "parts")) == metrics(str(tmp_path / "whole"))


def test_gradient_accumulation_over_workers(store: str, tmp_path: Path) -> None:
    """Workers with different numbers of parts, and a Raptor of two blocks."""
    config = tiny_config(**BRIEF, spans=(Span(0, 1), Span(1, 2)))
    go(1, store, str(tmp_path / "whole"), config)
    go(2, store, str(tmp_path / "parts"), config, micro_batch=3)
    assert_same_training(str(tmp_path / "parts"), str(tmp_path / "whole"))


def test_half_precision_over_workers_is_that_of_one(store: str, tmp_path: Path) -> None:
    """D13: autocast reaches through DDP."""
    for precision in ("float32", "bfloat16"):
        go(2, store, str(tmp_path / precision), tiny_config(**BRIEF, precision=precision))
    go(1, store, str(tmp_path / "one"), tiny_config(**BRIEF, precision="bfloat16"))
    halves, one, full = (metrics(str(tmp_path / name)) for name in ("bfloat16", "one", "float32"))
    assert halves != full
    assert halves == pytest.approx(full, rel=1e-2)
    assert halves == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_compiled_blocks_train_under_ddp(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for the CPU here; the graphs that torch cuts for DDP are not wanted, as tied weights end last."""
    monkeypatch.setattr("tests.trainer.ranks.DEADLINE_S", 3000)  # of a C++ compiler on a machine that others use too
    config = tiny_config(**BRIEF, noise=0.0, spans=(Span(0, 1), Span(1, 2)))
    go(1, store, str(tmp_path / "plain"), config)
    go(2, store, str(tmp_path / "compiled"), config, compile=True, micro_batch=5)
    assert_same_training(str(tmp_path / "compiled"), str(tmp_path / "plain"), rel=1e-5)


# ---------------------------------------------------------------- how it ends


def errors(outcomes: list[Outcome]) -> list[str]:
    return [outcome.error for outcome in outcomes]


def fail_at(workers: Workers, store: str, place: str, rank: int, what: str) -> None:
    """Train, and have something go wrong on one worker."""
    data = open_training_data(store, "0-2")
    run = RunFiles(FolderObjects(place))
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 4 and workers.rank == rank:
            if what == "lost":
                raise UserError("another process has taken this RUN")
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return False

    if workers.rank == rank and what == "unreadable":
        original = Feed.next_share

        def next_share(feed: Feed) -> Share:
            if asked == 3:
                raise ObjectAccessError("layer_01/patches/000002", "layer_01/patches/000002: no such bucket")
            return original(feed)

        Feed.next_share = next_share  # type: ignore[method-assign]
    if workers.rank == rank and what == "full":

        def put(key: str, _: bytes) -> None:
            raise ObjectAccessError(key, f"{key} could not be written: no space left on device")

        run._objects.put = put  # type: ignore[method-assign]
    rate = 1e30 if what == "infinite" else 1e-2
    config = tiny_config(log_every=2, n_steps=500, peak_learning_rate=rate)
    train(config, data, run, machine=Machine(device=CPU, compile=False), workers=workers, stop=stop)


@pytest.mark.parametrize(
    ("what", "rank", "cause"),
    [
        ("unreadable", 1, "layer_01/patches/000002: no such bucket"),
        slow("unreadable", 0, "layer_01/patches/000002: no such bucket"),
        slow("lost", 0, "another process has taken this RUN"),
        ("full", 0, "no space left on device"),
    ],
)
def test_what_stops_one_stops_all_with_the_cause(store: str, tmp_path: Path, what: str, rank: int, cause: str) -> None:
    outcomes = run_ranks(3, fail_at, store, str(tmp_path), rank, what)
    assert all(cause in error for error in errors(outcomes)), errors(outcomes)
    named = [error for other, error in enumerate(errors(outcomes)) if other != rank]
    assert all(error.startswith(f"JobError: worker {rank} of 3 stopped, and so do all: ") for error in named)
    assert not outcomes[rank].error.startswith("JobError")


def test_an_infinite_loss_is_seen_by_all(store: str, tmp_path: Path) -> None:
    found = errors(run_ranks(2, fail_at, store, str(tmp_path), 0, "infinite"))
    assert len(set(found)) == 1
    assert "the loss has become" in found[0]


def test_a_killed_worker_does_not_leave_the_others_waiting(store: str, tmp_path: Path) -> None:
    outcomes = run_ranks(3, fail_at, store, str(tmp_path), 1, "killed")
    assert outcomes[1].exit_code == -signal.SIGKILL
    others = [outcomes[0], outcomes[2]]
    assert all(outcome.error for outcome in others)
    assert all(outcome.after_s < outcomes[1].after_s + 120 for outcome in others)


def test_more_workers_than_lanes_are_refused(store: str, tmp_path: Path) -> None:
    found = errors(run_ranks(2, train_there, store, str(tmp_path), tiny_config(lanes=1)))
    assert all(error.startswith("UserError: WORKERS=2 cannot share") for error in found), found
    assert all("1 lanes" in error for error in found)


def test_workers_that_see_different_data_are_refused(store: str, tmp_path: Path) -> None:
    found = errors(run_ranks(2, claim_another, store, str(tmp_path)))
    assert "worker 1 of 2 does not see the data that the first one sees" in found[1]
    assert "data: the run has 0, this command asks for 1" in found[1]
    assert found[0].startswith("JobError: worker 1 of 2 stopped")
    assert not (tmp_path / "config.json").exists()


def claim_another(workers: Workers, _: str, place: str) -> None:
    with claimed(RunFiles(FolderObjects(place)), {"data": workers.rank}, workers):
        raise AssertionError


def test_a_run_that_is_taken_is_refused_to_all(store: str, tmp_path: Path) -> None:
    with RunFiles(FolderObjects(tmp_path)).exclusive():
        found = errors(run_ranks(2, train_there, store, str(tmp_path)))
    assert all("another process is training in" in error for error in found), found


# ---------------------------------------------------------------- who they are


def test_workers_are_found_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert Workers.found() == Workers.alone()
    monkeypatch.setenv("WORLD_SIZE", "8")  # as a cluster's own scripts may
    assert Workers.found().is_alone
    for name, value in zip(names, "5823", strict=True):
        monkeypatch.setenv(name, value)
    found = Workers.found()
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 2, 3)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(UserError, match="expected RANK below WORLD_SIZE"):
        Workers.found()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UserError, match="expected numbers"):
        Workers.found()


def test_one_worker_alone_needs_no_connection() -> None:
    alone = Workers.alone()
    with alone.joined(CPU):
        assert not torch.distributed.is_initialized()
    assert alone.from_first(b"x") == b"x"
    assert alone.agree(wish=True)
    with pytest.raises(KeyError):
        alone.agree(error=KeyError())


def test_cores_are_shared_out() -> None:
    assert torch_threads(768, n_processes=10**6) == 1
    assert torch_threads(768, n_processes=1) == torch_threads(768)
    assert torch_threads(16) == 1


def test_gpus_talk_by_nccl_and_hosts_by_gloo() -> None:
    assert backend_for(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"
    assert backend_for(CPU) == "gloo"


def test_a_micro_batch_has_a_sample_at_least() -> None:
    with pytest.raises(UserError, match="MICRO_BATCH=0"):
        Machine(device=CPU, compile=False, micro_batch=0)

"""What others see of a training: status.json, the verdict under injected throttles, and what Ray is told."""

import json
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer.telemetry as telemetry
import trainer.train as loop
from infra.metrics import SERIES, Metrics
from infra.objects import FolderObjects, MemoryObjects
from infra.verdict import Verdict
from storage_schemas import Span, open_store
from tests.trainer.tiny import CPU, tiny_config, tiny_data, tiny_teacher, write_tiny
from trainer.arithmetic import mfu, n_block_calls, stated_peak, training_flop
from trainer.chunk_reader import ChunkReader
from trainer.data import TrainingData, open_training_data
from trainer.losses import mse
from trainer.meter import Spent
from trainer.objectives import annealed_loss
from trainer.run_files import STATUS_KEY, RunFiles
from trainer.telemetry import Export, Relay, Telemetry
from trainer.train import take_step, train

UNIT_S = 0.05
"""What the faster of two stages takes for one batch; the throttled one takes half as much again, or more."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return tiny_data(tmp_path_factory.mktemp("store"))


class Counted(Metrics):
    """Writes down what Ray would have been told."""

    def __init__(self) -> None:
        super().__init__({"run": "r", "block": "0-2"})
        self.found: dict[str, float] = {}

    def expect(self, name: str, **tags: str) -> None:
        self.add(name, 0, **tags)

    def add(self, name: str, amount: float = 1, **tags: str) -> None:
        assert SERIES[name].kind == "counter"
        key = " ".join([name, *tags.values()])
        self.found[key] = self.found.get(key, 0) + amount

    def set(self, name: str, value: float, **tags: str) -> None:
        assert SERIES[name].kind == "gauge"
        self.found[name] = value


# ---------------------------------------------------------------- status.json


def test_a_finished_run_says_what_it_did(data: TrainingData, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = RunFiles(FolderObjects(tmp_path))
    train(tiny_config(), data, run, machine=CPU)
    status = json.loads((tmp_path / STATUS_KEY).read_text())
    # Passes of 41 samples are batches of 16, 16 and 9: twelve steps are four passes.
    assert (status["state"], status["step"], status["n_steps"]) == ("complete", 12, 12)
    assert status["samples_done"] == status["samples_total"] == 4 * 41
    assert status["totals"]["samples"] == 164
    assert status["totals"]["steps"] == 12
    assert status["loss"] == [line["loss"] for line in run.read_metrics() if "loss" in line][-1]
    assert status["spans"] == "0-2"
    assert status["limited_by"] in ("step", "loader", "validation", "checkpoint")
    assert status["verdict"].startswith("limited by ")
    assert f"\nthis run was {status['verdict']}\n" in capsys.readouterr().err
    # Every pass reads each chunk of three states once: float32, three kinds.
    assert status["amplification"] == 1.0
    spec = data.train.spec
    assert (
        status["totals"]["fetched_bytes"] == 4 * 44 * 3 * spec.n_tokens * spec.dim * 4
    )  # 41 samples in 11 chunks of 4
    seconds = [status["totals"][f"{stage}_s"] for stage in ("loader", "step", "validation", "checkpoint")]
    assert all(s > 0 for s in seconds)
    assert sum(seconds) < status["seconds"] + 0.05  # which has one decimal place


def test_a_run_that_was_stopped_and_goes_on_counts_its_own_part(data: TrainingData) -> None:
    objects = MemoryObjects()
    run = RunFiles(objects)
    asked = iter([False] * 4 + [True])
    assert train(tiny_config(), data, run, machine=CPU, stop=lambda: next(asked)) is None
    stopped = json.loads(run.read_status())
    assert (stopped["state"], stopped["step"], stopped["samples_done"]) == ("incomplete", 5, 16 + 16 + 9 + 16 + 16)
    train(tiny_config(), data, run, machine=CPU)
    done = json.loads(run.read_status())
    assert (done["state"], done["step"], done["samples_done"]) == ("complete", 12, 164)
    assert done["totals"]["steps"] == 7
    assert done["run_id"] != stopped["run_id"]

    counted = Counted()
    export = Export(counted)
    for document in (stopped, stopped, done, done):
        export(document)
    assert counted.found["train_steps"] == 12
    assert counted.found["train_samples"] == 164

    anew = Counted()  # as a process that goes on: its counters begin at zero, the run does not
    Export(anew)(done)
    assert (anew.found["train_steps"], anew.found["train_samples"]) == (7, 164 - 73)
    assert (anew.found["train_done_steps"], anew.found["train_done_samples"]) == (12, 164)


def test_a_run_that_fails_says_why(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the lamp went out")

    monkeypatch.setattr(loop, "take_step", fail)
    run = RunFiles(MemoryObjects())
    with pytest.raises(RuntimeError):
        train(tiny_config(), data, run, machine=CPU)
    status = json.loads(run.read_status())
    assert (status["state"], status["cause"]) == ("stopped", "the lamp went out")


def test_time_left_and_the_rate_are_of_the_recent_past() -> None:
    now = [0.0]
    telemetry = Telemetry(
        RunFiles(MemoryObjects()), tiny_config(), n_samples=200, first_step=2, samples_before=40, clock=lambda: now[0]
    )
    for _ in range(4):
        now[0] += 2.0
        telemetry.step(20)
    found = telemetry.document()
    assert (found["step"], found["samples_done"], found["samples_per_s"]) == (6, 120, 10.0)
    assert found["seconds_left"] == 8.0
    assert "amplification" not in found  # nothing was read yet


def test_a_step_takes_what_the_steps_of_the_lines_took() -> None:
    telemetry = Telemetry(
        RunFiles(MemoryObjects()), tiny_config(), n_samples=200, first_step=2, samples_before=40, clock=lambda: 0.0
    )
    for _ in range(4):
        telemetry.step(20)
    assert "step_s" not in telemetry.document()
    spent = Spent(loader_s=2.0, step_s=6.0, n_samples=80, fetched_bytes=100.0, needed_bytes=50.0)
    telemetry.interval({"loss": 0.5}, {"loader_wait": 0.25}, spent, None)
    for _ in range(3):  # whose seconds come with the next line
        telemetry.step(20)
    assert telemetry.document()["step_s"] == 1.5
    telemetry.spent(Spent(step_s=1.0))
    assert telemetry.document()["step_s"] == 1.0
    assert telemetry.document()["totals"]["step_s"] == 7.0


def test_what_was_spent_before_a_stop_is_told_though_no_line_was_due(data: TrainingData) -> None:
    run = RunFiles(MemoryObjects())
    asked = iter([False] * 4 + [True])
    assert train(tiny_config(log_every=100), data, run, machine=CPU, stop=lambda: next(asked)) is None
    status = json.loads(run.read_status())
    assert status["step"] == status["totals"]["steps"] == 5
    assert status["totals"]["needed_bytes"] > 0
    assert status["amplification"] >= 1.0
    assert 0 < 5 * status["step_s"] < status["seconds"] + 0.05


def test_a_process_without_ray_is_told_about_by_its_document(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = MemoryObjects()
    run = RunFiles(objects)
    run.write_status(json.dumps({"run_id": "before", "state": "stopped", "totals": {"steps": 9}}).encode())
    relay, counted = Relay(run), Counted()
    monkeypatch.setattr(telemetry, "Metrics", lambda labels: counted)
    relay.look()
    assert not counted.found, "that process was told about by somebody else"
    for steps, errors in ((3, {}), (5, {"store throttled": 2}), (5, {"store throttled": 2})):
        now = {"run_id": "now", "state": "running", "loss": 0.5, "totals": {"steps": steps}, "errors": errors}
        run.write_status(json.dumps(now).encode())
        relay.look()
    assert counted.found["train_steps"] == 5
    assert counted.found["train_errors store throttled"] == 2
    assert counted.found["train_errors network reset"] == 0
    assert counted.found["train_loss"] == 0.5
    run.write_status(b"{torn")
    relay.look()


def test_numbers_that_do_not_reach_ray_are_missed_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from trainer import spans_ray

    def fail(_: Relay) -> None:
        raise ValueError("no such series")

    monkeypatch.setattr(Relay, "look", fail)
    with pytest.raises(ValueError, match="no such series"), spans_ray._relaying(("--run", str(tmp_path)), {}):
        pass
    assert capsys.readouterr().err == ("the numbers of this training do not reach Ray: ValueError('no such series')\n")


# ---------------------------------------------------------------- arithmetic


def test_flops_count_the_calls_that_a_step_makes() -> None:
    calls: list[int] = []

    def model(x: torch.Tensor, layer: int) -> torch.Tensor:
        calls.append(layer)
        return x

    states = torch.zeros(1, 8, 2, 4)
    for forcing in (0.0, 0.5, 1.0):
        calls.clear()
        annealed_loss(model, states, 0, mse, forcing)
        assert len(calls) == n_block_calls(7, forcing)
    config = tiny_config(spans=(Span(0, 7),))
    assert training_flop(config, 768, 261, 0.0) == pytest.approx(3 * 7 * 5.14e9, rel=1e-3)
    assert mfu(1e12, torch.device("cpu"), 1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),  # no L4
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("Some Card", None),
    ],
)
def test_a_peak_is_that_of_the_very_device(name: str, peak: float | None) -> None:
    assert stated_peak(name) == peak


# ---------------------------------------------------------------- the verdict


def throttled_verdict(data: TrainingData, limit: str, times: float, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """Train with loader and step slowed by sleeps, the one so many times as much as the other."""
    slow = {"loader": UNIT_S, "step": UNIT_S} | {limit: times * UNIT_S}
    config = tiny_config(n_steps=24, log_every=6, validate_every=100, checkpoint_every=100, validation_samples=2)
    reads_per_batch = config.batch_size / data.train.spec.samples_per_chunk * config.span.n_states
    turn, read, step = threading.Lock(), ChunkReader._read, loop.take_step

    def slow_read(self: ChunkReader, *args: Any) -> None:
        with turn:  # as a disk or a network that all threads share
            time.sleep(slow["loader"] / reads_per_batch)
        read(self, *args)

    def slow_step(*args: Any) -> Any:
        time.sleep(slow["step"])
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkReader, "_read", slow_read)
        patch.setattr(loop, "take_step", slow_step)
        run = RunFiles(MemoryObjects())
        train(config, data, run, machine=CPU)
    status = json.loads(run.read_status())
    return Verdict(limit=status["limited_by"], busy=status["busy"])


@pytest.fixture(scope="module")
def even_data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """One long pass of whole batches: at the beginning of a pass a loader has nothing ready, whatever its speed."""
    root = tmp_path_factory.mktemp("even")
    teacher = tiny_teacher()
    write_tiny(FolderObjects(root / "train"), teacher, 384, 0)
    write_tiny(FolderObjects(root / "val"), teacher, 8, 1)
    data = open_training_data(str(root), "0-2", device="cpu")
    assert open_store(str(root / "train")).n_valid == 24 * 16
    return data


class Pretended:
    """Time that passes in steps and while a batch is awaited, and nowhere else."""

    def __init__(self, *, batch_s: float, step_s: float) -> None:
        self.now = self._ready = 0.0
        self._batch_s, self._step_s, self._is_waiting = batch_s, step_s, False

    def __call__(self) -> float:
        return self.now

    def around_a_wait(self) -> float:
        """Asked before and after a batch is awaited; batches are read one after the other, ahead of the steps."""
        if self._is_waiting:
            self._ready += self._batch_s
            self.now = max(self.now, self._ready)
        self._is_waiting = not self._is_waiting
        return self.now

    def step(self, *args: Any) -> Any:
        self.now += self._step_s
        return take_step(*args)


@pytest.mark.parametrize("limit", ["loader", "step"])
def test_the_verdict_names_what_is_half_as_slow_again(
    even_data: TrainingData, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"loader": 1.0, "step": 1.0} | {limit: 1.5}
    clock = Pretended(batch_s=slow["loader"], step_s=slow["step"])
    around = clock.around_a_wait
    monkeypatch.setattr("trainer.stream.time", SimpleNamespace(perf_counter=around))
    monkeypatch.setattr("trainer.meter.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(loop, "Telemetry", partial(Telemetry, clock=clock))
    monkeypatch.setattr(loop, "take_step", clock.step)
    config = tiny_config(n_steps=24, log_every=6, validate_every=100, checkpoint_every=100, validation_samples=2)
    run = RunFiles(MemoryObjects())
    train(config, even_data, run, machine=CPU)
    status = json.loads(run.read_status())
    assert status["limited_by"] == limit
    waited = 1.5 + 23 * 0.5 if limit == "loader" else 1.0  # for the first batch, then for what is left of each other
    totals = status["totals"]
    assert (totals["loader_s"], totals["step_s"]) == pytest.approx((waited, 24 * slow["step"]))


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["loader", "step"])
def test_the_verdict_is_right_in_nineteen_of_twenty(
    even_data: TrainingData, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [throttled_verdict(even_data, limit, 1.5, monkeypatch) for _ in range(20)]
    right = sum(one.limit == limit for one in found)
    print(f"{limit}: {right} of 20; {[dict(one.busy) for one in found[:3]]}")
    assert right >= 19, found

"""The scaling benchmark counts what it says it counts, and its extraction is a real one."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import scaling


def test_efficiency_is_the_teachers_share_of_the_workers_time():
    one = scaling.Measured(n_workers=4, wall_s=26.0, n_shards=48, driver_s=0, worker_s=0, load=0)
    assert one.efficiency(2.0) == pytest.approx(48 * 2.0 / (4 * 26.0))


def test_a_worker_waits_for_all_others_and_then_sleeps_one_batch_at_a_time(tmp_path: Path, monkeypatch):
    import torch

    slept: list[float] = []
    monkeypatch.setattr(scaling, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic))

    gate = tmp_path / "gate"
    teacher = scaling.sleeping_teacher(gate, 2, 0.2, "cpu")  # no gate: the driver's
    pixels = torch.zeros(1, 3, 16, 16)
    states = teacher.layer_states_list(pixels)
    assert slept == []
    gate.mkdir()
    (gate / "another worker").touch()
    slow = scaling.sleeping_teacher(gate, 2, 0.2, "cpu")
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(states, slow.layer_states_list(pixels)))
    assert slept == [0.2, 0.2]


@pytest.mark.ray
@pytest.mark.slow
def test_it_runs_and_reports_every_number_of_workers(tmp_path: Path):
    import ray

    ray.shutdown()
    result = scaling.run(scaling.QUICK, tmp_path)
    assert not any(tmp_path.iterdir())
    assert [row["workers"] for row in result.rows] == [1, 2]
    assert all(0 < row["efficiency"] <= 1.01 for row in result.rows)
    assert result.details["driver"][0]["shards_per_s"] > 1

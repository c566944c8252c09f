"""The benchmark of waiting for samples measures the training loop's own counter, and would notice a slow loader."""

import time
from pathlib import Path

import pytest

from benchmarks import loader_wait
from trainer.data import open_training_data


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return loader_wait._random_store(loader_wait.QUICK, tmp_path_factory.mktemp("wait"))


def test_the_loop_trains_nothing_but_counts_and_waits_as_it_does_elsewhere(store, capsys):
    data = open_training_data(store, "7-10")
    shares, samples_per_s = loader_wait.in_training(loader_wait.QUICK, data)
    assert len(shares) == loader_wait.QUICK.n_steps / loader_wait.QUICK.log_every
    assert all(0 <= share < 1 for share in shares)
    assert 0 < samples_per_s <= loader_wait.QUICK.batch_size / loader_wait.QUICK.step_s
    assert f"loader wait {shares[-1]:.1%}" in capsys.readouterr().err  # the bar shows the same number


def test_a_slow_loader_is_seen_by_both(store, monkeypatch):
    """Reads of 60 ms beside steps of 2 ms: most of the time is waiting."""
    data = open_training_data(store, "7-10")
    reads = type(data.train.objects).read_rows

    def slow(*arguments):
        time.sleep(0.06)
        return reads(*arguments)

    monkeypatch.setattr(type(data.train.objects), "read_rows", slow)
    for measure in (loader_wait.in_training, loader_wait.alone):
        shares, _ = measure(loader_wait.QUICK, data)
        assert max(shares) > 0.5


def test_run_reports_both_loops_on_both_stores(tmp_path: Path):
    result = loader_wait.run(loader_wait.QUICK, tmp_path)
    assert not any(tmp_path.iterdir())  # temporary data is gone
    assert [(row["store"], row["loop"]) for row in result.rows] == [
        (store, loop) for store in ("tiny teacher", "digits") for loop in (loader_wait.IN_TRAINING, loader_wait.ALONE)
    ]
    assert all(0 <= row["others, %"] <= 100 for row in result.rows)

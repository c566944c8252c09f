"""Workers that go from one store of an extraction to the next."""

from pathlib import Path

import pytest

from pipeline.extract import extract
from tests.kills import lives, wait_for
from tests.pipeline_jobs import ON_TWO, THREADS, digest_of, fake_config, make_tree

pytestmark = pytest.mark.ray


def test_val_is_done_by_the_processes_of_train(ray_cluster: None, tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_tree(tmp_path / "images" / split, 24)
    config = fake_config(tmp_path / "images", tmp_path / "store")
    train, val = extract(config, ON_TWO)
    pids = [{int(report.worker.rpartition(":")[2]) for report in result.reports} for result in (train, val)]
    assert pids[1] <= pids[0]
    assert wait_for(lambda: not any(map(lives, pids[0])))
    extract(fake_config(tmp_path / "images", tmp_path / "alone"), THREADS)
    for split in ("train", "val"):
        assert digest_of(tmp_path / "store" / split) == digest_of(tmp_path / "alone" / split)

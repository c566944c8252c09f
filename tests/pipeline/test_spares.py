"""Workers that go from one store of an extraction to the next, and no further."""

from pathlib import Path

import psutil
import pytest

from pipeline.dispatch import Wanted
from pipeline.dispatch_ray import run_on_ray
from pipeline.extract import extract
from pipeline.workers_ray import Spares
from tests.kills import lives, wait_for
from tests.pipeline_jobs import ON_RAY, THREADS, digest_of, fake_config, make_tree

pytestmark = pytest.mark.ray


def test_val_is_done_by_the_processes_of_train(ray_cluster: None, tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_tree(tmp_path / "images" / split, 24)
    config = fake_config(tmp_path / "images", tmp_path / "store")
    train, val = extract(config, ON_RAY)
    pids = [{int(report.worker.rpartition(":")[2]) for report in result.reports} for result in (train, val)]
    assert pids[1] <= pids[0]
    assert wait_for(lambda: not any(map(lives, pids[0])))
    extract(fake_config(tmp_path / "images", tmp_path / "alone"), THREADS)
    for split in ("train", "val"):
        assert digest_of(tmp_path / "store" / split) == digest_of(tmp_path / "alone" / split)


class Says:
    """A runner that tells what it was made with."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __call__(self) -> "Says":
        return self

    def run(self, shard: int) -> tuple[str, int]:
        return self._what, psutil.Process().pid


def run_all(what: str, spares: Spares, wanted: Wanted, n: int = 4) -> list[tuple[str, int]]:
    outcomes = list(run_on_ray(range(n), Says(what), wanted=lambda _: wanted, depth=1, spares=spares))
    assert all(outcome.ok for outcome in outcomes)
    return [outcome.report for outcome in outcomes]


def test_a_spare_is_set_up_anew_and_only_for_what_it_fits(ray_cluster: None) -> None:
    one, half = Wanted(n=1, num_cpus=1), Wanted(n=1, num_cpus=0.5)
    spares = Spares()
    first = run_all("first", spares, one)
    second = run_all("second", spares, one)
    assert {what for what, _ in second} == {"second"}
    assert {pid for _, pid in first} == {pid for _, pid in second}
    other = run_all("other", spares, half)
    assert {pid for _, pid in other}.isdisjoint({pid for _, pid in first}), "it has other cores"
    spares.close()
    pids = {pid for _, pid in first + other}
    assert wait_for(lambda: not any(map(lives, pids)))


def test_a_spare_that_has_died_is_replaced(ray_cluster: None) -> None:
    spares = Spares()
    ((_, pid), *_) = run_all("first", spares, Wanted(n=1, num_cpus=1))
    psutil.Process(pid).kill()
    second = run_all("second", spares, Wanted(n=1, num_cpus=1))
    assert pid not in {pid for _, pid in second}
    spares.keeps = False
    ((_, pid), *_) = run_all("third", spares, Wanted(n=1, num_cpus=1))
    assert wait_for(lambda: not lives(pid)), "nobody comes after it"
    spares.close()

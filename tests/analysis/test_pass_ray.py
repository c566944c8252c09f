"""The pass on a Ray cluster: the findings of one pass, whoever dies meanwhile, and errors in our words."""

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray

from analysis.__main__ import main
from analysis.measure import measure_store
from analysis.page import PAGE
from analysis.pass_ray import _results, measure_on_ray
from infra.console import JobError, UserError
from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.from_arrays import write_store
from tests.analysis.test_pass_shares import BATCH, LIMIT, WIDE_LIMIT, assert_same
from tests.stores import make_samples, make_spec, planted_states, write_planted

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    spec = make_spec(layers=tuple(range(7)), samples_per_chunk=2, samples_per_shard=4)
    write_planted(FolderObjects(folder), spec, {5: "truncated"})
    return folder


def address() -> str:
    return ray.get_runtime_context().gcs_address


def test_a_cluster_finds_what_one_pass_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    store = open_store(folder.name)  # relative to a folder that no worker is in
    found = measure_on_ray(store, address(), limit=LIMIT, wide_limit=WIDE_LIMIT, batch_rows=BATCH)
    assert_same(measure_store(store, limit=LIMIT, wide_limit=WIDE_LIMIT, batch_rows=BATCH), found)


def test_the_door_has_the_pass_done_by_the_cluster(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    typed = ["report", "--store", str(folder), "--out", str(tmp_path), "--k", "2", "--ray-address", address()]
    assert main(typed) == 0
    assert "shares" in capsys.readouterr().err
    assert (tmp_path / PAGE).exists()
    with (tmp_path / "tables" / "dynamics.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = measure_store(open_store(str(folder)), limit=100, wide_limit=100).dynamics
    for kind, found in expected.items():
        norms = [float(row["norm"]) for row in rows if row["kind"] == kind]
        assert norms == pytest.approx(found.norm.mean.tolist(), rel=1e-9)


def _dies_once(marker: Path, share: int) -> int:
    if share == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return share


def _dies(share: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return share


def test_a_lost_share_is_measured_again(tmp_path: Path) -> None:
    task = ray.remote(_dies_once).options(max_retries=2)
    found = _results(lambda share: task.remote(tmp_path / "died", share), [0, 1, 2, 3, 4, 5])
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "died").exists()


def test_a_share_that_is_lost_again_and_again_ends_the_pass() -> None:
    task = ray.remote(_dies).options(max_retries=1)
    with pytest.raises(JobError, match="a share of the store was lost"):
        list(_results(task.remote, [0]))


def test_an_error_of_a_worker_is_the_one_that_a_pass_here_has(tmp_path: Path) -> None:
    spec = make_spec(layers=tuple(range(7)))

    def with_zeros(rows: range) -> np.ndarray:
        states = planted_states(spec, rows)
        states[:, 4, 0] = 0
        return states

    write_store(FolderObjects(tmp_path), spec, make_samples(21), with_zeros)
    store = open_store(str(tmp_path))
    with pytest.raises(UserError, match="no direction: layer 4") as here:
        measure_store(store, limit=LIMIT, wide_limit=WIDE_LIMIT, batch_rows=BATCH)
    with pytest.raises(UserError, match="no direction: layer 4") as there:
        measure_on_ray(store, address(), limit=LIMIT, wide_limit=WIDE_LIMIT, batch_rows=BATCH)
    assert str(here.value) == str(there.value)

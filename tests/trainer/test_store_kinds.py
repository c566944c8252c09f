"""Training from every precision and back end: what is learned does not depend on how states lie, and hardly on bits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.console import ExitCode, run_door
from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from storage_schemas.keys import INDEX_KEY, commit_key
from tests.trainer.tiny import CPU, tiny_config, tiny_teacher, write_tiny, write_tiny_pair
from trainer.__main__ import main
from trainer.data import open_training_data
from trainer.run_files import RunFiles
from trainer.train import TrainResult, train


def trained(place: Path, **changes: object) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    data = open_training_data(write_tiny_pair(place, **changes), "0-2")
    run = RunFiles(MemoryObjects())
    result = train(tiny_config(), data, run, machine=CPU)
    assert result is not None
    return result, run.read_weights()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return trained(tmp_path_factory.mktemp("exact"))[0]


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_every_precision_learns_nearly_the_same(exact: TrainResult, precision: str, tmp_path: Path) -> None:
    result, weights = trained(tmp_path / "zarr", precision=precision)
    for kind, values in exact.validation.r2.items():
        assert result.validation.r2[kind] == pytest.approx(values, rel=1e-2, abs=1e-2), kind
    assert result.validation.accuracy == exact.validation.accuracy
    assert result != exact, "rounding shows"
    same, same_weights = trained(tmp_path / "tar", precision=precision, backend="webdataset")
    assert same == result
    assert all(torch.equal(value, same_weights[name]) for name, value in weights.items())


@pytest.mark.parametrize("changes", [{"precision": "int8"}, {"precision": "bfloat16", "backend": "webdataset"}])
def test_hold_out_and_unfinished_stores_of_every_kind(changes: dict[str, str], tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path / "store"), tiny_teacher(), 41, seed=0, **changes)
    (tmp_path / "store" / commit_key(3)).unlink()
    (tmp_path / "store" / INDEX_KEY).unlink()
    data = open_training_data(str(tmp_path / "store"), "0-2", partial=True)
    held = np.flatnonzero(data.validation.valid)
    assert not data.train.valid[held].any()
    assert int(data.train.valid.sum()) + len(held) == open_store(tmp_path / "store").n_valid == 41 - 8
    command = ["train", "--device", "cpu", "--block", "0-2", "--steps", "3", "--partial"]
    command += ["--store", str(tmp_path / "store"), "--run", str(tmp_path / "run")]
    assert run_door(lambda: main(command)) == ExitCode.OK
    assert RunFiles(FolderObjects(tmp_path / "run")).read_result()["validation"]["n_samples"] == len(held)

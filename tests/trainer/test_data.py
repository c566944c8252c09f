"""Stores that are there but cannot be trained on, and unfinished ones, which a run takes as it first found them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from infra.console import UserError
from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.keys import INDEX_KEY, commit_key
from tests.stores import make_spec, write_planted
from tests.trainer.tiny import tiny_teacher, write_tiny, write_tiny_pair
from trainer.data import TrainingData, frozen_shards, open_training_data


def take_commits(place: Path, shards: tuple[int, ...]) -> dict[Path, bytes]:
    """Make a store unfinished; returns what brings it back."""
    (place / INDEX_KEY).unlink(missing_ok=True)
    taken = {place / commit_key(shard): (place / commit_key(shard)).read_bytes() for shard in shards}
    for path in taken:
        path.unlink()
    return taken


def valid_samples(data: TrainingData) -> tuple[list[int], list[int]]:
    return np.flatnonzero(data.train.valid).tolist(), np.flatnonzero(data.validation.valid).tolist()


@pytest.mark.parametrize("empty", ["train", "val"])
def test_split_without_a_good_image_is_refused(tmp_path: Path, empty: str) -> None:
    for split in ("train", "val"):
        spec = make_spec(n_samples=24)
        bad = dict.fromkeys(range(24), "truncated") if split == empty else {}
        write_planted(FolderObjects(tmp_path / split), spec, bad)
    with pytest.raises(UserError, match=rf"/{empty} has no sample to use: .* 3 shards .*make inspect STORE="):
        open_training_data(str(tmp_path), "0-1")


def test_store_without_a_good_image_and_without_val_is_refused(tmp_path: Path) -> None:
    write_planted(FolderObjects(tmp_path), make_spec(n_samples=24), dict.fromkeys(range(24), "empty"))
    with pytest.raises(UserError, match="has no sample to use"):
        open_training_data(str(tmp_path), "0-1")


def test_partial_freezes_train_and_val(tmp_path: Path) -> None:
    """Both stores grow while the run is interrupted; it goes on with what it began with."""
    place = write_tiny_pair(tmp_path)
    taken = take_commits(tmp_path / "train", (1, 3)) | take_commits(tmp_path / "val", (0,))
    first = open_training_data(place, "0-2", partial=True)
    assert first.identity["shards"] == [0, 2, 4, 5]
    assert first.identity["validation_shards"] == [1, 2]
    assert frozen_shards(first.identity) == {"train": [0, 2, 4, 5], "val": [1, 2]}
    assert valid_samples(first)[1] == list(range(8, 18))
    for path, commit in taken.items():
        path.write_bytes(commit)
    again = open_training_data(place, "0-2", partial=True, frozen=frozen_shards(first.identity))
    assert again.identity == first.identity
    assert valid_samples(again) == valid_samples(first)
    grown = open_training_data(place, "0-2", partial=True)
    assert grown.identity["shards"] == grown.identity["validation_shards"] == "all"
    assert frozen_shards(grown.identity) == {}
    assert len(valid_samples(grown)[1]) == 18


def test_frozen_shards_that_are_gone_are_named(tmp_path: Path) -> None:
    place = write_tiny_pair(tmp_path)
    take_commits(tmp_path / "val", (1,))
    with pytest.raises(UserError, match=r"/val: the run began with shards 1, which are gone"):
        open_training_data(place, "0-2", partial=True, frozen={"val": [1, 2]})


def test_frozen_shards_without_a_good_image(tmp_path: Path) -> None:
    write_planted(FolderObjects(tmp_path / "train"), make_spec(n_samples=24), dict.fromkeys(range(8), "empty"))
    write_planted(FolderObjects(tmp_path / "val"), make_spec(n_samples=24), {})
    with pytest.raises(UserError, match="/train has no sample to use"):
        open_training_data(str(tmp_path), "0-1", partial=True, frozen={"train": [0]})
    assert open_training_data(str(tmp_path), "0-1", partial=True, frozen={"train": [0, 1]}).train.n_valid == 8


def test_hold_out_of_a_partial_store_stays_the_same(tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 41, seed=0)
    taken = take_commits(tmp_path, (2,))
    first = open_training_data(str(tmp_path), "0-2", partial=True)
    for path, commit in taken.items():
        path.write_bytes(commit)
    again = open_training_data(str(tmp_path), "0-2", partial=True, frozen=frozen_shards(first.identity))
    assert valid_samples(again) == valid_samples(first)
    assert open_store(tmp_path).is_complete
    assert dataclasses.asdict(again.span) == dataclasses.asdict(first.span)

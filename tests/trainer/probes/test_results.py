"""The documents of a probe: what a table reads, and what happens when they are damaged."""

import dataclasses
import json

import pytest
import torch

from infra.console import UserError
from infra.objects import FolderObjects, MemoryObjects, ObjectMissingError
from storage_schemas.documents import seal
from trainer.probes.probe_files import CHECKPOINT_KEY, ProbeCheckpoint, ProbeFiles
from trainer.probes.results import RESULT_KEY, ProbeResult, read_result, read_results, write_result

RESULT = ProbeResult(
    task="digits",
    metric="top-1",
    higher_is_better=True,
    what="raptor",
    label="Raptor k=3",
    spans=["0-7", "7-10", "10-12"],
    run="data/runs/digits/raptor",
    run_weights="a" * 64,
    teacher="digits_vit",
    teacher_weights="b" * 64,
    seed=0,
    model_seed=2,
    raptor_settings={"recipe": "digits_stage2", "loss": "mse"},
    compute="float32",
    initial=0.1,
    last=0.98,
    best=0.99,
    best_epoch=4,
    best_chosen_on_reported_samples=True,
    history=[{"top-1": 0.1}, {"top-1": 0.98}],
    teacher_head=0.994,
    n_train=1438,
    n_evaluation=359,
    compat=False,
    settings={"n_epochs": 1},
    data={"train": {"store": "c" * 64}},
    task_identity={},
)


def test_a_result_comes_back_as_it_was() -> None:
    objects = MemoryObjects()
    write_result(objects, RESULT)
    assert read_result(objects) == RESULT


def test_the_key_tells_models_and_probes_apart_and_finds_the_same_one_twice() -> None:
    keys = {
        dataclasses.replace(RESULT, **change).key
        for change in ({}, {"model_seed": 3}, {"seed": 1}, {"label": "k=3, no noise"}, {"task": "imagenet"})
    }
    assert len(keys) == 5
    assert dataclasses.replace(RESULT, run="elsewhere", last=0.5).key == RESULT.key


def test_all_results_below_a_place_are_found(tmp_path) -> None:
    for name in ("digits/b", "digits/a", "imagenet/deep/c"):
        write_result(FolderObjects(tmp_path / name), dataclasses.replace(RESULT, label=name))
    (tmp_path / "digits/a/notes.json").write_text("{}")
    found = read_results(str(tmp_path))
    assert [place.removeprefix(f"{tmp_path}/") for place in found] == ["digits/a", "digits/b", "imagenet/deep/c"]
    assert [result.label for result in found.values()] == ["digits/a", "digits/b", "imagenet/deep/c"]
    assert read_results(str(tmp_path / "nothing")) == {}


def test_damaged_results_are_all_named(tmp_path) -> None:
    for name in ("a", "b", "c"):
        write_result(FolderObjects(tmp_path / name), RESULT)
    path = tmp_path / "a" / RESULT_KEY
    path.write_bytes(path.read_bytes().replace(b"0.98", b"0.99"))
    document = {"format_version": 1, "result": {**dataclasses.asdict(RESULT), "last": "high", "more": 1}}
    del document["result"]["spans"]
    (tmp_path / "b" / RESULT_KEY).write_bytes(seal(document))
    with pytest.raises(UserError) as caught:
        read_results(str(tmp_path))
    for part in ("it was changed", "spans is missing", "more is unknown", "last is 'high'", "make probe"):
        assert part in str(caught.value), part


def test_another_format_is_refused() -> None:
    objects = MemoryObjects()
    objects.put(RESULT_KEY, seal({"format_version": 2, "result": {}}))
    with pytest.raises(UserError, match="has format 2, this code reads 1"):
        read_result(objects)


def test_no_result_is_missing_and_no_error_of_the_person() -> None:
    with pytest.raises(ObjectMissingError):
        read_result(MemoryObjects())
    assert ProbeFiles(MemoryObjects()).read_result() is None


# ---------------------------------------------------------------- the place of a probe

CHECKPOINT = ProbeCheckpoint(
    iteration=3, tensors={"head.weight": torch.arange(6.0).view(2, 3)}, state={"history": [{"top-1": 0.5}]}
)


def test_a_checkpoint_comes_back_and_only_the_newest_is_kept() -> None:
    objects = MemoryObjects()
    files = ProbeFiles(objects)
    assert files.read_checkpoint() is None
    files.save_checkpoint(dataclasses.replace(CHECKPOINT, iteration=1))
    files.save_checkpoint(CHECKPOINT)
    found = files.read_checkpoint()
    assert found is not None
    assert (found.iteration, found.state) == (3, CHECKPOINT.state)
    assert torch.equal(found.tensors["head.weight"], CHECKPOINT.tensors["head.weight"])
    assert sorted(info.key for info in objects.list()) == ["checkpoint-000000003.safetensors", CHECKPOINT_KEY]


class Dies(Exception):
    pass


class DyingObjects(MemoryObjects):
    """Dies before its n-th write or deletion."""

    def __init__(self, n_allowed: int) -> None:
        super().__init__()
        self.n_allowed = n_allowed

    def _count(self) -> None:
        self.n_allowed -= 1
        if self.n_allowed < 0:
            raise Dies

    def put(self, key, data) -> None:
        self._count()
        super().put(key, data)

    def delete(self, key) -> None:
        self._count()
        super().delete(key)


@pytest.mark.parametrize("n_allowed", range(3))
def test_a_death_while_saving_leaves_the_checkpoint_before_it_or_the_new_one(n_allowed: int) -> None:
    objects = DyingObjects(99)
    files = ProbeFiles(objects)
    files.save_checkpoint(dataclasses.replace(CHECKPOINT, iteration=1))
    objects.n_allowed = n_allowed
    with pytest.raises(Dies):
        files.save_checkpoint(CHECKPOINT)
    found = files.read_checkpoint()
    assert found is not None
    assert found.iteration == (1 if n_allowed < 2 else 3)
    objects.n_allowed = 99
    files.save_checkpoint(dataclasses.replace(CHECKPOINT, iteration=4))
    assert sorted(info.key for info in objects.list()) == ["checkpoint-000000004.safetensors", CHECKPOINT_KEY]


@pytest.mark.parametrize("damage", ["flipped", "missing", "foreign document"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(damage: str) -> None:
    objects = MemoryObjects()
    files = ProbeFiles(objects)
    files.save_checkpoint(CHECKPOINT)
    key = "checkpoint-000000003.safetensors"
    if damage == "flipped":
        data = bytearray(objects.get(key))
        data[-1] ^= 1
        objects.put(key, bytes(data))
    elif damage == "missing":
        objects.delete(key)
    else:
        objects.put(CHECKPOINT_KEY, seal({"iteration": "x"}))
    with pytest.raises(UserError, match=r"the checkpoint is damaged .*Delete checkpoint\.json there to begin"):
        files.read_checkpoint()


def test_another_probe_in_the_place_is_refused_field_by_field() -> None:
    objects = MemoryObjects()
    files = ProbeFiles(objects)
    files.claim({"task": "digits", "settings": {"n_epochs": 3}, "seed": 0})
    assert files.is_of({"task": "digits", "settings": {"n_epochs": 3}, "seed": 0})
    with pytest.raises(UserError) as caught:
        files.claim({"task": "digits", "settings": {"n_epochs": 4}, "seed": 1})
    for part in ("settings.n_epochs: that probe has 3", "seed: that probe has 0, this command asks for 1", "OUT=..."):
        assert part in str(caught.value)


def test_a_place_with_other_files_is_refused() -> None:
    objects = MemoryObjects()
    objects.put("holiday.jpg", b"x")
    with pytest.raises(UserError, match=r"no config\.json, so it is no probe, but it holds holiday\.jpg"):
        ProbeFiles(objects).claim({"task": "digits"})
    objects.put("config.json", seal({"run": {}}))
    with pytest.raises(UserError, match="is not that of a probe"):
        ProbeFiles(objects).claim({"task": "digits"})


def test_two_processes_cannot_share_a_place(tmp_path) -> None:
    first, second = (ProbeFiles(FolderObjects(tmp_path)) for _ in range(2))
    with first.exclusive(), pytest.raises(UserError, match=r"another process is training in .*give another OUT"):
        second.exclusive().__enter__()
    with second.exclusive():
        second.claim({"task": "digits"})
    assert json.loads((tmp_path / "config.json").read_text())["probe"] == {"task": "digits"}

"""RUN folders: nothing is damaged by a crash at any write, and nothing of another run is continued."""

import json

import pytest
import torch

from infra.console import UserError
from infra.objects import MemoryObjects
from trainer.run_files import KEPT_CHECKPOINTS, Checkpoint, RunFiles


class Crash(Exception):
    pass


class CrashingObjects(MemoryObjects):
    """Objects whose k-th change raises instead, as if the process had died there."""

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None

    def _spend(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Crash
            self.left -= 1

    def put(self, key, data):
        self._spend()
        super().put(key, data)

    def delete(self, key):
        self._spend()
        super().delete(key)


def make_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        tensors={"block": {"w": torch.full((2, 3), float(step))}, "optimizer": {"m.w": torch.arange(step)}},
        state={"place": step, "losses": [0.1 + step, 1e-300]},
    )


def assert_equal(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.step, found.state) == (expected.step, expected.state)
    assert found.tensors.keys() == expected.tensors.keys()
    for file, tensors in expected.tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found.tensors[file][name], value)
            assert found.tensors[file][name].dtype == value.dtype


def test_checkpoint_returns_exactly() -> None:
    run = RunFiles(MemoryObjects())
    assert run.newest_checkpoint() is None
    run.save_checkpoint(make_checkpoint(7))
    assert_equal(run.newest_checkpoint(), make_checkpoint(7))


def test_checkpoint_survives_a_crash_at_any_write() -> None:
    """Whatever change the process dies before, the newest checkpoint is whole: the old one or the new one."""
    n_old = n_new = 0
    for k in range(50):
        objects = CrashingObjects()
        run = RunFiles(objects)
        for step in range(1, KEPT_CHECKPOINTS + 1):
            run.save_checkpoint(make_checkpoint(step))
        new = KEPT_CHECKPOINTS + 1
        objects.left = k
        try:
            run.save_checkpoint(make_checkpoint(new))
        except Crash:
            found = run.newest_checkpoint()
            assert found is not None
            assert_equal(found, make_checkpoint(found.step))
            n_old, n_new = n_old + (found.step == new - 1), n_new + (found.step == new)
            objects.left = None
            run.save_checkpoint(make_checkpoint(new))  # what the resumed run does
        assert_equal(run.newest_checkpoint(), make_checkpoint(new))
        steps = sorted({info.key.split("/")[1][:9] for info in objects.list("checkpoints/")})
        assert steps == [f"{step:09d}" for step in range(2, new + 1)]
        if objects.left:
            break
    else:
        pytest.fail("saving never came to an end")
    assert n_old == 3  # before each of two tensor files and the document
    assert n_new == 3  # before each deletion of the oldest's document and files


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "flip document"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(damage: str) -> None:
    objects = MemoryObjects()
    run = RunFiles(objects)
    run.save_checkpoint(make_checkpoint(3))
    run.save_checkpoint(make_checkpoint(6))
    key = "checkpoints/000000006.json" if "document" in damage else "checkpoints/000000006/block.safetensors"
    data = bytearray(objects.get(key))
    if damage == "delete":
        objects.delete(key)
    elif damage == "truncate":
        objects.put(key, bytes(data[:-1]))
    else:
        data[-3] ^= 1
        objects.put(key, bytes(data))
    said: list[str] = []
    assert_equal(run.newest_checkpoint(said.append), make_checkpoint(3))
    assert len(said) == 1
    assert "checkpoint of step 6 is damaged" in said[0]


def test_other_config_is_refused_field_by_field() -> None:
    run = RunFiles(MemoryObjects())
    config = {"train": {"seed": 0, "n_steps": 10, "loss": "mse"}, "data": {"train": "abc", "shards": [0, 1]}}
    run.claim(config)
    run.claim(json.loads(json.dumps(config)))
    other = {"train": {"seed": 1, "n_steps": 10, "loss": {"cls": 0.5}}, "data": {"train": "abc", "shards": "all"}}
    with pytest.raises(UserError) as caught:
        run.claim(other)
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "data.shards: the run has [0, 1], this command asks for 'all'",
        "train.loss: the run has 'mse', this command asks for {'cls': 0.5}",
        "train.seed: the run has 0, this command asks for 1",
    ]
    assert run.read_config() == config


def test_finished_run_gives_its_weights_and_nothing_else_does() -> None:
    objects = MemoryObjects()
    run = RunFiles(objects)
    with pytest.raises(UserError, match="no finished run"):
        run.read_weights()
    run.finish({"w": torch.ones(3)}, {"final_loss": 0.5})
    result = run.read_result()
    assert result is not None
    assert result["final_loss"] == 0.5
    assert torch.equal(run.read_weights()["w"], torch.ones(3))
    data = bytearray(objects.get("block.safetensors"))
    data[-1] ^= 1
    objects.put("block.safetensors", bytes(data))
    with pytest.raises(UserError, match="sha256"):
        run.read_weights()


def test_result_is_written_after_the_weights() -> None:
    objects = CrashingObjects()
    objects.left = 1
    run = RunFiles(objects)
    with pytest.raises(Crash):
        run.finish({"w": torch.ones(3)}, {"final_loss": 0.5})
    assert run.read_result() is None


def test_changed_config_is_reported_not_trusted() -> None:
    objects = MemoryObjects()
    run = RunFiles(objects)
    run.claim({"seed": 0})
    objects.put("config.json", objects.get("config.json").replace(b'"seed":0', b'"seed":1'))
    with pytest.raises(UserError, match="it was changed"):
        run.claim({"seed": 0})

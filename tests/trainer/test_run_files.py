"""RUN folders: nothing is damaged by a crash at any write, and nothing of another run is continued."""

import errno
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from infra.console import UserError
from infra.objects import FolderObjects, MemoryObjects, ObjectAccessError
from infra.status import Beat, my_heartbeat
from trainer.run_files import KEPT_CHECKPOINTS, Checkpoint, RunFiles
from trainer.run_lock import HEARTBEAT_KEY


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
        tensors={"model": {"w": torch.full((2, 3), float(step))}, "optimizer": {"m.w": torch.arange(step)}},
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
            for step in run._checkpoint_steps():  # also of one whose deletion was cut short
                assert_equal(run._read_checkpoint(step), make_checkpoint(step))
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
    key = "checkpoints/000000006.json" if "document" in damage else "checkpoints/000000006/model.safetensors"
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


# ---------------------------------------------------------------- what is not ours


def test_files_of_others_among_the_checkpoints_stay() -> None:
    """Such as a published checkpoint that was put beside ours; only the oldest of our own is deleted."""
    objects = MemoryObjects()
    run = RunFiles(objects)
    foreign = {
        "checkpoints/final_raptor_step_312500.pt",
        "checkpoints/000000001/notes.txt",
        "checkpoints/000000001.json.bak",
        "checkpoints/1.json",
        "checkpoints/000000001/model.safetensors/readme",
    }
    for key in foreign:
        objects.put(key, b"theirs")
    for step in range(1, KEPT_CHECKPOINTS + 3):
        run.save_checkpoint(make_checkpoint(step))
    left = {info.key for info in objects.list("checkpoints/")}
    assert foreign <= left
    own = {key.split("/")[1][:9] for key in left - foreign}
    assert own == {f"{step:09d}" for step in range(3, KEPT_CHECKPOINTS + 3)}
    assert len(left - foreign) == 3 * KEPT_CHECKPOINTS


def test_folder_with_other_files_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(7):
        (tmp_path / f"photos/{i}.jpg").write_bytes(b"jpg")
    run = RunFiles(FolderObjects(tmp_path))
    with (
        run.exclusive(),
        pytest.raises(UserError, match=r"no config.json.*photos/0.jpg.*photos/4.jpg and more.*RUN=") as caught,
    ):
        run.claim({"seed": 0})
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "config.json").exists()


def test_checkpoints_without_a_config_are_not_gone_on_with() -> None:
    """Nobody knows what run they are of."""
    run = RunFiles(MemoryObjects())
    run.save_checkpoint(make_checkpoint(3))
    with pytest.raises(UserError, match=r"it holds checkpoints/000000003"):
        run.claim({"seed": 0})


def test_claiming_sweeps_torn_writes(tmp_path: Path) -> None:
    run = RunFiles(FolderObjects(tmp_path))
    for again in range(2):
        torn = [tmp_path / ".config.json.0123456789ab.put-tmp"]
        if again:
            torn.append(tmp_path / "checkpoints/000000003/.optimizer.safetensors.0123456789ab.put-tmp")
        for path in torn:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(100))
        with run.exclusive():
            run.claim({"seed": 0})
        assert not any(path.exists() for path in torn)


# ---------------------------------------------------------------- places that cannot be a RUN


def test_run_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match=r"RUN=.*/run is a file, not a folder"), _exclusive(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "mine"


def test_run_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"RUN=.* cannot be written: Not a directory"),
        _exclusive(tmp_path / "file/run"),
    ):
        pass


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(UserError, match=r"RUN=.* file system without locks \(No locks available\)"),
        _exclusive(tmp_path / "run"),
    ):
        pass


def _exclusive(place: Path):
    return RunFiles(FolderObjects(place)).exclusive()


# ---------------------------------------------------------------- damage


def test_run_whose_checkpoints_are_all_damaged_is_refused() -> None:
    """Not begun again in silence."""
    objects = MemoryObjects()
    run = RunFiles(objects)
    for step in (3, 6):
        run.save_checkpoint(make_checkpoint(step))
        objects.put(f"checkpoints/{step:09d}/model.safetensors", b"junk")
    said: list[str] = []
    with pytest.raises(UserError, match=r"all 2 checkpoints are damaged, of steps 3, 6\. .*delete"):
        run.newest_checkpoint(said.append)
    assert len(said) == 2


def test_whole_lines_of_damaged_metrics_are_kept() -> None:
    objects = MemoryObjects()
    run = RunFiles(objects)
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, 6)]
    run.write_metrics(lines)
    texts = objects.get("metrics.jsonl").splitlines(keepends=True)
    texts[1] = b'{"step": 2, "lo\xff\n'
    texts[3] = b"[]\n"
    objects.put("metrics.jsonl", b"".join(texts)[:-4])  # and the last one torn
    said: list[str] = []
    assert run.read_metrics(said.append) == [lines[0], lines[2]]
    assert len(said) == 1
    assert "metrics.jsonl: 3 of 5 lines are damaged and left out: 2, 4, 5" in said[0]
    objects.delete("metrics.jsonl")
    assert run.read_metrics(said.append) == []


# ---------------------------------------------------------------- places that are no folder


def test_a_prefix_is_held_by_one_process() -> None:
    objects = MemoryObjects("memory://runs/x/")
    run = RunFiles(objects)
    with run.exclusive() as still_ours:
        with pytest.raises(UserError, match=r"another process is training in memory://runs/x/ \(run .*: wait for it"):
            RunFiles(objects).exclusive().__enter__()
        still_ours()
        run.claim({"seed": 0})  # its own heartbeat is no foreign file
    assert [info.key for info in objects.list()] == ["config.json"]
    with pytest.raises(KeyError), run.exclusive():
        raise KeyError
    with run.exclusive():
        pass


def test_a_prefix_left_by_a_dead_process_is_free() -> None:
    objects = MemoryObjects()
    gone = replace(my_heartbeat("earlier", time.time()), started=-1.0)  # this machine's process, and not alive
    objects.put(HEARTBEAT_KEY, gone.to_bytes())
    with RunFiles(objects).exclusive():
        assert b"earlier" not in objects.get(HEARTBEAT_KEY)


def test_losing_a_prefix_to_another_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run_lock.Beat", partial(Beat, every_s=0.01))
    objects = MemoryObjects()
    later = my_heartbeat("later", time.time()).to_bytes()

    def lose() -> None:
        with RunFiles(objects).exclusive() as still_ours:
            for _ in range(6000):
                objects.put(HEARTBEAT_KEY, later)  # each time: ours may have been on its way there
                still_ours()
                time.sleep(0.01)

    with pytest.raises(UserError, match=r"another process is training in memory:// \(run later"):
        lose()
    assert objects.get(HEARTBEAT_KEY) == later, "the other one's heartbeat is not ours to take away"


def test_a_run_that_may_not_be_written_is_refused_at_once() -> None:
    class ReadOnly(MemoryObjects):
        def check_writable(self) -> None:
            raise ObjectAccessError("log/probe", "memory://log/probe: 403 AccessDenied")

    with pytest.raises(UserError, match=r"RUN=memory:// may not be written: .*403 AccessDenied.*\(RUN=...\)"):
        RunFiles(ReadOnly()).check_writable()


def test_event_files_are_put_whole_where_objects_cannot_grow(tmp_path: Path) -> None:
    for objects in (MemoryObjects(), FolderObjects(tmp_path)):
        run = RunFiles(objects)
        run.write_events("events.1", b"abc", 0)
        run.write_events("events.1", b"abcdef", 3)
        assert objects.get("tensorboard/events.1") == b"abcdef"

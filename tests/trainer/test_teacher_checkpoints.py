"""Checkpoints of digits_vit: which are kept, that keeping changes nothing, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from infra.console import UserError
from pipeline.digits import digits_split
from pipeline.teacher import load_teacher
from trainer import digits_teacher
from trainer.commands.teacher import teacher_command
from trainer.digits_teacher import DigitsTeacherConfig, evaluate, load_split, train_digits_teacher
from trainer.teacher_checkpoints import CheckpointKeeper, read_checkpoints

CONFIG = DigitsTeacherConfig(n_epochs=2, batch_size=16, bfloat16=False, n_train=32, drop_path=0.5)


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_teacher, "digits_split", lambda split: digits_split(split)[:48])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, digits_teacher.DigitsTeacherResult]:
    """The checkpoints of a training, and what it gave."""
    folder = tmp_path_factory.mktemp("teacher") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_teacher, "digits_split", lambda split: digits_split(split)[:48])
        keeper = CheckpointKeeper(folder, [0, 2], CONFIG)
        return folder, train_digits_teacher(CONFIG, report=lambda _: None, keep=keeper)


def test_keeping_checkpoints_changes_no_weight(kept):
    alone = train_digits_teacher(CONFIG, report=lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), kept[1].model.parameters(), strict=True))


def test_the_untrained_model_is_kept_and_the_last_one_is_the_result(kept):
    folder, result = kept
    checkpoints = read_checkpoints(folder.parent)
    assert [one.epoch for one in checkpoints] == [0, 2]
    first, last = (load_teacher("digits_vit", weights=one.weights, head=one.head) for one in checkpoints)
    assert all(torch.equal(a, b) for a, b in zip(last.model.parameters(), result.model.parameters(), strict=True))
    assert not torch.equal(first.model.cls_token, last.model.cls_token)
    torch.manual_seed(CONFIG.seed)
    untrained = digits_teacher.make_digits_vit()
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), untrained.parameters(), strict=True))


def test_losses_are_those_of_the_kept_weights_on_images_as_they_are(kept):
    checkpoint = read_checkpoints(kept[0])[1]
    teacher = load_teacher("digits_vit", weights=checkpoint.weights, head=checkpoint.head)
    assert teacher.head is not None
    assert checkpoint.val == evaluate(teacher.model, teacher.head, *load_split("val"))
    assert checkpoint.train == evaluate(teacher.model, teacher.head, *load_split("train", 32))
    assert checkpoint.val.accuracy == kept[1].val_accuracy
    assert read_checkpoints(kept[0])[0].val.loss == pytest.approx(2.3, abs=0.5)  # of guessing


def test_a_checkpoint_without_its_last_file_is_none_and_a_damaged_one_is_named(kept, tmp_path):
    for epoch in (0, 2):
        for path in (kept[0] / f"epoch_000{epoch}").iterdir():
            (tmp_path / f"epoch_000{epoch}").mkdir(exist_ok=True)
            (tmp_path / f"epoch_000{epoch}" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "epoch_0002/digits_vit.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="epoch_0002: its files are not what was written"):
        read_checkpoints(tmp_path)
    (tmp_path / "epoch_0002/measured.json").unlink()
    assert [one.epoch for one in read_checkpoints(tmp_path)] == [0]
    (tmp_path / "epoch_0000/measured.json").write_text(json.dumps({"epoch": 0}))
    with pytest.raises(UserError, match="not as make teacher writes it"):
        read_checkpoints(tmp_path)


def test_what_cannot_be_kept_is_refused_before_it_is_trained(kept, tmp_path):
    with pytest.raises(UserError, match="KEEP=3,5: a training of 2 epochs has 0, which is untrained, to 2"):
        CheckpointKeeper(tmp_path, [0, 3, 5], CONFIG)
    with pytest.raises(UserError, match="checkpoints of a training with other settings"):
        CheckpointKeeper(kept[0], [0], dataclasses.replace(CONFIG, seed=1))
    with pytest.raises(UserError, match="KEEP=0,last: expected epochs with commas"):
        teacher_command(out=str(tmp_path), keep="0,last")
    with pytest.raises(UserError, match="has no checkpoints: make teacher KEEP="):
        read_checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"n_epochs is 0.*\n.*batch_size is 64; expected 1 to 32.*\n.*drop_path is 1"):
        train_digits_teacher(dataclasses.replace(CONFIG, n_epochs=0, batch_size=64, drop_path=1.0))


def test_all_that_is_typed_wrong_is_listed_before_minutes_are_spent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        teacher_command(
            out=str(tmp_path / "file"), keep="0,x", epochs=0, batch_size=0, drop_path=2.0, n_train=0, seed=-1
        )
    expected = ("n_epochs is 0", "batch_size is 0", "drop_path is 2", "n_train is 0", "seed is -1")
    assert [text for text in (*expected, "file cannot be written", "KEEP=0,x") if text not in str(caught.value)] == []
    with pytest.raises(UserError, match="KEEP=5: a training of 1 epochs"):
        teacher_command(out=str(tmp_path / "new"), keep="0,5", epochs=1)

"""Checkpoints of digits_vit while it is trained, the untrained one included: what curves over a training are made of.

<folder>/epoch_0005/digits_vit.safetensors, digits_vit_head.safetensors   as load_teacher reads them
<folder>/epoch_0005/measured.json                                         written last; without it there is none
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from infra.console import UserError
from trainer.digits_teacher import (
    DigitsTeacherConfig,
    DigitsTeacherResult,
    Evaluation,
    evaluate,
    load_split,
    save_digits_teacher,
)

FOLDER = "checkpoints"
_MEASURED = "measured.json"


@dataclass(frozen=True, kw_only=True)
class TeacherCheckpoint:
    """digits_vit after some epochs.

    Attributes:
        epoch: Passes over the training digits; 0 is untrained.
        weights: File of the model, as WEIGHTS= takes it.
        head: File of the head, as HEAD= takes it.
        digest: sha256 of both files, in hex.
        train: Of the digits that it is trained on, without augmentation.
        val: Of the held-out digits.
        config: The training's.
    """

    epoch: int
    weights: Path
    head: Path
    digest: str
    train: Evaluation
    val: Evaluation
    config: DigitsTeacherConfig


class CheckpointKeeper:
    """Measures and writes the checkpoints of chosen epochs: the `keep` of train_digits_teacher.

    Args:
        folder: Where they go; made if missing.
        epochs: Which; each from 0 to the last one of the training.
        config: The training's.

    Raises:
        UserError: Epochs that the training does not have; or the folder has checkpoints of another training.
    """

    def __init__(self, folder: Path, epochs: Sequence[int], config: DigitsTeacherConfig) -> None:
        beyond = sorted(epoch for epoch in set(epochs) if not 0 <= epoch <= config.n_epochs)
        if beyond:
            raise UserError(
                f"KEEP={','.join(map(str, beyond))}: a training of {config.n_epochs} epochs has 0, which is untrained, "
                f"to {config.n_epochs}"
            )
        if folder.exists() and any(one.config != config for one in _find(folder)):
            raise UserError(f"{folder} has checkpoints of a training with other settings: give another OUT")
        self._folder, self._epochs, self._config = folder, set(epochs), config
        self._train, self._val = load_split("train", config.n_train), load_split("val")

    def __call__(self, epoch: int, model: nn.Module, head: nn.Linear) -> None:
        """Write the checkpoint of an epoch, if it is one of those."""
        if epoch not in self._epochs:
            return
        train, val = evaluate(model, head, *self._train), evaluate(model, head, *self._val)
        place = self._folder / f"epoch_{epoch:04d}"
        (place / _MEASURED).unlink(missing_ok=True)
        result = DigitsTeacherResult(model=model, head=head, val_accuracy=val.accuracy)
        digest = _digest(save_digits_teacher(result, place))
        document = {
            "epoch": epoch,
            "digest": digest,
            "train": asdict(train),
            "val": asdict(val),
            "config": asdict(self._config),
        }
        draft = place / f"{_MEASURED}.draft"  # a crash leaves no half of it
        draft.write_text(json.dumps(document))
        os.replace(draft, place / _MEASURED)


def read_checkpoints(folder: Path) -> list[TeacherCheckpoint]:
    """All checkpoints of one training, by epoch; those whose writing was interrupted are not there.

    Args:
        folder: That they are in, or the one above it, as make teacher has it.

    Raises:
        UserError: There is none, they are of several trainings, or a file is damaged; every problem is listed.
    """
    place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    found = _find(place)
    if not found:
        raise UserError(
            f"{folder} has no checkpoints: make teacher KEEP=0,1,2,5,10,20,40,60 keeps those of these epochs"
        )
    problems = [f"{one.weights.parent}: its files are not what was written" for one in found if not _is_whole(one)]
    if any(one.config != found[0].config for one in found):
        problems.append("they are of trainings with different settings")
    if problems:
        raise UserError("\n  ".join([f"the checkpoints in {place} cannot be used:", *problems, "Train again"]))
    return found


def _find(folder: Path) -> list[TeacherCheckpoint]:
    return sorted(map(_read, folder.glob(f"epoch_*/{_MEASURED}")), key=lambda one: one.epoch)


def _read(path: Path) -> TeacherCheckpoint:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return TeacherCheckpoint(
            epoch=found["epoch"],
            weights=path.parent / "digits_vit.safetensors",
            head=path.parent / "digits_vit_head.safetensors",
            digest=found["digest"],
            train=Evaluation(**found["train"]),
            val=Evaluation(**found["val"]),
            config=DigitsTeacherConfig(**found["config"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not as make teacher writes it ({error!r}): delete {path.parent}") from error


def _is_whole(checkpoint: TeacherCheckpoint) -> bool:
    try:
        return _digest([checkpoint.weights, checkpoint.head]) == checkpoint.digest
    except FileNotFoundError:
        return False


def _digest(paths: Sequence[Path]) -> str:
    return sha256(b"".join(sha256(path.read_bytes()).digest() for path in paths)).hexdigest()

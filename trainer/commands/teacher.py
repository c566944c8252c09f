"""`make teacher`: the small teacher that ships with the project, trained anew."""

import dataclasses
from pathlib import Path

from infra.console import ExitCode, UserError

DEFAULT_TEACHER = "data/teachers/digits_vit"


def teacher_command(
    *,
    out: str = DEFAULT_TEACHER,
    seed: int = 0,
    keep: str = "",
    epochs: int = 60,
    batch_size: int = 128,
    drop_path: float = 0.1,
    n_train: int | None = None,
    augment: bool = True,
    bfloat16: bool = True,
) -> int:
    """Train digits_vit, the small teacher that ships with the project: some minutes on two cores.

    Args:
        out: Folder for the weights and the head; pipeline/weights replaces the teacher that ships.
        seed: Of initial weights, order and augmentation.
        keep: Epochs whose checkpoints are kept below checkpoints/, such as 0,1,2,5,10,20,40,60; 0 is untrained. They
            are what make curves looks at; the training is the same with and without.
        epochs: Passes over the training digits.
        batch_size: Images a step.
        drop_path: Chance that a residual branch is dropped, the same in all blocks (stochastic depth).
        n_train: Only the first so many of the 1,438 training digits; for a training that shall overfit.
        augment: Rotate, scale and shift the training digits a little.
        bfloat16: Products in bfloat16; many processors without instructions for it are slower so.
    """
    from trainer.commands.start import or_problem
    from trainer.digits_teacher import (
        DigitsTeacherConfig,
        config_problems,
        save_digits_teacher,
        train_digits_teacher,
    )
    from trainer.teacher_checkpoints import FOLDER, CheckpointKeeper

    config = DigitsTeacherConfig(
        n_epochs=epochs, batch_size=batch_size, drop_path=drop_path, n_train=n_train, bfloat16=bfloat16, seed=seed
    )
    if not augment:
        config = dataclasses.replace(config, max_rotation_deg=0.0, max_shift=0.0, max_scale=0.0)
    problems = config_problems(config)
    folder = or_problem(lambda: _made(out), problems)
    epochs_kept = or_problem(lambda: _epochs(keep), problems) if keep else None
    kept = None
    if folder is not None and epochs_kept is not None:
        kept = or_problem(lambda: CheckpointKeeper(folder / FOLDER, epochs_kept, config), problems)
    if problems:
        raise UserError("\n  ".join(["make teacher cannot start:", *problems]))
    result = train_digits_teacher(config, keep=kept)
    weights, head = save_digits_teacher(result, Path(out))
    print(f"held-out top-1 {result.val_accuracy:.2%}; weights {weights}, head {head}")
    print(f"next  make extract TEACHER=digits_vit WEIGHTS={weights} HEAD={head} STORE=data/stores/digits-seed{seed}")
    if kept is not None:
        print(f"  or  make curves CHECKPOINTS={out}")
    return ExitCode.OK


def _made(out: str) -> Path:
    """The folder, made before the training, which takes minutes, and not after it."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUT={out} cannot be written: {error.strerror}. Give another folder") from error
    return folder


def _epochs(keep: str) -> list[int]:
    try:
        return sorted({int(epoch) for epoch in keep.split(",")})
    except ValueError as error:
        raise UserError(f"KEEP={keep}: expected epochs with commas between, such as 0,1,2,5,10") from error

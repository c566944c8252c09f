"""`make teacher`: the small teacher that ships with the project, trained anew."""

from pathlib import Path

from infra.console import ExitCode

DEFAULT_TEACHER = "data/teachers/digits_vit"


def teacher_command(*, out: str = DEFAULT_TEACHER, seed: int = 0) -> int:
    """Train digits_vit, the small teacher that ships with the project: some minutes on two cores.

    Args:
        out: Folder for the weights and the head; pipeline/weights replaces the teacher that ships.
        seed: Of initial weights, order and augmentation.
    """
    from trainer.digits_teacher import DigitsTeacherConfig, save_digits_teacher, train_digits_teacher

    result = train_digits_teacher(DigitsTeacherConfig(seed=seed))
    weights, head = save_digits_teacher(result, Path(out))
    print(f"held-out top-1 {result.val_accuracy:.2%}; weights {weights}, head {head}")
    print(f"next  make extract TEACHER=digits_vit WEIGHTS={weights} HEAD={head} STORE=data/stores/digits-seed{seed}")
    return ExitCode.OK

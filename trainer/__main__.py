"""`python -m trainer`: the door to training. One command of it is one file of `trainer.commands`."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

import tyro

from infra.console import JobError, leave, run_door
from infra.objects import ObjectError
from storage_schemas.errors import StoreError

COMMANDS = {
    "train": "trainer.commands.train:train_command",
    "raptor": "trainer.commands.raptor:raptor_command",
    "probe": "trainer.commands.probe:probe_command",
    "table": "trainer.commands.table:table_command",
    "extract": "trainer.commands.extract:extract_command",
    "import": "trainer.commands.import_:import_command",
    "teacher": "trainer.commands.teacher:teacher_command",
}
"""Where each command is; the others' modules are not imported for it, as some take seconds."""


def command(name: str) -> Callable[..., int]:
    """The function behind the name of a command."""
    module, _, function = COMMANDS[name].partition(":")
    return getattr(import_module(module), function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, or the given arguments, and do it."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if typed and typed[0] in COMMANDS:
            return tyro.cli(command(typed[0]), prog=f"python -m trainer {typed[0]}", args=typed[1:])
        return tyro.extras.subcommand_cli_from_dict(
            {name: command(name) for name in COMMANDS},
            prog="python -m trainer",
            args=typed,
            description="Train Raptors on the states in a store, probe them, compare them.",
        )
    except (StoreError, ObjectError) as error:
        raise JobError(f"{error}\nOnce that is mended, the same command goes on from the last checkpoint") from error


if __name__ == "__main__":
    leave(run_door(main))

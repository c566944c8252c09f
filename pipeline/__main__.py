"""The door of this package: `python -m pipeline extract | plan | verify`. The Makefile calls only this."""

import sys
from collections.abc import Callable
from importlib import import_module

import tyro

from infra.console import leave, run_door

COMMANDS = {
    "extract": "pipeline.extract_command:run_extract",
    "plan": "pipeline.plan_command:run_plan",
    "verify": "pipeline.verify_command:run_verify",
}
"""Where each command is; the others' modules are not imported for it, as some take seconds."""


def command(name: str) -> Callable[..., int]:
    """The function behind the name of a command."""
    module, _, function = COMMANDS[name].partition(":")
    return getattr(import_module(module), function)


def main(args: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    typed = list(sys.argv[1:] if args is None else args)
    if typed and typed[0] in COMMANDS:
        prog = f"python -m pipeline {typed[0]}"
        return run_door(lambda: tyro.cli(command(typed[0]), prog=prog, args=typed[1:]))
    commands = {name: command(name) for name in COMMANDS}
    return run_door(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m pipeline", args=typed))


if __name__ == "__main__":
    leave(main())

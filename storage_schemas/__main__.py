"""The door of this package: `python -m storage_schemas inspect | digest`. The Makefile calls only this."""

import sys
from typing import Annotated

import tyro

from infra.console import ExitCode, JobError, run_door
from infra.objects import ObjectError, open_objects
from storage_schemas.digest import content_digest
from storage_schemas.find import find_stores
from storage_schemas.inspect import describe_store, next_command
from storage_schemas.reader import open_store

_Store = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]


def run_inspect(store: _Store) -> int:
    """Say what a store holds. Reads its documents and statistics, not its states.

    Args:
        store: Path of a store, or of a folder with stores train and val.
    """
    try:
        opened = [open_store(location) for location in find_stores(store).values()]
        for one in opened:
            print(describe_store(one), end="\n\n")
        print(next_command(opened, store))
    except ObjectError as error:
        raise JobError(str(error)) from error
    return ExitCode.PROBLEMS if any(one.damaged_commits for one in opened) else ExitCode.OK


def run_digest(store: _Store) -> int:
    """Print the content digest: equal digests mean equal bytes under equal keys, log/ left out. Reads everything.

    Args:
        store: Path of a store, or of a folder with stores train and val.
    """
    try:
        for location in find_stores(store).values():
            print(f"{content_digest(open_objects(location))}  {location}")
    except ObjectError as error:
        raise JobError(str(error)) from error
    return ExitCode.OK


def main(args: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    commands = {"inspect": run_inspect, "digest": run_digest}
    return run_door(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m storage_schemas", args=args))


if __name__ == "__main__":
    sys.exit(main())

"""The door of this package: `python -m infra s3 | submit | jobs | logs | stop | ...`. The Makefile calls only this.

Each command lives where its work is and is imported only when it is typed: none pays for what another one needs.
"""

import sys
from collections.abc import Callable
from importlib import import_module

import tyro

from infra.console import leave, run_door

COMMANDS = {
    "s3": "infra.s3_server:serve",
    "submit": "infra.job_doors:submit_command",
    "jobs": "infra.job_doors:jobs_command",
    "logs": "infra.job_doors:logs_command",
    "stop": "infra.job_doors:stop_command",
    "deploy": "infra.manifests:deploy",
    "watch": "infra.watch:watch",
    "dashboard": "infra.dashboard:dashboard",
    "monitoring": "infra.monitoring:monitoring",
}


def main(args: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    typed = sys.argv[1:] if args is None else args
    if typed and typed[0] in COMMANDS:
        name, *rest = typed
        return run_door(lambda: tyro.cli(_find(COMMANDS[name]), prog=f"python -m infra {name}", args=rest))
    found = {name: _find(where) for name, where in COMMANDS.items()}
    return run_door(lambda: tyro.extras.subcommand_cli_from_dict(found, prog="python -m infra", args=typed))


def _find(where: str) -> Callable[..., int | None]:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    leave(main())

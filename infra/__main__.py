"""The door of this package: `python -m infra s3`. The Makefile calls only this."""

import sys

import tyro

from infra.console import run_door
from infra.s3_server import serve


def run_s3(port: int = 9000) -> None:
    """Start an S3 server on this machine, for trying things. What it holds is gone when it stops.

    Args:
        port: Of loopback, where it listens; 0 is any that is free.
    """
    serve(port)


def main(args: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    return run_door(lambda: tyro.extras.subcommand_cli_from_dict({"s3": run_s3}, prog="python -m infra", args=args))


if __name__ == "__main__":
    sys.exit(main())

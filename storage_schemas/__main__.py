"""The door of this package: `python -m storage_schemas inspect | copy | convert | stores | digest`.

The Makefile calls only this.
"""

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated

import tyro

from infra.console import ExitCode, JobError, UserError, counted, leave, run_door
from infra.objects import ObjectError, open_objects
from infra.s3_settings import use_endpoint
from storage_schemas.catalogue import describe_stores, list_stores
from storage_schemas.copy_plan import Part
from storage_schemas.copy_stores import copy_stores
from storage_schemas.digest import content_digest
from storage_schemas.errors import NotAStoreError
from storage_schemas.find import find_stores
from storage_schemas.indices import parse_layers
from storage_schemas.inspect import describe_store, next_command
from storage_schemas.reader import open_store

_Store = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
_To = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TO")]
_At = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AT")]


def run_inspect(store: _Store, endpoint_url: str | None = None) -> int:
    """Say what a store holds. Reads its documents and statistics, not its states.

    Args:
        store: Path of a store, or of a folder with stores train and val.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    locations = _find(store)
    try:
        opened = [open_store(location) for location in locations]
        for one in opened:
            print(describe_store(one), end="\n\n")
        print(next_command(opened, store))
    except ObjectError as error:
        raise JobError(str(error)) from error
    return ExitCode.PROBLEMS if any(one.damaged_commits for one in opened) else ExitCode.OK


def run_copy(
    store: _Store, to: _To, layers: str | None = None, limit: int | None = None, endpoint_url: str | None = None
) -> int:
    """Mirror a store, or a part of it, between folders and S3; every byte is checked. Run it again to go on.

    Args:
        store: Path of a store, or of a folder with stores train and val. It is only read.
        to: Where the copy goes: an empty place, or an earlier copy of the same.
        layers: States to copy, such as 0-7 or 0,6,12; None is all.
        limit: Only the first so many samples of each store, rounded up to whole shards; None is all.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    return copy_stores(store, to, Part(layers=parse_layers(layers) if layers else None, limit=limit))


def run_convert(
    store: _Store,
    to: _To,
    format: str,
    codec: str | None = None,
    shuffle: str | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Copy a store into another form, losslessly: the same values, statistics, errors and bad images.

    Args:
        store: Path of a store, or of a folder with stores train and val. It is only read.
        to: Where the copy goes: an empty place, or an earlier copy of the same.
        format: zarr or webdataset.
        codec: none, lz4, zstd-1 or zstd-3 in zarr, none or gzip in webdataset; None is the store's if it can be had.
        shuffle: byte or bit with lz4 and zstd; None is the store's, else byte.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    return copy_stores(store, to, Part(backend=format, codec=codec, shuffle=shuffle))


def run_stores(at: _At, json: bool = False, endpoint_url: str | None = None) -> int:
    """List the stores below a place, without listing their objects.

    Args:
        at: A folder, bucket or prefix; up to four levels of folders below it are looked into.
        json: Print one JSON array with everything that is known, instead of a table.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    try:
        catalogue = list_stores(open_objects(at))
    except ObjectError as error:
        raise UserError(str(error)) from error
    if json:
        print(dumps([entry.to_json() for entry in catalogue.entries], indent=1, allow_nan=False))
    elif catalogue.entries or catalogue.unseen or catalogue.refused:
        print(describe_stores(catalogue))
    if not catalogue.entries:
        raise NotAStoreError(_nothing_there(at, catalogue.n_folders))
    return ExitCode.PROBLEMS if any(entry.problem for entry in catalogue.entries) else ExitCode.OK


def run_digest(store: _Store, endpoint_url: str | None = None) -> int:
    """Print the content digest: equal digests mean equal bytes under equal keys, log/ left out. Reads everything.

    Args:
        store: Path of a store, or of a folder with stores train and val.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    locations = _find(store)
    try:
        for location in locations:
            print(f"{content_digest(open_objects(location))}  {location}")
    except ObjectError as error:
        raise JobError(str(error)) from error
    return ExitCode.OK


def _nothing_there(at: str, n_folders: int) -> str:
    """Why no store was found."""
    if "://" not in at:
        place = Path(at)
        if not place.exists():
            return f"there is no folder {at}; give a folder, or s3://bucket/prefix, that stores lie in"
        if not place.is_dir():
            return f"{at} is a file; give the folder that stores lie in"
    return f"there is no store below {at}; looked into {counted(n_folders, 'folder')}"


def _find(store: str) -> list[str]:
    """Locations of the stores that a STORE names.

    Raises:
        UserError: There is none, or the place cannot be read at all.
    """
    try:
        return list(find_stores(store).values())
    except ObjectError as error:
        raise UserError(str(error)) from error


def main(args: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    commands: dict[str, Callable[..., int]] = {
        "inspect": run_inspect,
        "copy": run_copy,
        "convert": run_convert,
        "stores": run_stores,
        "digest": run_digest,
    }
    return run_door(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m storage_schemas", args=args))


if __name__ == "__main__":
    leave(main())

"""Which stores a STORE names: a store itself, or a folder with stores train and val."""

import os
from pathlib import Path

from infra.console import UserError
from infra.objects import Get, ObjectAccessError, ObjectMissingError, ObjectTooLargeError, open_objects
from storage_schemas.documents import MAX_DOCUMENT_NBYTES
from storage_schemas.errors import NotAStoreError
from storage_schemas.keys import COMMITS_PREFIX, STORE_KEY

SPLITS = ("train", "val")


def find_stores(root: str | os.PathLike[str]) -> dict[str, str]:
    """Locations by split, "" for a store that is no split.

    A place counts as a store if it has a store.json, sound or not, or commits, so that verify can speak of it.

    Raises:
        NotAStoreError: There is none; says where was looked.
    """
    root = os.fspath(root).rstrip("/") or os.fspath(root)
    if not root:
        raise NotAStoreError("STORE is empty: give the path of a store, such as data/stores/digits/train")
    if is_store(root):
        return {"": root}
    found = {split: f"{root}/{split}" for split in SPLITS if is_store(f"{root}/{split}")}
    if not found:
        raise NotAStoreError(
            f"{root} is not a store: neither it nor {root}/train nor {root}/val has a {STORE_KEY}. "
            "Give the path of a store, or make one: make extract"
        )
    return found


def splits_in(objects: Get) -> list[str]:
    """Which of the stores train and val lie below a place."""
    return [split for split in SPLITS if _has(objects, f"{split}/{STORE_KEY}")]


def store_around(location: str) -> str | None:
    """The store that a place lies in, where another would only be found as a stranger: the nearest one above it.

    Where an address may not be read, nothing is known of it, and the next one is looked at.
    """
    if "://" not in location:
        folders = Path(os.path.realpath(os.path.expanduser(location))).parents
        return next((str(folder) for folder in folders if (folder / STORE_KEY).is_file()), None)
    scheme, _, path = location.rstrip("/").partition("://")
    parts = path.split("/")
    above = [f"{scheme}://{'/'.join(parts[:n])}" for n in range(len(parts) - 1, 0, -1)]
    return next((place for place in above if is_begun(open_objects(place))), None)


def is_begun(objects: Get) -> bool:
    """Whether there is a store.json, sound or not, as far as that may be read."""
    try:
        return _has(objects, STORE_KEY)
    except ObjectAccessError:
        return False


def is_store(location: str) -> bool:
    """Whether there is a store, sound or not: something with a store.json or commits."""
    try:
        objects = open_objects(location)
    except UserError as error:  # a scheme that this version does not serve
        raise NotAStoreError(str(error)) from error
    return _has(objects, STORE_KEY) or any(True for _ in objects.list(COMMITS_PREFIX))


def _has(objects: Get, key: str) -> bool:
    """Whether there is such a document, sound or not."""
    try:
        objects.get(key, at_most=MAX_DOCUMENT_NBYTES)
    except ObjectTooLargeError:
        return True
    except ObjectMissingError:
        return False
    return True

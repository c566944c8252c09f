"""Which stores a STORE names: a store itself, or a folder with stores train and val."""

import os

from infra.console import UserError
from infra.objects import Get, ObjectMissingError, ObjectTooLargeError, open_objects
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
    if _is_store(root):
        return {"": root}
    found = {split: f"{root}/{split}" for split in SPLITS if _is_store(f"{root}/{split}")}
    if not found:
        raise NotAStoreError(
            f"{root} is not a store: neither it nor {root}/train nor {root}/val has a {STORE_KEY}. "
            "Give the path of a store, or make one: make extract"
        )
    return found


def splits_in(objects: Get) -> list[str]:
    """Which of the stores train and val lie below a place."""
    return [split for split in SPLITS if _has(objects, f"{split}/{STORE_KEY}")]


def _is_store(location: str) -> bool:
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

"""Which stores a STORE names: a store itself, or a folder with stores train and val."""

from infra.objects import ObjectMissingError, open_objects
from storage_schemas.errors import NotAStoreError
from storage_schemas.keys import STORE_KEY

SPLITS = ("train", "val")


def find_stores(root: str) -> dict[str, str]:
    """Locations by split, "" for a store that is no split.

    A place counts as a store if it has a store.json, sound or not, or commits, so that verify can speak of it.

    Raises:
        NotAStoreError: There is none; says where was looked.
    """
    root = root.rstrip("/") or root
    if _is_store(root):
        return {"": root}
    found = {split: f"{root}/{split}" for split in SPLITS if _is_store(f"{root}/{split}")}
    if not found:
        raise NotAStoreError(
            f"{root} is not a store: neither it nor {root}/train nor {root}/val has a {STORE_KEY}. "
            "Give the path of a store, or make one: make extract"
        )
    return found


def _is_store(location: str) -> bool:
    try:
        objects = open_objects(location)
        objects.get(STORE_KEY)
    except ObjectMissingError:
        return any(True for _ in objects.list("commits/"))
    except ValueError as error:  # a scheme that this version does not serve
        raise NotAStoreError(str(error)) from error
    return True

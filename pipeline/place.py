"""The place where a store goes: what is there already, whether there is room, and its index when all is done."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from infra.console import UserError, human_bytes, say
from infra.objects import ObjectMissingError, Objects
from pipeline.run_log import HEARTBEAT_KEY
from pipeline.settings import PlannedStore
from storage_schemas.create import StoreDocument, identity_differences, plan_documents, read_store_document
from storage_schemas.errors import NotAStoreError, SchemaError
from storage_schemas.index import index_to_bytes
from storage_schemas.keys import INDEX_KEY, LOG_PREFIX, STORE_KEY, is_owned
from storage_schemas.limits import most_nbytes
from storage_schemas.reader import Store, has_index, list_commits, read_commits

_N_NAMED = 10


def check_place(objects: Objects, planned: PlannedStore, overwrite: bool) -> tuple[StoreDocument | None, bool]:
    """What is where the store should go: its identity if it can be resumed, None if it has to be created.

    Returns:
        The document of the store to go on with or None, and whether a store of another identity is to be deleted.

    Raises:
        UserError: Something else is there; says what, and what to do.
    """
    if "://" not in objects.location and Path(objects.location).is_file():
        raise UserError(f"{objects.location} is a file; a store is a folder. Choose another STORE")
    try:
        found = read_store_document(objects, objects.location)
    except NotAStoreError:
        strangers = [info.key for info in objects.list() if not is_owned(info.key)][:_N_NAMED]
        if strangers:
            raise UserError(
                f"{objects.location} is not empty and is no store: it holds {', '.join(strangers)}. "
                "Choose another STORE, or empty that folder"
            ) from None
        if list_commits(objects):
            raise UserError(
                f"{objects.location} holds committed shards but no {STORE_KEY}, so nobody can say what they are. "
                f"Write it anew: make verify STORE={objects.location} REPAIR=1 and the variables of the extraction"
            ) from None
        return None, False
    except SchemaError as error:
        raise UserError(
            f"{error}\nMend it with: make verify STORE={objects.location} REPAIR=1 and the variables of the extraction"
        ) from error
    expected, _ = plan_documents(planned.spec, planned.samples, planned.teacher_files)
    different = identity_differences(objects, found, expected, planned.samples)
    if not different:
        return found, False
    if overwrite:
        return None, True
    raise UserError(
        "\n  ".join(
            [
                f"{objects.location} is a store of another identity:",
                *different,
                "Choose another STORE, set the variables as they were, or delete it first with --overwrite",
            ]
        )
    )


def delete_store(objects: Objects, *, keep_run: str) -> None:
    """Delete the keys that this format owns, store.json last, but for the log of one run; says how many."""
    kept = (HEARTBEAT_KEY, f"{LOG_PREFIX}{keep_run}/")
    owned = [info for info in objects.list() if is_owned(info.key) and not info.key.startswith(kept)]
    if not owned:
        return
    say(f"  deleting {len(owned):,} objects, {human_bytes(sum(info.nbytes for info in owned))}, of {objects.location}")
    for info in sorted(owned, key=lambda info: info.key == STORE_KEY):
        objects.delete(info.key)


def check_disk(needs: Iterable[tuple[str, int]]) -> None:
    """Refuse what will not fit, before the first image.

    Args:
        needs: Location of each store and the bytes still to be written there.

    Raises:
        UserError: Names the place, what is free and what is needed.
    """
    needed: dict[int, tuple[Path, int]] = {}
    for location, nbytes in needs:
        place = Path(location).absolute()
        while not place.exists():
            place = place.parent
        device = place.stat().st_dev
        needed[device] = (place, needed.get(device, (place, 0))[1] + nbytes)
    for place, nbytes in needed.values():
        free = shutil.disk_usage(place).free
        if nbytes > free:
            raise UserError(
                f"{place} has {human_bytes(free)} free and up to {human_bytes(nbytes)} are needed. "
                "Free some, choose another STORE, or take fewer images with LIMIT=n"
            )


def write_index(objects: Objects, store: Store) -> None:
    """Put index.parquet of a complete store, unless it is there already."""
    commits, _ = read_commits(objects, store.document, use_index=False)  # the index there may be an earlier one
    data = index_to_bytes(store.spec, store.document.digest, commits)
    try:
        if objects.get(INDEX_KEY, at_most=most_nbytes(store.spec, INDEX_KEY)) == data:
            return
    except ObjectMissingError:
        pass  # the usual case: the last shard has just been committed
    objects.put(INDEX_KEY, data)


def was_left_in_order(objects: Objects) -> bool:
    """Whether there is an index, and the last run took its heartbeat away: it was not killed, and is not at work."""
    return has_index(objects) and not any(True for _ in objects.list(HEARTBEAT_KEY))

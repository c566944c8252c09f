"""The place where a store goes: what is there already, whether there is room, and its index when all is done."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from infra.console import UserError, human_bytes, say
from infra.disk import disk_shortage
from infra.objects import ObjectAccessError, ObjectMissingError, Objects, open_objects
from pipeline.claims import delete_all
from pipeline.config import inside_a_store
from pipeline.locations import is_bare_bucket, is_remote
from pipeline.presence import anybody_at_work
from pipeline.settings import PlannedStore
from pipeline.shard_writer import counted_requests
from storage_schemas.create import StoreDocument, identity_differences, plan_documents, read_store_document
from storage_schemas.errors import NotAStoreError, SchemaError
from storage_schemas.find import is_begun
from storage_schemas.index import index_to_bytes
from storage_schemas.keys import HEARTBEAT_KEY, HEARTBEATS_PREFIX, INDEX_KEY, LOG_PREFIX, STORE_KEY, is_owned
from storage_schemas.limits import most_nbytes
from storage_schemas.reader import has_index, list_commits, read_commits

_N_NAMED = 10


def check_writable(locations: Iterable[str]) -> Counter[str]:
    """Refuse places where nothing may be written, before any work; returns the requests that this took.

    Raises:
        UserError: Names the place and why; or it is a file, or lies in a store.
    """
    requests: Counter[str] = Counter()
    for location in locations:
        _check_no_file(location)
        requests += _check_no_store_above(location)
        objects = open_objects(location)
        try:
            objects.check_writable()
        except ObjectAccessError as error:
            raise UserError(f"{error}. Choose another STORE, or get the right to write there") from error
        requests += counted_requests(objects)
    return requests


def check_place(objects: Objects, planned: PlannedStore, overwrite: bool) -> tuple[StoreDocument | None, bool]:
    """What is where the store should go: its identity if it can be resumed, None if it has to be created.

    Returns:
        The document of the store to go on with or None, and whether a store of another identity is to be deleted.

    Raises:
        UserError: Something else is there; says what, and what to do.
    """
    _check_no_file(objects.location)
    try:
        found = read_store_document(objects, objects.location)
    except NotAStoreError:
        strangers = list(islice((info.key for info in objects.list() if not is_owned(info.key)), _N_NAMED))
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
    if overwrite and is_bare_bucket(objects.location):
        raise UserError(
            f"--overwrite deletes nothing in a whole bucket, and {objects.location} is one. Choose a prefix in it for "
            "STORE, or empty the bucket yourself"
        )
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


def begin_store(objects: Objects, planned: PlannedStore) -> StoreDocument:
    """Write the documents of a new store, store.json last; interrupted, it is simply done again.

    Nothing that is there already is replaced. So of two jobs with different settings that begin in one place at one
    moment, at least one finds that a document is not its own, and stops.

    Raises:
        UserError: Another job has begun another store here; says how it differs.
    """
    document, documents = plan_documents(planned.spec, planned.samples, planned.teacher_files)
    for key, data in documents.items():
        if not objects.put_new(key, data) and objects.get(key) != data:
            raise UserError(_raced(objects, [f"{key}: another content than this run's"]))
    if not objects.put_new(STORE_KEY, document.to_bytes()):
        found = read_store_document(objects, objects.location)
        different = identity_differences(objects, found, document, planned.samples)
        if different:
            raise UserError(_raced(objects, different))
        return found
    return document


def delete_store(objects: Objects, *, keep_run: str) -> None:
    """Delete the keys that this format owns, store.json last, but for the log of one run and who is at work; says how
    many."""
    kept = (HEARTBEAT_KEY, HEARTBEATS_PREFIX, f"{LOG_PREFIX}{keep_run}/")
    owned = [info for info in objects.list() if is_owned(info.key) and not info.key.startswith(kept)]
    if not owned:
        return
    say(f"  deleting {len(owned):,} objects, {human_bytes(sum(info.nbytes for info in owned))}, of {objects.location}")
    delete_all(objects, (info.key for info in owned if info.key != STORE_KEY))
    objects.delete(STORE_KEY)


def check_disk(needs: Iterable[tuple[str, int]]) -> None:
    """Refuse what will not fit, before the first image.

    Args:
        needs: Location of each store and the bytes still to be written there.

    Raises:
        UserError: Names the place, what is free and what is needed. Buckets have no end.
    """
    shortage = disk_shortage(needs)
    if shortage:
        raise UserError(f"{shortage}. Free some, choose another STORE, or take fewer images with LIMIT=n")


def finish_store(objects: Objects, document: StoreDocument) -> bool:
    """Put index.parquet, unless it is there already, if every shard is committed; returns whether that is so."""
    if len(list_commits(objects)) < document.spec.n_shards:
        return False
    commits, _ = read_commits(objects, document, use_index=False)  # the index there may be an earlier one
    if len(commits) < document.spec.n_shards:
        return False
    data = index_to_bytes(document.spec, document.digest, commits)
    try:
        if objects.get(INDEX_KEY, at_most=most_nbytes(document.spec, INDEX_KEY)) == data:
            return True
    except ObjectMissingError:
        pass  # the usual case: the last shard has just been committed
    objects.put(INDEX_KEY, data)
    return True


def was_left_in_order(objects: Objects) -> bool:
    """Whether there is an index, and every job took its heartbeat away: none was killed, and none is at work."""
    return has_index(objects) and not anybody_at_work(objects)


def _check_no_file(location: str) -> None:
    if not is_remote(location) and Path(location).is_file():
        raise UserError(f"{location} is a file; a store is a folder. Choose another STORE")


def _check_no_store_above(location: str) -> Counter[str]:
    """Refuse an address right below that of a store; the requests it took. Folders `check_inputs` has looked at."""
    if not is_remote(location) or is_bare_bucket(location):
        return Counter()
    above = open_objects(location.rstrip("/").rpartition("/")[0])
    if is_begun(above):
        raise UserError(inside_a_store(location, above.location))
    return counted_requests(above)


def _raced(objects: Objects, different: Sequence[str]) -> str:
    return "\n  ".join(
        [
            f"another job with other settings is creating a store at {objects.location}:",
            *different,
            "Choose another STORE, or set the variables as that job has them",
        ]
    )

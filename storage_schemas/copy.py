"""Copy a store or a part of it, between folders and S3 in any direction: every byte is checked before it is written.

Where the form stays the same nothing is decoded: whole objects are read, held against the checksums of the source's
commits, and put under the same keys. Else chunks are coded anew, bit for bit the same values. The commits of the copy,
written last, say what is done, so the same copy again goes on with what is missing. The source is only read.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from infra.console import UserError
from infra.objects import ObjectMissingError, Objects, ObjectTooLargeError
from storage_schemas.commit import Commit
from storage_schemas.copy_plan import CopyPlan, Part, plan_copy
from storage_schemas.copy_shards import Room, mend_hint, shard_tasks
from storage_schemas.create import StoreDocument, read_store_document
from storage_schemas.documents import sha256
from storage_schemas.errors import ChecksumError, NotAStoreError, SchemaError
from storage_schemas.index import commits_from_index, index_to_bytes
from storage_schemas.keys import (
    COMMITS_PREFIX,
    INDEX_KEY,
    SAMPLES_KEY,
    STORE_KEY,
    commit_key,
    is_owned,
)
from storage_schemas.limits import most_nbytes
from storage_schemas.reader import read_commits
from storage_schemas.spec import differences

N_THREADS = 16  # one connection to S3 gives some 80 MB/s, so so many fill a fast network
#: Bytes in flight; one object may have more, and is then copied alone. A copy takes as much memory, and the commits'.
MEMORY_NBYTES = 2**30
_N_NAMED = 10
_N_LOOKED_AT = 1000  # strangers at the target, to name the folders that they lie in


@dataclass(frozen=True, kw_only=True)
class PreparedCopy:
    """A copy that may begin.

    Attributes:
        source: What is copied.
        target: Where to.
        plan: What the copy is.
        begun: Whether its documents are there already.
        n_copied: Shards that are.
        shards: Commits of those that are not, in shard order.
        stale: Those of them that were copied, and extracted again since.
        damaged: Commits of the source that cannot be read, and why.
    """

    source: Objects
    target: Objects
    plan: CopyPlan
    begun: bool
    n_copied: int
    shards: Sequence[Commit]
    stale: frozenset[int]
    damaged: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Of the source's objects that are still to be read."""
        return sum(map(self.plan.source_nbytes, self.shards))

    @property
    def target_nbytes(self) -> int:
        """That will be written, at most."""
        return sum(map(self.plan.target_nbytes, self.shards))

    @property
    def n_missing(self) -> int:
        """Shards of the copy that the source does not have, or not soundly."""
        return self.plan.spec.n_shards - self.n_copied - len(self.shards)


def copy_store(
    source: Objects,
    target: Objects,
    *,
    layers: Sequence[int] | None = None,
    limit: int | None = None,
    backend: str | None = None,
    codec: str | None = None,
    shuffle: str | None = None,
) -> None:
    """Copy a store, or a part of it; done again it goes on, or finds that nothing is missing.

    Args:
        source: Of the store. It is never written; what it has not committed yet is left for another time.
        target: Empty, or an earlier copy of the same.
        layers: As in `Part`, with limit, backend, codec and shuffle.

    Raises:
        UserError: The target holds something else, or there is no such part; nothing was written.
        ChecksumError, ObjectError: An object of the source is not what was committed, or one side failed. All shards
            that were copied until then stay.
    """
    kept = tuple(sorted(layers)) if layers is not None else None
    part = Part(layers=kept, limit=limit, backend=backend, codec=codec, shuffle=shuffle)
    prepared = prepare_copy(source, target, part)
    run_copy(prepared)
    check_all_copied(prepared)


def prepare_copy(source: Objects, target: Objects, part: Part) -> PreparedCopy:
    """Work out what is to be copied, and what of it is there already.

    Raises:
        UserError: As `copy_store`.
        ObjectError: One side cannot be read.
    """
    document = read_store_document(source, source.location)
    commits, damaged = read_commits(source, document)
    plan = plan_copy(document, _document(source, document, SAMPLES_KEY), part)
    shards = [commit for commit in commits if commit.shard < plan.spec.n_shards]
    begun, there = _read_target(target, plan)
    missing = [c for c in shards if c.shard not in there or not plan.is_copied(c, there[c.shard])]
    return PreparedCopy(
        source=source,
        target=target,
        plan=plan,
        begun=begun,
        n_copied=len(shards) - len(missing),
        shards=missing,
        stale=frozenset(commit.shard for commit in missing if commit.shard in there),
        damaged=damaged,
    )


def run_copy(
    prepared: PreparedCopy,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Copy what is missing, and the index when nothing is.

    Args:
        prepared: By `prepare_copy`.
        stop: Asked before each shard; true ends the copy when the shards in flight are done.
        progress: Called with the bytes of each object of the source that has been copied, from any thread.

    Returns:
        Shards copied.
    """
    if not prepared.begun:
        _copy_documents(prepared)
    plan = prepared.plan
    n_copied, room, running = 0, Room(MEMORY_NBYTES), deque[Future[None]]()
    with ThreadPoolExecutor(N_THREADS, thread_name_prefix="copy") as pool:
        try:
            for commit in prepared.shards:
                if stop():
                    break
                if commit.shard in prepared.stale:  # no commit may speak of objects that are being replaced
                    prepared.target.delete(commit_key(commit.shard))
                for task in shard_tasks(prepared.source, prepared.target, plan, commit, progress):
                    room.take(task.nbytes)
                    running.append(pool.submit(room.use, task))
                    while running and running[0].done():
                        running.popleft().result()
                n_copied += 1
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not prepared.n_missing and n_copied == len(prepared.shards):
        _copy_index(prepared)
    return n_copied


def check_all_copied(prepared: PreparedCopy) -> None:
    """Raise for shards that could not be copied because the source's commits of them are damaged."""
    if not prepared.damaged:
        return
    listed = [f"{key}: {what}" for key, what in sorted(prepared.damaged.items())]
    more = [f"and {len(listed) - _N_NAMED} more"] if len(listed) > _N_NAMED else []
    raise ChecksumError(
        next(iter(prepared.damaged)),
        "\n  ".join(
            [
                f"{prepared.source.location} has damaged commits, whose shards could not be copied:",
                *listed[:_N_NAMED],
                *more,
                mend_hint(prepared.source.location),
            ]
        ),
    )


def _read_target(target: Objects, plan: CopyPlan) -> tuple[bool, dict[int, Commit]]:
    """Whether an earlier copy of the same is there, and its commits by shard.

    Raises:
        UserError: Something else is there; says what.
    """
    if "://" not in target.location and Path(target.location).is_file():
        raise UserError(f"{target.location} is a file; a store is a folder. Choose another TO")
    try:
        found = read_store_document(target, target.location)
    except NotAStoreError:
        keys = (info.key for info in target.list())
        odd = (key for key in keys if key.startswith(COMMITS_PREFIX) or not is_owned(key))
        strangers = list(dict.fromkeys(map(_top, islice(odd, _N_LOOKED_AT))))[:_N_NAMED]  # there may be millions
        if strangers:
            raise UserError(
                f"{target.location} is not empty and is no store: it holds {', '.join(strangers)}. Choose another TO"
            ) from None
        return False, {}
    if found.digest == plan.document.digest:
        commits, _ = read_commits(target, found)
        return True, {commit.shard: commit for commit in commits}
    different = differences(found.spec, plan.spec, found_has="it has", asked_has="the copy would have") or [
        f"{key}: another content than the copy would have"
        for key in sorted({*found.documents, *plan.document.documents})
        if found.documents.get(key) != plan.document.documents.get(key)
    ]
    raise SchemaError(f"{target.location} is a store of another identity; choose another TO, or delete it", different)


def _top(key: str) -> str:
    """The folder right below the root that an object lies in, or its own name."""
    name, slash, _ = key.partition("/")
    return name + slash


def _document(objects: Objects, document: StoreDocument, key: str) -> bytes:
    """A document of the source, checked."""
    data, digest = objects.get(key, at_most=most_nbytes(document.spec, key)), document.documents[key]
    if sha256(data) != digest:
        raise ChecksumError(
            key,
            f"{objects.location}/{key}: sha256 {sha256(data)[:16]}, store.json says {digest[:16]}. "
            f"{mend_hint(objects.location)}",
        )
    return data


def _copy_documents(prepared: PreparedCopy) -> None:
    """Everything that is there before the first shard; store.json last."""
    plan = prepared.plan

    def copy(key: str) -> None:
        data = plan.made[key] if key in plan.made else _document(prepared.source, plan.source, key)
        prepared.target.put(key, data)

    with ThreadPoolExecutor(N_THREADS, thread_name_prefix="copy") as pool:
        for _ in pool.map(copy, plan.document.documents):
            pass
    prepared.target.put(STORE_KEY, plan.document.to_bytes())


def _copy_index(prepared: PreparedCopy) -> None:
    """Put the index of the complete copy: the source's own bytes if the copy is whole, whatever Arrow wrote them."""
    plan, target = prepared.plan, prepared.target
    commits, _ = read_commits(target, plan.document, use_index=False)
    if len(commits) != plan.spec.n_shards:  # somebody deletes what we write; verify will say so
        return
    data = (_source_index(prepared, commits) if plan.is_whole else None) or index_to_bytes(
        plan.spec, plan.document.digest, commits
    )
    try:
        if target.get(INDEX_KEY, at_most=most_nbytes(plan.spec, INDEX_KEY)) == data:
            return
    except (ObjectMissingError, ObjectTooLargeError):
        pass  # the usual case: the last shard has just been copied
    target.put(INDEX_KEY, data)


def _source_index(prepared: PreparedCopy, commits: Sequence[Commit]) -> bytes | None:
    """The source's index if it is of exactly these commits."""
    document = prepared.plan.source
    try:
        data = prepared.source.get(INDEX_KEY, at_most=most_nbytes(document.spec, INDEX_KEY))
        indexed = commits_from_index(document.spec, document.digest, data)
    except (ObjectMissingError, ObjectTooLargeError, SchemaError):
        return None
    return data if all(map(prepared.plan.is_copied, indexed, commits)) else None

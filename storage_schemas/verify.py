"""Re-read every object of a store and report each that is not what was committed. Never raises for a bad store."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from infra.objects import ObjectError, Objects
from storage_schemas.commit import Commit
from storage_schemas.create import StoreDocument, read_store_document
from storage_schemas.digest import object_sha256
from storage_schemas.documents import sha256
from storage_schemas.errors import NotAStoreError, Problem, SchemaError
from storage_schemas.index import commits_from_index
from storage_schemas.keys import (
    COMMITS_PREFIX,
    INDEX_KEY,
    LOG_PREFIX,
    SAMPLES_KEY,
    STORE_KEY,
    TEACHER_PREFIX,
    commit_key,
    is_owned,
    is_shard_object,
)
from storage_schemas.limits import most_nbytes
from storage_schemas.reader import has_index, list_commits, load_commits
from storage_schemas.samples import samples_from_bytes
from storage_schemas.verify_shards import ShardChecks

ProgressCallback = Callable[[int, int], None]


def verify_store(objects: Objects, *, progress: ProgressCallback | None = None, threads: int = 4) -> list[Problem]:
    """Check a store from end to end.

    Identity, documents, every commit, every byte of every object that a commit names, whether statistics and measured
    errors can be those of the values (`storage_schemas.consistency`), the index, and keys that belong to nothing.
    Memory: for each thread one whole object, the small kinds of one layer in float64, and 10 MB.

    Args:
        objects: Of the store.
        progress: Called with (bytes checked, bytes in all) after each object, from one thread at a time.
        threads: Layers of a shard checked at once.

    Returns:
        Every problem found, in key order; empty when the store is sound.

    Raises:
        ObjectAccessError: The store cannot be listed.
    """
    try:
        document = read_store_document(objects, objects.location)
    except (NotAStoreError, ObjectError) as error:
        return [Problem(key=STORE_KEY, what="missing or unreadable", expected="a store.json", found=str(error))]
    except SchemaError as error:
        return [Problem(key=STORE_KEY, what="damaged", expected="as written", found="; ".join(error.problems))]
    problems = list(_document_problems(objects, document))
    was_finished = has_index(objects)  # before the commits are listed: it is written after all of them
    commits, commit_problems = _check_commits(objects, document, was_finished)
    sizes = {info.key: info.nbytes for info in objects.list() if not info.key.startswith(LOG_PREFIX)}
    problems += commit_problems
    problems += _object_problems(objects, document, commits, sizes, progress, threads)
    problems += _index_problems(objects, document, commits, was_finished)
    problems += _stray_problems(document, sizes)
    return sorted(problems, key=lambda p: (p.key, p.what))


def _document_problems(objects: Objects, document: StoreDocument) -> Iterator[Problem]:
    sizes = {info.key: info.nbytes for info in objects.list(TEACHER_PREFIX)}
    for key, digest in document.documents.items():
        data = b""
        try:
            most = most_nbytes(document.spec, key)
            if sizes.get(key, most + 1) <= most:  # the teacher's weights may be larger than memory
                found = object_sha256(objects, key, sizes[key])
            else:
                data = objects.get(key, at_most=most)
                found = sha256(data)
        except ObjectError as error:
            yield Problem(key=key, what="missing or unreadable", expected=f"sha256 {digest[:16]}", found=str(error))
            continue
        if found != digest:
            yield Problem(key=key, what="changed", expected=f"sha256 {digest[:16]}", found=f"sha256 {found[:16]}")
            continue
        if key == SAMPLES_KEY:
            try:
                samples_from_bytes(data, document.spec.n_samples)
            except SchemaError as error:
                yield Problem(key=key, what="unfit", expected="the samples table", found="; ".join(error.problems))


def _check_commits(objects: Objects, document: StoreDocument, was_finished: bool) -> tuple[list[Commit], list[Problem]]:
    listed = list_commits(objects)
    n_shards = document.spec.n_shards
    strange = [key for key, shard in listed.items() if shard is None or shard >= n_shards]
    problems = [
        Problem(key=key, what="not a commit of this store", expected=f"shards 0 to {n_shards - 1}", found=key)
        for key in strange
    ]
    present = sorted(shard for shard in listed.values() if shard is not None and shard < n_shards)
    commits = []
    for shard, (key, commit) in zip(present, load_commits(objects, document, present)):
        if isinstance(commit, Commit):
            commits.append(commit)
        else:
            problems.append(Problem(key=key, what="damaged commit", expected="as written", found=commit, shard=shard))
    if was_finished:  # every shard was committed then, so no commit may be missing now
        problems += [
            Problem(
                key=commit_key(shard),
                what="commit is missing",
                expected="one, since the store was finished once",
                found="none",
                shard=shard,
            )
            for shard in sorted(set(range(n_shards)) - set(present))
        ]
    return commits, problems


def _object_problems(
    objects: Objects,
    document: StoreDocument,
    commits: list[Commit],
    sizes: Mapping[str, int],
    progress: ProgressCallback | None,
    threads: int,
) -> Iterator[Problem]:
    total = sum(record.nbytes for commit in commits for record in commit.objects.values())
    done, lock = 0, threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    running: deque[Future[list[Problem]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for commit in commits:
            shard = ShardChecks(objects, document.spec, commit, sizes, advance)
            running += [pool.submit(check) for check in shard.checks()]
            while len(running) > 16 * threads:  # a bounded window, so that few results wait
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def _index_problems(
    objects: Objects, document: StoreDocument, commits: list[Commit], was_finished: bool
) -> Iterator[Problem]:
    """Of a store that was finished, or complete, when its commits were listed; an extraction may have ended since."""
    if not was_finished and len(commits) < document.spec.n_shards:
        return
    try:
        data = objects.get(INDEX_KEY, at_most=most_nbytes(document.spec, INDEX_KEY))
        indexed = commits_from_index(document.spec, document.digest, data)
    except ObjectError as error:
        yield Problem(key=INDEX_KEY, what="missing or unreadable", expected="an index", found=str(error))
        return
    except SchemaError as error:
        yield Problem(key=INDEX_KEY, what="damaged", expected="as written", found="; ".join(error.problems))
        return
    # the commits are compared, not the bytes, which differ from one release of Arrow to the next
    by_shard = {commit.shard: commit.digest for commit in indexed}
    for commit in commits:
        if by_shard[commit.shard] != commit.digest:
            yield Problem(
                key=INDEX_KEY,
                what=f"differs from the commit of shard {commit.shard}",
                expected=f"sha256 {commit.digest[:16]}",
                found=f"sha256 {by_shard[commit.shard][:16]}",
            )


def _stray_problems(document: StoreDocument, sizes: Mapping[str, int]) -> Iterator[Problem]:
    """Objects that belong to nothing. Those of a shard without commit do belong: they are work in progress."""
    known = {STORE_KEY, INDEX_KEY, *document.documents}
    for key, nbytes in sizes.items():
        if key not in known and not key.startswith(COMMITS_PREFIX) and not is_shard_object(document.spec, key):
            what = "no commit names this object" if is_owned(key) else "not an object of this format"
            yield Problem(key=key, what=what, expected="nothing here", found=f"{nbytes:,} bytes")

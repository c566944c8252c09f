"""Re-read every object of a store and report each that is not what was committed. Never raises for a bad store."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from crc32c import crc32c

from infra.objects import ObjectError, ObjectMissingError, Objects, read_range
from storage_schemas.commit import Commit, ObjectRecord
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

ProgressCallback = Callable[[int, int], None]


def verify_store(objects: Objects, *, progress: ProgressCallback | None = None, threads: int = 4) -> list[Problem]:
    """Check a store from end to end.

    Identity, documents, every commit, every byte of every object that a commit names, the index, and keys that belong
    to nothing. Memory: `threads` whole objects.

    Args:
        objects: Of the store.
        progress: Called with (bytes checked, bytes in all) after each object.
        threads: Objects read at once.

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
    problems += _object_problems(objects, commits, sizes, progress, threads)
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
    commits: list[Commit],
    sizes: Mapping[str, int],
    progress: ProgressCallback | None,
    threads: int,
) -> Iterator[Problem]:
    work = [(commit.shard, key, record) for commit in commits for key, record in commit.objects.items()]
    total = sum(record.nbytes for _, _, record in work)
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        # a bounded window, so that at most `threads` objects are in memory
        for start in range(0, len(work), 16 * threads):
            window = work[start : start + 16 * threads]
            checked = pool.map(lambda item: check_object(objects, sizes.get(item[1]), *item), window)
            for (_, _, record), found in zip(window, checked):
                yield from found
                done += record.nbytes
                if progress is not None:
                    progress(done, total)


def check_object(
    objects: Objects, listed_nbytes: int | None, shard: int, key: str, record: ObjectRecord
) -> list[Problem]:
    """Problems of one data object; `listed_nbytes` is its size if a listing gave it."""
    if listed_nbytes is not None and listed_nbytes != record.nbytes:  # never read what may be far too large
        return [
            Problem(
                key=key,
                what="object has the wrong size",
                expected=f"{record.nbytes:,} bytes",
                found=f"{listed_nbytes:,} bytes",
                shard=shard,
            )
        ]
    try:
        data = memoryview(read_range(objects, key, 0, record.nbytes))
    except ObjectMissingError:
        return [
            Problem(
                key=key, what="object is missing", expected=f"{record.nbytes:,} bytes", found="nothing", shard=shard
            )
        ]
    except ObjectError as error:
        return [Problem(key=key, what="unreadable", expected=f"{record.nbytes:,} bytes", found=str(error), shard=shard)]
    # Chunk by chunk first: the CRC32C of bytes followed by their own CRC32C is a constant, so over a whole object,
    # where each chunk carries its own, it cannot tell one object from another. It then covers what lies between chunks.
    bad = [
        Problem(key=key, what=f"chunk {i}", expected=f"crc32c {crc:08x}", found=f"crc32c {found:08x}", shard=shard)
        for i, (offset, nbytes, crc) in enumerate(record.chunks.tolist())
        if (found := crc32c(data[offset : offset + nbytes])) != crc
    ]
    if bad or (found := crc32c(data)) == record.crc32c:
        return bad
    return [
        Problem(
            key=key,
            what="sharding index or chunk trailer",
            expected=f"crc32c {record.crc32c:08x}",
            found=f"crc32c {found:08x}",
            shard=shard,
        )
    ]


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

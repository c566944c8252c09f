"""The objects of a shard on their way from one store to another: tasks for any threads, within a bounded memory."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from infra.objects import Objects
from storage_schemas.commit import Commit, ObjectRecord
from storage_schemas.copy_plan import CopyPlan
from storage_schemas.errors import ChecksumError
from storage_schemas.keys import STATISTICS, commit_key, shard_object_keys
from storage_schemas.object_checks import byte_problems
from storage_schemas.recode import recode_nbytes, recode_object
from storage_schemas.shard_buffers import EncodedObject, encode_statistics


@dataclass(frozen=True, kw_only=True)
class Task:
    """One object to be copied, and the memory that it takes meanwhile."""

    nbytes: int
    run: Callable[[], None]


class Room:
    """Holds the bytes in flight below a limit; a task that takes more runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._nbytes = limit, 0
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes may be in flight as well."""
        with self._changed:
            self._changed.wait_for(lambda: not self._nbytes or self._nbytes + nbytes <= self._limit)
            self._nbytes += nbytes

    def use(self, task: Task) -> None:
        """Run a task whose bytes have been taken, and give them back."""
        try:
            task.run()
        finally:
            with self._changed:
                self._nbytes -= task.nbytes
                self._changed.notify()


def shard_tasks(
    source: Objects, target: Objects, plan: CopyPlan, commit: Commit, progress: Callable[[int], None]
) -> Iterator[Task]:
    """What copies a shard, in any order and any threads: whichever task ends last puts the commit.

    Args:
        source: Only read.
        target: Where objects and commit go.
        plan: Of the copy.
        commit: Of the shard, by the source.
        progress: Called with the bytes of each object of the source that has been copied.
    """
    shard = commit.shard
    expected = shard_object_keys(plan.spec, shard)
    records: dict[str, ObjectRecord] = {}
    lock = threading.Lock()

    def copy(path: str) -> None:
        encoded = _copied_object(source, plan, commit, path)
        target.put(encoded.key, encoded.pieces)
        with lock:
            records[encoded.key] = encoded.record
            is_last = len(records) == len(expected)
        if is_last:
            made = plan.copied_commit(commit, {name: records[name] for name in expected})
            target.put(commit_key(shard), made.to_bytes())
        progress(commit.objects[plan.source_key(path, shard)].nbytes)

    for path in plan.paths:
        nbytes = commit.objects[plan.source_key(path, shard)].nbytes
        if plan.encodes and path != STATISTICS:
            nbytes += recode_nbytes(plan, path, shard)
        yield Task(nbytes=nbytes, run=partial(copy, path))


def _copied_object(source: Objects, plan: CopyPlan, commit: Commit, path: str) -> EncodedObject:
    """The object of one array, or the statistics, of a shard of the copy.

    Raises:
        ObjectError: The source's object cannot be read.
        ChecksumError: It is not what was committed.
    """
    shard = commit.shard
    key = plan.source_key(path, shard)
    record = commit.objects[key]
    data = np.empty(record.nbytes, np.uint8).data
    source.read_into(key, 0, data)
    problems = byte_problems(data, commit.shard, key, record)
    if problems:
        raise ChecksumError(key, f"{source.location}/{problems[0]}. {mend_hint(source.location)}")
    if path == STATISTICS and not plan.has_all_layers:
        return encode_statistics(shard, plan.copied_statistics(data))
    if path != STATISTICS and plan.encodes:
        return recode_object(plan, path, shard, data, record)
    return EncodedObject(key=key, pieces=[data], record=record)


def mend_hint(location: str) -> str:
    """What to do about a damaged source."""
    return f"Mend it: make verify STORE={location} IMAGES=<as extracted> REPAIR=1; then copy again"

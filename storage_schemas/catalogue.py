"""Which stores lie below a place, and how they are: from a few small documents of each, never from its data objects.

Folders are listed one level at a time, so a store of a million objects costs what a store of ten does: itself, its
store.json, its commits' names if it is not finished, and the newest entries of its log.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infra.console import human_bytes, human_duration
from infra.objects import Folder, Get, ObjectError, Objects
from infra.status import Heartbeat, is_dead, kernel_id
from storage_schemas.commit import read_commit, statistics_nbytes
from storage_schemas.create import StoreDocument, parse_store_document
from storage_schemas.documents import MAX_DOCUMENT_NBYTES
from storage_schemas.errors import SchemaError
from storage_schemas.indices import layer_ranges
from storage_schemas.inspect import table
from storage_schemas.keys import (
    COMMITS_PREFIX,
    HEARTBEAT_KEY,
    HEARTBEATS_PREFIX,
    INDEX_KEY,
    LOG_PREFIX,
    STORE_KEY,
    commit_key,
    commit_shard,
    sharded_array_paths,
)
from storage_schemas.layout import object_nbytes
from storage_schemas.spec import StoreSpec
from storage_schemas.zarr_layout import CRC_NBYTES

DEPTH = 4  # levels of folders below the place asked for
MAX_FOLDERS = 10_000  # one request each; whoever asks for more means a place further down
_N_THREADS = 16
_N_COMMITS = 3  # read of a compressed store, to estimate its size
_N_RUNS = 3  # whose status is looked at, newest first
_STATUS_NBYTES = 2**20
_LATEST_S = 1e11  # after 1970: no clock says more


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """What is known of one store.

    Attributes:
        name: Relative to the place that was asked for; "." for that place itself.
        location: Of the store.
        problem: Why it cannot be read; then nothing else is known.
        spec: Its identity.
        n_committed: Shards committed.
        nbytes: Size of their data objects.
        is_estimate: Whether that size is estimated from a few commits, since chunks are compressed.
        last_active: When a job last wrote its status or a sign of life, seconds since 1970; None if none is there.
        state: What that job said of itself: "running", "complete" ...
        running: Jobs at work now, as they name themselves.
    """

    name: str
    location: str
    problem: str | None = None
    spec: StoreSpec | None = None
    n_committed: int = 0
    nbytes: int = 0
    is_estimate: bool = False
    last_active: float | None = None
    state: str | None = None
    running: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        return self.spec is not None and self.n_committed == self.spec.n_shards

    def to_json(self) -> dict[str, Any]:
        """Plain values: the attributes, the whole identity, and how far it is."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("spec", "running")}
        if self.spec is None:
            return found
        spec = self.spec.to_json()
        return {
            **found,
            "running": list(self.running),
            "complete": self.is_complete,
            "n_shards": self.spec.n_shards,
            "spec": spec,
        }


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The stores below a place.

    Attributes:
        entries: By name.
        n_folders: Folders that were listed to find them.
        unseen: Folders that were not looked into, for they lie too deep or there are too many.
        refused: Folders that could not be listed, each with the reason.
    """

    entries: list[StoreEntry]
    n_folders: int
    unseen: list[str]
    refused: dict[str, str]


def list_stores(objects: Objects, *, now: float | None = None) -> Catalogue:
    """Find the stores below a place and say how each is.

    Args:
        objects: Of the place.
        now: Seconds since 1970.

    Raises:
        ObjectError: The place itself cannot be listed. Of a folder below it, that is said in the result.
    """
    now = time.time() if now is None else now
    found: dict[str, Folder] = {}
    level, n_folders, unseen, refused = [""], 0, list[str](), dict[str, str]()
    with ThreadPoolExecutor(_N_THREADS, thread_name_prefix="stores") as pool:
        for _ in range(DEPTH + 1):
            room = MAX_FOLDERS - n_folders
            unseen += level[room:]
            looks = dict(zip(level, pool.map(lambda prefix: _look(objects, prefix), level[:room])))
            n_folders += len(looks)
            refused |= {prefix: reason for prefix, reason in looks.items() if isinstance(reason, str)}
            folders = {prefix: folder for prefix, folder in looks.items() if isinstance(folder, Folder)}
            found |= {prefix: folder for prefix, folder in folders.items() if _is_store(prefix, folder)}
            level = [below for prefix, folder in folders.items() if prefix not in found for below in folder.folders]
        unseen += level
        places = sorted(found)
        entries = list(pool.map(lambda prefix: _entry(objects, prefix, found[prefix], now), places))
    return Catalogue(entries=entries, n_folders=n_folders, unseen=unseen, refused=refused)


def _look(objects: Objects, prefix: str) -> Folder | str:
    """What a folder holds, or why that cannot be known."""
    try:
        return objects.list_folder(prefix)
    except (ObjectError, ValueError) as error:  # ValueError: a name that no folder of ours has, such as "a//"
        if not prefix:
            raise
        return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def describe_stores(catalogue: Catalogue, *, now: float | None = None) -> str:
    """The table that `make stores` prints."""
    now = time.time() if now is None else now
    sound = [entry for entry in catalogue.entries if entry.spec is not None]
    rows = [["store", "teacher", "samples", "layers", "stored as", "size", "done", "last activity"]]
    lines = table([*rows, *(_row(entry, now) for entry in sound)]) if sound else []
    lines += [f"{entry.name}  cannot be read: {entry.problem}" for entry in catalogue.entries if entry.problem]
    if any(entry.is_estimate for entry in sound):
        lines.append(f"~ estimated from up to {_N_COMMITS} commits")
    if catalogue.unseen:
        lines.append(
            f"not looked into: {len(catalogue.unseen):,} folders more than {DEPTH} levels down or past the first "
            f"{MAX_FOLDERS:,}, such as {catalogue.unseen[0]}; give a place further down"
        )
    lines += [f"not looked into: {prefix}: {reason}" for prefix, reason in sorted(catalogue.refused.items())]
    return "\n".join(lines)


def _row(entry: StoreEntry, now: float) -> list[str]:
    spec = entry.spec
    assert spec is not None
    form = [spec.backend, spec.precision, spec.codec] if spec.codec != "none" else [spec.backend, spec.precision]
    done = "complete" if entry.is_complete else f"{entry.n_committed:,} of {spec.n_shards:,} shards"
    size = f"{'~' if entry.is_estimate else ''}{human_bytes(entry.nbytes)}"
    return [
        entry.name,
        spec.teacher,
        f"{spec.n_samples:,}",
        layer_ranges(spec.layers),
        " ".join(form),
        size,
        done,
        _activity(entry, now),
    ]


def _activity(entry: StoreEntry, now: float) -> str:
    if entry.running:
        return f"running: {'; '.join(entry.running)}"
    return "-" if entry.last_active is None else f"{human_duration(max(0.0, now - entry.last_active))} ago"


def _is_store(prefix: str, folder: Folder) -> bool:
    keys = {info.key for info in folder.objects}
    return f"{prefix}{STORE_KEY}" in keys or f"{prefix}{COMMITS_PREFIX}" in folder.folders


def _entry(objects: Objects, prefix: str, folder: Folder, now: float) -> StoreEntry:
    name = prefix.rstrip("/") or "."
    location = f"{objects.location.rstrip('/')}/{prefix.rstrip('/')}".rstrip("/")
    try:
        return _sound_entry(objects, prefix, folder, now, name, location)
    except (SchemaError, ObjectError) as error:
        return StoreEntry(name=name, location=location, problem=_one_line(error))


def _sound_entry(objects: Objects, prefix: str, folder: Folder, now: float, name: str, location: str) -> StoreEntry:
    document = parse_store_document(objects.get(f"{prefix}{STORE_KEY}", at_most=MAX_DOCUMENT_NBYTES), STORE_KEY)
    spec = document.spec
    if any(info.key == f"{prefix}{INDEX_KEY}" for info in folder.objects):
        shards = list(range(spec.n_shards))
    else:
        infos = objects.list_folder(f"{prefix}{COMMITS_PREFIX}").objects
        numbers = (commit_shard(info.key.removeprefix(prefix)) for info in infos)
        shards = sorted(number for number in numbers if number is not None and number < spec.n_shards)
    nbytes, is_estimate = _stored_nbytes(objects, prefix, document, shards)
    last_active, state, running = _activity_of(objects, prefix, folder, now)
    return StoreEntry(
        name=name,
        location=location,
        spec=spec,
        n_committed=len(shards),
        nbytes=nbytes,
        is_estimate=is_estimate,
        last_active=last_active,
        state=state,
        running=running,
    )


def _stored_nbytes(objects: Get, prefix: str, document: StoreDocument, shards: list[int]) -> tuple[int, bool]:
    """Bytes of the data objects of these shards, exact without a codec, else scaled up from some of them."""
    spec = document.spec
    full, last = _raw_nbytes(spec, 0), _raw_nbytes(spec, spec.n_shards - 1)
    raw = len(shards) * full - (full - last if shards and shards[-1] == spec.n_shards - 1 else 0)
    if spec.codec == "none" or not shards:
        return raw, False
    seen = sorted({shards[0], shards[len(shards) // 2], shards[-1]})[:_N_COMMITS]
    stored = [size for shard in seen if (size := _commit_nbytes(objects, prefix, document, shard)) is not None]
    if len(stored) < len(seen):
        return raw, True
    return round(raw * sum(stored) / sum(_raw_nbytes(spec, shard) for shard in seen)), len(seen) < len(shards)


def _raw_nbytes(spec: StoreSpec, shard: int) -> int:
    arrays = sum(object_nbytes(spec, path, shard) for path in sharded_array_paths(spec))
    return arrays + statistics_nbytes(spec) + CRC_NBYTES


def _commit_nbytes(objects: Get, prefix: str, document: StoreDocument, shard: int) -> int | None:
    """Bytes of a shard's data objects as its commit has them; None if it is damaged, which verify would say."""
    try:
        data = objects.get(f"{prefix}{commit_key(shard)}", at_most=MAX_DOCUMENT_NBYTES)
        commit = read_commit(document.spec, document.digest, shard, data)
    except (SchemaError, ObjectError):
        return None
    return sum(record.nbytes for record in commit.objects.values())


def _activity_of(
    objects: Objects, prefix: str, folder: Folder, now: float
) -> tuple[float | None, str | None, tuple[str, ...]]:
    """When a job last wrote here, what it said of itself, and the jobs that are alive."""
    if f"{prefix}{LOG_PREFIX}" not in folder.folders:
        return None, None, ()
    log = objects.list_folder(f"{prefix}{LOG_PREFIX}")
    beats = list(_heartbeats(objects, prefix, log))
    kernel = kernel_id()
    alive = tuple(sorted(str(beat) for beat in beats if not is_dead(beat, now, kernel=kernel)))
    runs = sorted(
        (name for name in log.folders if name.removeprefix(f"{prefix}{LOG_PREFIX}")[:1].isdigit()), reverse=True
    )
    said = [status for run in runs[:_N_RUNS] if (status := _status(objects, f"{run}status.json")) is not None]
    times = [*(beat.time for beat in beats if 0 <= beat.time < _LATEST_S), *(written for written, _ in said)]
    return max(times, default=None), max(said, default=(0.0, None))[1], alive


def _heartbeats(objects: Objects, prefix: str, log: Folder) -> Iterator[Heartbeat]:
    keys = [info.key for info in log.objects if info.key == f"{prefix}{HEARTBEAT_KEY}"]
    if f"{prefix}{HEARTBEATS_PREFIX}" in log.folders:
        keys += [info.key for info in objects.list_folder(f"{prefix}{HEARTBEATS_PREFIX}").objects]
    for key in keys:
        try:
            beat = Heartbeat.from_bytes(objects.get(key, at_most=_STATUS_NBYTES))
        except ObjectError:  # it has just ended
            continue
        if beat is not None:
            yield beat


def _status(objects: Get, key: str) -> tuple[float, str] | None:
    """When a run last wrote its status and what it said; None if it has none that can be read."""
    try:
        document = json.loads(objects.get(key, at_most=_STATUS_NBYTES))
        written, state = float(document["time"]), str(document.get("state", ""))
    except (ObjectError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return (written, state) if 0 <= written < _LATEST_S and state.isprintable() else None

"""`make copy`: copy what a STORE names, a store or the stores train and val, and say how it goes."""

import contextlib
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from infra.console import (
    ExitCode,
    JobError,
    Progress,
    StopFlag,
    UserError,
    counted,
    human_bytes,
    human_duration,
    say,
    stop_on_signals,
)
from infra.disk import disk_shortage
from infra.objects import ObjectError, open_objects
from infra.status import Beat, status_document
from storage_schemas.copy import MEMORY_NBYTES, PreparedCopy, check_all_copied, prepare_copy, run_copy
from storage_schemas.copy_claim import Claim
from storage_schemas.copy_plan import Part
from storage_schemas.find import find_stores, store_around
from storage_schemas.inspect import next_command
from storage_schemas.keys import LOG_PREFIX, STORE_KEY
from storage_schemas.reader import open_store


def copy_stores(store: str, to: str, part: Part) -> int:
    """Copy the stores below `store` to `to`; returns an exit code.

    Raises:
        UserError: Refused before anything was written.
        JobError, ChecksumError: Stopped, or ended with shards that the source does not have soundly; what was copied
            stays, and the same copy again goes on.
    """
    check_apart(store, to)
    try:
        copies = _prepare(store, to, part)
    except ObjectError as error:
        raise UserError(str(error)) from error
    try:
        with stop_on_signals() as stop:
            for split, prepared in copies.items():
                _run(prepared, split, stop)
        for prepared in copies.values():
            check_all_copied(prepared)
        stores = [open_store(prepared.target) for prepared in copies.values()]
        if all(s.is_complete for s in stores):
            print(next_command(stores, shlex.quote(to)))
            return ExitCode.OK
        print("Next: the same copy again, to go on with what is missing")
        return ExitCode.INTERRUPTED if stop() else ExitCode.OK
    except ObjectError as error:
        raise JobError(f"{error}. What is copied stays; the same command goes on from there") from error


def _prepare(store: str, to: str, part: Part) -> dict[str, PreparedCopy]:
    """The copies by split, announced; there is room for them and they may be written.

    Raises:
        UserError: As `copy_stores`.
        ObjectError: One side cannot be read, or the target not be written.
    """
    sources = find_stores(store)
    if list(sources) != [""] and _has_store_json(to):
        raise UserError(f"TO={to} is a store; stores {' and '.join(sources)} cannot be copied into it")
    copies = {
        split: prepare_copy(open_objects(source), open_objects(_target(to, split)), part)
        for split, source in sources.items()
    }
    for prepared in copies.values():
        _announce(prepared, part)
    check_room(copies.values())
    for prepared in copies.values():
        if prepared.shards or not prepared.begun:
            prepared.target.check_writable()
    return copies


def check_apart(store: str, to: str) -> None:
    """Refuse a target that is the source, or lies inside it or inside another store.

    Raises:
        UserError: It is, or does, or there is none.
    """
    if not to:
        raise UserError("TO is missing: where should the copy go? For example make copy TO=/nvme/imagenet")
    source, target = _place(store), _place(to)
    if target == source:
        raise UserError(f"TO={to} is the STORE itself. Give another TO")
    if target.startswith(f"{source}/"):
        raise UserError(f"TO={to} lies inside STORE={store}. Give a TO elsewhere")
    around = store_around(to)
    if around:
        raise UserError(f"TO={to} lies inside a store, {around}. Give a TO elsewhere")


def check_room(copies: Iterable[PreparedCopy]) -> None:
    """Refuse what will not fit on the disks, before the first byte.

    Raises:
        UserError: Names the place, what is free and what is needed.
    """
    shortage = disk_shortage((prepared.target.location, prepared.target_nbytes) for prepared in copies)
    if shortage:
        raise UserError(f"{shortage}. Free some, choose another TO, or copy less with LAYERS=a-b or LIMIT=n")


def _place(location: str) -> str:
    """One spelling for one place."""
    return location.rstrip("/") if "://" in location else os.path.realpath(os.path.expanduser(location))


def _target(to: str, split: str) -> str:
    return f"{to.rstrip('/')}/{split}" if split else to


def _has_store_json(location: str) -> bool:
    return any(info.key == STORE_KEY for info in open_objects(location).list(STORE_KEY))


def _announce(prepared: PreparedCopy, part: Part) -> None:
    spec, source = prepared.plan.spec, prepared.plan.source.spec
    say(
        f"{prepared.source.location} -> {prepared.target.location}: {len(spec.layers)} of {len(source.layers)} layers, "
        f"{spec.n_samples:,} of {source.n_samples:,} samples, {human_bytes(prepared.nbytes)} to copy in "
        f"{counted(len(prepared.shards), 'shard')}; up to {human_bytes(MEMORY_NBYTES)} of memory for objects in flight"
    )
    if part.limit is not None and part.limit < spec.n_samples and part.limit % spec.samples_per_shard:
        say(
            f"  LIMIT={part.limit} is rounded up to {spec.n_samples:,} samples, whole shards of "
            f"{spec.samples_per_shard}: the statistics of a part of one cannot be known from its rounded states"
        )
    if prepared.n_copied:
        say(f"  there already: {counted(prepared.n_copied, 'shard')}")
    if prepared.n_missing:
        say(f"  not in the source yet, or damaged: {counted(prepared.n_missing, 'shard')}; a later copy adds them")


def _run(prepared: PreparedCopy, split: str, stop: StopFlag) -> None:
    """Copy one store with a line of progress, and sum up."""
    began, done, lock = time.monotonic(), 0, threading.Lock()
    scale, unit = (10**6, "MB") if prepared.nbytes >= 10**8 else (10**3, "kB")
    with Progress(total=prepared.nbytes // scale, unit=unit, label=f"copy {split}".strip()) as line:

        def advance(nbytes: int) -> None:
            nonlocal done
            with lock:
                line.advance((done + nbytes) // scale - done // scale)
                done += nbytes

        n_copied = _copy_claimed(prepared, stop, advance, lambda: {"bytes_done": done, "bytes_total": prepared.nbytes})
    seconds = time.monotonic() - began
    n_there, n_shards = prepared.n_copied + n_copied, prepared.plan.spec.n_shards
    state = "complete" if n_there == n_shards else f"{n_there:,} of {n_shards:,} shards"
    print(
        f"{prepared.target.location}: {state}; {human_bytes(done)} copied and checked in {human_duration(seconds)}"
        + (f", {human_bytes(done / seconds)}/s" if done else "")
    )


def _copy_claimed(
    prepared: PreparedCopy,
    stop: StopFlag,
    advance: Callable[[int], None],
    numbers: Callable[[], dict[str, int]],
) -> int:
    """Copy while the target shows that somebody does, as an extraction would: status and a sign of life below log/.

    Raises:
        UserError: Another job is writing there; names it.
    """
    target = prepared.target
    if not prepared.shards and prepared.begun:
        return run_copy(prepared)  # nothing but the index may be missing
    claim = Claim(target)
    claim.take()
    status = {"state": "copying", "source": prepared.source.location}

    def write() -> None:
        document = status_document(run_id=claim.run_id, now=time.time(), **status, **numbers())
        target.put(f"{LOG_PREFIX}{claim.run_id}/status.json", document)
        claim.renew()

    try:
        with Beat(write, expected=(ObjectError,)) as beat, _cause_in(status):
            target.sweep()  # what a copy that was killed left half-written

            def asked() -> bool:
                beat.check()
                return stop()

            n_copied = run_copy(prepared, stop=asked, progress=advance)
            status["state"] = "stopped" if stop() else "copied"
    except BaseException:
        with contextlib.suppress(ObjectError):  # never hide the error that is on its way
            claim.release()
        raise
    claim.release()
    return n_copied


@contextlib.contextmanager
def _cause_in(status: dict[str, str]) -> Iterator[None]:
    """Note in a status why its job stopped."""
    try:
        yield
    except BaseException as error:
        status |= {"state": "failed", "cause": str(error) or type(error).__name__}
        raise

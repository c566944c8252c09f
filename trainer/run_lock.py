"""One process at a time in a RUN: a file lock in a local folder, a heartbeat everywhere else."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from infra.console import JobError, UserError, say
from infra.objects import ObjectError, ObjectMissingError, Objects, ObjectTooLargeError
from infra.status import MAX_SIGN_NBYTES, Beat, Heartbeat, find_living, my_heartbeat

LOCK_NAME = ".lock"
HEARTBEAT_KEY = "heartbeat.json"


class RunInUseError(JobError):
    """Another process holds the RUN. It may end by itself, so whoever started this one may try again."""


StillOurs = Callable[[], None]
"""To be called now and then while holding a RUN; raises once it is no longer ours, or cannot be written."""


@contextmanager
def hold_folder(location: str, variable: str = "RUN") -> Iterator[StillOurs]:
    """Keep other processes out of a folder; a dead process keeps nobody out.

    Args:
        location: The folder; made if it is missing.
        variable: What the person typed it as, for messages.

    Raises:
        UserError: Another process is in it, or the folder cannot be made.
    """
    if os.path.exists(location) and not os.path.isdir(location):
        raise UserError(f"{variable}={location} is a file, not a folder: give another place ({variable}=...)")
    try:
        os.makedirs(location, exist_ok=True)
        lock = open(os.path.join(location, LOCK_NAME), "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{variable}={location} cannot be written: {error.strerror}. Give another place ({variable}=...)"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunInUseError(
                f"another process is training in {location}: wait for it, stop it, or give another {variable}"
            ) from error
        except OSError as error:
            raise UserError(
                f"{variable}={location} lies on a file system without locks ({error.strerror}), so two processes "
                f"could write into it at once: give a place on a local disk ({variable}=...)"
            ) from error
        yield lambda: None


@contextmanager
def hold_prefix(objects: Objects, variable: str = "RUN") -> Iterator[StillOurs]:
    """Keep other processes out of objects that have no locks, by a heartbeat that is renewed every ten seconds.

    A process that was killed a moment ago on this machine is seen to be gone at once; one on another machine is given
    60 s to show itself. Of several that begin at one moment the last one stays.

    Raises:
        UserError: Another process is at work here; names it.
    """
    other = find_living(lambda: _read_heartbeat(objects), say=say)
    if other is not None:
        raise RunInUseError(_in_use(objects, other, variable))
    run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{os.urandom(3).hex()}"

    def put() -> None:
        objects.put(HEARTBEAT_KEY, my_heartbeat(run_id, time.time()).to_bytes())

    def renew() -> None:
        found = _read_heartbeat(objects)
        if found is not None and found.run_id != run_id:
            raise RunInUseError(_in_use(objects, found, variable))
        put()

    def release() -> None:
        found = _read_heartbeat(objects)
        if found is not None and found.run_id == run_id:
            objects.delete(HEARTBEAT_KEY)

    put()
    try:
        with Beat(renew, expected=(ObjectError,)) as beat:
            yield beat.check
    except BaseException:
        with suppress(ObjectError):  # the error that is on its way says more
            release()
        raise
    release()


def _read_heartbeat(objects: Objects) -> Heartbeat | None:
    try:
        return Heartbeat.from_bytes(objects.get(HEARTBEAT_KEY, at_most=MAX_SIGN_NBYTES))
    except (ObjectMissingError, ObjectTooLargeError):
        return None


def _in_use(objects: Objects, other: Heartbeat, variable: str) -> str:
    return (
        f"another process is training in {objects.location} ({other}): wait for it, stop it, or give another {variable}"
    )

"""The place that a copy writes to is its own meanwhile: its heartbeat is where a job that leads an extraction has its.

Nobody joins a copy, and a copy joins nobody.
"""

import os
import time
from functools import partial

from infra.console import UserError, say
from infra.objects import ObjectMissingError, Objects, ObjectTooLargeError
from infra.status import MAX_SIGN_NBYTES, Heartbeat, find_living, my_heartbeat
from storage_schemas.keys import HEARTBEAT_KEY, HEARTBEATS_PREFIX


class Claim:
    """Our sign of life at the target of a copy.

    Args:
        target: Where the copy goes.
    """

    def __init__(self, target: Objects) -> None:
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{os.urandom(3).hex()}"
        self._target = target

    def take(self) -> None:
        """Claim the place; of two copies that begin at one moment, one does.

        Raises:
            UserError: Another job is at work there, alone or having joined one; names it.
        """
        dead = _read_heartbeat(self._target, HEARTBEAT_KEY)
        self._refuse(find_living(partial(_read_heartbeat, self._target, HEARTBEAT_KEY), say=say))
        for key in [info.key for info in self._target.list(HEARTBEATS_PREFIX)]:
            self._refuse(find_living(partial(_read_heartbeat, self._target, key), say=say))
            self._target.delete(key)
        is_new = self._target.put_new(HEARTBEAT_KEY, self._document())
        if not is_new and _read_heartbeat(self._target, HEARTBEAT_KEY) in (dead, None):
            self._target.put(HEARTBEAT_KEY, self._document())
        self._refuse_another()

    def renew(self) -> None:
        """Show that we are still at work.

        Raises:
            UserError: Another job has taken the place meanwhile, so we were thought to be dead.
        """
        self._refuse_another()
        self._target.put(HEARTBEAT_KEY, self._document())

    def release(self) -> None:
        """Take our heartbeat away."""
        last = _read_heartbeat(self._target, HEARTBEAT_KEY)
        if last is not None and last.run_id == self.run_id:
            self._target.delete(HEARTBEAT_KEY)

    def _refuse_another(self) -> None:
        found = _read_heartbeat(self._target, HEARTBEAT_KEY)
        self._refuse(found if found is not None and found.run_id != self.run_id else None)

    def _refuse(self, other: Heartbeat | None) -> None:
        if other is not None:
            raise UserError(
                f"{self._target.location} is being written by another job ({other}). Wait for it, or stop it"
            )

    def _document(self) -> bytes:
        return my_heartbeat(self.run_id, time.time(), ready=False).to_bytes()


def _read_heartbeat(objects: Objects, key: str) -> Heartbeat | None:
    """The heartbeat at a key; None if there is none, or bytes that are none."""
    try:
        return Heartbeat.from_bytes(objects.get(key, at_most=MAX_SIGN_NBYTES))
    except (ObjectMissingError, ObjectTooLargeError):
        return None

"""Which jobs are at work on a store: one leads and prepares it, others may join it.

The leader's heartbeat has one key, so of several that begin at one moment one has it. A job that joins has a heartbeat
of its own below another prefix. Whoever leads deletes leftovers and creates the store before its heartbeat says that it
is ready, and nobody joins before that.
"""

import os
import time
from collections.abc import Callable
from functools import partial

from infra.console import UserError
from infra.objects import ObjectMissingError, Objects, ObjectTooLargeError
from infra.status import MAX_SIGN_NBYTES, Heartbeat, Watch, find_living, my_heartbeat
from storage_schemas.keys import HEARTBEAT_KEY, HEARTBEATS_PREFIX

_LOOK_EVERY_S = 1.0
_SAY_EVERY_S = 20.0


class Presence:
    """Our sign of life in a store.

    Args:
        objects: Of the store.
        run_id: Ours; None makes one.
    """

    def __init__(self, objects: Objects, run_id: str | None = None) -> None:
        self.run_id = run_id or f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{os.urandom(3).hex()}"
        self._objects = objects
        self._key = ""  # of our heartbeat, once it is there
        self._ready = self._may_join = False
        self._watch = Watch()

    @property
    def leads(self) -> bool:
        """Whether it is for us to prepare the store."""
        return self._key == HEARTBEAT_KEY

    def enter(self, say: Callable[[str], None], *, join: bool = False) -> None:
        """Lead, or join the job that does; a job that is dead is replaced.

        A job that was killed a moment ago on this machine is seen to be gone at once; one on another machine is given
        60 s to show itself.

        Raises:
            UserError: Another job is alive and we are not to join it; names it.
        """
        last_said, self._may_join = time.monotonic(), join
        while True:
            before = read_heartbeat(self._objects)
            leader = find_living(partial(read_heartbeat, self._objects), say=say) if before else None
            if leader is None and self._lead(before, say, join=join):
                return
            if leader is not None and not join:
                raise UserError(in_use(self._objects, leader))
            if leader is not None and leader.ready and self._join(leader):
                say(f"  joined {leader}: shards that it has, or any other job, are left to them")
                return
            if leader is not None and time.monotonic() - last_said > _SAY_EVERY_S:
                say(f"waiting until {leader} has prepared {self._objects.location}")
                last_said = time.monotonic()
            time.sleep(_LOOK_EVERY_S)

    def set_ready(self, ready: bool) -> None:
        """Say whether others may join now."""
        self._ready = ready
        self._put()

    def renew(self) -> None:
        """Show that we are still at work.

        Raises:
            UserError: Another job has taken the lead over meanwhile, so we were thought to be dead.
        """
        found = read_heartbeat(self._objects) if self.leads else None
        if found is not None and found.run_id != self.run_id:
            raise UserError(
                f"another job ({found}) has taken over {self._objects.location}: this one seemed dead, or both began "
                "at one moment. What is committed stays valid. Run the same command again"
                + ("" if self._may_join else ", with JOIN=1 while that job is at work")
            )
        self._put()

    def release(self) -> None:
        """Take our heartbeat away."""
        if not self._key:
            return
        last = read_heartbeat(self._objects, self._key)
        if last is not None and last.run_id == self.run_id:
            self._objects.delete(self._key)

    def others(self) -> set[str]:
        """Ids of the other runs that are at work."""
        return self._watch.living(found for key, found in self._heartbeats() if key != self._key)

    def _lead(self, dead: Heartbeat | None, say: Callable[[str], None], *, join: bool) -> bool:
        """Try to lead, in the place of a job that is dead; False if another one was quicker and may be joined."""
        for key in [info.key for info in self._objects.list(HEARTBEATS_PREFIX)]:
            living = find_living(partial(read_heartbeat, self._objects, key), say=say)
            if living is not None and not join:
                raise UserError(in_use(self._objects, living))
            if living is None:
                self._objects.delete(key)
        self._key = HEARTBEAT_KEY
        if not self._objects.put_new(HEARTBEAT_KEY, self._document()):
            found = read_heartbeat(self._objects)
            if found is None or found == dead:
                self._put()
        found = read_heartbeat(self._objects)
        if found is not None and found.run_id != self.run_id:
            self._key = ""
            if not join:
                raise UserError(in_use(self._objects, found))
            return False
        return True

    def _join(self, leader: Heartbeat) -> bool:
        """Join; False if the leader has gone, or changed, meanwhile."""
        self._key, self._ready = f"{HEARTBEATS_PREFIX}{self.run_id}.json", True
        self._put()
        now = read_heartbeat(self._objects)
        if now is not None and now.run_id == leader.run_id and now.ready:
            return True
        self.release()
        self._key, self._ready = "", False
        return False

    def _put(self) -> None:
        self._objects.put(self._key, self._document())

    def _document(self) -> bytes:
        return my_heartbeat(self.run_id, time.time(), ready=self._ready).to_bytes()

    def _heartbeats(self) -> list[tuple[str, Heartbeat]]:
        keys = [HEARTBEAT_KEY, *(info.key for info in self._objects.list(HEARTBEATS_PREFIX))]
        found = [(key, read_heartbeat(self._objects, key)) for key in keys]
        return [(key, heartbeat) for key, heartbeat in found if heartbeat is not None]


def read_heartbeat(objects: Objects, key: str = HEARTBEAT_KEY) -> Heartbeat | None:
    """The heartbeat at a key; None if there is none, or bytes that are none."""
    try:
        return Heartbeat.from_bytes(objects.get(key, at_most=MAX_SIGN_NBYTES))
    except (ObjectMissingError, ObjectTooLargeError):
        return None


def anybody_at_work(objects: Objects) -> bool:
    """Whether there is any heartbeat, of a job that lives or was killed."""
    return any(True for prefix in (HEARTBEAT_KEY, HEARTBEATS_PREFIX) for _ in objects.list(prefix))


def in_use(objects: Objects, other: Heartbeat) -> str:
    """What a job is told that may not join."""
    return (
        f"{objects.location} is being written by another job ({other}). Wait for it, or stop it: "
        "the same command then goes on with what is missing. Or share its work: JOIN=1"
    )

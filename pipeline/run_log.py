"""What a running extraction leaves under log/ for people and for a second job: heartbeat, status, provenance, timings.

Nothing here is read by a reader of the store, compared on resume, or part of its content.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from infra.console import UserError
from infra.objects import ObjectError, ObjectMissingError, Objects
from infra.status import Beat, Heartbeat, find_living, my_heartbeat, status_document
from pipeline.dispatch import Event, WorkersReady
from pipeline.shard import ShardReport
from storage_schemas.keys import LOG_PREFIX

HEARTBEAT_KEY = f"{LOG_PREFIX}heartbeat.json"
_SHOWN_VERSIONS = ("torch", "timm", "numpy", "pillow", "pyarrow", "numcodecs", "ray")


class RunLog:
    """Collects what happens; its documents are put every few seconds and at the end."""

    def __init__(self, objects: Objects, run_id: str) -> None:
        self.run_id = run_id
        self._objects = objects
        self._began = time.time()
        self._status: dict[str, Any] = {"state": "starting", "images_done": 0}
        self._shards: list[dict[str, Any]] = []
        self._messages: list[str] = []
        self._n_written = 0
        self._holds_claim = False

    def write(self) -> None:
        """Put the documents that have changed.

        Raises:
            UserError: Another job has taken the store over meanwhile.
        """
        now = time.time()
        if self._holds_claim:
            self._check_claim()
        self._put_heartbeat(now)
        numbers = {**self._status, "seconds": round(now - self._began, 1), "messages": self._messages[-20:]}
        self._objects.put(self._key("status.json"), status_document(run_id=self.run_id, now=now, **numbers))
        if len(self._shards) != self._n_written:
            lines = "".join(json.dumps(shard) + "\n" for shard in self._shards)
            self._objects.put(self._key("shards.jsonl"), lines.encode())
            self._n_written = len(self._shards)

    def claim(self) -> None:
        """Show that we are at work; of several jobs that begin at one moment, the last one does.

        Raises:
            UserError: Another one was later.
        """
        self._put_heartbeat(time.time())
        self._check_claim()
        self._holds_claim = True

    def release(self) -> None:
        """Take our heartbeat away."""
        last = read_heartbeat(self._objects)
        if last is not None and last.run_id == self.run_id:
            self._objects.delete(HEARTBEAT_KEY)

    def _put_heartbeat(self, now: float) -> None:
        self._objects.put(HEARTBEAT_KEY, my_heartbeat(self.run_id, now).to_bytes())

    def _check_claim(self) -> None:
        found = read_heartbeat(self._objects)
        if found is not None and found.run_id != self.run_id:
            raise UserError(_in_use(self._objects, found))

    def write_provenance(self, settings: dict[str, Any]) -> None:
        """Put what made these bytes; shown to people, never compared."""
        document = {
            "run_id": self.run_id,
            "settings": settings,
            "versions": {name: version(name) for name in _SHOWN_VERSIONS},
            "python": platform.python_version(),
            "machine": {"host": platform.node(), "processor": platform.machine(), "cores": os.cpu_count()},
        }
        self._objects.put(self._key("provenance.json"), json.dumps(document, indent=1, default=str).encode())

    def status(self, **numbers: Any) -> None:
        """Set fields of status.json."""
        self._status |= numbers

    def event(self, event: Event) -> None:
        """Note something that happened to workers or shards."""
        if isinstance(event, WorkersReady):
            self._status["workers"] = str(event)
        else:
            self._messages.append(str(event))

    def shard(self, report: ShardReport, attempts: int) -> None:
        """Note a finished shard."""
        seconds = {stage: round(s, 4) for stage, s in report.seconds.items()}
        self._shards.append({**asdict(report), "seconds": seconds, "attempts": attempts})

    def _key(self, name: str) -> str:
        return f"{LOG_PREFIX}{self.run_id}/{name}"


@contextmanager
def claimed(objects: Objects, say: Callable[[str], None]) -> Iterator[tuple[RunLog, Beat]]:
    """Make sure that no other job writes this store, and show for the whole body that we do.

    A job that was killed a moment ago on this machine is seen to be gone at once; one on another machine is given 60 s
    to show itself.

    Raises:
        UserError: Another job is alive; names it.
    """
    other = find_living(lambda: read_heartbeat(objects), say=say)
    if other is not None:
        raise UserError(_in_use(objects, other))
    log = RunLog(objects, f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{os.urandom(3).hex()}")
    log.claim()
    try:
        with Beat(log.write, expected=(ObjectError,)) as beat:
            try:
                yield log, beat
            except BaseException as error:
                log.status(state="stopped", cause=str(error) or type(error).__name__)
                raise
    finally:
        log.release()


def read_heartbeat(objects: Objects) -> Heartbeat | None:
    """The heartbeat in a store; None if there is none, or bytes that are none."""
    try:
        return Heartbeat.from_bytes(objects.get(HEARTBEAT_KEY))
    except ObjectMissingError:
        return None


def _in_use(objects: Objects, other: Heartbeat) -> str:
    return (
        f"{objects.location} is being written by another job ({other}). Wait for it, or stop it; "
        "the same command then goes on with what is missing"
    )

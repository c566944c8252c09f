"""What a running extraction leaves under log/ for people: status, provenance, timings, messages.

Nothing here is read by a reader of the store, compared on resume, or part of its content.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from infra.objects import ObjectError, Objects
from infra.status import Beat, status_document
from pipeline.dispatch import Event, WorkersReady
from pipeline.presence import Presence
from pipeline.shard import ShardReport
from storage_schemas.keys import LOG_PREFIX

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
        self._live: Callable[[], dict[str, Any]] = dict

    def write(self) -> None:
        """Put the documents that have changed."""
        now = time.time()
        numbers = {
            **self._status,
            **self._live(),
            "seconds": round(now - self._began, 1),
            "messages": self._messages[-20:],
        }
        self._objects.put(self._key("status.json"), status_document(run_id=self.run_id, now=now, **numbers))
        if len(self._shards) != self._n_written:
            lines = "".join(json.dumps(shard) + "\n" for shard in self._shards)
            self._objects.put(self._key("shards.jsonl"), lines.encode())
            self._n_written = len(self._shards)

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

    @contextmanager
    def following(self, live: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """While this lasts, status.json also has what `live` says at the moment; afterwards what it said last."""
        self._live = live
        try:
            yield
        finally:
            self._status |= live()
            self._live = dict

    def event(self, event: Event) -> None:
        """Note something that happened to workers or shards."""
        if isinstance(event, WorkersReady):
            self._status["workers"] = str(event)
        else:
            self._messages.append(str(event))

    def shard(self, report: ShardReport, attempts: int) -> None:
        """Note a finished shard."""
        seconds = {stage: round(s, 4) for stage, s in report.seconds.items()}
        found = {name: value for name, value in asdict(report).items() if name != "pools"}
        self._shards.append({**found, "seconds": seconds, "attempts": attempts})

    def _key(self, name: str) -> str:
        return f"{LOG_PREFIX}{self.run_id}/{name}"


@dataclass(frozen=True, kw_only=True)
class AtWork:
    """A job that shows itself in a store."""

    presence: Presence
    log: RunLog
    beat: Beat


@contextmanager
def at_work(objects: Objects, say: Callable[[str], None], *, join: bool = False) -> Iterator[AtWork]:
    """Make sure that no other job writes this store, or join those that do, and show for the whole body that we do.

    Raises:
        UserError: Another job is alive and we are not to join it; names it.
    """
    presence = Presence(objects)
    presence.enter(say, join=join)
    log = RunLog(objects, presence.run_id)

    def write() -> None:
        presence.renew()
        log.write()

    try:
        with Beat(write, expected=(ObjectError,)) as beat:
            try:
                yield AtWork(presence=presence, log=log, beat=beat)
            except BaseException as error:
                log.status(state="stopped", cause=str(error) or type(error).__name__)
                raise
    finally:
        presence.release()

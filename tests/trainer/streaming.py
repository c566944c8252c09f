"""What the tests of the stream share: planted stores, objects that count or fail, and a watch on threads."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from storage_schemas.reader import Store
from tests.stores import make_spec, write_planted

BAD = {0: "truncated", 5: "truncated", 6: "truncated", 43: "truncated"}
PATIENCE_S = 120.0  # for what takes milliseconds: only a machine that stands still comes near it


def planted(n_samples: int = 101, bad: dict[int, str] | None = None, **changes) -> Store:
    """A store in memory, by default with bad images and a short last chunk."""
    objects = MemoryObjects()
    write_planted(objects, make_spec(n_samples=n_samples, **changes), BAD if bad is None else bad)
    return open_store(objects)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream-reader")]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"{what}, which did not happen"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads end where they should; a stream waits for them longer than it does elsewhere, should they be slow."""
    monkeypatch.setattr("trainer.chunk_reader._JOIN_S", PATIENCE_S)
    yield
    wait_until(lambda: not reading_threads(), "all reading threads of a test end")


class CountingObjects(FolderObjects):
    """Counts what is read, independently of the stream's own counters."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: Counter[tuple[str, int, int]] = Counter()
        self._count = threading.Lock()

    def read_rows(self, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
        with self._count:
            self.ranges[key, start, len(rows) * out[0].nbytes] += 1
        return super().read_rows(key, start, out, rows)


class FaultyObjects(FolderObjects):
    """Calls `fault` instead of reading keys with `key_part`, after some of them were served."""

    def __init__(self, root: Path, fault: Callable[[], object], after: int = 0, key_part: str = "layer") -> None:
        super().__init__(root)
        self.fault, self.after, self.key_part = fault, after, key_part
        self._count = threading.Lock()

    def read_rows(self, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
        if self.key_part in key:
            with self._count:
                self.after -= 1
                due = self.after < 0
            if due:
                self.fault()
        return super().read_rows(key, start, out, rows)


def catch_fire() -> None:
    raise OSError("the disk is on fire")

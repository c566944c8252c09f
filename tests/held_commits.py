"""The door of the pipeline, for a job that cannot end: from some commit on, every shard waits to be committed.

`python -m tests.held_commits 3 extract ...`: whoever kills it has all the time there is.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infra.objects import Buffer, FolderObjects
from storage_schemas.keys import COMMITS_PREFIX


@dataclass(frozen=True)
class HeldCommits:
    """Makes the tiny teacher of `fake_config`, in a process that writes no more commits once there are `n`."""

    n: int

    def __call__(self, device: str) -> Any:
        from pipeline.teacher import load_teacher

        put, n = FolderObjects.put, self.n

        def held(self: FolderObjects, key: str, data: Buffer | Sequence[Buffer]) -> None:
            while key.startswith(COMMITS_PREFIX) and sum(1 for _ in self.list(COMMITS_PREFIX)) >= n:
                time.sleep(0.1)
            put(self, key, data)

        FolderObjects.put = held  # type: ignore[method-assign]
        return load_teacher("fake_vit", "random:0", device=device)


def main() -> None:
    import pipeline.extract
    from infra.console import leave
    from pipeline.__main__ import main as door

    tell, held = pipeline.extract.extract_and_tell, HeldCommits(int(sys.argv[1]))
    pipeline.extract.extract_and_tell = lambda *given, **named: tell(*given, teacher_factory=held, **named)
    leave(door(sys.argv[2:]))


if __name__ == "__main__":
    from tests.held_commits import main as importable  # what workers get must have a name that they can import

    importable()

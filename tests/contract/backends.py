"""The back ends that the contract suite runs over. A new one is a line here."""

from collections.abc import Callable
from pathlib import Path

from infra.objects import FolderObjects, MemoryObjects, Objects

#: Each makes empty objects; the path is an empty folder of the test's own.
BACKENDS: dict[str, Callable[[Path], Objects]] = {
    "folder": lambda folder: FolderObjects(folder / "objects"),
    "memory": lambda folder: MemoryObjects(),
}

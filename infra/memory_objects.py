"""Named byte objects in this process's memory."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from infra.object_rows import read_rows_in_python
from infra.object_verbs import (
    Buffer,
    Folder,
    ObjectInfo,
    ObjectMissingError,
    ShortObjectError,
    check_folder_prefix,
    check_key,
    check_prefix,
    check_size,
    pieces_of,
)


class MemoryObjects:
    """Objects in this process's memory, with the behaviour of the others; for tests and small experiments."""

    def __init__(self, location: str = "memory://") -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._location = location

    @property
    def location(self) -> str:
        return self._location

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        with self._lock:
            try:
                data = self._objects[check_key(key)]
            except KeyError:
                raise ObjectMissingError(key, f"{self.location}{key} is missing") from None
        check_size(self.location, key, len(data), at_most)
        return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        for _ in self.read_parts(key, start, [buffer]):
            pass

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        data, nbytes = memoryview(self.get(key)), sum(buffer.nbytes for buffer in buffers)
        if nbytes and start + nbytes > len(data):
            raise ShortObjectError(
                key,
                f"{self.location}{key}: bytes {start} to {start + nbytes} were asked for, the object has {len(data)}",
            )
        for buffer in buffers:
            buffer.cast("B")[:] = data[start : start + buffer.nbytes]
            start += buffer.nbytes
            yield buffer

    def read_rows(self, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
        return read_rows_in_python(self, key, start, out, rows)

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        whole = b"".join(pieces_of(data))
        with self._lock:
            self._objects[check_key(key)] = whole

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> bool:
        whole = b"".join(pieces_of(data))
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = whole
        return True

    def check_writable(self) -> None:
        return

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            found = [ObjectInfo(key=k, nbytes=len(v)) for k, v in sorted(self._objects.items()) if k.startswith(prefix)]
        yield from found

    def list_folder(self, prefix: str = "") -> Folder:
        check_folder_prefix(prefix)
        folder, folders = Folder(objects=[], folders=[]), set()
        for info in self.list(prefix):
            name, slash, _ = info.key.removeprefix(prefix).partition("/")
            if slash:
                folders.add(f"{prefix}{name}/")
            else:
                folder.objects.append(info)
        folder.folders.extend(sorted(folders))
        return folder

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def sweep(self) -> int:
        return 0

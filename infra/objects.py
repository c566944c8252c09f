"""Named byte objects in a folder or in memory: get, ranged get, put, list, delete.

Each verb has a protocol of its own, so a function asks for what it uses: a reader takes `GetRange`, a writer `Put`.
Keys are relative POSIX paths. One put makes one whole object appear at once, or none.
"""

import ctypes
import errno
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from crc32c import crc32c

from infra.console import UserError
from infra.native import read_rows_function

Buffer = bytes | bytearray | memoryview

_LEFTOVER_SUFFIX = ".put-tmp"
SMALL_ROW_NBYTES = 2**16  # without the compiled reader, a system call for each row would cost more than a copy
_CACHED_NBYTES = 2**19  # read, then checksummed, while it is still in a core's cache


class ObjectError(Exception):
    """An object could not be read or written; `key` names it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple:  # keep both arguments when Ray or multiprocessing sends the error on
        return type(self), (self.key, str(self))


class ObjectMissingError(ObjectError):
    """No object has this key."""


class ShortObjectError(ObjectError):
    """The object ends before the bytes asked for."""


class ObjectTooLargeError(ObjectError):
    """The object has more bytes than the caller will take; none were read."""


class ObjectAccessError(ObjectError):
    """The back end refused or failed: permission, full disk, input/output error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """One listed object."""

    key: str
    nbytes: int


@runtime_checkable
class Get(Protocol):
    """Whole objects."""

    def get(self, key: str, *, at_most: int | None = None) -> bytes: ...


@runtime_checkable
class GetRange(Protocol):
    """Parts of objects, into memory that the caller owns."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> None: ...


class GetParts(Protocol):
    """One part of an object, into several pieces of memory."""

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]: ...


@runtime_checkable
class GetRows(Protocol):
    """One part of an object, into rows of an array, checksummed on the way."""

    def read_rows(self, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int: ...


@runtime_checkable
class Put(Protocol):
    """Whole objects, at once or not at all."""

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None: ...


@runtime_checkable
class List(Protocol):
    """Keys and sizes below a prefix."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]: ...


@runtime_checkable
class Delete(Protocol):
    """Remove one object; removing a missing one is no error."""

    def delete(self, key: str) -> None: ...


@runtime_checkable
class Objects(Get, GetRange, GetParts, GetRows, Put, List, Delete, Protocol):
    """All verbs together, for code that owns a store."""

    @property
    def location(self) -> str: ...

    def sweep(self) -> int: ...


def check_key(key: str) -> str:
    """Return the key, or raise ValueError for one that is empty, absolute or climbs out of the store."""
    parts = key.split("/")
    plain = key.isprintable() and "\\" not in key and not any(part in ("", ".", "..") for part in parts)
    if not plain or key.endswith(_LEFTOVER_SUFFIX):
        raise ValueError(f"object key {key!r} is not a plain relative path such as 'layer_00/cls/c/0/0'")
    return key


class FolderObjects:
    """Objects as files below a folder. The folder is made by the first put.

    Links inside the folder are read through, but never listed, written or deleted through: nothing outside is changed.
    A put writes a temporary file beside the target and renames it, so readers see the old object or the new one. There
    is no fsync: after a power cut a committed object may be short or empty, which checksums report and repair mends.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)

    @property
    def location(self) -> str:
        return str(self._root)

    def __repr__(self) -> str:
        return f"FolderObjects({self.location!r})"

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        """Read a whole object.

        Args:
            key: Of the object.
            at_most: Bytes that the caller will take; the size is looked at before anything is read.

        Raises:
            ObjectMissingError: There is no such object.
            ObjectTooLargeError: It has more bytes than that; names both.
        """
        try:
            with open(self._path(key), "rb") as file:
                _check_size(self.location, key, os.fstat(file.fileno()).st_size, at_most)
                return file.read()
        except OSError as error:
            raise self._read_error(key, error) from error

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes from `start` on.

        Raises:
            ObjectMissingError: There is no such object.
            ShortObjectError: The object ends first; names both sizes.
        """
        for _ in self.read_parts(key, start, [buffer]):
            pass

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        """Fill buffers one after another with the bytes from `start` on; yields each when it is full.

        The caller can checksum a buffer while it is still in the processor's cache. Errors are those of `read_into`.
        """
        try:
            descriptor = os.open(f"{self._root}/{check_key(key)}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._read_error(key, error) from error
        place = start
        try:  # little is done between system calls: threads that read take turns to do it
            for buffer in buffers:
                n = os.preadv(descriptor, [buffer], place)
                while n < buffer.nbytes:
                    more = os.preadv(descriptor, [buffer.cast("B")[n:]], place + n)
                    if more == 0:
                        raise ShortObjectError(
                            key,
                            f"{self.location}/{key}: bytes {start} to {start + sum(b.nbytes for b in buffers)} were "
                            f"asked for, the object has {os.fstat(descriptor).st_size}",
                        )
                    n += more
                place += n
                yield buffer
        except OSError as error:
            raise self._read_error(key, error) from error
        finally:
            os.close(descriptor)

    def read_rows(self, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
        """Read the bytes from `start` on into rows of an array, and return their CRC32C.

        Outside Python where a compiler was there to build it: any number of threads can do this at full speed.

        Args:
            key: Of the object.
            start: First byte.
            out: (row, ...); each row must be contiguous, the rows need not follow one another.
            rows: (piece,) int64: the piece that comes i-th goes to `out[rows[i]]`, or nowhere if that is negative.

        Raises:
            ObjectMissingError, ShortObjectError: As `read_into`.
        """
        native = read_rows_function()
        if native is None:
            return _read_rows_in_python(self, key, start, out, rows)
        nbytes = _row_nbytes(out, rows)
        rows = np.ascontiguousarray(rows, np.int64)
        nowhere = np.empty(nbytes if (rows < 0).any() else 0, np.uint8)
        crc, object_nbytes = ctypes.c_uint32(), ctypes.c_int64()
        code = native(
            os.fsencode(f"{self._root}/{check_key(key)}"),
            start,
            out.ctypes.data,
            out.strides[0],
            rows.ctypes.data,
            len(rows),
            nbytes,
            nowhere.ctypes.data,
            _CACHED_NBYTES,
            ctypes.byref(crc),
            ctypes.byref(object_nbytes),
        )
        if code < 0:
            raise ShortObjectError(
                key,
                f"{self.location}/{key}: bytes {start} to {start + len(rows) * nbytes} were asked for, "
                f"the object has {object_nbytes.value}",
            )
        if code:
            raise self._read_error(key, OSError(code, os.strerror(code)))
        return crc.value

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole object, replacing one of the same key.

        Raises:
            ObjectAccessError: The file could not be written (full disk, permission); nothing is left behind.
        """
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_LEFTOVER_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check_inside(key, path)
            try:
                with open(temporary, "xb", buffering=0) as file:
                    for piece in _pieces(data):
                        view = memoryview(piece).cast("B")
                        while view.nbytes:
                            view = view[file.write(view) :]
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ObjectAccessError(key, f"{self.location}/{key} could not be written: {_reason(error)}") from error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order. Half-written files are not objects.

        Raises:
            ValueError: The prefix climbs out of the folder.
        """
        _check_prefix(prefix)
        yield from self._walk(self._root, "", prefix)

    def _walk(self, folder: Path, folder_key: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=_key_order)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._read_error(folder_key.rstrip("/") or ".", error) from error
        for entry in entries:
            key = folder_key + entry.name
            if entry.is_symlink():
                continue
            if entry.is_dir():
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(Path(entry.path), f"{key}/", prefix)
            elif key.startswith(prefix) and not entry.name.endswith(_LEFTOVER_SUFFIX):
                try:
                    yield ObjectInfo(key=key, nbytes=entry.stat().st_size)
                except FileNotFoundError:  # deleted while we listed
                    continue

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""
        path = self._path(key)
        self._check_inside(key, path)
        try:
            path.unlink(missing_ok=True)
        except (NotADirectoryError, IsADirectoryError):  # an object above, or a folder: no object has this key
            return
        except OSError as error:
            raise ObjectAccessError(key, f"{self.location}/{key} could not be deleted: {_reason(error)}") from error

    def sweep(self) -> int:
        """Delete the files that interrupted puts left behind; returns how many. Call only while nobody else writes.

        Raises:
            ObjectAccessError: One could not be deleted.
        """
        n_swept = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                if name.endswith(_LEFTOVER_SUFFIX):
                    path = Path(folder, name)
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        key = path.relative_to(self._root).as_posix()
                        raise ObjectAccessError(key, f"{path} could not be deleted: {_reason(error)}") from error
                    n_swept += 1
        return n_swept

    def _check_inside(self, key: str, path: Path) -> None:
        """Raise ObjectAccessError if a link on the way leads out of the folder."""
        root, parent = os.path.realpath(self._root), os.path.realpath(path.parent)
        if os.path.commonpath([root, parent]) != root:
            raise ObjectAccessError(key, f"{self.location}/{key} leads out of {self.location}, to {parent}: a link")

    def _read_error(self, key: str, error: OSError) -> ObjectError:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            return ObjectMissingError(key, f"{self.location}/{key} is missing")
        return ObjectAccessError(key, f"{self.location}/{key} could not be read: {_reason(error)}")


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
        _check_size(self.location, key, len(data), at_most)
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
        return _read_rows_in_python(self, key, start, out, rows)

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        check_key(key)
        whole = b"".join(memoryview(piece).cast("B") for piece in _pieces(data))
        with self._lock:
            self._objects[key] = whole

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        _check_prefix(prefix)
        with self._lock:
            found = [ObjectInfo(key=k, nbytes=len(v)) for k, v in sorted(self._objects.items()) if k.startswith(prefix)]
        yield from found

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def sweep(self) -> int:
        return 0


def open_objects(location: str | os.PathLike[str]) -> Objects:
    """The objects below a local path.

    Raises:
        UserError: The location has a scheme that this version does not serve.
    """
    text = os.fspath(location)
    if "://" in text:
        raise UserError(f"{text}: this version reads and writes local folders only; give a path without '://'")
    return FolderObjects(text)


def read_range(objects: GetRange, key: str, start: int, nbytes: int) -> bytearray:
    """Read `nbytes` bytes of an object into new memory."""
    data = bytearray(nbytes)
    objects.read_into(key, start, memoryview(data))
    return data


def _read_rows_in_python(objects: GetParts, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
    nbytes = _row_nbytes(out, rows)
    if nbytes < SMALL_ROW_NBYTES:
        whole = np.empty((len(rows), *out.shape[1:]), out.dtype)
        for _ in objects.read_parts(key, start, [whole.data.cast("B")]):
            pass
        out[rows[rows >= 0]] = whole[rows >= 0]
        return crc32c(whole.data.cast("B"))
    nowhere = memoryview(bytearray(nbytes))
    parts = [out[row].data.cast("B") if row >= 0 else nowhere for row in rows.tolist()]
    crc = 0
    for part in objects.read_parts(key, start, parts):
        crc = crc32c(part, crc)
    return crc


def _row_nbytes(out: np.ndarray, rows: np.ndarray) -> int:
    """Bytes of a row. Everything is checked even under `python -O`: C will write to these places.

    Raises:
        ValueError: Something would be written outside `out`, or over what is not plain bytes.
    """
    if not out.ndim or not len(out):
        raise ValueError(f"an array of shape {out.shape} has no rows to read into")
    if rows.ndim != 1 or rows.dtype.kind != "i" or not len(rows):
        raise ValueError(f"rows are {rows.dtype} of shape {rows.shape}; some integers along one axis were expected")
    if rows.max() >= len(out):
        raise ValueError(f"row {rows.max()} is past the end of an array of {len(out)} rows")
    if out.dtype.hasobject or not out[0].nbytes:
        raise ValueError(f"rows of {out[0].nbytes} bytes of {out.dtype} cannot be read into")
    if not out[0].flags.c_contiguous or not out.flags.writeable:
        raise ValueError("the rows of the array must be contiguous, and it must be writable")
    return out[0].nbytes


def _check_size(location: str, key: str, nbytes: int, at_most: int | None) -> None:
    if at_most is not None and nbytes > at_most:
        raise ObjectTooLargeError(key, f"{location}/{key} has {nbytes:,} bytes; at most {at_most:,} are read")


def _pieces(data: Buffer | Sequence[Buffer]) -> Sequence[Buffer]:
    return [data] if isinstance(data, bytes | bytearray | memoryview) else data


def _check_prefix(prefix: str) -> None:
    """Raise ValueError if the folder part of a listing's prefix is no plain path."""
    if "/" in prefix:
        check_key(prefix.rpartition("/")[0])


def _key_order(entry: os.DirEntry[str]) -> str:
    """Sorts a folder's entries as the keys below them sort."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)

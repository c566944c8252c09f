"""Named byte objects as files below a folder."""

import ctypes
import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from infra.native import read_rows_function
from infra.object_rows import read_rows_in_python, row_nbytes
from infra.object_verbs import (
    LEFTOVER_SUFFIX,
    Buffer,
    Folder,
    ObjectAccessError,
    ObjectError,
    ObjectInfo,
    ObjectMissingError,
    ShortObjectError,
    check_folder_prefix,
    check_key,
    check_prefix,
    check_size,
    pieces_of,
)

_CACHED_NBYTES = 2**19  # read, then checksummed, while it is still in a core's cache
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


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
                check_size(self.location, key, os.fstat(file.fileno()).st_size, at_most)
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
            return read_rows_in_python(self, key, start, out, rows)
        nbytes = row_nbytes(out, rows)
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
        self._place(key, data, _replace)

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> bool:
        """Write a whole object unless there is one of this key; returns whether it was written.

        A file system without hard links is looked at first, which leaves a narrow race; safety never rests on this.

        Raises:
            ObjectAccessError: As `put`; also where a folder lies in the object's place.
        """
        return self._place(key, data, _link)

    def _place(self, key: str, data: Buffer | Sequence[Buffer], move: Callable[[Path, Path], bool]) -> bool:
        """Write a whole file and move it to its place; again if another job's sweep took it for a leftover."""
        for n_left in (2, 1, 0):
            try:
                with self._whole_file(key, data) as (temporary, path):
                    return move(temporary, path)
            except ObjectAccessError as error:
                if not n_left or not isinstance(error.__cause__, FileNotFoundError):
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _whole_file(self, key: str, data: Buffer | Sequence[Buffer]) -> Iterator[tuple[Path, Path]]:
        """A temporary file with the data, and the object's path; it is deleted if it cannot be put there."""
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{LEFTOVER_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check_inside(key, path)
            try:
                with open(temporary, "xb", buffering=0) as file:
                    for view in pieces_of(data):
                        while view.nbytes:
                            view = view[file.write(view) :]
                yield temporary, path
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ObjectAccessError(key, f"{self.location}/{key} could not be written: {_reason(error)}") from error

    def check_writable(self) -> None:
        """Try whether anything could be written here, without making the folder.

        Raises:
            ObjectAccessError: Nothing could.
        """
        folder = self._root
        try:
            while not folder.exists() and folder != folder.parent:
                folder = folder.parent
            descriptor, name = tempfile.mkstemp(dir=folder, prefix=".probe.", suffix=LEFTOVER_SUFFIX)
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)  # another job may have swept it
        except OSError as error:
            raise ObjectAccessError(".", f"nothing can be written to {self.location}: {_reason(error)}") from error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order. Half-written files are not objects.

        Raises:
            ValueError: The prefix climbs out of the folder.
        """
        check_prefix(prefix)
        yield from self._walk(self._root, "", prefix)

    def _walk(self, folder: Path, folder_key: str, prefix: str) -> Iterator[ObjectInfo]:
        for key, entry in self._entries(folder, folder_key):
            if entry.is_dir():
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(Path(entry.path), f"{key}/", prefix)
            elif key.startswith(prefix) and (info := _listed(key, entry)) is not None:
                yield info

    def _entries(self, folder: Path, folder_key: str) -> Sequence[tuple[str, os.DirEntry[str]]]:
        """What lies in a folder but links, with its key, in key order."""
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=_key_order)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._read_error(folder_key.rstrip("/") or ".", error) from error
        return [(folder_key + entry.name, entry) for entry in entries if not entry.is_symlink()]

    def list_folder(self, prefix: str = "") -> Folder:
        """One level: the objects whose key is the prefix and a name, and the folders with objects somewhere below.

        Raises:
            ValueError: The prefix does not end in "/", or climbs out of the folder.
        """
        check_folder_prefix(prefix)
        found = Folder(objects=[], folders=[])
        for key, entry in self._entries(self._root / prefix, prefix):
            if entry.is_dir():
                if any(self._walk(Path(entry.path), f"{key}/", "")):
                    found.folders.append(f"{key}/")
            elif (info := _listed(key, entry)) is not None:
                found.objects.append(info)
        return found

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
                if name.endswith(LEFTOVER_SUFFIX):
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


def _replace(temporary: Path, path: Path) -> bool:
    os.replace(temporary, path)
    return True


def _link(temporary: Path, path: Path) -> bool:
    """Give a whole file its name, unless something has it; returns whether it got it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.is_dir():
            raise
        if isinstance(error, FileExistsError) or (error.errno in _NO_LINKS and path.exists()):
            return False
        if error.errno not in _NO_LINKS:
            raise
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _listed(key: str, entry: os.DirEntry[str]) -> ObjectInfo | None:
    """What a listing says of a file; None for one that is half written, or was deleted while we listed."""
    if entry.name.endswith(LEFTOVER_SUFFIX):
        return None
    try:
        return ObjectInfo(key=key, nbytes=entry.stat().st_size)
    except FileNotFoundError:
        return None


def _key_order(entry: os.DirEntry[str]) -> str:
    """Sorts a folder's entries as the keys below them sort."""
    return f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)

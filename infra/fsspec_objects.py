"""Objects that are only read, wherever they are: folders, S3, and through fsspec whatever else it has a driver for."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import fsspec

from infra.console import UserError
from infra.object_verbs import (
    Folder,
    Get,
    GetRange,
    List,
    ListFolder,
    ObjectAccessError,
    ObjectError,
    ObjectInfo,
    ObjectMissingError,
    ShortObjectError,
    check_folder_prefix,
    check_key,
    check_prefix,
    check_size,
)
from infra.objects import open_objects


class ReadOnlyObjects(Get, GetRange, List, ListFolder, Protocol):
    """The verbs that read."""

    @property
    def location(self) -> str: ...


def open_read_only(location: str) -> ReadOnlyObjects:
    """The objects below a local path, s3://bucket/prefix, or any URL that fsspec has a driver for.

    Raises:
        UserError: No driver serves such a URL, or it is not installed; says which.
    """
    if "://" not in location or location.startswith("s3://"):
        return open_objects(location)
    return FsspecObjects(location)


def split_key(location: str) -> tuple[str, str]:
    """The folder that an object's location lies in, and its key there.

    Raises:
        UserError: The location names a whole bucket or host, and no object.
    """
    folder, _, key = location.rpartition("/")
    if not key or folder.endswith(("/", ":")) or "//" not in folder:
        raise UserError(f"{location} names no object; give one such as s3://bucket/folder/file")
    return folder, key


class FsspecObjects:
    """Objects of a file system of fsspec's, only to be read. Nothing is cached. Threads may share it.

    Args:
        location: A URL such as gs://bucket/prefix or memory://folder.

    Raises:
        UserError: As `open_read_only`.
    """

    def __init__(self, location: str) -> None:
        self._location = location.rstrip("/")
        self._fs, self._root = _open(location)

    @property
    def location(self) -> str:
        return self._location

    def __repr__(self) -> str:
        return f"FsspecObjects({self.location!r})"

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        """Read a whole object; errors as of the other back ends."""
        path = self._path(key)
        try:
            if at_most is not None:
                check_size(self.location, key, self._nbytes(key), at_most)
            return self._fs.cat_file(path)
        except ObjectError:
            raise
        except Exception as error:
            raise self._error(key, "read", error) from error

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes from `start` on; errors as of the other back ends."""
        path, stop = self._path(key), start + buffer.nbytes
        try:
            data = self._fs.cat_file(path, start=start, end=stop) if buffer.nbytes else b""
            if len(data) < buffer.nbytes:
                found = self._nbytes(key)
                raise ShortObjectError(
                    key, f"{self.location}/{key}: bytes {start} to {stop} were asked for, the object has {found}"
                )
        except ObjectError:
            raise
        except Exception as error:
            raise self._error(key, "read", error) from error
        if len(data) > buffer.nbytes:
            raise ObjectAccessError(key, f"{self.location}/{key}: the server sends more than the range asked for")
        buffer.cast("B")[:] = data

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order; one folder is held at a time, and those above it."""
        check_prefix(prefix)
        yield from self._walk(prefix[: prefix.rfind("/") + 1], prefix)

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        level = self.list_folder(folder)
        infos = {info.key: info for info in level.objects}
        for place in sorted([*level.folders, *infos]):
            if place in infos:
                if place.startswith(prefix):
                    yield infos[place]
            elif place.startswith(prefix) or prefix.startswith(place):
                yield from self._walk(place, prefix)

    def list_folder(self, prefix: str = "") -> Folder:
        """One level: the objects whose key is the prefix and a name, and the folders."""
        check_folder_prefix(prefix)
        path = self._place(prefix).rstrip("/")
        try:
            entries = self._fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        except Exception as error:
            raise self._error(prefix or ".", "listed", error) from error
        objects, folders = [], []
        for entry in entries:
            name = entry["name"].rstrip("/")
            if name.strip("/") == path.strip("/"):
                continue  # what some tools leave to show an empty folder; or the prefix is itself an object
            key = prefix + name.rpartition("/")[2]
            if entry["type"] == "directory":
                folders.append(f"{key}/")
            elif entry["type"] == "file":
                objects.append(ObjectInfo(key=key, nbytes=self._listed_nbytes(key, entry)))
        return Folder(objects=sorted(objects, key=lambda info: info.key), folders=sorted(folders))

    def _listed_nbytes(self, key: str, entry: dict[str, Any]) -> int:
        return self._nbytes(key) if entry["size"] is None else entry["size"]

    def _nbytes(self, key: str) -> int:
        try:
            nbytes = self._fs.size(self._place(key))
        except Exception as error:
            raise self._error(key, "looked at", error) from error
        if nbytes is None:
            raise ObjectAccessError(key, f"{self.location}/{key}: the server does not say how large it is")
        return nbytes

    def _path(self, key: str) -> str:
        return self._place(check_key(key))

    def _place(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}"

    def _error(self, key: str, done: str, error: Exception) -> ObjectError:
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return ObjectMissingError(key, f"{self.location}/{key} is missing")
        cause = (str(error).splitlines() or [""])[0]
        return ObjectAccessError(
            key, f"{self.location}/{key} could not be {done}: {f'{type(error).__name__}: {cause}'.removesuffix(': ')}"
        )


@cache
def _open(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(location, use_listings_cache=False)
    except ImportError as error:
        raise UserError(f"{location} needs a driver that is not installed: {error}") from error
    except ValueError as error:
        raise UserError(
            f"{location} cannot be read: {error}. Give a local path, s3://, or another of fsspec's"
        ) from error

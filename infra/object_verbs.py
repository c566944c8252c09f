"""What may be asked of named byte objects, and what can go wrong: one protocol for each verb.

A function asks for what it uses: a reader takes `GetRange`, a writer `Put`. Keys are relative POSIX paths. One put
makes one whole object appear at once, or none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Buffer = bytes | bytearray | memoryview

LEFTOVER_SUFFIX = ".put-tmp"  # of half-written files; no key ends so


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """One level of a listing: the objects right there, and the folders, each ending in "/"."""

    objects: list[ObjectInfo]
    folders: list[str]


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
class PutNew(Protocol):
    """Whole objects that replace nothing. True: written; False: there was one, which is left alone."""

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> bool: ...


@runtime_checkable
class List(Protocol):
    """Keys and sizes below a prefix."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]: ...


@runtime_checkable
class ListFolder(Protocol):
    """Keys, sizes and folders of one level; the prefix is "" or ends in "/"."""

    def list_folder(self, prefix: str = "") -> Folder: ...


@runtime_checkable
class Delete(Protocol):
    """Remove one object; removing a missing one is no error."""

    def delete(self, key: str) -> None: ...


@runtime_checkable
class Objects(Get, GetRange, GetParts, GetRows, Put, PutNew, List, ListFolder, Delete, Protocol):
    """All verbs together, for code that owns a store."""

    @property
    def location(self) -> str: ...

    def sweep(self) -> int: ...

    def check_writable(self) -> None: ...


def check_key(key: str) -> str:
    """Return the key, or raise ValueError for one that is empty, absolute or climbs out of the store."""
    parts = key.split("/")
    plain = key.isprintable() and "\\" not in key and not any(part in ("", ".", "..") for part in parts)
    if not plain or key.endswith(LEFTOVER_SUFFIX):
        raise ValueError(f"object key {key!r} is not a plain relative path such as 'layer_00/cls/c/0/0'")
    return key


def check_size(location: str, key: str, nbytes: int, at_most: int | None) -> None:
    if at_most is not None and nbytes > at_most:
        raise ObjectTooLargeError(key, f"{location}/{key} has {nbytes:,} bytes; at most {at_most:,} are read")


def pieces_of(data: Buffer | Sequence[Buffer]) -> Iterator[memoryview]:
    """The pieces of an object, each as plain bytes; nothing is copied."""
    for piece in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
        yield memoryview(piece).cast("B")


def check_prefix(prefix: str) -> None:
    """Raise ValueError if the folder part of a listing's prefix is no plain path."""
    if "/" in prefix:
        check_key(prefix.rpartition("/")[0])


def check_folder_prefix(prefix: str) -> None:
    """Raise ValueError for a prefix that is not a folder's: neither empty nor a plain path and "/"."""
    if prefix:
        if not prefix.endswith("/"):
            raise ValueError(f"the prefix of a folder is empty or ends in '/', unlike {prefix!r}")
        check_key(prefix[:-1])

"""Named byte objects in a folder, in memory or on S3: the verbs, back ends and errors that other packages use."""

import os
import re

from infra.console import UserError
from infra.folder_objects import FolderObjects
from infra.memory_objects import MemoryObjects
from infra.object_rows import SMALL_ROW_NBYTES
from infra.object_verbs import (
    Buffer,
    Delete,
    Folder,
    Get,
    GetParts,
    GetRange,
    GetRows,
    List,
    ListFolder,
    ObjectAccessError,
    ObjectError,
    ObjectInfo,
    ObjectMissingError,
    Objects,
    ObjectTooLargeError,
    Put,
    PutNew,
    ShortObjectError,
    check_key,
)

__all__ = [
    "SMALL_ROW_NBYTES",
    "Buffer",
    "Delete",
    "Folder",
    "FolderObjects",
    "Get",
    "GetParts",
    "GetRange",
    "GetRows",
    "List",
    "ListFolder",
    "MemoryObjects",
    "ObjectAccessError",
    "ObjectError",
    "ObjectInfo",
    "ObjectMissingError",
    "ObjectTooLargeError",
    "Objects",
    "Put",
    "PutNew",
    "ShortObjectError",
    "check_key",
    "check_location",
    "open_objects",
    "read_range",
]


#: What begins like an address and names no bucket or host: "s3:", "s3://", "s3:///x", "s3:/bucket/x".
_BROKEN_ADDRESS = re.compile(r"[a-z0-9+.-]+:/{0,2}|s3:(?!//[^/]).*", re.IGNORECASE | re.DOTALL)


def check_location(text: str) -> None:
    """Refuse what was meant as an address, and would be taken for a folder of this machine.

    Raises:
        UserError: Says what is missing, and how such a folder can be named all the same.
    """
    if _BROKEN_ADDRESS.fullmatch(text):
        raise UserError(
            f"{text} is no whole address: no bucket follows '://'. Is a shell variable in it unset? Give "
            f"s3://bucket/prefix, or ./{text.rstrip('/')} for a folder of this name"
        )


def open_objects(location: str | os.PathLike[str]) -> Objects:
    """The objects below a local path, or below a prefix of a bucket: `s3://bucket/prefix`.

    Raises:
        UserError: The location has a scheme that this version does not serve, or is an address without a bucket.
    """
    text = os.fspath(location)
    check_location(text)
    if text.startswith("s3://"):
        from infra.s3 import S3Objects  # imported late: half a second that local work need not wait

        return S3Objects(text)
    if "://" in text:
        raise UserError(f"{text}: give a local path without '://', or s3://bucket/prefix")
    return FolderObjects(text)


def read_range(objects: GetRange, key: str, start: int, nbytes: int) -> bytearray:
    """Read `nbytes` bytes of an object into new memory."""
    data = bytearray(nbytes)
    objects.read_into(key, start, memoryview(data))
    return data

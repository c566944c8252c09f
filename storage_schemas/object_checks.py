"""Whether the bytes of a data object are those that were committed. Never raises for a bad one."""

import numpy as np
from crc32c import crc32c

from infra.objects import GetRange, ObjectError, ObjectMissingError
from storage_schemas.commit import ObjectRecord
from storage_schemas.errors import Problem


def check_object(
    objects: GetRange, listed_nbytes: int | None, shard: int, key: str, record: ObjectRecord
) -> list[Problem]:
    """Problems of one data object; `listed_nbytes` is its size if a listing gave it."""
    return read_checked(objects, listed_nbytes, shard, key, record)[1]


def read_checked(
    objects: GetRange, listed_nbytes: int | None, shard: int, key: str, record: ObjectRecord
) -> tuple[memoryview, list[Problem]]:
    """The bytes of a data object, as far as they could be read, and its problems."""

    def problem(what: str, found: str) -> tuple[memoryview, list[Problem]]:
        expected = f"{record.nbytes:,} bytes"
        return memoryview(b""), [Problem(key=key, what=what, expected=expected, found=found, shard=shard)]

    if listed_nbytes is not None and listed_nbytes != record.nbytes:  # never read what may be far too large
        return problem("object has the wrong size", f"{listed_nbytes:,} bytes")
    data = np.empty(record.nbytes, np.uint8).data
    try:
        objects.read_into(key, 0, data)
    except ObjectMissingError:
        return problem("object is missing", "nothing")
    except ObjectError as error:
        return problem("unreadable", str(error))
    return data, byte_problems(data, shard, key, record)


def byte_problems(data: memoryview, shard: int, key: str, record: ObjectRecord) -> list[Problem]:
    """How the bytes of a data object differ from what was committed."""
    # Chunk by chunk first: the CRC32C of bytes followed by their own CRC32C is a constant, so over a whole object,
    # where each chunk carries its own, it cannot tell one object from another. It then covers what lies between chunks.
    bad = [
        Problem(key=key, what=f"chunk {i}", expected=f"crc32c {crc:08x}", found=f"crc32c {found:08x}", shard=shard)
        for i, (offset, nbytes, crc) in enumerate(record.chunks.tolist())
        if (found := crc32c(data[offset : offset + nbytes])) != crc
    ]
    if bad or (found := crc32c(data)) == record.crc32c:
        return bad
    return [
        Problem(
            key=key,
            what="bytes between or behind the chunks",
            expected=f"crc32c {record.crc32c:08x}",
            found=f"crc32c {found:08x}",
            shard=shard,
        )
    ]

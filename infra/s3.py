"""Objects below a prefix of an S3 bucket, Amazon's or any other server's.

One PUT writes one object, and a ranged GET fetches only the bytes asked for. What may pass (5xx, SlowDown, resets,
stalls, replies cut off) is tried again with back-off until a deadline, and said; what will not (403, no bucket) is
raised at once. obstore carries the objects, botocore the listings: it alone lists by any prefix, page by page.
"""

import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from infra.object_rows import row_nbytes, scatter_rows
from infra.object_verbs import (
    Buffer,
    Folder,
    ObjectAccessError,
    ObjectInfo,
    ObjectMissingError,
    ShortObjectError,
    check_folder_prefix,
    check_key,
    check_prefix,
    check_size,
    pieces_of,
)
from infra.retry import Patience, TransientError
from infra.s3_connection import S3Connection
from infra.s3_errors import failure_of, status_of
from infra.s3_settings import S3Settings, read_settings, split_location

STALL_S = 20.0
CONCURRENCY = 32
_PAST_THE_END = 416
_CONFLICT = 409
_NOT_OF_THE_CONDITION = (401, 403, 404)


class S3Objects:
    """Objects on S3. Threads may share one; processes open the location again.

    Args:
        location: s3://bucket or s3://bucket/prefix.
        settings: How to reach the server; by default what the environment says.
        patience: How long to try.
        stall_s: A reply that brings nothing for so long is given up and asked for again.
        concurrency: Requests in flight at once, at most.
    """

    def __init__(
        self,
        location: str,
        *,
        settings: S3Settings | None = None,
        patience: Patience | None = None,
        stall_s: float = STALL_S,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self._bucket, prefix = split_location(location)
        self._base = f"{prefix}/" if prefix else ""
        self._location = f"s3://{self._bucket}/{prefix}".rstrip("/")
        self._connection = S3Connection(
            self._location,
            self._bucket,
            settings or read_settings(),
            patience or Patience(),
            stall_s=stall_s,
            concurrency=concurrency,
        )
        self._probing = threading.Lock()
        self._honours_conditions: bool | None = None

    @property
    def location(self) -> str:
        return self._location

    @property
    def requests(self) -> Counter[str]:
        """As sent, tries again included: put, get, list, delete, head; and bytes_out, bytes_in."""
        return self._connection.requests

    def __repr__(self) -> str:
        return f"S3Objects({self.location!r})"

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        """Read a whole object.

        Raises:
            ObjectMissingError: There is no such object.
            ObjectTooLargeError: It has more bytes than `at_most`; its contents were not fetched.
            ObjectAccessError: The server refused, or failed until the deadline.
        """
        path = self._path(key)

        def fetch(store: S3Store) -> bytes:
            reply = obstore.get(store, path)
            check_size(self.location, key, reply.meta["size"], at_most)
            return reply.bytes().to_bytes()

        data = self._connection.send("get", key, fetch, nbytes=None)
        self._connection.count("bytes_in", len(data))
        return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill the whole buffer with the bytes from `start` on.

        Raises:
            ObjectMissingError: There is no such object.
            ShortObjectError: The object ends first; names both sizes.
            ObjectAccessError: The server refused, or failed until the deadline.
        """
        for _ in self.read_parts(key, start, [buffer]):
            pass

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        """Fill buffers one after another with the bytes from `start` on; yields each when it is full."""
        data = np.frombuffer(self._range(key, start, sum(buffer.nbytes for buffer in buffers)), np.uint8)
        place = 0
        for buffer in buffers:
            if buffer.nbytes:  # copied by numpy, as that lets other threads run
                np.frombuffer(buffer, np.uint8)[:] = data[place : place + buffer.nbytes]
            place += buffer.nbytes
            yield buffer

    def read_rows(self, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
        """Read the bytes from `start` on into rows of an array, and return their CRC32C; as a folder does."""
        data = self._range(key, start, row_nbytes(out, rows) * len(rows))
        return scatter_rows(np.frombuffer(data, np.uint8), out, rows)

    def _range(self, key: str, start: int, nbytes: int) -> memoryview:
        path, stop = self._path(key), start + nbytes
        if not nbytes:
            self._size(key)
            return memoryview(b"")

        def fetch(store: S3Store) -> memoryview | int | None:
            """The bytes; or the object's size, or None where it is not told, if it ends first."""
            try:
                reply = obstore.get(store, path, options={"range": (start, stop)})
            except BaseError as error:
                if status_of(error) == _PAST_THE_END:
                    return None
                raise
            if tuple(reply.range) != (start, stop):
                return reply.meta["size"]
            data = memoryview(reply.bytes())
            if data.nbytes != nbytes:
                raise TransientError(f"{data.nbytes:,} of {nbytes:,} bytes came", "cut_off")
            return data

        found = self._connection.send("get", key, fetch, nbytes=nbytes)
        if not isinstance(found, memoryview):
            size = self._size(key) if found is None else found
            raise ShortObjectError(
                key, f"{self.location}/{key}: bytes {start} to {stop} were asked for, the object has {size}"
            )
        self._connection.count("bytes_in", nbytes)
        return found

    def _size(self, key: str) -> int:
        path = self._path(key)
        return self._connection.send("head", key, lambda store: obstore.head(store, path)["size"])

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole object in one PUT, replacing one of the same key.

        Raises:
            ObjectAccessError: The server refused, or failed until the deadline. One of the two is there.
        """
        self._write(key, data)

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> bool:
        """Write a whole object unless there is one of this key; returns whether it was written.

        Exact where the server honours `If-None-Match`, which is tried out once. Elsewhere it is looked for first and
        then written: two writers at one moment may both be told that they were first, so safety must not rest on it.
        """
        check_key(key)
        if not self._conditions_work():
            if self._exists(key):
                return False
            self._write(key, data)
            return True
        n_tries = self._write(key, data, only_new=True)
        if n_tries == 0:
            return True
        # An earlier try may have been ours, with its reply lost: then the object that is there has our bytes.
        return n_tries > 1 and self.get(key) == b"".join(pieces_of(data))

    def _write(self, key: str, data: Buffer | Sequence[Buffer], *, only_new: bool = False) -> int:
        """0 if it was written; else the number of the try that was told of an object already there."""
        path, n_tries = self._path(key), 0
        pieces = [piece for piece in pieces_of(data) if piece.nbytes]
        nbytes = sum(piece.nbytes for piece in pieces)

        def write(store: S3Store) -> int:
            nonlocal n_tries
            n_tries += 1
            self._connection.count("bytes_out", nbytes)
            try:
                obstore.put(store, path, pieces, mode="create" if only_new else "overwrite", use_multipart=False)
            except AlreadyExistsError as error:
                if status_of(error) == _CONFLICT:  # another writer at this very moment: who wins is not yet known
                    raise
                return n_tries
            return 0

        return self._connection.send("put", key, write, nbytes=nbytes)

    def _exists(self, key: str) -> bool:
        try:
            self._size(key)
        except ObjectMissingError:
            return False
        return True

    def _conditions_work(self) -> bool:
        """Whether conditional PUTs do what they should; tried once."""
        with self._probing:
            if self._honours_conditions is None:
                key = _probe_key()
                try:
                    self._write(key, b"one")
                    self._honours_conditions = self._is_refused_over(key)
                finally:
                    self.delete(key)
            return self._honours_conditions

    def _is_refused_over(self, key: str) -> bool:
        """Whether a conditional PUT over this object is refused because it is there.

        Some servers write it all the same, and others answer 400 or 501 to all that are conditional: both is False.
        """
        path, data = self._path(key), b"two"

        def write(store: S3Store) -> bool:
            self._connection.count("bytes_out", len(data))
            try:
                obstore.put(store, path, data, mode="create", use_multipart=False)
            except BaseError as error:
                failure = failure_of(error)
                if failure is None or failure.passes or failure.status in (0, *_NOT_OF_THE_CONDITION):
                    raise
                return isinstance(error, AlreadyExistsError)
            return False

        return self._connection.send("put", key, write, nbytes=len(data))

    def check_writable(self) -> None:
        """Write a small object and delete it.

        Raises:
            ObjectAccessError: The server refuses it.
        """
        key = _probe_key()
        try:
            self.put(key, b"probe")
            self.delete(key)
        except ObjectAccessError as error:
            raise ObjectAccessError(key, f"nothing can be written to {self.location}: {error}") from error

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""
        path = self._path(key)
        try:
            self._connection.send("delete", key, lambda store: obstore.delete(store, path))
        except ObjectMissingError:
            return

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order; a page of a thousand is held at a time.

        Raises:
            ObjectAccessError: The server refused, failed until the deadline, or lists in another order.
        """
        check_prefix(prefix)
        last = ""
        for page in self._pages(prefix):
            for info in self._infos(page):
                if info.key < last:
                    where = f"{self.location}/{prefix}"
                    raise ObjectAccessError(
                        info.key, f"{where}: the server lists {info.key} after {last}; key order was expected"
                    )
                if info.key != last:  # rclone lists one twice that is just being replaced
                    yield info
                last = info.key

    def list_folder(self, prefix: str = "") -> Folder:
        """One level: the objects whose key is the prefix and a name, and the folders."""
        check_folder_prefix(prefix)
        objects: dict[str, ObjectInfo] = {}
        folders: set[str] = set()
        for page in self._pages(prefix, Delimiter="/"):
            objects |= {info.key: info for info in self._infos(page)}
            folders |= {found["Prefix"].removeprefix(self._base) for found in page.get("CommonPrefixes", [])}
        return Folder(objects=[objects[key] for key in sorted(objects)], folders=sorted(folders))

    def _infos(self, page: dict[str, Any]) -> Iterator[ObjectInfo]:
        for found in page.get("Contents", []):
            if not found["Key"].endswith("/"):  # what some tools leave to show an empty folder
                yield ObjectInfo(key=found["Key"].removeprefix(self._base), nbytes=found["Size"])

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        tokens = set[str]()
        while True:
            page = self._page(prefix, options)
            yield page
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if not token or token in tokens:
                found = "one that it gave before" if token else "none"
                raise ObjectAccessError(
                    prefix,
                    f"{self.location}/{prefix} could not be listed: the server says that more follows; expected a new "
                    f"token to go on with, and got {found}",
                )
            tokens.add(token)
            options = {**options, "ContinuationToken": token}

    def _page(self, prefix: str, options: dict[str, str]) -> dict[str, Any]:
        def fetch(store: S3Store) -> dict[str, Any]:
            client = self._connection.client
            return client.list_objects_v2(Bucket=self._bucket, Prefix=self._base + prefix, **options)

        return self._connection.send("list", prefix, fetch)

    def sweep(self) -> int:
        """Nothing to do: a PUT that was cut off leaves nothing behind."""
        return 0

    def _path(self, key: str) -> str:
        return self._base + check_key(key)


def _probe_key() -> str:
    return f"log/probe-{secrets.token_hex(8)}"

"""The writing half of a shard: whose it is, its objects, its commit; and what that took of a remote store."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from infra.metrics import StageClock
from infra.objects import Buffer, ObjectError, ObjectMissingError, Objects
from pipeline.claims import Claims
from pipeline.dispatch import FatalError
from pipeline.locations import is_remote
from storage_schemas.commit import Commit, Fidelity, read_commit
from storage_schemas.create import StoreDocument
from storage_schemas.documents import MAX_DOCUMENT_NBYTES
from storage_schemas.errors import SchemaError
from storage_schemas.keys import commit_key, sharded_array_paths
from storage_schemas.shard_buffers import EncodedObject, ShardBuffers, encode_statistics

#: Objects on their way to a remote store at once, per worker, beside the threads that work on micro-batches.
N_PUT_THREADS = 16


class ShardWriter:
    """Writes shards of one store; shared by the threads of a worker.

    On a local disk whoever encodes an object also writes it, which measured best. Requests to a remote store would keep
    those threads waiting, so they have threads of their own.

    Args:
        objects: Of the store.
        document: Its identity.
        encoders: Threads that encode.
        run_id: Of the run; None makes no claims and looks for nothing that is there.
    """

    def __init__(self, objects: Objects, document: StoreDocument, encoders: Executor, run_id: str | None) -> None:
        self._objects, self._document, self._encoders = objects, document, encoders
        self._claims = Claims(objects, run_id) if run_id else None
        self._run_id = run_id or ""
        self._putters = ThreadPoolExecutor(N_PUT_THREADS, "put") if is_remote(objects.location) else None
        self._requests = Since(lambda: counted_requests(objects))

    def close(self) -> None:
        """End the threads."""
        if self._putters is not None:
            self._putters.shutdown()

    def find(self, shard: int) -> tuple[str, Commit | None]:
        """Claim a shard, and look whether it is done.

        Returns:
            The run that has it, which is ours if it is for us to do, and its commit if there is a sound one; "" if it
            is done and nobody had it any more.
        """
        if self._claims is None:
            return self._run_id, None
        with fatal():
            holder, new = self._claims.take(shard)
            commit = self._commit(shard)
        return "" if new and commit is not None else holder, commit

    def write(
        self, shard: int, buffers: ShardBuffers, statistics: np.ndarray, clock: StageClock
    ) -> list[EncodedObject]:
        """Encode and put every data object of a shard."""

        def encode(path: str) -> EncodedObject:
            with clock("encode"):
                encoded = buffers.encode(path, shard)
            if self._putters is None:
                put(encoded)
            return encoded

        def put(encoded: EncodedObject) -> None:
            with clock("write"):
                self.put(encoded.key, encoded.pieces)

        encoding = [self._encoders.submit(encode, path) for path in sharded_array_paths(buffers.spec)]
        putting: list[Future[None]] = []
        with _ended(encoding), _ended(putting):
            written = []
            for future in encoding:
                encoded = future.result()
                written.append(encoded)
                if self._putters is not None:
                    putting.append(self._putters.submit(put, encoded))
            encoded = encode_statistics(shard, statistics)
            put(encoded)
            for put_ended in putting:
                put_ended.result()
        return [*written, encoded]

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        """Put one object.

        Raises:
            FatalError: The store does not take it, so no shard can pass.
        """
        with fatal():
            self._objects.put(key, data)

    def new_requests(self) -> dict[str, int]:
        """Requests, and bytes, to a remote store since this was last asked; empty for a local one."""
        return self._requests.new()

    def _commit(self, shard: int) -> Commit | None:
        spec, digest = self._document.spec, self._document.digest
        try:
            data = self._objects.get(commit_key(shard), at_most=MAX_DOCUMENT_NBYTES)
            return read_commit(spec, digest, shard, data)
        except (ObjectMissingError, SchemaError):  # a damaged one is done again
            return None


class Since:
    """What has been counted since this was last asked. Threads may share it.

    Args:
        count: All counts so far.
        told: Those that are no news.
    """

    def __init__(self, count: Callable[[], Counter[str]], told: Counter[str] | None = None) -> None:
        self._count, self._told, self._lock = count, Counter(told or {}), threading.Lock()

    def new(self) -> dict[str, int]:
        """The news, by name; none of them is zero."""
        with self._lock:
            new = self._count()
            new.subtract(self._told)
            self._told.update(new)
        return {name: n for name, n in new.items() if n}


def counted_requests(objects: object) -> Counter[str]:
    """What a remote store has been asked so far, by verb, with bytes_in and bytes_out; empty for a local one."""
    return Counter(getattr(objects, "requests", {}))


def check_fidelity(fidelity: dict[str, Fidelity], precision: str, max_error: float | None) -> None:
    """Refuse a shard whose rounding lost more than the person allows.

    Raises:
        FatalError: Names the worst layer and kind, both values, and what would hold the bound.
    """
    if max_error is None or not fidelity:
        return
    path, worst = max(fidelity.items(), key=lambda item: item[1].relative_mse)
    if not worst.relative_mse <= max_error:
        message = too_inexact(path, worst.relative_mse, precision, max_error)
        raise FatalError(
            f"{message}. Nothing of this shard was written; to go on in the same STORE with other settings, give "
            "ARGS=--overwrite"
        )


#: Largest relative MSE of rounding to so many bits: a third of the square of half a unit in the last place.
_BOUNDS = {"int8": float("inf"), "bfloat16": 2.0**-16 / 3, "float16": 2.0**-22 / 3, "float32": 0.0}


def too_inexact(path: str, found: float, precision: str, max_error: float) -> str:
    """The message about patches that a precision does not hold well enough."""
    better = list(_BOUNDS)[list(_BOUNDS).index(precision) + 1 :]
    exact = next(name for name in better if _BOUNDS[name] <= max_error)
    layer, _, kind = path.partition("/")
    return (
        f"{layer}, {kind}: the relative MSE of {precision} against float32 is {found:.2e}, and MAX_ERROR={max_error:g} "
        f"allows no more than that. PRECISION={exact} would hold it, in another STORE"
    )


@contextmanager
def fatal() -> Iterator[None]:
    """A store that fails, after all retries, ends the whole job.

    Raises:
        FatalError: Instead of any error of the store; names the object.
    """
    try:
        yield
    except ObjectError as error:
        raise FatalError(f"{error}. What is committed stays valid; the same command goes on from there") from error


@contextmanager
def _ended(futures: Sequence[Future]) -> Iterator[None]:
    """Leave only when all of them have ended: they use buffers that the next shard will get."""
    try:
        yield
    finally:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()

"""Kill an extraction at an exact moment: in children that are forked from a warm process, by `os._exit`."""

import gc
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

import pipeline.job
import pipeline.shard
from infra.objects import Buffer, open_objects
from pipeline.config import ExtractConfig
from storage_schemas.keys import LOG_PREFIX
from tests.pipeline_jobs import ALONE, run_job

DIED = 137  # what a shell says of a process that was killed with signal 9
FINISHED = 0
CHILD_TIMEOUT_S = 500


@dataclass(frozen=True, kw_only=True)
class Crash:
    """A moment: before, during or after the n-th put or delete, counted from 1, of keys that start with a prefix.

    Keys under log/ count only if the prefix asks for them: a second thread writes there now and then.
    """

    when: Literal["before", "during", "after"]
    n: int
    prefix: str = ""
    verb: Literal["put", "delete"] = "put"


class CrashingObjects:
    """Objects in a folder or on S3 whose process dies at one moment."""

    crash: Crash
    n_seen = 0

    def __init__(self, location: str) -> None:
        self._objects = open_objects(location)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        self._put(self._objects.put, key, data)

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> bool:
        return self._put(self._objects.put_new, key, data)

    def delete(self, key: str) -> None:
        the_moment = self._is_the_moment("delete", key)
        if not the_moment or self.crash.when == "after":
            self._objects.delete(key)
        if the_moment:
            os._exit(DIED)

    def _put(self, put: Callable[..., Any], key: str, data: Buffer | Sequence[Buffer]) -> Any:
        if not self._is_the_moment("put", key):
            return put(key, data)
        if self.crash.when == "during" and self._objects.location.startswith("s3://"):
            _upload_half(f"{self._objects.location}/{key}", _joined(data))
        elif self.crash.when == "during":
            put(key, _TornWrite([data] if isinstance(data, Buffer) else data))
        elif self.crash.when == "after":
            put(key, data)
        os._exit(DIED)

    def _is_the_moment(self, verb: str, key: str) -> bool:
        counts = key.startswith(self.crash.prefix) and (self.crash.prefix or not key.startswith(LOG_PREFIX))
        if verb != self.crash.verb or not counts:
            return False
        CrashingObjects.n_seen += 1
        return CrashingObjects.n_seen == self.crash.n


class _TornWrite(list):
    """Buffers of which only the first half is ever written."""

    def __iter__(self) -> Iterator[memoryview]:
        whole = _joined(list.__iter__(self))
        yield memoryview(whole[: len(whole) // 2])
        os._exit(DIED)


def _joined(data: Buffer | Iterable[Buffer]) -> bytes:
    pieces = [data] if isinstance(data, Buffer) else data
    return b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces)


def _upload_half(location: str, whole: bytes) -> None:
    """What a server sees of an upload whose process dies in the middle of it."""
    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    connection = socket.create_connection((endpoint.hostname, endpoint.port))
    path = location.removeprefix("s3:/")
    connection.sendall(f"PUT {path} HTTP/1.1\r\nHost: s3\r\nContent-Length: {len(whole)}\r\n\r\n".encode())
    connection.sendall(whole[: len(whole) // 2])


def run_and_crash(jobs: Sequence[tuple[ExtractConfig, Crash]], warm_up: ExtractConfig) -> list[int]:
    """Run each job in a process of its own that dies at its moment.

    Args:
        jobs: What to run, and when it dies.
        warm_up: A job into a folder that is done in peace, so that children need not begin from nothing.

    Returns:
        Their exit codes: DIED, or FINISHED if the moment never came.
    """
    context = multiprocessing.get_context("forkserver")  # the test's own process may have threads, which forks dislike
    context.set_forkserver_preload(["tests.trainer.preload"])
    here, there = context.Pipe()
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    server = context.Process(target=_serve, args=(jobs, warm_up, environment, there))
    server.start()
    there.close()
    try:
        return here.recv()
    finally:
        server.join(CHILD_TIMEOUT_S)


def _serve(
    jobs: Sequence[tuple[ExtractConfig, Crash]],
    warm_up: ExtractConfig,
    environment: Mapping[str, str],
    answer: Connection,
) -> None:
    os.environ.update(environment)  # it was forked from a process that may be older than a test's S3 server
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    run_job(warm_up, ALONE)
    gc.collect()
    pipeline.job.open_objects = pipeline.shard.open_objects = CrashingObjects
    answer.send([_die_in_child(config, crash) for config, crash in jobs])


def _die_in_child(config: ExtractConfig, crash: Crash) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(CHILD_TIMEOUT_S)  # a hang becomes an exit code that no test expects
    CrashingObjects.crash = crash
    try:
        run_job(config, ALONE)
    except BaseException:  # noqa: BLE001 - told by the exit code, in a process that is about to end
        os._exit(1)
    os._exit(FINISHED)

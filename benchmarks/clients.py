"""S3 clients side by side on two unrelated local servers: obstore, s3fs, and our objects, which use obstore."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from benchmarks.rounds import Rates, run_rounds
from benchmarks.s3_environment import s3_environment
from infra.objects import Objects, open_objects

_BUCKET, _KEY, _SECRET = "bench", "bench-key", "bench-secret"
_START_S = 60
NOTES = (
    "All clients and the server share the cores, so that what a server takes of them is in every number; read the "
    "ratios. Each object is one PUT. moto answers one request at a time; rclone serves a folder.",
    "From rclone whole objects of a chunk's size are read: it answers a ranged GET with 200, which obstore refuses.",
    "s3fs is called from threads, as the store calls its objects; they share its one event loop.",
)

Call = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class ClientsBenchmark:
    """Sizes.

    Attributes:
        large_nbytes: Of one object of ViT-B/14 patches.
        chunk_nbytes: Of one chunk of it.
        n_chunks: Read or written in one go.
        n_keys: Listed.
        threads: That read and write chunks.
        n_rounds: Each client takes a turn in each.
        least_s: Of a turn.
    """

    large_nbytes: int = 100_663_296
    chunk_nbytes: int = 6_291_456
    n_chunks: int = 16
    n_keys: int = 1000
    threads: int = 8
    n_rounds: int = 5
    least_s: float = 1.0


QUICK = ClientsBenchmark(large_nbytes=300_000, chunk_nbytes=50_000, n_chunks=4, n_keys=30, n_rounds=1, least_s=0.0)


@dataclass(frozen=True)
class Client:
    """One client's calls, bound to a bucket."""

    put: Callable[[str, bytes], object]
    get: Callable[[str, int, int], object]
    get_whole: Callable[[str], object]
    count: Callable[[str], int]


def run(config: ClientsBenchmark) -> Result:
    """Start both servers in turn, fill them, take turns, compare."""
    rows: list[dict[str, Cell]] = []
    details: dict[str, Any] = {}
    for name, command in (("moto", _moto), ("rclone", _rclone)):
        with (
            _server(command) as endpoint,
            s3_environment(endpoint, _KEY, _SECRET),
            ThreadPoolExecutor(config.threads) as pool,
        ):
            objects = open_objects(f"s3://{_BUCKET}")
            _fill(objects, config)
            clients = {
                "obstore": _obstore_client(endpoint),
                "s3fs": _s3fs_client(endpoint),
                "ours": Client(objects.put, _reading(objects), objects.get, _counting(objects)),
            }
            for task, units, of in _tasks(config, ranges=name == "moto"):
                turns = {client: _turn(of(calls), pool, units) for client, calls in clients.items()}
                rates = run_rounds(turns, n_rounds=config.n_rounds, least_s=config.least_s)
                details[f"{name}, {task}"] = {client: rate.per_s for client, rate in rates.items()}
                rows.append(_row(name, task, rates))
    return Result(
        name="clients",
        title="S3 clients on local servers: obstore, s3fs, and our objects",
        machine=this_machine(),
        settings=asdict(config),
        rows=rows,
        goals=[
            Goal(
                what=f"{row['server']}, {row['task']}: ours / obstore",
                found=float(row["ours / obstore"] or 0),
                at_least=0.7,
            )
            for row in rows
            if "GET" in str(row["task"])
        ],
        notes=NOTES,
        details=details,
    )


@dataclass(frozen=True)
class _Units:
    """How often a call is made in one go, by how many at once, and what each counts for."""

    n_calls: int
    each: int
    threaded: bool = True


def _tasks(config: ClientsBenchmark, *, ranges: bool) -> Iterator[tuple[str, _Units, Callable[[Client], Call]]]:
    chunk, large = (
        np.random.default_rng(0).bytes(config.chunk_nbytes),
        np.random.default_rng(1).bytes(config.large_nbytes),
    )
    n_places = config.large_nbytes // config.chunk_nbytes
    chunks = _Units(config.n_chunks, config.chunk_nbytes)
    yield "PUT large, B/s", _Units(1, config.large_nbytes, threaded=False), lambda c: lambda i: c.put("large", large)
    yield "PUT chunks, B/s", chunks, lambda c: lambda i: c.put(f"chunks/{i}", chunk)
    if ranges:
        yield "GET ranges, B/s", chunks, lambda c: lambda i: c.get("large", i % n_places * len(chunk), len(chunk))
    else:
        yield "GET chunks, B/s", chunks, lambda c: lambda i: c.get_whole(f"chunks/{i}")
    yield "GET small, requests/s", _Units(64, 1), lambda c: lambda i: c.get_whole(f"keys/{i % config.n_keys:06d}")
    yield "LIST, keys/s", _Units(1, config.n_keys, threaded=False), lambda c: lambda i: c.count("keys/")


def _turn(call: Call, pool: ThreadPoolExecutor, units: _Units) -> Callable[[], int]:
    def turn() -> int:
        for _ in (pool.map if units.threaded else map)(call, range(units.n_calls)):
            pass
        return units.n_calls * units.each

    return turn


def _row(server: str, task: str, rates: Mapping[str, Rates]) -> dict[str, Cell]:
    ours, obstore, s3fs = (rates[name].median for name in ("ours", "obstore", "s3fs"))
    scale, unit = (1e6, task.replace("B/s", "MB/s")) if task.endswith(" B/s") else (1, task)
    return {
        "server": server,
        "task": unit,
        "obstore": obstore / scale,
        "s3fs": s3fs / scale,
        "ours": ours / scale,
        "obstore / s3fs": obstore / s3fs,
        "ours / obstore": ours / obstore,
    }


def _fill(objects: Objects, config: ClientsBenchmark) -> None:
    objects.put("large", bytes(config.large_nbytes))
    for i in range(config.n_chunks):
        objects.put(f"chunks/{i}", bytes(config.chunk_nbytes))
    for i in range(config.n_keys):
        objects.put(f"keys/{i:06d}", b"small" * 800)


def _reading(objects: Objects) -> Callable[[str, int, int], object]:
    """Reads as the stream does: into rows that exist, with the checksum."""

    def read(key: str, start: int, nbytes: int) -> int:
        out = np.empty((16, nbytes // 16), np.uint8)
        return objects.read_rows(key, start, out, np.arange(16))

    return read


def _counting(objects: Objects) -> Callable[[str], int]:
    return lambda prefix: sum(1 for _ in objects.list(prefix))


def _obstore_client(endpoint: str) -> Client:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        _BUCKET,
        aws_endpoint_url_s3=endpoint,
        access_key_id=_KEY,
        secret_access_key=_SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    return Client(
        put=lambda key, data: obstore.put(store, key, data, use_multipart=False),
        get=lambda key, start, nbytes: obstore.get_range(store, key, start=start, end=start + nbytes),
        get_whole=lambda key: obstore.get(store, key).bytes(),
        count=lambda prefix: sum(len(page) for page in obstore.list(store, prefix, chunk_size=1000)),
    )


def _s3fs_client(endpoint: str) -> Client:
    import s3fs

    files = s3fs.S3FileSystem(
        key=_KEY,
        secret=_SECRET,
        endpoint_url=endpoint,
        client_kwargs={"region_name": "us-east-1"},
        config_kwargs={
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "max_pool_connections": 32,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    return Client(
        put=lambda key, data: files.pipe_file(f"{_BUCKET}/{key}", data, chunksize=2**30),
        get=lambda key, start, nbytes: files.cat_file(f"{_BUCKET}/{key}", start=start, end=start + nbytes),
        get_whole=lambda key: files.cat_file(f"{_BUCKET}/{key}"),
        count=lambda prefix: len(files.find(f"{_BUCKET}/{prefix}")),
    )


def _moto(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _rclone(folder: Path, port: int) -> list[str]:
    program, served = Path(sys.executable).with_name("rclone"), folder / "served"
    served.mkdir()
    address = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{_KEY},{_SECRET}"]
    return [str(program), "serve", "s3", *address, "--config", str(folder / "rclone.conf"), str(served)]


@contextmanager
def _server(command: Callable[[Path, int], list[str]]) -> Iterator[str]:
    """A server on loopback with an empty bucket; its URL."""
    from infra.s3_settings import read_settings

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-s3-")))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        log = stack.enter_context(open(folder / "log", "wb"))
        process = subprocess.Popen(command(folder, port), stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        _wait(process, port, folder / "log")
        endpoint = f"http://127.0.0.1:{port}"
        with s3_environment(endpoint, _KEY, _SECRET):
            read_settings().make_client(timeout_s=30).create_bucket(Bucket=_BUCKET)
        yield endpoint


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")

"""How fast a span of states comes from S3: our stream against plain GETs of the same ranges by the same client."""

import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from urllib.error import URLError

from benchmarks.machine import this_machine
from benchmarks.report import Cell, Goal, Result
from benchmarks.rounds import run_rounds
from benchmarks.s3_environment import s3_environment
from benchmarks.stream import SPAN
from benchmarks.stream_data import make_spec, planted_states
from infra.objects import open_objects
from storage_schemas import Span, open_store
from storage_schemas.from_arrays import write_store
from storage_schemas.reader import ChunkLocation, Store
from storage_schemas.samples import Sample
from trainer.reading_threads import default_threads
from trainer.ring import stream_kinds
from trainer.stream import LayerSliceStream

NOTES = (
    "Server (moto) and client share this machine's cores over loopback, so the rates say little about a network; the "
    "ratio, in one run, says what the stream adds to its GETs: checksums, the way to the rows of future batches, "
    "planning.",
    "Plain GETs: threads fetch the ranges of the same chunks in random order, each into one buffer of its own that is "
    "used again and again, and do nothing with the bytes. The stream: one pass after another, its batches as stored.",
    "A sample counts when all kinds of all states of the span have come. Every row has the same number of threads for "
    "both; the goal is about the default number.",
)
_START_S = 60
_BUCKET = "bench"


@dataclass(frozen=True, kw_only=True)
class StreamS3Benchmark:
    """Sizes of this benchmark.

    Attributes:
        n_samples: In the store.
        span: States that are read.
        precisions: Of the stores.
        threads: Numbers of threads to try; 32 is the default for S3.
        n_rounds: Stream and GETs run once in each.
        least_s: Passes are repeated for at least so long in a round.
        small: A tiny teacher instead of ViT-B/14, to check that everything runs.
    """

    n_samples: int = 192
    span: Span = SPAN
    precisions: tuple[str, ...] = ("float16", "int8")
    threads: tuple[int, ...] = (4, 32)
    n_rounds: int = 5
    least_s: float = 1.5
    small: bool = False


QUICK = StreamS3Benchmark(n_samples=40, precisions=("int8",), threads=(32,), n_rounds=1, least_s=0.0, small=True)


def run(config: StreamS3Benchmark) -> Result:
    """Start a server, fill it, take turns, compare."""
    rows: list[dict[str, Cell]] = []
    goals, details = [], {}
    with _server() as endpoint, s3_environment(endpoint, "bench", "bench"):
        for precision in config.precisions:
            store = _write(config, precision)
            with ExitStack() as stack:
                contestants: dict[str, Callable[[], int]] = {}
                for n_threads in config.threads:
                    stream = stack.enter_context(_stream(store, config.span, n_threads))
                    contestants[f"stream, {n_threads}"] = stream
                    contestants[f"GETs, {n_threads}"] = partial(_plain_gets, store, config.span, n_threads)
                rates = run_rounds(contestants, n_rounds=config.n_rounds, least_s=config.least_s)
            details[precision] = {name: rate.per_s for name, rate in rates.items()}
            for n_threads in config.threads:
                ours, plain = rates[f"stream, {n_threads}"], rates[f"GETs, {n_threads}"]
                ratio = ours.median / plain.median
                rows.append(
                    {
                        "precision": precision,
                        "threads": n_threads,
                        "stream, samples/s": ours.median,
                        "stream, rounds": ours.spread,
                        "plain GETs, samples/s": plain.median,
                        "plain GETs, rounds": plain.spread,
                        "ratio": ratio,
                    }
                )
                if n_threads == default_threads(remote=True) and not config.small:
                    goals.append(Goal(what=f"{precision}: stream / plain GETs", found=ratio, at_least=0.7))
    return Result(
        name="stream-s3",
        title=f"Streaming states {config.span} of {'a tiny teacher' if config.small else 'ViT-B/14'} from S3",
        machine=this_machine(),
        settings={**asdict(config), "span": str(config.span)},
        rows=rows,
        goals=goals,
        notes=NOTES,
        details=details,
    )


def _write(config: StreamS3Benchmark, precision: str) -> Store:
    location = f"s3://{_BUCKET}/{precision}"
    spec = make_spec(config.n_samples, config.span, small=config.small)
    samples = [Sample(sample_id=f"{i:09d}.jpg", label=0, class_name="random", nbytes=1) for i in range(spec.n_samples)]
    write_store(
        open_objects(location),
        replace(spec, precision=precision),
        samples,
        lambda rows: planted_states(spec, rows),
    )
    return open_store(location)


@contextmanager
def _stream(store: Store, span: Span, threads: int) -> Iterator[Callable[[], int]]:
    epochs = count()
    with LayerSliceStream(store, span, batch_size=16, lanes=8, threads=threads) as stream:

        def one_pass() -> int:
            stream.set_epoch(next(epochs))
            return sum(len(batch) for batch in stream)

        yield one_pass


def _plain_gets(store: Store, span: Span, threads: int) -> int:
    """One pass over the ranges of all chunks of a span; the samples in them."""
    kinds, chunks = stream_kinds(store.spec), range(store.spec.n_chunks)
    ranges = [store.chunk(layer, kind, chunk) for layer in span.states for kind in kinds for chunk in chunks]
    todo, failed = deque(random.sample(ranges, len(ranges))), deque[Exception]()

    def work() -> None:
        buffer = bytearray(max(location.nbytes for location in ranges))
        try:
            while todo:
                _get(store, todo.popleft(), buffer)
        except IndexError:  # another thread took the last one
            pass
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    pool = [threading.Thread(target=work) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if failed:
        raise failed[0]
    return store.n_samples


def _get(store: Store, location: ChunkLocation, buffer: bytearray) -> None:
    store.objects.read_into(location.key, location.offset, memoryview(buffer)[: location.nbytes])


@contextmanager
def _server() -> Iterator[str]:
    """moto's S3 server on loopback with an empty bucket; its URL."""
    with tempfile.TemporaryDirectory(prefix="bench-s3-") as folder, open(Path(folder, "log"), "wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            endpoint = _listening(process, Path(folder, "log"))
            make = urllib.request.Request(f"{endpoint}/{_BUCKET}", method="PUT")
            urllib.request.urlopen(make, timeout=30).close()
            yield endpoint
        finally:
            process.terminate()
            process.wait(30)


def _listening(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL that the server says it listens at."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        said = log.read_text()
        if "Running on " in said:
            endpoint = said.partition("Running on ")[2].split()[0]
            try:
                urllib.request.urlopen(endpoint, timeout=5).close()
            except URLError:
                pass
            else:
                return endpoint
        time.sleep(0.1)
    raise RuntimeError(f"moto's server did not start: {log.read_text()[-2000:]}")

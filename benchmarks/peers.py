"""The loaders that the stream is compared with, each set up as well as we know how.

A loader is a context manager that opens everything once and gives a function; each call of it is one pass over all
samples, as an iterator of batches. A batch's memory may be used again when the next one is asked for. Peers read in
store order, in runs that suit their chunks: they are spared the mixing that the stream does.
"""

import io
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tensorstore
import torch
import webdataset
import zarr
from zarr.buffer import cpu

from benchmarks.stream_data import StreamData
from infra.machine import n_cores
from storage_schemas.codecs import kind_dtype, kind_shape

KINDS = ("cls", "registers", "patches")  # together every token of a state

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a batch's values in one contiguous array.

    Attributes:
        kind: "cls", "registers", "patches", or "tokens" for all of them in the teacher's order; "patches_int8" and
            "patches_scale" in the place of patches.
        state: Which one of the span, (sample, ...); None for all, (sample, state, ...).
        values: In the dtype that the loader stores.
    """

    kind: str
    state: int | None
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a loader delivers: every value of the span's states of these samples."""

    sample_index: Sequence[int] | np.ndarray
    parts: Sequence[Part]


Pass = Callable[[], Iterator[Batch]]
Loader = Callable[..., AbstractContextManager[Pass]]


# --- the published loader's style -------------------------------------------------------------------------------------


@contextmanager
def reference_style(data: StreamData, *, window: int = 64, threads: int = 8, depth: int = 30) -> Iterator[Pass]:
    """float32 Zarr v2, Blosc zstd-3, chunks of 128 samples by one layer; threads take shuffled windows of 64 samples.

    Source: seeds.md 1.3 and 1.4. Written anew; it ends after a pass, hands errors on and keeps batches on the host.
    """
    array = zarr.open_array(data.reference, mode="r", zarr_format=2)

    def one_pass() -> Iterator[Batch]:
        windows = _windows(data.spec.n_samples, window)
        random.shuffle(windows)

        def read(rows: range) -> Batch:
            states = torch.from_numpy(np.asarray(array[rows.start : rows.stop])).to(torch.float32)
            return Batch(sample_index=rows, parts=[Part(kind="tokens", state=None, values=states.numpy())])

        yield from _from_threads(windows, read, threads=threads, depth=depth)

    yield one_pass


# --- readers of our store -----------------------------------------------------------------------------------------


@contextmanager
def zarr_python(
    data: StreamData, *, samples_per_read: int = 64, ahead: int = 0, config: Mapping[str, Any] | None = None
) -> Iterator[Pass]:
    """Stock zarr-python reading runs of whole chunks into memory that is used again; it checks the CRC32C."""
    settings = dict(config or {})
    with zarr.config.set(settings):
        arrays = {key: zarr.open_array(path, mode="r") for key, path in _array_paths(data).items()}
    slots = [_buffers(data, samples_per_read) for _ in range(ahead + 1)]
    windows = _windows(data.spec.n_samples, samples_per_read)

    def read(slot: int, rows: range) -> Batch:
        parts = []
        for key, array in arrays.items():
            values = slots[slot][key][: len(rows)]
            array.get_basic_selection((slice(rows.start, rows.stop),), out=cpu.NDBuffer.from_numpy_array(values))
            parts.append(Part(kind=key[1], state=key[0], values=values))
        return Batch(sample_index=rows, parts=parts)

    with ThreadPoolExecutor(max(1, ahead)) as pool:

        def start(slot: int, rows: range) -> Callable[[], Batch]:
            return pool.submit(read, slot, rows).result if ahead else lambda: read(slot, rows)

        def one_pass() -> Iterator[Batch]:
            with zarr.config.set(settings):  # only while it reads: the other loaders use zarr too
                yield from _read_ahead(windows, start, ahead)

        yield one_pass


def zarrs_pipeline(data: StreamData, *, samples_per_read: int = 64, ahead: int = 0) -> AbstractContextManager[Pass]:
    """The same with the Rust codec pipeline of the zarrs package; strict, so that it never falls back to Python."""
    config = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    return zarr_python(data, samples_per_read=samples_per_read, ahead=ahead, config=config)


@contextmanager
def tensorstore_reader(
    data: StreamData, *, samples_per_read: int = 64, ahead: int = 1, batched: bool = True, file_mode: str = "default"
) -> Iterator[Pass]:
    """tensorstore's zarr3 driver, copying into memory that is used again; it checks the CRC32C.

    Args:
        data: Where the store is.
        samples_per_read: A run of whole chunks.
        ahead: Reads in flight beside the one that is used.
        batched: Whether reads of one run are submitted as one tensorstore.Batch.
        file_mode: "default" (pread) or "memmap".
    """
    context = tensorstore.Context(
        {
            "file_io_mode": {"mode": file_mode},
            "file_io_concurrency": {"limit": max(4, n_cores())},
            "data_copy_concurrency": {"limit": n_cores()},
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    arrays = {
        key: tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(path)},
                "recheck_cached_metadata": False,
                "recheck_cached_data": False,
            },
            open=True,
            read=True,
            context=context,
        ).result()
        for key, path in _array_paths(data).items()
    }
    slots = [_buffers(data, samples_per_read) for _ in range(ahead + 1)]

    def start(slot: int, rows: range) -> Callable[[], Batch]:
        batch = tensorstore.Batch() if batched else None
        parts, futures = [], []
        for key, array in arrays.items():
            values = slots[slot][key][: len(rows)]
            source = array[rows.start : rows.stop].translate_to[0]
            futures.append(tensorstore.array(values, copy=False).write(source, batch=batch))
            parts.append(Part(kind=key[1], state=key[0], values=values))
        if batch is not None:
            batch.submit()

        def finish() -> Batch:
            for future in futures:
                future.result()
            return Batch(sample_index=rows, parts=parts)

        return finish

    yield lambda: _read_ahead(_windows(data.spec.n_samples, samples_per_read), start, ahead)


# --- WebDataset ---------------------------------------------------------------------------------------------------


@contextmanager
def webdataset_reader(data: StreamData, *, threads: int = 0, workers: int = 0) -> Iterator[Pass]:
    """Tars of one .npy a sample, as its users would store a span, read in order; the samples are not stacked.

    Args:
        data: Where the tars are.
        threads: Reading threads, each with its share of the tars; 0 reads in the consumer.
        workers: Processes of a DataLoader, which hand samples over in shared memory; 0 for none.
    """
    if workers:
        dataset = _webdataset(data.tars).map(_to_tensor)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context="spawn"
        )
        yield lambda: (_tokens(key, values.numpy()) for key, values in loader)
    elif threads:
        shares = [data.tars[i::threads] for i in range(min(threads, len(data.tars)))]
        yield lambda: _from_threads(shares, _webdataset, threads=len(shares), depth=64, flat=True)
    else:
        yield lambda: (_tokens(key, values) for key, values in _webdataset(data.tars))


def _webdataset(tars: Sequence[Path]) -> webdataset.WebDataset:
    tar_names = [str(path) for path in tars]
    samples = webdataset.WebDataset(tar_names, shardshuffle=False, empty_check=False)
    return samples.map_dict(**{"states.npy": _parse_npy}).to_tuple("__key__", "states.npy")


def _parse_npy(data: bytes) -> np.ndarray:
    """An array over the bytes of a .npy member; webdataset's own decoder would copy them once more."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    assert version == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert not fortran
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def _to_tensor(sample: tuple[str, np.ndarray]) -> tuple[str, torch.Tensor]:
    key, values = sample
    shared = torch.empty(values.shape, dtype=torch.float16).share_memory_()
    shared.numpy()[...] = values
    return key, shared


def _tokens(key: str, values: np.ndarray) -> Batch:
    return Batch(sample_index=[int(key)], parts=[Part(kind="tokens", state=None, values=values[None])])


# --- what they share ----------------------------------------------------------------------------------------------


def _windows(n_samples: int, size: int) -> list[range]:
    return [range(start, min(start + size, n_samples)) for start in range(0, n_samples, size)]


def _array_paths(data: StreamData) -> dict[tuple[int, str], Path]:
    """Folder of each array of the span, by (state, kind)."""
    return {(state, kind): data.store / f"layer_{state:02d}" / kind for state in data.span.states for kind in KINDS}


def _buffers(data: StreamData, n_rows: int) -> dict[tuple[int, str], np.ndarray]:
    """Memory for a run of samples, touched once so that no page has to be made while the clock runs."""
    spec = data.spec
    return {
        (state, kind): np.full((n_rows, *kind_shape(spec, kind)), 1, kind_dtype(spec, kind))
        for state in data.span.states
        for kind in KINDS
    }


def _read_ahead(
    windows: Iterable[range], start: Callable[[int, range], Callable[[], Batch]], ahead: int
) -> Iterator[Batch]:
    """Results in order, with `ahead` reads under way; a slot is used again only when its batch has been used."""
    pending: deque[Callable[[], Batch]] = deque()
    for number, rows in enumerate(windows):
        pending.append(start(number % (ahead + 1), rows))
        if len(pending) > ahead:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def _from_threads(
    tasks: Sequence[T], read: Callable[[T], Any], *, threads: int, depth: int, flat: bool = False
) -> Iterator[Batch]:
    """Batches as threads finish them, through a queue; with `flat`, a task gives many (key, values)."""
    todo, done = deque(tasks), queue.Queue[Batch | BaseException | None](maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return done.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            while not stopped.is_set():
                try:
                    task = todo.popleft()
                except IndexError:
                    break
                for batch in (_tokens(*sample) for sample in read(task)) if flat else [read(task)]:
                    put(batch)
            put(None)
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            put(error)

    pool = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for thread in pool:
        thread.start()
    try:
        n_running = threads
        while n_running:
            item = done.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                n_running -= 1
            else:
                yield item
    finally:
        stopped.set()
        for thread in pool:
            thread.join()

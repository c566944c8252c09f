"""How fast a span of states reaches host memory: our stream against its peers and against the page cache itself."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.limit import preadv_into_a_ring
from benchmarks.machine import PeakMemory, this_machine
from benchmarks.peers import (
    Batch,
    Loader,
    Part,
    Pass,
    reference_style,
    tensorstore_reader,
    webdataset_reader,
    zarr_python,
    zarrs_pipeline,
)
from benchmarks.report import Cell, Goal, Result
from benchmarks.rounds import Rates, measure, run_rounds
from benchmarks.stream_data import StreamData, make_spec, planted_states, write_stream_data
from infra.machine import n_cores
from storage_schemas import open_store
from storage_schemas.from_arrays import split_kinds
from storage_schemas.precision import round_patches
from storage_schemas.spec import Span
from trainer.stream import HostBatch, LayerSliceStream

STREAM, GATHERED, LIMIT = "our stream, batches as stored", "our stream, one tensor a batch", "limit: preadv, 2 threads"
INT8, REFERENCE = "our stream, int8, as stored", "reference style"
OURS = (STREAM, GATHERED, INT8)

NOTES = (
    "A sample counts when every value of its states (CLS, registers and patches of each) lies in host memory at the "
    "dtype that the loader stores, and one byte of every memory page of it has been read by the consumer. Files are in "
    "the page cache. Opening, starting processes and making buffers are not counted.",
    "The stream and the readers of our store check the CRC32C of every chunk; so do zarr-python, zarrs and tensorstore "
    "by their codec. The reference style and WebDataset have no checksum. The limit checks nothing.",
    "The stream mixes samples over its lanes in its seeded order; the peers read runs of whole chunks in store order, "
    "which is easier. `batches as stored` are arrays per token kind, (sample, state, ...); `one tensor a batch` is "
    "(sample, state, token, dim) float16, contiguous, tokens in the teacher's order. In int8, half of the bytes, "
    "patches and their scales are delivered as stored: a GPU undoes them beside its step.",
    "Every loader runs with the best of the settings that were tried first; all of them are in the JSON.",
)


SPAN = Span(7, 10)


@dataclass(frozen=True, kw_only=True)
class StreamBenchmark:
    """Sizes of this benchmark.

    Attributes:
        n_samples: In the store.
        span: States that are read.
        batch_size: Of the stream.
        lanes: Of the stream.
        n_rounds: Every loader runs once in each.
        least_s: A loader's passes are repeated for at least so long in a round.
        small: A tiny teacher instead of ViT-B/14, to check that everything runs.
    """

    n_samples: int = 512
    span: Span = SPAN
    batch_size: int = 64
    lanes: int = 64
    n_rounds: int = 5
    least_s: float = 1.5
    small: bool = False


QUICK = StreamBenchmark(n_samples=72, batch_size=16, lanes=4, n_rounds=1, least_s=0.0, small=True)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One line of the table: a loader and the settings to try."""

    name: str
    loader: Loader
    settings: tuple[Mapping[str, Any], ...]


def run(config: StreamBenchmark, folder: Path | None = None) -> Result:
    """Make the data, find each loader's best setting, check what it delivers, time all in turn."""
    with tempfile.TemporaryDirectory(prefix="bench-stream-", dir=folder, ignore_cleanup_errors=True) as place:
        spec = make_spec(config.n_samples, config.span, small=config.small)
        data = write_stream_data(Path(place), spec, config.span)
        memory = _stream_memory(data, config)
        with ExitStack() as stack:
            passes, chosen, tried = {}, {}, {}
            for contestant in contestants(config, int(memory["stated_nbytes"])):
                name = contestant.name
                tried[name] = _try_settings(contestant, data)
                chosen[name] = max(tried[name], key=lambda record: record["samples_per_s"])["setting"]
                passes[name] = stack.enter_context(contestant.loader(data, **chosen[name]))
                check_numbers(data, passes[name])
            rates = run_rounds(
                {name: partial(consume, one) for name, one in passes.items()},
                n_rounds=config.n_rounds,
                least_s=config.least_s,
            )
    return _result(config, data, rates, chosen, {"tried": tried, "memory": memory})


def contestants(config: StreamBenchmark, ring_nbytes: int) -> list[Contestant]:
    """Who takes part, with what settings."""
    cores = n_cores()
    chunk = make_spec(1, config.span, small=config.small).samples_per_chunk
    reads = [{"samples_per_read": n * chunk, "ahead": ahead} for n in (2, 4, 8) for ahead in (0, 1, 2)]
    sizes: dict[str, Any] = {"batch_size": config.batch_size, "lanes": config.lanes}
    stream_threads = tuple({"threads": n} for n in sorted({cores, 8}))
    return [
        Contestant(name=LIMIT, loader=partial(preadv_into_a_ring, ring_nbytes=ring_nbytes), settings=({"threads": 2},)),
        Contestant(name=STREAM, loader=partial(our_stream, **sizes), settings=stream_threads),
        Contestant(name=GATHERED, loader=partial(our_stream_gathered, **sizes), settings=stream_threads),
        Contestant(name=INT8, loader=partial(our_stream, **sizes, int8=True), settings=stream_threads),
        Contestant(name="zarrs pipeline", loader=zarrs_pipeline, settings=tuple(reads)),
        Contestant(name="zarr-python", loader=zarr_python, settings=tuple(reads)),
        Contestant(
            name="tensorstore",
            loader=tensorstore_reader,
            settings=tuple(
                {"samples_per_read": n * chunk, "ahead": ahead, "batched": batched, "file_mode": mode}
                for n, ahead in ((1, 2), (2, 1), (2, 2), (4, 1))
                for batched in (False, True)
                for mode in ("default", "memmap")
            ),
        ),
        Contestant(
            name="webdataset",
            loader=webdataset_reader,
            settings=({}, {"threads": 2}, {"workers": 2}) if not config.small else ({}, {"threads": 2}),
        ),
        Contestant(name=REFERENCE, loader=reference_style, settings=({},)),
    ]


@contextmanager
def our_stream(data: StreamData, *, batch_size: int, lanes: int, threads: int, int8: bool = False) -> Iterator[Pass]:
    """LayerSliceStream; every pass is another epoch of one stream, which keeps its buffers."""
    with _passes(data.int8 if int8 else data.store, data, batch_size, lanes, threads) as host_batches:

        def one_pass() -> Iterator[Batch]:
            for batch in host_batches():
                patches = "patches_int8" if int8 else "patches"
                arrays = {"cls": batch.cls, "registers": batch.registers, patches: batch.patches}
                arrays["patches_scale"] = batch.patches_scale
                parts = [Part(kind=kind, state=None, values=a) for kind, a in arrays.items() if a is not None]
                yield Batch(sample_index=batch.sample_index, parts=parts)

        yield one_pass


@contextmanager
def our_stream_gathered(data: StreamData, *, batch_size: int, lanes: int, threads: int) -> Iterator[Pass]:
    """The same, every batch as the one tensor that it was read into."""
    with _passes(data.store, data, batch_size, lanes, threads) as host_batches:

        def one_pass() -> Iterator[Batch]:
            for batch in host_batches():
                part = Part(kind="tokens", state=None, values=batch.tokens)
                yield Batch(sample_index=batch.sample_index, parts=[part])

        yield one_pass


@contextmanager
def _passes(
    store: Path, data: StreamData, batch_size: int, lanes: int, threads: int
) -> Iterator[Callable[[], Iterator[HostBatch]]]:
    epochs = itertools.count()
    with LayerSliceStream(open_store(store), data.span, batch_size, lanes=lanes, threads=threads) as stream:

        def one_pass() -> Iterator[HostBatch]:
            stream.set_epoch(next(epochs))
            yield from stream

        yield one_pass


def consume(one_pass: Pass) -> int:
    """Read one byte of every page of everything that a pass delivers; the number of samples."""
    n_samples = 0
    for batch in one_pass():
        for part in batch.parts:
            _touch(part.values)
        n_samples += len(batch.sample_index)
    return n_samples


def _touch(values: np.ndarray) -> None:
    """Read one byte of every memory page."""
    if values.flags.c_contiguous:
        values.reshape(-1).view(np.uint8)[::4096].sum()
    else:  # patches of one tensor: whole rows of channels, the tokens before them left out
        channels = values.view(np.uint8)
        channels[..., :: max(1, 4096 // channels.shape[-1]), ::4096].sum()


def check_numbers(data: StreamData, one_pass: Pass, n_compared: int = 24) -> None:
    """Hold a pass against the states that were planted: every sample once, and bit for bit the same numbers.

    Args:
        data: What was planted.
        one_pass: Of any loader.
        n_compared: Samples whose numbers are made again and compared, spread over the store.

    Raises:
        AssertionError: Something else came; names the place.
    """
    seen, step = [], max(1, data.spec.n_samples // n_compared)
    for batch in one_pass():
        seen += [int(row) for row in batch.sample_index]
        for place, row in enumerate(batch.sample_index):
            if row % step:
                continue
            states = planted_states(data.spec, range(int(row), int(row) + 1))[0]
            kinds = {**split_kinds(data.spec, states), "tokens": states}
            kinds["patches_int8"], kinds["patches_scale"] = round_patches(
                "int8", np.ascontiguousarray(kinds["patches"])
            )
            for part in batch.parts:
                expected = kinds[part.kind] if part.state is None else kinds[part.kind][part.state - data.span.start]
                found = part.values[place]
                if not np.array_equal(found, expected.astype(found.dtype)):
                    raise AssertionError(f"sample {row}, {part.kind}, state {part.state}: not what was planted")
    if sorted(seen) != list(range(data.spec.n_samples)):
        raise AssertionError(f"{len(seen)} samples came, {len(set(seen))} different, of {data.spec.n_samples}")


def _try_settings(contestant: Contestant, data: StreamData) -> list[dict[str, Any]]:
    """The better of two passes with each setting, after one that warms up."""
    records = []
    for setting in contestant.settings:
        with contestant.loader(data, **setting) as one_pass:
            consume(one_pass)
            rates = [measure(partial(consume, one_pass), 0.0) for _ in range(2 if len(contestant.settings) > 1 else 1)]
        records.append({"setting": dict(setting), "samples_per_s": max(rates)})
    return records


def _stream_memory(data: StreamData, config: StreamBenchmark) -> dict[str, float]:
    """What the stream says it needs and what it took, and its read amplification."""
    store = open_store(data.store)
    with (
        PeakMemory() as peak,
        LayerSliceStream(store, data.span, config.batch_size, lanes=config.lanes, threads=n_cores()) as stream,
    ):
        stated = stream.memory_nbytes
        for batch in stream:
            _touch(batch.tokens)
        amplification = stream.amplification
    return {"stated_nbytes": stated, "peak_nbytes": peak.nbytes, "amplification": amplification}


def _result(
    config: StreamBenchmark,
    data: StreamData,
    rates: Mapping[str, Rates],
    chosen: Mapping[str, Mapping[str, Any]],
    details: Mapping[str, Any],
) -> Result:
    limit, ours, gathered, int8 = (rates[name].median for name in (LIMIT, STREAM, GATHERED, INT8))
    rows: list[dict[str, Cell]] = [
        {
            "loader": name,
            "samples/s": rate.median,
            "rounds": rate.spread,
            "of the limit": rate.median / limit,
            "stream is faster": ours / rate.median,
            "gathered is faster": gathered / rate.median,
            "setting": ", ".join(f"{key} {value}" for key, value in chosen[name].items()),
        }
        for name, rate in sorted(rates.items(), key=lambda item: -item[1].median)
    ]
    best_peer = max(rate.median for name, rate in rates.items() if name not in (LIMIT, *OURS))
    memory = details["memory"]
    goals = [Goal(what="bytes fetched / bytes needed", found=memory["amplification"], at_most=1.0)]
    if not config.small:  # a tiny teacher's numbers say nothing about speed
        goals += [
            Goal(what="stream as stored / limit", found=ours / limit, at_least=0.6),
            Goal(what="stream gathered / limit", found=gathered / limit, at_least=0.4),
            Goal(what="stream as stored / best peer", found=ours / best_peer, at_least=1.0),
            Goal(what="stream gathered / best peer", found=gathered / best_peer, at_least=1.0),
            Goal(what="stream int8 / reference style", found=int8 / rates[REFERENCE].median, at_least=25.0),
            Goal(
                what="peak memory / stated memory of the stream",
                found=memory["peak_nbytes"] / memory["stated_nbytes"],
                at_most=1.0,
            ),
        ]
    size = "tiny teacher" if config.small else "ViT-B/14"
    return Result(
        name="stream",
        title=f"Streaming states {config.span} of {size} from the page cache, {data.spec.precision}, codec none",
        machine=this_machine(),
        settings={**asdict(config), "span": str(config.span)},
        rows=rows,
        goals=goals,
        notes=NOTES,
        details={**details, "samples_per_s": {name: rate.per_s for name, rate in rates.items()}},
    )

"""The stream of a span: content, coverage, order, resume, counters, errors, shutdown (seeds.md 7.2, rows B1 to B10)."""

import gc
import inspect
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.native import read_rows_function
from infra.objects import FolderObjects, ObjectMissingError, ShortObjectError
from storage_schemas import open_store
from storage_schemas.codecs import DecodeError, kind_dtype
from storage_schemas.errors import ChecksumError, NotCommittedError, SchemaError
from storage_schemas.from_arrays import write_store
from storage_schemas.precision import restore_patches, round_patches
from storage_schemas.reader import Store
from storage_schemas.spec import StoreSpec
from tests.resume import check_resume_everywhere
from tests.stores import as_stored, make_samples, make_spec, planted_states, write_planted
from tests.trainer import streaming
from tests.trainer.streaming import (
    BAD,
    PATIENCE_S,
    CountingObjects,
    FaultyObjects,
    catch_fire,
    planted,
    reading_threads,
    wait_until,
)
from trainer.chunk_reader import ChunkReader
from trainer.order import make_pass_order
from trainer.rank_pass import make_rank_pass
from trainer.stream import HostBatch, LayerSliceStream, Span, stream_memory_nbytes

no_thread_is_left = streaming.no_thread_is_left


@pytest.fixture(scope="module")
def store() -> Store:
    return planted()


@pytest.fixture(params=["compiled", "python"])
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled reader, and without."""
    if request.param == "python":
        monkeypatch.setattr("infra.folder_objects.read_rows_function", lambda: None)
    elif read_rows_function() is None:
        pytest.skip("no compiler here")


def indices(stream: LayerSliceStream) -> list[list[int]]:
    with stream:
        return [batch.sample_index.tolist() for batch in stream]


# B1: layers start..end inclusive, equal to direct indexing


FORMS: list[dict[str, Any]] = [
    {},
    {"precision": "float32"},
    {"codec": "lz4", "shuffle": "byte"},
    {"codec": "zstd-3", "shuffle": "bit"},
    {"has_cls": False, "n_registers": 0},
    {"n_registers": 0},
    {"precision": "bfloat16"},
    {"precision": "bfloat16", "codec": "lz4", "shuffle": "bit", "has_cls": False},
    {"precision": "int8"},
    {"precision": "int8", "codec": "zstd-1", "shuffle": "byte"},
    {"precision": "int8", "has_cls": False, "n_registers": 0},
    {"backend": "webdataset"},
    {"backend": "webdataset", "precision": "int8"},
    {"backend": "webdataset", "codec": "gzip", "precision": "bfloat16"},
]
SPANS = [Span(0, 2), Span(1, 2)]


@pytest.mark.parametrize(
    ("changes", "span"),
    [
        pytest.param(changes, span, marks=[] if i % 2 == j else [pytest.mark.slow])  # every form, and both spans
        for i, changes in enumerate(FORMS)
        for j, span in enumerate(SPANS)
    ],
    ids=lambda value: (" ".join(map(str, value.values())) or "float16") if isinstance(value, dict) else None,
)
def test_batches_hold_the_planted_states(changes: dict, span: Span, way_of_reading: None, tmp_path: Path) -> None:
    write_planted(FolderObjects(tmp_path), make_spec(n_samples=45, **changes), BAD)
    store = open_store(tmp_path)
    n_seen = 0
    with LayerSliceStream(store, span, batch_size=8, lanes=4, threads=3) as stream:
        for batch in stream:
            planted_rows = [planted_states(store.spec, range(i, i + 1)) for i in batch.sample_index]
            expected = as_stored(store.spec, np.concatenate(planted_rows))[:, span.start : span.stop + 1]
            check_host_arrays(store.spec, batch, expected)
            activations = batch.to("cpu", torch.float32).activations
            assert np.array_equal(activations.numpy(), expected)
            assert np.array_equal(activations.numpy(), store.read(list(span.states), batch.sample_index))
            n_seen += len(batch)
    assert n_seen == store.n_valid


def check_host_arrays(spec: StoreSpec, batch: HostBatch, expected: np.ndarray) -> None:
    """Each array of a batch as stored; `expected` are the states in the teacher's order."""
    first_register = int(spec.has_cls)
    first_patch = first_register + spec.n_registers
    if spec.has_cls:
        assert np.array_equal(batch.cls, expected[:, :, 0])
    else:
        assert batch.cls is None
    if spec.n_registers:
        assert np.array_equal(batch.registers, expected[:, :, first_register:first_patch])
    else:
        assert batch.registers is None
    assert batch.patches.dtype == kind_dtype(spec, "patches")
    assert np.array_equal(
        restore_patches(spec.precision, batch.patches, batch.patches_scale), expected[:, :, first_patch:]
    )
    if spec.precision == "int8":
        assert batch.patches_scale is not None
        with pytest.raises(ValueError, match=r"an int8 batch has no `tokens`.*Take .*patches_scale.*activations"):
            _ = batch.tokens
        return
    assert batch.patches_scale is None
    assert batch.tokens.dtype == batch.patches.dtype
    assert batch.tokens.flags.c_contiguous
    rounded, _ = round_patches(spec.precision, expected)  # of CLS and registers; exact in float16
    assert np.array_equal(batch.tokens, rounded)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_on_the_device_is_rounded_once(precision: str, dtype: torch.dtype) -> None:
    store = planted(24, bad={}, precision=precision)
    with LayerSliceStream(store, Span(0, 1), batch_size=8) as stream:
        for batch in stream:
            exact = torch.from_numpy(store.read([0, 1], batch.sample_index))
            assert batch.to(dtype=dtype).activations.equal(exact.to(dtype))


def test_to_another_dtype_and_into_given_memory(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 1), batch_size=8) as stream:
        batch = next(stream)
        exact = batch.to().activations
        assert batch.to(dtype=torch.bfloat16).activations.equal(exact.to(torch.bfloat16))
        out = torch.full((10, *exact.shape[1:]), torch.nan)
        into = batch.to(out=out).activations
        assert into.equal(exact)
        assert into.data_ptr() == out.data_ptr()
        assert batch.to().sample_index.tolist() == batch.sample_index.tolist()
        with pytest.raises(ValueError, match=r"out is .*float32 on cpu; at least .*float16 on cpu was expected"):
            batch.to(dtype=torch.float16, out=out)


def test_layers_of_a_union_come_from_their_stores(tmp_path: Path) -> None:
    for name, layers in (("a", (0, 1)), ("b", (2, 3))):
        write_planted(FolderObjects(tmp_path / name), make_spec(layers=layers), seed=layers[0])
    union = open_store([tmp_path / "a", tmp_path / "b"])
    with LayerSliceStream(union, Span(1, 2), batch_size=8) as stream:
        for batch in stream:
            assert np.array_equal(batch.to().activations.numpy(), union.read([1, 2], batch.sample_index))


# B2: every valid sample exactly once, also over ranks; B4: the same order for any ranks and threads


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("threads", [1, 5])
def test_ranks_and_threads_do_not_change_the_order(store: Store, world_size: int, threads: int) -> None:
    order = make_pass_order(store.valid, store.spec.samples_per_chunk, seed=3, epoch=2, lanes=8)
    expected = [order.samples(i, min(i + 7, order.n_samples)) for i in range(0, order.n_samples, 7)]
    ranks = [
        indices(LayerSliceStream(store, Span(0, 1), 7, 3, 2, rank, world_size, lanes=8, threads=threads))
        for rank in range(world_size)
    ]
    lanes = [order.lane_entries(i, min(i + 7, order.n_samples))[0] for i in range(0, order.n_samples, 7)]
    for rank, batches in enumerate(ranks):
        mine = [batch[lane % world_size == rank].tolist() for batch, lane in zip(expected, lanes)]
        assert batches == mine
    everything = Counter(i for batches in ranks for batch in batches for i in batch)
    assert everything == Counter(np.flatnonzero(store.valid).tolist())


def test_a_rank_without_samples_in_a_batch_keeps_step(store: Store) -> None:
    shares = []
    for rank in range(8):
        with LayerSliceStream(store, Span(0, 1), batch_size=3, rank=rank, world_size=8, lanes=8) as stream:
            shares.append([len(batch) for batch in stream])
            assert len(shares[-1]) == len(stream)
    assert any(share == 0 for rank in shares for share in rank)
    assert [sum(batch) for batch in zip(*shares)] == [3] * 32 + [1]
    with LayerSliceStream(store, Span(0, 1), batch_size=3, rank=0, world_size=8, lanes=8) as stream:
        empty = next(batch for batch in stream if len(batch) == 0)
        assert empty.to().activations.shape == (0, 2, store.spec.n_tokens, store.spec.dim)
        assert empty.n_batch == 3


# B3: passes differ in membership, chunks are read as wholes


def test_passes_differ_in_membership(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 1), batch_size=8) as stream:
        first = [frozenset(batch.sample_index.tolist()) for batch in stream]
        stream.set_epoch(1)
        second = [frozenset(batch.sample_index.tolist()) for batch in stream]
        stream.set_epoch(0)
        again = [frozenset(batch.sample_index.tolist()) for batch in stream]
    assert first == again
    assert not set(first) & set(second)


# B5: resume


@pytest.mark.parametrize("lanes", [1, 8])
def test_resume_from_every_step(store: Store, lanes: int) -> None:
    def key(batch: HostBatch) -> tuple:
        return tuple(batch.sample_index.tolist()), batch.number, batch.to().activations.numpy().tobytes()

    check_resume_everywhere(
        lambda: LayerSliceStream(store, Span(0, 1), batch_size=6, seed=1, epoch=4, lanes=lanes, threads=1),
        key,
        lambda: LayerSliceStream(store, Span(0, 1), batch_size=6, seed=8, lanes=lanes, threads=6),
    )


def test_resume_with_other_ranks_continues_the_same_order(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 1), batch_size=6, lanes=8) as whole:
        batches = [batch.sample_index.tolist() for batch in whole]
    with LayerSliceStream(store, Span(0, 1), batch_size=6, lanes=8, rank=1, world_size=2) as stream:
        for _ in range(5):
            next(stream)
        state = stream.state_dict()
    parts = []
    for rank in range(4):
        with LayerSliceStream(store, Span(1, 2), batch_size=6, lanes=8, rank=rank, world_size=4) as stream:
            stream.load_state_dict(state)
            parts.append([set(batch.sample_index.tolist()) for batch in stream])
    assert [set.union(*batch) for batch in zip(*parts)] == [set(batch) for batch in batches[5:]]


def test_state_of_another_pass_is_refused(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 1), batch_size=6, lanes=8) as stream:
        state = stream.state_dict()
    with LayerSliceStream(planted(90), Span(0, 1), batch_size=7, lanes=4) as other:
        message = "batch_size was 6, is 7 now; n_lanes was 8, is 4 now; n_samples was 97, is 86 now; valid_digest was"
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        with pytest.raises(ValueError, match="version 7; expected 1"):
            other.load_state_dict({**state, "version": 7})


# B6: every stored byte once


@pytest.mark.parametrize("world_size", [1, 4])
def test_every_stored_byte_of_the_span_once(tmp_path: Path, world_size: int, way_of_reading: None) -> None:
    write_planted(FolderObjects(tmp_path), make_spec(n_samples=101), BAD)
    objects = CountingObjects(tmp_path)
    store = open_store(objects)
    objects.ranges.clear()
    fetched = 0
    for rank in range(world_size):
        with LayerSliceStream(store, Span(1, 2), rank=rank, world_size=world_size, lanes=8) as stream:
            assert stream.amplification == 1.0
            for _ in stream:
                pass
            assert stream.amplification == 1.0
            fetched += stream.bytes_fetched
    needed = Counter()
    for layer in (1, 2):
        for kind in ("cls", "registers", "patches"):
            for chunk in range(store.spec.n_chunks):
                place = store.chunk(layer, kind, chunk)
                needed[place.key, place.offset, place.nbytes] += 1
    assert objects.ranges == needed
    assert fetched == sum(nbytes for _, _, nbytes in needed)


@pytest.mark.parametrize(
    ("precision", "patches_nbytes"),
    [("float16", 256 * 768 * 2), pytest.param("int8", 256 * 768 + 768 * 4, marks=pytest.mark.slow)],
)
def test_amplification_is_one_at_vit_b_size(tmp_path: Path, precision: str, patches_nbytes: int) -> None:
    size = {"layers": (0, 1), "dim": 768, "n_registers": 4, "grid": (16, 16), "n_samples": 50, "precision": precision}
    write_planted(FolderObjects(tmp_path), make_spec(**size, samples_per_shard=32, samples_per_chunk=16))
    store = open_store(tmp_path)
    with LayerSliceStream(store, Span(0, 1)) as stream:
        for batch in stream:
            assert np.array_equal(batch.to().activations[:3].numpy(), store.read(samples=batch.sample_index[:3]))
        assert stream.amplification == 1.0
        per_sample = 2 * (patches_nbytes + 5 * 768 * 4)
        assert stream.bytes_fetched == 64 * per_sample  # four chunks of 16, the last one padded
        assert stream.n_chunks_read == 4 * 2 * (4 if precision == "int8" else 3)


# B7: errors reach the consumer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_planted(FolderObjects(tmp_path / "store"), make_spec(n_samples=101))
    return tmp_path / "store"


@pytest.mark.parametrize("threads", [1, 6])
@pytest.mark.parametrize("after", [0, 1, 40])
def test_an_error_in_a_thread_reaches_the_consumer(folder: Path, after: int, threads: int) -> None:
    store = open_store(FaultyObjects(folder, catch_fire, after, "layer_01"))
    with LayerSliceStream(store, Span(0, 1), batch_size=8, threads=threads) as stream:
        with pytest.raises(OSError, match="on fire"):
            for _ in stream:
                pass
        with pytest.raises(OSError, match="on fire"):
            next(stream)


def test_an_error_comes_before_batches_that_are_ready(folder: Path) -> None:
    gate = threading.Event()

    def late() -> None:
        gate.wait(PATIENCE_S)
        catch_fire()

    store = open_store(FaultyObjects(folder, late, 30))
    # One thread reads in order: of two, one may use up the sound reads while the other is within the first chunk.
    with LayerSliceStream(store, Span(0, 1), batch_size=2, threads=1, lanes=1, readahead=10.0) as stream:
        next(stream)  # and batch 1 is of the same chunk
        gate.set()
        wait_until(lambda: not reading_threads(), "the thread ends with its error")
        with pytest.raises(OSError, match="on fire"):
            next(stream)


def test_damage_is_named_and_never_delivered(folder: Path, way_of_reading: None) -> None:
    victim = next((folder / "layer_01/patches").rglob("0"))
    while victim.is_dir():
        victim = next(victim.iterdir())
    key = victim.relative_to(folder).as_posix()
    sound = victim.read_bytes()
    store = open_store(folder)

    def stream_all() -> None:
        with LayerSliceStream(store, Span(0, 1)) as stream:
            for _ in stream:
                pass

    flipped = bytearray(sound)
    flipped[7] ^= 4
    victim.write_bytes(flipped)
    with pytest.raises(ChecksumError, match=f"{key}: bytes 0 to .* have crc32c .* the commit says") as damage:
        stream_all()
    assert damage.value.key == key
    victim.write_bytes(sound[:5])
    with pytest.raises(ShortObjectError, match=key):
        stream_all()
    victim.unlink()
    with pytest.raises(ObjectMissingError, match=f"{key} is missing"):
        stream_all()
    victim.write_bytes(sound)
    stream_all()


def test_a_chunk_that_does_not_decode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> np.ndarray:
        raise DecodeError("a chunk of the wrong kind")

    monkeypatch.setattr("trainer.chunk_reader.decode_payload", fail)  # no sound commit leads to such bytes
    named = pytest.raises(DecodeError, match=r"layer_0\d/.*, chunk \d+: a chunk of the wrong kind")
    with LayerSliceStream(planted(codec="lz4", shuffle="byte"), Span(0, 1)) as stream, named:
        next(stream)


# B8: shutdown


@pytest.mark.parametrize("n_taken", [0, 1, 3])
def test_close_returns_at_once_with_the_queue_full(store: Store, n_taken: int) -> None:
    stream = LayerSliceStream(store, Span(0, 1), batch_size=4, lanes=2, threads=8)
    for _ in range(n_taken):
        next(stream)
    time.sleep(0.1)  # the readers have filled every buffer and wait for room
    begin = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - begin < PATIENCE_S / 2, "it would wait so long for threads that do not end"
    assert not reading_threads()
    with pytest.raises(RuntimeError, match="the stream is closed"):
        next(stream)


def test_close_from_another_thread_wakes_a_waiting_consumer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awaited, gate, wait = threading.Event(), threading.Event(), ChunkReader.wait
    store = open_store(FaultyObjects(folder, lambda: gate.wait(PATIENCE_S)))
    stream = LayerSliceStream(store, Span(0, 1), batch_size=4, threads=2)

    def tell(reader: ChunkReader, place: int) -> None:
        awaited.set()
        wait(reader, place)

    def close() -> None:
        assert awaited.wait(PATIENCE_S)
        threading.Timer(0.2, gate.set).start()  # close() waits for the threads that read
        stream.close()

    monkeypatch.setattr(ChunkReader, "wait", tell)
    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(RuntimeError, match="closed while a batch was awaited"):
        next(stream)
    closing.join()


def test_a_read_that_never_returns_is_left_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes late, to memory that nobody uses any more."""
    hangs, gate = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        gate.wait(PATIENCE_S)

    store = open_store(FaultyObjects(folder, hang, 30))
    stream = LayerSliceStream(store, Span(0, 1), batch_size=2, threads=1, lanes=1, readahead=10.0)
    next(stream)
    assert hangs.wait(PATIENCE_S)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.chunk_reader._JOIN_S", 0.2)
        stream.set_epoch(1)
    assert f"{folder}: some reads hang; they are left behind" in capsys.readouterr().err
    assert reading_threads()
    gate.set()
    expected = LayerSliceStream(open_store(folder), Span(0, 1), batch_size=2, epoch=1, lanes=1)
    with stream, expected:
        for batch, sound in zip(stream, expected, strict=True):
            assert np.array_equal(batch.tokens, sound.tokens)


def test_threads_end_when_the_stream_is_forgotten(store: Store) -> None:
    stream = LayerSliceStream(store, Span(0, 1), batch_size=4, lanes=2)
    next(stream)
    del stream
    gc.collect()  # no_thread_is_left does the rest


def test_threads_end_with_the_pass(store: Store) -> None:
    stream = LayerSliceStream(store, Span(0, 1))
    for _ in stream:
        pass
    assert not reading_threads()
    assert list(stream) == []
    stream.close()


# B9: the last batch is short and says so


def test_last_batch_is_short_and_batches_know_their_size(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 1), batch_size=32) as stream:
        assert len(stream) == 4
        assert stream.n_samples == 97
        sizes = [(batch.number, len(batch), batch.n_batch) for batch in stream]
    assert sizes == [(0, 32, 32), (1, 32, 32), (2, 32, 32), (3, 1, 1)]


# memory


def test_views_hold_until_the_next_batch_and_then_refuse(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 1), batch_size=8, lanes=4, readahead=0.0) as stream:
        previous = None
        for batch in stream:
            if previous is not None:
                with pytest.raises(RuntimeError, match=r"batch \d+ was released; copy what you need"):
                    _ = previous.patches
            time.sleep(0.01)  # time for readers to overwrite what they may
            assert np.array_equal(batch.to().activations.numpy(), store.read([0, 1], batch.sample_index))
            batch.release() if batch.number % 2 else None
            previous = batch


@pytest.mark.parametrize("readahead", [0.0, 0.5, 1.0, 4.0])
def test_any_readahead_delivers_the_same(store: Store, readahead: float) -> None:
    expected = indices(LayerSliceStream(store, Span(0, 1), batch_size=5, lanes=8))
    assert indices(LayerSliceStream(store, Span(0, 1), batch_size=5, lanes=8, readahead=readahead)) == expected


def test_memory_is_what_the_plan_says() -> None:
    store = planted(2048, bad={}, samples_per_shard=1024, samples_per_chunk=16)
    sizes = {}
    for readahead in (0.0, 1.0):
        for stop in (1, 2):
            with LayerSliceStream(store, Span(0, stop), lanes=32, readahead=readahead) as stream:
                stated = stream.memory_nbytes
            assert stated == stream_memory_nbytes(store.spec, Span(0, stop), lanes=32, readahead=readahead)
            sizes[readahead, stop] = stated
    in_lanes = 32 * 16 * (8 * 4 + 2 * 8 * 4 + (1 + 2 + 6) * 8 * 2)  # of one state; the rest does not grow with them
    assert in_lanes <= sizes[0.0, 2] - sizes[0.0, 1] <= 1.5 * in_lanes
    assert 1.7 * in_lanes <= sizes[1.0, 2] - sizes[1.0, 1] <= 2.3 * in_lanes


PEAK = """
import gc, sys
import infra.folder_objects
from storage_schemas import open_store
from trainer.stream import LayerSliceStream, Span

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

for way in sys.argv[1].split():
    if way == "python":
        infra.folder_objects.read_rows_function = lambda: None
    for location in sys.argv[2:]:
        store = open_store(location)
        warm = LayerSliceStream(store, Span(0, 1), batch_size=1, lanes=1, threads=1, readahead=0.0)
        next(warm)
        warm.close()
        gc.collect()
        open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
        before = kilobytes("VmRSS")
        with LayerSliceStream(store, Span(0, 2), batch_size=32, lanes=16, n_steps=1000) as stream:
            for epoch in range(2):  # the second was read ahead, in part
                stream.set_epoch(epoch)
                for batch in stream:
                    pass
            print(way, location, (kilobytes("VmHWM") - before) * 1024, stream.memory_nbytes)
"""


@pytest.fixture(scope="module")
def larger_stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Without and with a codec, in either back end, and with bad images, whose bytes are read but go nowhere."""
    root = tmp_path_factory.mktemp("larger")
    sizes = {"dim": 128, "grid": (16, 16), "n_samples": 256, "samples_per_shard": 64, "samples_per_chunk": 8}
    states = planted_states(make_spec(**sizes), range(64))
    bad = dict.fromkeys(range(0, 256, 3), "empty")
    stores: dict[str, dict[str, Any]] = {
        "none": {},
        "bad": {},
        "lz4": {"codec": "lz4", "shuffle": "byte"},
        "int8": {"precision": "int8"},
        "tar": {"backend": "webdataset"},
    }
    for name, changes in stores.items():
        images = bad if name == "bad" else {}
        spec = make_spec(**sizes, **changes)
        write_store(FolderObjects(root / name), spec, make_samples(256), lambda rows: states, bad_images=images)
    return [str(root / name) for name in stores]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_measured_peak_stays_under_the_statement(larger_stores: list[str]) -> None:
    command = [sys.executable, "-c", PEAK, "compiled python", *larger_stores]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2 * len(larger_stores)
    for line in lines:
        *name, measured, stated = line.split()
        assert int(measured) <= int(stated), f"{name}: {measured} bytes used, {stated} stated"
        assert int(measured) > 0.6 * int(stated), f"{name}: {measured} bytes used; {stated} stated, which is of no use"


@pytest.mark.parametrize(("n", "samples_per_chunk", "lanes"), [(200_000, 4, 64), (300_000, 64, 8), (100, 16, 4)])
def test_planning_takes_no_more_than_it_says(n: int, samples_per_chunk: int, lanes: int) -> None:
    tracemalloc.start()
    try:
        valid = np.arange(n) % 10 > 0
        before, _ = tracemalloc.get_traced_memory()
        order = make_pass_order(valid, samples_per_chunk, lanes=lanes)
        one = make_rank_pass(order, 0, 64)
        kept, peak = tracemalloc.get_traced_memory()
        for world_size in (1, 2):  # the next pass is planned while one is in use
            make_rank_pass(
                make_pass_order(valid, samples_per_chunk, lanes=lanes, epoch=1), 1, 64, world_size=world_size
            )
        _, peak_of_two = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert one.n_batches == order.n_batches(64)
    assert peak <= order.planning_nbytes + 2**17
    assert kept - before <= order.kept_nbytes(64) + 2**14
    assert peak_of_two <= order.kept_nbytes(64) + order.planning_nbytes + 2**17


# what is refused


@pytest.mark.parametrize("value", [2.5, "8", True, None, 0])
@pytest.mark.parametrize("name", ["batch_size", "lanes", "threads", "world_size"])
def test_numbers_that_are_none(store: Store, name: str, value: object) -> None:
    if name == "threads" and value is None:
        return  # as many as fit
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected a whole number, at least 1"):
        _untyped_stream(store, **{name: value})


@pytest.mark.parametrize("name", ["seed", "epoch", "rank"])
def test_numbers_from_zero(store: Store, name: str) -> None:
    for value in (1.5, -1):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected a whole number, at least 0"):
            _untyped_stream(store, **{name: value})


def _untyped_stream(store: Store, **changes: Any) -> None:
    """Make one as where nothing checks types, unlike in these tests."""
    inspect.unwrap(LayerSliceStream.__init__)(object.__new__(LayerSliceStream), store, Span(0, 1), **changes)


def test_what_is_no_store_or_no_span_is_named(store: Store) -> None:
    make = inspect.unwrap(LayerSliceStream.__init__)
    with pytest.raises(TypeError, match=r"store is str, expected a Store: give open_store\('stores/train'\)"):
        make(object.__new__(LayerSliceStream), "stores/train", Span(0, 1))
    with pytest.raises(TypeError, match=r"span is tuple, expected a Span: give Span\(0, 7\)"):
        make(object.__new__(LayerSliceStream), store, (0, 1))
    with pytest.raises(TypeError, match=r"span is str, .* Span.parse\('0-7'\)"):
        make(object.__new__(LayerSliceStream), store, "0-7")


def test_state_that_is_not_whole_is_refused(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 1), batch_size=8) as stream:
        next(stream)
        whole = stream.state_dict()
        with pytest.raises(ValueError, match=r"lacks seed, epoch, batch, batch_size, n_lanes, .*, shards; give what"):
            stream.load_state_dict({"version": 1})
        for name in whole.keys() - {"version"}:
            with pytest.raises(ValueError, match=f"lacks {name}; give"):
                stream.load_state_dict({key: value for key, value in whole.items() if key != name})
        for change in ({"seed": "x"}, {"batch": None}, {"epoch": 1.5}):
            with pytest.raises(ValueError, match=f"{next(iter(change))} is .*; expected a whole number"):
                stream.load_state_dict(whole | change)
        with pytest.raises(ValueError, match="shards of the stream state are 'all'"):
            stream.load_state_dict(whole | {"shards": "all"})
        assert stream.state_dict() == whole
        stream.load_state_dict(whole)


def test_unfinished_store_needs_partial(folder: Path) -> None:
    (folder / "index.parquet").unlink()
    for shard in (2, 5):
        next(folder.glob(f"commits/*{shard}.json")).unlink()
    store = open_store(folder)
    with pytest.raises(NotCommittedError, match=r"is not finished: 11 of 13 shards are committed.*PARTIAL=1"):
        LayerSliceStream(store, Span(0, 1))
    present = [s for s in range(13) if s not in (2, 5)]
    with LayerSliceStream(store, Span(0, 1), batch_size=8, partial=True) as stream:
        assert stream.shards == tuple(present)
        seen = [i for batch in stream for i in batch.sample_index.tolist()]
        state = stream.state_dict()
    assert sorted({i // 8 for i in seen}) == present
    with pytest.raises(NotCommittedError, match="shards 2 are not committed"):
        LayerSliceStream(store, Span(0, 1), partial=True, shards=[1, 2])
    write_planted(FolderObjects(folder), make_spec(n_samples=101))  # the store has been finished meanwhile
    with LayerSliceStream(open_store(folder), Span(0, 1), batch_size=8) as stream:
        stream.load_state_dict({**state, "batch": 0})
        assert [i for batch in stream for i in batch.sample_index.tolist()] == seen, "the list of shards is frozen"


def test_impossible_requests_are_refused(store: Store) -> None:
    with pytest.raises(SchemaError, match=r"BLOCK=1-4:\s+.*has no layer 3, 4; it has 0, 1, 2"):
        LayerSliceStream(store, Span(1, 4))
    with pytest.raises(ValueError, match="16 ranks, but only 8 lanes"):
        LayerSliceStream(store, Span(0, 1), lanes=8, rank=3, world_size=16)
    with pytest.raises(ValueError, match="rank is 2; expected 0 to 1"):
        LayerSliceStream(store, Span(0, 1), rank=2, world_size=2)
    for name in ("batch_size", "threads", "lanes"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected a whole number, at least 1"):
            LayerSliceStream(store, Span(0, 1), **{name: 0})


# B10: the rest of this file runs without CUDA; this is what CUDA adds


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_cuda_gives_the_same_activations(precision: str) -> None:
    store = planted(precision=precision)
    with LayerSliceStream(store, Span(0, 2), batch_size=8, lanes=4, readahead=0.0) as stream:
        for epoch in range(3):
            stream.set_epoch(epoch)
            made = [
                (batch.to("cuda"), batch.sample_index) for batch in stream
            ]  # buffers recycle while copies are queued
            for on_device, sample_index in made:
                assert np.array_equal(on_device.activations.cpu().numpy(), store.read([0, 1, 2], sample_index))
                assert on_device.sample_index.tolist() == sample_index.tolist()


@pytest.mark.gpu
def test_buffers_are_pinned(store: Store) -> None:
    with LayerSliceStream(store, Span(0, 2), batch_size=8) as stream:
        assert torch.from_numpy(next(stream).patches).is_pinned()

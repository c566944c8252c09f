"""Passes one after another: the next one's first chunks are read while one ends, and nothing else is different."""

import dataclasses
import gc
import inspect
import math
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.reader import Store
from tests import examples
from tests.resume import check_resume_everywhere
from tests.stores import make_spec, write_planted
from tests.trainer import streaming
from tests.trainer.streaming import (
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
from trainer.rank_pass import RankPass, make_rank_pass
from trainer.stream import HostBatch, LayerSliceStream, Span

SPAN = Span(0, 1)

no_thread_is_left = streaming.no_thread_is_left


@pytest.fixture(scope="module")
def store() -> Store:
    return planted()  # 97 valid samples in 26 chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_planted(FolderObjects(tmp_path / "store"), make_spec(n_samples=101))
    return tmp_path / "store"


class Passes:
    """The batches of a stream, pass after pass, as a training takes them."""

    def __init__(self, stream: LayerSliceStream, n_steps: int) -> None:
        self.stream, self.n_steps = stream, n_steps

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        if self.stream.epoch * len(self.stream) + self.state_dict()["batch"] >= self.n_steps:
            raise StopIteration
        batch = next(self.stream, None)
        if batch is None:
            self.stream.set_epoch(self.stream.epoch + 1)
            batch = next(self.stream)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        self.stream.close()


def content(batch: HostBatch) -> tuple:
    return tuple(batch.sample_index.tolist()), batch.number, batch.n_batch, batch.to().activations.numpy().tobytes()


def taken(store: Store, n_steps: int, *, announced: bool, **changes: Any) -> list[tuple]:
    """Every batch of so many steps."""
    stream = LayerSliceStream(store, SPAN, n_steps=n_steps if announced else None, **changes)
    passes = Passes(stream, n_steps)
    try:
        return [content(batch) for batch in passes]
    finally:
        passes.close()


def read_early(stream: LayerSliceStream, following: RankPass) -> int:
    """Chunks of (layer, kind) of the next pass that may be read while the last batch of the one before is in use."""
    may = following.plan.opens_at < 0
    n_first = len(may) if may.all() else int(np.argmin(may))
    return n_first * stream.span.n_states * 3


def following_pass(stream: LayerSliceStream, **changes: Any) -> RankPass:
    spec = stream.store.spec
    order = make_pass_order(
        stream.store.valid, spec.samples_per_chunk, seed=stream.seed, epoch=stream.epoch + 1, lanes=stream.n_lanes
    )
    return make_rank_pass(order, stream.epoch + 1, stream.batch_size, **changes)


def whole_pass(stream: LayerSliceStream) -> int:
    return stream.store.spec.n_chunks * stream.span.n_states * 3


# the same samples in the same order, whatever is read when


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (3, 8)])
@pytest.mark.parametrize("readahead", [0.0, 1.0, pytest.param(4.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_the_batches_are_those_of_passes_read_one_by_one(
    store: Store, rank: int, world_size: int, readahead: float, threads: int
) -> None:
    config: dict[str, Any] = {"batch_size": 7, "seed": 3, "lanes": 8, "readahead": readahead, "threads": threads}
    config |= {"rank": rank, "world_size": world_size}
    n_steps = 3 * math.ceil(97 / 7) + 5
    assert taken(store, n_steps, announced=True, **config) == taken(store, n_steps, announced=False, **config)


@given(st.data())
@settings(max_examples=examples.of(60), deadline=None)
def test_any_stream_of_passes_is_that_of_its_orders(data: st.DataObject) -> None:
    """Against the arithmetic alone: small stores, where one pass's chunks fill all buffers, among them."""
    n = data.draw(st.integers(1, 60))
    store = planted(n, bad=dict.fromkeys(data.draw(st.sets(st.integers(1, n), max_size=5)) - {n}, "empty"))
    lanes, batch_size = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 20))
    world_size = data.draw(st.sampled_from([1, 2]))
    first = data.draw(st.integers(0, 3))
    config: dict[str, Any] = {"batch_size": batch_size, "lanes": lanes, "threads": data.draw(st.integers(1, 3))}
    config |= {"readahead": data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])), "epoch": first}
    orders = [make_pass_order(store.valid, 4, epoch=first + i, lanes=lanes) for i in range(3)]
    world_size = min(world_size, orders[0].n_lanes)
    n_batches = orders[0].n_batches(batch_size)
    n_steps = data.draw(st.integers(first * n_batches + 1, (first + 3) * n_batches))
    wanted = []
    for place in range(first * n_batches, n_steps):
        order, start = orders[place // n_batches - first], place % n_batches * batch_size
        stop = min(start + batch_size, order.n_samples)
        wanted.append((order.samples(start, stop), order.lane_entries(start, stop)[0] % world_size))
    for rank in range(world_size):
        made = taken(store, n_steps, announced=True, rank=rank, world_size=world_size, **config)
        assert [list(one[0]) for one in made] == [samples[of == rank].tolist() for samples, of in wanted]
        for samples, *_, states in made:
            assert states == store.read(list(SPAN.states), list(samples)).tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"lanes": 8},
        pytest.param({"lanes": 1}, marks=pytest.mark.slow),
        pytest.param({"lanes": 8, "readahead": 0.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resume_from_every_step_of_three_passes(store: Store, changes: dict[str, Any]) -> None:
    n_steps = 3 * 9 - 2
    config: dict[str, Any] = {"batch_size": 11, "n_steps": n_steps, **changes}
    keys = check_resume_everywhere(
        lambda: Passes(LayerSliceStream(store, SPAN, seed=1, threads=1, **config), n_steps),
        content,
        lambda: Passes(LayerSliceStream(store, SPAN, seed=8, threads=6, **config), n_steps),
    )
    assert len(keys) == n_steps


def test_resume_with_other_ranks_at_the_border(store: Store) -> None:
    """Among them ranks that have nothing left to read in the pass they begin in."""
    config: dict[str, Any] = {"batch_size": 6, "lanes": 8, "n_steps": 40}
    whole = taken(store, 40, announced=False, batch_size=6, lanes=8)
    for n_taken in (15, 16, 17, 18):
        with LayerSliceStream(store, SPAN, rank=1, world_size=2, **config) as stream:
            passes = Passes(stream, 40)
            for _ in range(n_taken):
                next(passes)
            state = stream.state_dict()
        parts = []
        for rank in range(8):
            with LayerSliceStream(store, SPAN, rank=rank, world_size=8, threads=1, **config) as stream:
                stream.load_state_dict(state)
                parts.append([set(batch.sample_index.tolist()) for batch in Passes(stream, 40)])
        assert [set.union(*batch) for batch in zip(*parts)] == [set(one[0]) for one in whole[n_taken:]]


# what is read when


def test_the_next_pass_begins_without_a_read(folder: Path) -> None:
    """Its first batch is there while the last one of the pass before is in use: from there on, reads do not return."""
    gate, barred = threading.Event(), threading.Event()

    def read() -> None:
        if barred.is_set() and not gate.wait(PATIENCE_S):
            raise AssertionError("the first batch waits for a read")

    store = open_store(FaultyObjects(folder, read))
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, threads=2, n_steps=20) as stream:
        following = following_pass(stream, n_buffers=stream._n_buffers)
        for _ in range(len(stream)):
            batch = next(stream)
        early = read_early(stream, following)
        assert early >= 8 * 2 * 3, "a chunk of each lane"
        wait_until(lambda: stream.n_chunks_read == whole_pass(stream) + early, f"{early} chunks are read ahead")
        assert np.array_equal(batch.to().activations.numpy(), store.read([0, 1], batch.sample_index)), "overwritten"
        barred.set()
        assert next(stream, None) is None
        stream.set_epoch(1)
        first = next(stream)
        gate.set()
        assert first.number == 0
        assert np.array_equal(first.to().activations.numpy(), store.read([0, 1], first.sample_index))


@pytest.mark.parametrize("n_passes", [1, 3])
@pytest.mark.parametrize("world_size", [1, 4])
def test_whole_passes_read_every_stored_byte_once_each(folder: Path, n_passes: int, world_size: int) -> None:
    objects = CountingObjects(folder)
    store = open_store(objects)
    objects.ranges.clear()
    n_steps = n_passes * 13
    for rank in range(world_size):
        config: dict[str, Any] = {"rank": rank, "world_size": world_size, "lanes": 8, "batch_size": 8}
        with LayerSliceStream(store, SPAN, n_steps=n_steps, **config) as stream:
            assert len(stream) == 13
            for _ in Passes(stream, n_steps):
                pass
            wait_until(lambda: not reading_threads(), "the threads end with the last pass")
            assert stream.amplification == 1.0
        assert stream.amplification == 1.0, "nor does the end drop anything"
    needed = Counter()
    for layer in SPAN.states:
        for kind in ("cls", "registers", "patches"):
            for chunk in range(store.spec.n_chunks):
                place = store.chunk(layer, kind, chunk)
                needed[place.key, place.offset, place.nbytes] += n_passes
    assert objects.ranges == needed


@pytest.mark.parametrize("n_steps", [1, 7, 12, 13, 14, 20])
def test_nothing_is_read_that_only_later_steps_hold(store: Store, n_steps: int) -> None:
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=n_steps) as stream:
        for _ in Passes(stream, n_steps):
            pass
        wait_until(lambda: not reading_threads(), "the threads end with the last step")
        held = 0
        for epoch in range(2):
            order = make_pass_order(store.valid, 4, epoch=epoch, lanes=8)
            n_samples = max(0, min(n_steps - epoch * len(stream), len(stream))) * 8
            held += len(np.unique(order.samples(0, min(n_samples, order.n_samples)) // 4))
        assert stream.n_chunks_read == held * 6
        assert stream.amplification == 1.0
        with pytest.raises(ValueError, match=rf"was made for {n_steps} batches in all: give as many n_steps as will"):
            list(Passes(stream, n_steps + 1))


def test_without_a_number_of_steps_no_other_pass_is_read(store: Store) -> None:
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8) as stream:
        for _ in range(len(stream)):
            next(stream)
        wait_until(lambda: not reading_threads(), "the threads end with the pass")
        assert stream.n_chunks_read == whole_pass(stream)


def test_memory_is_that_of_a_single_pass(store: Store) -> None:
    with (
        LayerSliceStream(store, SPAN, batch_size=8, lanes=8) as one,
        LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=40) as many,
    ):
        assert many.memory_nbytes == one.memory_nbytes
        rows = many._ring.n_rows
        for _ in Passes(many, 40):
            assert many.memory_nbytes == one.memory_nbytes
            assert many._ring.n_rows == rows


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_pass_that_needs_more_room_begins_anew(store: Store, rank: int, world_size: int) -> None:
    """Without buffers to spare, passes differ in how many a chunk is spread over; ranks, in the most of a batch."""
    config: dict[str, Any] = {"rank": rank, "world_size": world_size, "readahead": 0.0}
    orders = [make_pass_order(store.valid, 4, epoch=epoch, lanes=8) for epoch in range(4)]
    passes = [make_rank_pass(order, epoch, 5, **config) for epoch, order in enumerate(orders)]
    rooms = [(one.plan.n_buffers, one.most_rows) for one in passes]
    fit = [one.fits(*rooms[0]) for one in passes]
    assert fit == [buffers <= rooms[0][0] and rows <= rooms[0][1] for buffers, rows in rooms]
    assert not all(fit), "this store would prove nothing"
    n_steps = 4 * passes[0].n_batches
    config |= {"batch_size": 5, "lanes": 8}
    assert taken(store, n_steps, announced=True, **config) == taken(store, n_steps, announced=False, **config)


def test_a_thread_that_comes_late_leaves_no_pass_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a pass fits into the buffers here: a third one may be appended before the second one's first read."""
    take, begun = ChunkReader._take, []

    def late(reader: ChunkReader) -> Any:
        if reader._next_task == whole_pass(stream) // 3 and reader._reading.first == 0:
            wait_until(lambda: reader._passes[-1].first == 2 * len(stream), "a third pass is appended")
        task = take(reader)
        if task is not None and task[0].first not in begun:
            begun.append(task[0].first)
            assert begun == [13 * number for number in range(len(begun))]
        return task

    monkeypatch.setattr(ChunkReader, "_take", late)
    config: dict[str, Any] = {"batch_size": 8, "lanes": 8, "threads": 1, "readahead": 20.0}
    with LayerSliceStream(store, SPAN, n_steps=39, **config) as stream:
        give_up = threading.Timer(PATIENCE_S, stream.close)  # a pass left out would be waited for for ever
        give_up.start()
        made = [content(batch) for batch in Passes(stream, 39)]
        give_up.cancel()
    monkeypatch.undo()
    assert made == taken(store, 39, announced=False, **config)
    assert begun == [0, 13, 26]


# what the consumer does instead


@pytest.mark.parametrize("n_before", [0, 1])
def test_another_pass_than_the_next_drops_what_was_read_ahead(store: Store, n_before: int) -> None:
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=200) as stream:
        for epoch in range(n_before):
            assert len(list(stream)) == len(stream)
            stream.set_epoch(epoch + 1)
        following = following_pass(stream, n_buffers=stream._n_buffers)
        for _ in range(len(stream)):
            next(stream)
        early, whole = read_early(stream, following), (n_before + 1) * whole_pass(stream)
        assert early
        wait_until(lambda: stream.n_chunks_read == whole + early, "the next pass's first chunks are read")
        assert stream.bytes_needed == stream.bytes_fetched
        stream.set_epoch(5)
        dropped = stream.bytes_fetched - stream.bytes_needed
        assert stream.amplification == stream.bytes_fetched / stream.bytes_needed > 1
        assert dropped * whole == stream.bytes_needed * early, "chunks are of one size"
        made = [content(batch) for batch in stream]
        assert stream.bytes_fetched - stream.bytes_needed == dropped
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, epoch=5) as alone:
        assert made == [content(batch) for batch in alone]


@pytest.mark.parametrize(("leave_after", "epoch"), [(0, 2), (5, 1), (13, 0), (13, 1), (13, 2)])
def test_any_pass_may_be_begun_at_any_time(store: Store, leave_after: int, epoch: int) -> None:
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=100) as stream:
        for _ in range(leave_after):
            next(stream)
        stream.set_epoch(epoch)
        assert stream.state_dict() | {"epoch": epoch, "batch": 0} == stream.state_dict()
        made = [content(batch) for batch in stream]
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, epoch=epoch) as alone:
        assert made == [content(batch) for batch in alone]


def test_a_refused_pass_leaves_the_one_in_use_as_it_is(store: Store) -> None:
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=100) as stream:
        whole = len(list(stream))
        stream.set_epoch(1)
        made = [content(next(stream))]
        with pytest.raises(ValueError, match="epoch"):
            stream.set_epoch(2**63)
        assert stream.state_dict() | {"epoch": 1, "batch": 1} == stream.state_dict()
        made += [content(batch) for batch in stream]
    assert len(made) == whole
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, epoch=1) as alone:
        assert made == [content(batch) for batch in alone]


@pytest.mark.parametrize("moment", ["the reader is made", "the next pass is planned"])
def test_close_from_another_thread_at_any_moment_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stream = LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=100)
    where, name = (ChunkReader, "__init__") if moment == "the reader is made" else (LayerSliceStream, "_make_order")
    former = getattr(where, name)

    def closed_by_another(*args: Any, **kwargs: Any) -> Any:
        done = former(*args, **kwargs)
        closing = threading.Thread(target=stream.close)
        closing.start()
        closing.join()
        return done

    monkeypatch.setattr(where, name, closed_by_another)
    with pytest.raises(RuntimeError, match="closed"):
        for _ in stream:
            pass
    assert not reading_threads()


def test_buffers_change_hands_after_the_device_has_copied_them(store: Store) -> None:
    """The last batch of a reader may still be on its way to the device when another reader gets its buffers."""
    copied = create_autospec(torch.cuda.Event, instance=True)
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8) as stream:
        next(stream)._copied = copied
        stream.set_epoch(1)
        copied.synchronize.assert_called_once_with()


def test_passes_that_have_ended_are_let_go(store: Store) -> None:
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=100) as stream:
        ended = weakref.ref(stream._pass)
        list(stream)
        stream.set_epoch(1)
        gc.collect()
        assert ended() is None


def test_the_end_of_a_pass_may_be_asked_for_again(store: Store) -> None:
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, n_steps=100) as stream:
        for epoch in range(2):
            assert len(list(stream)) == len(stream)
            assert list(stream) == []
            assert (stream.epoch, stream.position) == (epoch, stream.n_samples)
            stream.set_epoch(epoch + 1)
            assert (stream.epoch, stream.position) == (epoch + 1, 0)


@pytest.mark.parametrize("n_taken", [0, 3, 13])
def test_close_ends_threads_that_wait_for_the_next_pass(store: Store, n_taken: int) -> None:
    stream = LayerSliceStream(store, SPAN, batch_size=8, lanes=8, threads=6, n_steps=100)
    for _ in range(n_taken):
        next(stream)
    assert (len(reading_threads()) == 6) == (n_taken > 0)
    stream.close()
    assert not reading_threads()


def test_an_error_ahead_comes_at_the_next_batch(folder: Path) -> None:
    """And again afterwards, in the pass that it happened in too."""
    n_sound = whole_pass(LayerSliceStream(open_store(folder), SPAN)) // 2  # reads of layer 1 in the first pass
    store = open_store(FaultyObjects(folder, catch_fire, n_sound, "layer_01"))
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, threads=1, n_steps=100) as stream:
        with pytest.raises(OSError, match="on fire"):
            for _ in Passes(stream, 100):
                pass
        assert stream.epoch <= 1
        with pytest.raises(OSError, match="on fire"):
            next(stream)


def test_an_error_ahead_outlives_the_border(folder: Path) -> None:
    """It came while the last batch was in use, so nothing could tell of it before the next pass."""
    gate = threading.Event()

    def late() -> None:
        gate.wait(600)
        catch_fire()

    n_sound = whole_pass(LayerSliceStream(open_store(folder), SPAN)) // 2
    store = open_store(FaultyObjects(folder, late, n_sound, "layer_01"))
    with LayerSliceStream(store, SPAN, batch_size=8, lanes=8, threads=1, n_steps=100) as stream:
        assert len([next(stream) for _ in range(len(stream))]) == len(stream)
        gate.set()
        wait_until(lambda: not reading_threads(), "the thread ends with its error")
        assert next(stream, None) is None
        stream.set_epoch(1)
        for _ in range(2):
            with pytest.raises(OSError, match="on fire"):
                next(stream)


def test_shards_of_an_unfinished_store_stay_those_of_the_first_pass(folder: Path) -> None:
    (folder / "index.parquet").unlink()
    for shard in (2, 5):
        next(folder.glob(f"commits/*{shard}.json")).unlink()
    store = open_store(folder)
    n_steps = 3 * math.ceil(int(store.valid.sum()) / 8)
    made = taken(store, n_steps, announced=True, batch_size=8, lanes=8, partial=True)
    assert made == taken(store, n_steps, announced=False, batch_size=8, lanes=8, partial=True)
    assert not {i // 8 for samples, *_ in made for i in samples} & {2, 5}


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "9"])
def test_what_is_no_number_of_steps_is_refused(store: Store, value: Any) -> None:
    make = inspect.unwrap(LayerSliceStream.__init__)
    with pytest.raises(ValueError, match=f"n_steps is {value!r}; expected a whole number, at least 1"):
        make(object.__new__(LayerSliceStream), store, SPAN, n_steps=value)


def test_rank_pass_knows_its_rows() -> None:
    order = make_pass_order(np.ones(50, bool), 4, lanes=4)
    one = make_rank_pass(order, 0, 8, rank=1, world_size=2)
    assert one.n_batches == 7
    assert sum(one.n_rows(batch) for batch in range(7)) == int(order.lane_n[one.lanes].sum())
    assert one.most_rows == max(one.n_rows(batch) for batch in range(7))
    assert one.fits(one.plan.n_buffers, one.most_rows)
    assert not one.fits(one.plan.n_buffers, one.most_rows - 1)
    assert not dataclasses.replace(one, plan=dataclasses.replace(one.plan, first_batch=one.plan.first_batch * 0)).fits(
        3, 8
    )

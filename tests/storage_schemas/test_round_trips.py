"""What is written is what is read: any shape, codec, precision, short last shard, bad images; and in equal bytes."""

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from storage_schemas.codecs import DecodeError, decode_chunk, encode_chunk, kind_dtype, raw_chunk_nbytes
from storage_schemas.digest import content_digest, digest_of
from storage_schemas.errors import SchemaError
from storage_schemas.from_arrays import split_kinds, write_store
from storage_schemas.keys import LOG_PREFIX
from tests import examples
from tests.stores import (
    as_stored,
    make_samples,
    make_spec,
    planted_head_inputs,
    planted_states,
    write_planted,
    write_planted_anew,
)
from tests.strategies import bad_images, specs


@settings(max_examples=examples.of(40))
@given(specs(), st.data())
def test_any_store_reads_back_as_it_was_written(spec, data):
    bad, objects = data.draw(bad_images(spec.n_samples)), MemoryObjects()
    write_planted(objects, spec, bad)
    store, states = open_store(objects), planted_states(spec, range(spec.n_samples))
    exact = split_kinds(spec, states)  # the small kinds are stored as they are
    states = as_stored(spec, states)
    valid = [i for i in range(spec.n_samples) if i not in bad]

    assert store.verify() == []
    assert (store.n_samples, store.n_committed, store.n_valid) == (spec.n_samples, spec.n_samples, len(valid))
    np.testing.assert_array_equal(store.read(), states[valid])
    for kind, values in {**exact, "patches": split_kinds(spec, states)["patches"]}.items():
        found = store.read(tokens=kind)
        np.testing.assert_array_equal(found.reshape(values[valid].shape), values[valid])
        assert found.ndim == 4
    if spec.has_head_input:
        np.testing.assert_array_equal(store.read_head_input(), planted_head_inputs(spec, range(spec.n_samples))[valid])
    assert store.samples["valid"].to_pylist() == [i in valid for i in range(spec.n_samples)]
    assert store.table.bad_images == bad


def test_folder_and_memory_hold_the_same_bytes(tmp_path):
    folder, memory = FolderObjects(tmp_path), MemoryObjects()
    for objects in (folder, memory):
        write_planted_anew(objects, make_spec(codec="zstd-3", shuffle="bit"), {3: "empty"})
    assert content_digest(folder) == content_digest(memory)


def test_rounding_is_measured():
    spec, objects = make_spec(n_samples=5), MemoryObjects()
    rng = np.random.default_rng(0)
    states = rng.standard_normal((5, 3, 9, 8)).astype(np.float32) + 3
    write_store(objects, spec, make_samples(5), lambda rows: states[rows.start : rows.stop])
    store = open_store(objects)
    patches = states[:, :, 3:].astype(np.float64)
    for layer in spec.layers:
        truth = patches[:, layer]
        stored = store.read([layer], tokens="patches")[:, 0].astype(np.float64)
        error = ((stored - truth) ** 2).sum()
        assert error > 0
        fidelity = store.table.fidelity[f"layer_{layer:02d}/patches"]
        assert fidelity.relative_mse == pytest.approx(error / (truth**2).sum(), rel=1e-9)
        means = truth.mean(axis=(0, 1))
        assert fidelity.r2 == pytest.approx(1 - error / ((truth - means) ** 2).sum(), rel=1e-12)
        assert fidelity.worst == np.abs(stored - truth).max()
    assert {path.rpartition("/")[2] for path in store.table.fidelity} == {"patches"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: np.where(np.arange(8) == 3, np.inf, s).astype(np.float32), "layer_00/cls.*NaN or infinite"),
        (lambda s: np.where(np.arange(8) == 3, np.nan, s).astype(np.float32), "layer_00/cls.*NaN or infinite"),
        (lambda s: s + np.float32(70_000), r"(?s)layer_00/patches.*does not fit float16"),
        (lambda s: s.astype(np.float64), "float64, expected"),
        (lambda s: s[:, :2], r"shape \(8, 2, 9, 8\) .*expected \(8, 3, 9, 8\)"),
    ],
)
def test_states_that_cannot_be_stored_are_refused(change, message):
    with pytest.raises(SchemaError, match=rf"(?s){message}"):
        write_store(MemoryObjects(), make_spec(), make_samples(21), lambda r: change(planted_states(make_spec(), r)))


def test_what_a_bad_image_holds_is_ignored():
    """Whatever the caller has in those rows, NaN or too large, neither warns nor shows in the bytes."""

    def states_of(rows: range, filler: float) -> np.ndarray:
        states = planted_states(make_spec(), rows)
        if 2 in rows:
            states[2] = filler
        return states

    digests = []
    for filler in (0.0, np.nan, np.inf, 1e30):
        objects = MemoryObjects()
        write_store(
            objects, make_spec(), make_samples(21), lambda r, f=filler: states_of(r, f), bad_images={2: "empty"}
        )
        digests.append(content_digest(objects))
    assert len(set(digests)) == 1


def test_rows_without_states_are_nan_on_disk():
    objects = MemoryObjects()
    write_planted(objects, make_spec(), {2: "empty"})
    store = open_store(objects)
    for kind in store.spec.token_kinds:
        first = decode_chunk(store.spec, kind, store.fetch(store.chunk(0, kind, 0)))
        assert np.isnan(first[2]).all()
        assert np.isfinite(first[[0, 1, 3]]).all()
        last = decode_chunk(store.spec, kind, store.fetch(store.chunk(0, kind, 5)))
        assert np.isfinite(last[:1]).all()
        assert np.isnan(last[1:]).all(), "rows past the end of the store"


def test_a_store_without_head_inputs_says_so():
    spec, objects = make_spec(), MemoryObjects()
    write_store(objects, spec, make_samples(21), lambda rows: planted_states(spec, rows))
    with pytest.raises(SchemaError, match="made from arrays without head inputs"):
        open_store(objects).read_head_input([0])
    bare, objects = make_spec(has_cls=False), MemoryObjects()
    write_planted(objects, bare)
    with pytest.raises(SchemaError, match="no CLS token, so the store has no head_input"):
        open_store(objects).read_head_input([0])


CODECS = [(codec, shuffle) for codec in ("lz4", "zstd-1", "zstd-3") for shuffle in ("byte", "bit")]
#: 1.6 MB a chunk, so that Blosc cuts it into blocks and would, left alone, spread them over threads.
LARGE = {"dim": 384, "grid": (16, 16), "samples_per_chunk": 8, "samples_per_shard": 8}


@pytest.mark.parametrize(("codec", "shuffle"), CODECS)
def test_coding_gives_the_same_bytes_from_any_thread(codec, shuffle):
    spec = make_spec(codec=codec, shuffle=shuffle, **LARGE)
    raw = memoryview((np.random.default_rng(0).integers(-20, 20, 8 * 256 * 384) / 8).astype("<f2").tobytes())
    expected = bytes(encode_chunk(spec, "patches", raw))
    found = [bytes(encode_chunk(spec, "patches", raw)) for _ in range(4)]

    def encode() -> None:
        found.append(bytes(encode_chunk(spec, "patches", raw)))

    threads = [threading.Thread(target=encode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert set(found) == {expected}
    assert decode_chunk(spec, "patches", expected).tobytes() == raw
    assert len(expected) < len(raw)


@pytest.mark.parametrize(("codec", "shuffle"), [("none", "none"), *CODECS])
def test_payloads_of_another_size_are_refused(codec, shuffle):
    """They would have passed their checksum, so these are faults of the writer; still nothing may be read past."""
    spec = make_spec(codec=codec, shuffle=shuffle)
    raw = memoryview(bytes(raw_chunk_nbytes(spec, "patches")))
    payload = bytes(encode_chunk(spec, "patches", raw))
    np.testing.assert_array_equal(decode_chunk(spec, "patches", payload), 0)
    longer = payload[:12] + (len(payload) + 1).to_bytes(4, "little") + payload[16:]
    for wrong in (b"", payload[:-1], payload + b"\0", payload[:10], *([longer] if codec != "none" else [])):
        with pytest.raises(DecodeError, match="a patches chunk"):
            decode_chunk(spec, "patches", wrong)


@settings(max_examples=examples.of(60))
@given(st.sampled_from(CODECS), st.data())
def test_damaged_payloads_never_crash_the_decoder(how, data):
    spec = make_spec(codec=how[0], shuffle=how[1])
    raw = memoryview(np.arange(raw_chunk_nbytes(spec, "patches") // 2, dtype="<f2").tobytes())
    payload = bytearray(encode_chunk(spec, "patches", raw))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode_chunk(spec, "patches", bytes(payload))
    except DecodeError:
        return
    assert found.dtype == kind_dtype(spec, "patches")  # Blosc has no checksum; the CRC32C before it has


class TestDigest:
    def test_the_digest_is_that_of_the_format(self):
        """FORMAT.md, "Content digest", worked out by other means."""
        import hashlib

        objects = MemoryObjects()
        for key in ("b", "a/c", "a.d"):
            objects.put(key, key.encode())
        objects.put("log/run/status.json", b"never counted")
        lines = [f"{hashlib.sha256(key.encode()).hexdigest()}  {key}\n" for key in ("a.d", "a/c", "b")]
        assert content_digest(objects) == hashlib.sha256("".join(lines).encode()).hexdigest()

    @pytest.mark.parametrize("change", ["put", "delete", "rename", "new", "log"])
    def test_what_changes_it(self, change):
        objects = MemoryObjects()
        write_planted(objects, make_spec(n_samples=3))
        before, data = content_digest(objects), objects.get("zarr.json")
        if change == "put":
            objects.put("zarr.json", data + b" ")
        if change in ("delete", "rename"):
            objects.delete("zarr.json")
        if change == "rename":
            objects.put("zarr.jsom", data)
        if change == "new":
            objects.put("x", b"")
        if change == "log":
            objects.put(f"{LOG_PREFIX}x", b"")
        assert (content_digest(objects) == before) == (change == "log")

    def test_it_depends_on_every_input_of_a_store(self):
        digests = []
        for spec, bad, seed in [
            (make_spec(), {}, 0),
            (make_spec(), {}, 1),
            (make_spec(), {1: "empty"}, 0),
            (make_spec(), {1: "truncated"}, 0),
            (make_spec(order_seed=7), {}, 0),
        ]:
            objects = MemoryObjects()
            write_planted(objects, spec, bad, seed)
            digests.append(content_digest(objects))
        assert all(a != b for a, b in pairwise(digests))
        assert len(set(digests)) == 5

    def test_nothing_has_a_digest_too(self):
        assert content_digest(MemoryObjects()) == digest_of([])

"""Distances between layers, from a store: by definition, for any chunks, from the small kinds alone."""

import itertools
import os
import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from analysis.distances import cosine_distances, layer_distances, teacher_depth
from infra.console import UserError
from infra.objects import MemoryObjects
from storage_schemas import open_store
from storage_schemas.errors import ChecksumError, SchemaError
from storage_schemas.from_arrays import write_store
from storage_schemas.keys import shard_object_key
from tests.analysis.published import DISTANCE
from tests.stores import make_samples, make_spec, write_planted

BAD = {5: "truncated", 20: "empty"}
GOOD = [row for row in range(21) if row not in BAD]
LAYERS = (0, 1, 2, 3, 4)


class RecordingObjects(MemoryObjects):
    """Knows the keys of what was read, whole or in part, and the bytes of each part."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[str, int]] = []
        self.keys: set[str] = set()

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        self.keys.add(key)  # reading a part of it comes by here, too
        return super().get(key, at_most=at_most)

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        self.read.append((key, sum(buffer.nbytes for buffer in buffers)))
        return super().read_parts(key, start, buffers)


def one_shot(store) -> np.ndarray:
    """The definition, pair by pair, on all states at once in float64."""
    n = len(store.layers) - 1
    out = np.zeros((n, n))
    kinds = [kind for kind in ("cls", "patch_mean") if kind in store.spec.token_kinds]
    for kind in kinds:
        states = store.read(store.layers[1:], tokens=kind)[:, :, 0].astype(np.float64)
        for i, j in itertools.combinations(range(n), 2):
            a, b = states[:, i], states[:, j]
            cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
            out[i, j] = out[j, i] = out[i, j] + np.mean(1 - cosine) / len(kinds)
    return out


def planted(objects: MemoryObjects | None = None, **changes):
    objects = MemoryObjects() if objects is None else objects
    write_planted(objects, make_spec(**{"layers": LAYERS} | changes), BAD)
    return open_store(objects)


@pytest.mark.parametrize("window_nbytes", [1, 3000, 2**24])
@pytest.mark.parametrize(
    "changes",
    [
        {"samples_per_chunk": 1, "samples_per_shard": 1},
        {"samples_per_chunk": 4},
        {"samples_per_chunk": 8, "samples_per_shard": 32},
        {"samples_per_chunk": 21, "samples_per_shard": 21},
        {"precision": "int8"},
        {"codec": "zstd-1", "shuffle": "byte"},
        {"backend": "webdataset"},
        {"has_cls": False, "n_registers": 0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_streaming_equals_all_at_once(monkeypatch, changes, window_nbytes):
    monkeypatch.setattr("analysis.distances._WINDOW_NBYTES", window_nbytes)
    store = planted(**changes)
    found = layer_distances(store)
    np.testing.assert_allclose(found.distance, one_shot(store), rtol=0, atol=1e-10)
    assert (found.layers, found.n_images) == ((1, 2, 3, 4), len(GOOD))
    assert found.kinds == (("cls", "patch_mean") if changes.get("has_cls", True) else ("patch_mean",))


def test_no_patches_are_read_and_nothing_twice(monkeypatch):
    monkeypatch.setattr("analysis.distances._WINDOW_NBYTES", 1)
    recording = RecordingObjects()
    store = planted(recording)
    recording.read.clear()
    recording.keys.clear()
    layer_distances(store)
    expected = {f"layer_{layer:02d}/{kind}" for layer in (1, 2, 3, 4) for kind in ("cls", "patch_mean")}
    assert {"/".join(key.split("/")[:2]) for key in recording.keys} == expected
    assert len(recording.read) == 4 * 2 * 5  # layers, kinds, chunks: the sixth has no valid image
    assert sum(nbytes for _, nbytes in recording.read) == 4 * 2 * 20 * 8 * 4


def test_limit_takes_the_first_valid_images():
    store = planted()
    found = layer_distances(store, limit=7)
    assert found.n_images == 7
    rows = GOOD[:7]
    expected = np.mean([cosine_distances(store.read(LAYERS[1:], rows, kind)[:, :, 0]) for kind in found.kinds], axis=0)
    np.testing.assert_allclose(found.distance, expected.mean(axis=0), rtol=0, atol=1e-12)
    assert layer_distances(store, [1, 4], None).distance.shape == (2, 2)


def test_standard_error_is_that_of_the_mean_over_images():
    store = planted()
    found = layer_distances(store)
    per_image = np.mean(
        [cosine_distances(store.read(LAYERS[1:], tokens=kind)[:, :, 0]) for kind in found.kinds], axis=0
    )
    expected = per_image.std(axis=0, ddof=1) / np.sqrt(len(GOOD))
    np.testing.assert_allclose(found.standard_error, expected, rtol=1e-9, atol=1e-9)
    assert np.isinf(layer_distances(store, limit=1).standard_error).all()


def test_progress_counts_every_image_once(monkeypatch):
    monkeypatch.setattr("analysis.distances._WINDOW_NBYTES", 1)
    told: list[int] = []
    layer_distances(planted(), limit=10, progress=told.append)
    assert sum(told) == 10
    assert len(told) == 3  # 4 valid images of a chunk of 4, then 3, then 3 of 4


class TestCosine:
    STATES = arrays.arrays(np.float32, (3, 4, 5), elements=st.floats(-8, 8, width=32))

    @given(STATES, st.integers(0, 2**16))
    def test_symmetric_in_range_and_without_scale(self, states, seed):
        states = states + np.float32(0.01)
        found = cosine_distances(states)
        assert (found == np.swapaxes(found, 1, 2)).all()
        assert (found[:, range(4), range(4)] == 0).all()
        assert found.min() >= 0
        assert found.max() <= 2
        scales = np.random.default_rng(seed).uniform(0.1, 100, (3, 4, 1))
        np.testing.assert_allclose(cosine_distances(states * scales), found, rtol=0, atol=1e-6)

    def test_known_angles(self):
        states = np.array([[[1, 0], [0, 2], [-3, 0], [5, 5]]], np.float32)
        half = 1 - np.sqrt(0.5)
        expected = [[0, 1, 2, half], [1, 0, 1, half], [2, 1, 0, 2 - half], [half, half, 2 - half, 0]]
        np.testing.assert_allclose(cosine_distances(states)[0], expected, rtol=0, atol=1e-15)

    def test_kinds_count_equally(self):
        """CLS states that are orthogonal, patch means that are equal: half of 1."""
        spec = make_spec(layers=(0, 1, 2), dim=2, n_samples=4)
        states = np.ones((4, 3, spec.n_tokens, 2), np.float32)
        states[:, 1, 0], states[:, 2, 0] = (3, 0), (0, 0.5)
        objects = MemoryObjects()
        write_store(objects, spec, make_samples(4), lambda rows: states[list(rows)])
        found = layer_distances(open_store(objects))
        np.testing.assert_allclose(found.distance, [[0, 0.5], [0.5, 0]], atol=1e-15)
        np.testing.assert_allclose(found.by_kind[:, 0, 1], [1, 0], atol=1e-15)


def test_memory_does_not_grow_with_the_store(monkeypatch):
    monkeypatch.setattr("analysis.distances._WINDOW_NBYTES", 2**14)
    sizes = {"n_samples": 64, "samples_per_shard": 64, "samples_per_chunk": 4}
    spec = make_spec(layers=tuple(range(7)), dim=256, grid=(1, 1), **sizes)
    objects = MemoryObjects()
    states = np.random.default_rng(0).standard_normal((64, 7, spec.n_tokens, 256)).astype(np.float32)
    write_store(objects, spec, make_samples(64), lambda rows: states)
    store = open_store(objects)
    all_nbytes = 64 * 6 * 256 * 8 * 2
    tracemalloc.start()
    try:
        layer_distances(store)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < all_nbytes / 4


class TestWhatCannotBeMeasured:
    def test_states_without_a_direction(self):
        spec = make_spec(n_samples=4)
        states = np.ones((4, 3, spec.n_tokens, 8), np.float32)
        states[1:3, 2, 0] = 0
        objects = MemoryObjects()
        write_store(objects, spec, make_samples(4), lambda rows: states[list(rows)])
        with pytest.raises(UserError, match=r"no direction:\n  layer 2, cls: of 2 images\n"):
            layer_distances(open_store(objects))

    def test_no_valid_image(self):
        spec = make_spec(n_samples=2)
        objects = MemoryObjects()
        write_planted(objects, spec, {0: "truncated", 1: "empty"})
        with pytest.raises(UserError, match="has no image"):
            layer_distances(open_store(objects))

    def test_damage_is_named(self):
        objects = MemoryObjects()
        store = planted(objects)
        key = shard_object_key(store.spec, "layer_02/patch_mean", 1)
        data = bytearray(objects.get(key))
        data[5] ^= 1
        objects.put(key, bytes(data))
        with pytest.raises(ChecksumError, match=key):
            layer_distances(store)


class TestTeacherDepth:
    def test_without_a_teacher(self):
        assert teacher_depth(planted()) is None

    @pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\x05" + b"\0" * 7 + b"{}{}{", b"\x02" + b"\0" * 7 + b"12"])
    def test_a_damaged_head_is_named(self, data):
        objects = MemoryObjects()
        write_planted(objects, make_spec(), teacher_files={"config.json": b"{}", "weights.safetensors": data})
        with pytest.raises(SchemaError, match=r"teacher/weights\.safetensors is damaged: .*make verify"):
            teacher_depth(open_store(objects))

    def test_weights_without_numbered_blocks(self):
        head = b'{"stem.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
        objects = MemoryObjects()
        weights = len(head).to_bytes(8, "little") + head
        write_planted(objects, make_spec(), teacher_files={"config.json": b"{}", "weights.safetensors": weights})
        assert teacher_depth(open_store(objects)) is None


@pytest.mark.skipif("IMAGENET_STORE" not in os.environ, reason="give IMAGENET_STORE=, a store of DINOv2 ViT-B/14 reg")
def test_published_matrix_on_the_real_teacher():
    """Needs weights and images that nobody has here: states of 10,000 ImageNet training images."""
    store = open_store(os.environ["IMAGENET_STORE"])
    np.testing.assert_allclose(layer_distances(store).distance, DISTANCE, rtol=0, atol=0.01)

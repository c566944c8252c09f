"""Stores in which every array holds random values, for readers that we did not write."""

from collections.abc import Mapping

import numpy as np

from infra.objects import Objects
from storage_schemas import Store
from storage_schemas.codecs import kind_dtype, kind_fill, kind_shape
from storage_schemas.commit import Commit
from storage_schemas.create import create_store
from storage_schemas.keys import STATISTICS, array_kind, commit_key, sharded_array_paths
from storage_schemas.precision import restore_patches
from storage_schemas.shard_buffers import ShardBuffers, write_shard
from storage_schemas.spec import StoreSpec
from tests.stores import make_samples

BAD_ROWS = (2, 17)  # 17 lies in the last, partial shard


def any_finite(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Every finite bit pattern is possible: minus zero, subnormal numbers, the largest ones."""
    bits = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    values = bits.view(dtype)[..., 0]
    return np.where(np.isfinite(values), values, -np.zeros((), dtype))


def write_random(objects: Objects, spec: StoreSpec) -> dict[str, np.ndarray]:
    """A store in which every array, head_input and statistics too, holds random values; gives those by path."""
    rng = np.random.default_rng(7)
    truth = {
        path: any_finite(rng, kind_dtype(spec, array_kind(path)), (spec.n_samples, *kind_shape(spec, array_kind(path))))
        for path in sharded_array_paths(spec)
    }
    for path in truth:
        if array_kind(path) == "patches_scale":  # of any bits, it would overflow
            truth[path] = rng.uniform(-9, 9, truth[path].shape).astype(np.float32)
    n_kinds = len(spec.token_kinds)
    truth[STATISTICS] = rng.standard_normal((spec.n_shards, len(spec.layers), n_kinds, 5, spec.dim))
    document = create_store(objects, spec, make_samples(spec.n_samples), {})
    buffers = ShardBuffers(spec)
    for shard in range(spec.n_shards):
        rows = spec.shard_samples(shard)
        bad = [row for row in BAD_ROWS if row in rows]
        buffers.begin(shard)
        for path in sharded_array_paths(spec):
            buffers.assign(path, 0, truth[path][rows.start : rows.stop])
        for row in bad:
            buffers.invalidate(row - rows.start)
        commit = Commit(
            shard=shard,
            store=document.digest,
            bad_images=tuple((row, "truncated") for row in bad),
            objects=write_shard(objects.put, buffers, shard, truth[STATISTICS][shard]),
            fidelity={},
        )
        objects.put(commit_key(shard), commit.to_bytes())
    return truth


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def assert_rows(found: np.ndarray, expected: np.ndarray, spec: StoreSpec, path: str) -> None:
    """Every good row bit for bit, every bad one the fill value."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
    good, bad = np.setdiff1d(np.arange(len(expected)), BAD_ROWS), list(BAD_ROWS)
    np.testing.assert_array_equal(bits(found[good]), bits(expected[good]), err_msg=path)
    fill = kind_fill(spec, array_kind(path))
    np.testing.assert_array_equal(found[bad], np.full_like(found[bad], fill), err_msg=path)


def assert_our_reader_agrees(store: Store, truth: Mapping[str, np.ndarray]) -> None:
    """With what was written: every layer and kind, and the head input."""
    good = np.setdiff1d(np.arange(store.n_samples), BAD_ROWS)
    for layer in store.layers:
        for kind in store.spec.token_kinds:
            expected = truth[f"layer_{layer:02d}/{kind}"][good]
            if kind == "patches":
                scale = truth.get(f"layer_{layer:02d}/patches_scale")
                expected = restore_patches(store.spec.precision, expected, None if scale is None else scale[good])
            found = store.read(layers=[layer], tokens=kind)[:, 0]
            np.testing.assert_array_equal(bits(found.reshape(expected.shape)), bits(expected), kind)
    np.testing.assert_array_equal(bits(store.read_head_input()), bits(truth["head_input"][good]))

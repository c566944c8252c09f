"""Statistics and measured errors that contradict the stored values are reported; true ones never are."""

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.objects import MemoryObjects
from storage_schemas import open_store
from storage_schemas.commit import Commit, Fidelity, ObjectRecord
from storage_schemas.consistency import moment_problems, moments_of, moments_of_blocks
from storage_schemas.errors import Problem
from storage_schemas.from_arrays import write_store
from storage_schemas.index import index_to_bytes
from storage_schemas.keys import INDEX_KEY, commit_key, shard_object_key, statistics_key
from storage_schemas.reader import read_commits
from storage_schemas.shard_buffers import encode_statistics
from storage_schemas.spec import PRECISIONS, StoreSpec
from storage_schemas.statistics import Statistics
from storage_schemas.zarr_layout import crc_bytes
from tests import examples
from tests.cases import one_in
from tests.stores import make_samples, make_spec
from tests.strategies import bad_images, specs

ROUNDED = [precision for precision in PRECISIONS if precision != "float32"]
PATH = "layer_01/patches"


def made_store(precision: str, *, scale: float = 1.0, offset: float = 0.0, seed: int = 0) -> MemoryObjects:
    """Gaussian states, 64 patches of 16 channels; two bad images."""
    objects = MemoryObjects()
    for key, data in _made(precision, scale, offset, seed):
        objects.put(key, data)
    return objects


@cache
def _made(precision: str, scale: int | float, offset: int | float, seed: int) -> list[tuple[str, bytes]]:
    spec = make_spec(precision=precision, grid=(8, 8), dim=16)
    shape = (spec.n_samples, len(spec.layers), spec.n_tokens, spec.dim)
    states = (np.random.default_rng(seed).standard_normal(shape) * scale + offset).astype(np.float32)
    objects = MemoryObjects()
    write_store(
        objects,
        spec,
        make_samples(spec.n_samples),
        lambda rows: states[rows.start : rows.stop],
        bad_images={5: "truncated", 20: "empty"},
    )
    return [(info.key, objects.get(info.key)) for info in objects.list()]


def reseal(objects: MemoryObjects, change: Callable[[Commit], Commit]) -> list[Problem]:
    """Verify a store after a change of the commit of shard 1, with digests and index made anew to fit it."""
    store = open_store(objects)
    commits, _ = read_commits(objects, store.document, use_index=False)
    commits[1] = change(commits[1])
    objects.put(commit_key(1), commits[1].to_bytes())
    objects.put(INDEX_KEY, index_to_bytes(store.spec, store.document.digest, commits))
    return open_store(objects).verify()


def with_fidelity(change: Callable[[Fidelity], Fidelity]) -> Callable[[Commit], Commit]:
    return lambda c: dataclasses.replace(c, fidelity={**c.fidelity, PATH: change(c.fidelity[PATH])})


def with_object(objects: MemoryObjects, key: str, data: bytes, record: ObjectRecord) -> Callable[[Commit], Commit]:
    objects.put(key, data)
    return lambda c: dataclasses.replace(c, objects={**c.objects, key: record})


def sums(objects: MemoryObjects) -> tuple[float, float]:
    """Squares and squared deviations of the patches of PATH in shard 1."""
    moments = open_store(objects).shard_statistics(1)
    count, mean, m2 = (a[1, 2] for a in (moments.count, moments.mean, moments.m2))
    return float((m2 + count * mean**2).sum()), float(m2.sum())


@pytest.mark.parametrize(
    ("size", "precision"),
    one_in(3, [(1, 0), (1, 300), (1e-4, 0), (1e3, -5e3), (0, 0), (0, 7.3), (1e-7, 0), (1e-30, 0)], PRECISIONS),
)
def test_what_is_true_is_never_doubted(precision, size):
    scale, offset = size
    assert open_store(made_store(precision, scale=scale, offset=offset)).verify() == []


@settings(max_examples=8)
@given(st.data())
def test_no_store_that_we_write_is_doubted(data):
    check_not_doubted(data)


@pytest.mark.slow
@settings(max_examples=examples.of(100))
@given(st.data())
def test_none_of_many_stores_that_we_write_is_doubted(data):
    check_not_doubted(data)


def check_not_doubted(data: st.DataObject) -> None:
    """Any form, with states of any size, constant, huge, tiny or of one patch alone."""
    spec: StoreSpec = data.draw(specs())
    size = data.draw(st.sampled_from([1e-38, 1e-12, 1.0, 1e4]))
    repeat = data.draw(st.sampled_from(["", "patches", "samples", "channels", "all"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shape = [spec.n_samples, len(spec.layers), spec.n_tokens, spec.dim]
    for axis, name in ((0, "samples"), (2, "patches"), (3, "channels")):
        shape[axis] = 1 if repeat in (name, "all") else shape[axis]
    states = np.broadcast_to(
        rng.standard_normal(shape) * size, (spec.n_samples, len(spec.layers), spec.n_tokens, spec.dim)
    ).astype(np.float32)
    objects = MemoryObjects()
    write_store(
        objects,
        spec,
        make_samples(spec.n_samples),
        lambda rows: states[rows.start : rows.stop],
        bad_images=data.draw(bad_images(spec.n_samples)),
    )
    assert open_store(objects).verify() == []


class TestMadeUpErrors:
    def check(self, problems: list[Problem], message: str) -> None:
        assert [(p.key, p.shard, p.what) for p in problems] == [(commit_key(1), 1, f"measured error of {PATH}")]
        assert message in problems[0].found

    @pytest.mark.parametrize(("factor", "precision"), one_in(2, [0.0, 1e-6, 1e-3, 0.003, 10, 100], ROUNDED))
    def test_consistent_in_itself_but_not_with_the_values(self, precision, factor):
        """relative_mse, r2 and worst all scaled as if the errors were smaller or larger."""
        objects = made_store(precision)
        squares, deviations = sums(objects)

        def scaled(f: Fidelity) -> Fidelity:
            error = f.relative_mse * factor
            return Fidelity(relative_mse=error, r2=1 - error * squares / deviations, worst=f.worst * factor**0.5)

        problems = reseal(objects, with_fidelity(scaled))
        self.check(problems, "gives at most" if factor > 1 else "means of samples of the stored patches show at least")

    @pytest.mark.parametrize(("factor", "precision"), one_in(2, [0.999, 1.001, 2], ROUNDED))
    def test_r2_follows_from_the_rest(self, precision, factor):
        problems = reseal(
            made_store(precision), with_fidelity(lambda f: dataclasses.replace(f, r2=1 - factor * (1 - f.r2)))
        )
        self.check(problems, "relative_mse and statistics give")
        problems = reseal(
            made_store(precision),
            with_fidelity(lambda f: dataclasses.replace(f, relative_mse=f.relative_mse * factor)),
        )
        self.check(problems, "relative_mse and statistics give")

    @pytest.mark.parametrize(("factor", "precision"), one_in(2, [0.0, 0.01, 0.3], ROUNDED))
    def test_the_largest_error_is_at_least_that_of_the_extremes(self, precision, factor):
        problems = reseal(
            made_store(precision), with_fidelity(lambda f: dataclasses.replace(f, worst=f.worst * factor))
        )
        self.check(problems, "of a channel differs by")

    @pytest.mark.parametrize("precision", ROUNDED)
    def test_the_largest_error_is_at_most_that_of_rounding(self, precision):
        problems = reseal(made_store(precision), with_fidelity(lambda f: dataclasses.replace(f, worst=f.worst * 5)))
        self.check(problems, f"{precision} gives at most")

    @pytest.mark.parametrize("precision", ["float16", "int8"])
    def test_left_out(self, precision):
        problems = reseal(made_store(precision), lambda c: dataclasses.replace(c, fidelity={}))
        assert [p.what for p in problems] == [f"measured error of layer_0{i}/patches" for i in range(3)]
        assert problems[0].found == "none, though it was rounded"

    @pytest.mark.parametrize("precision", ["float16", "int8"])
    def test_negative_is_no_error(self, precision):
        problems = reseal(
            made_store(precision), with_fidelity(lambda f: Fidelity(relative_mse=-1.0, r2=2.0, worst=-1.0))
        )
        self.check(problems, "gives at most")


def test_an_error_where_nothing_was_rounded():
    exact = Fidelity(relative_mse=0.0, r2=1.0, worst=0.0)
    problems = reseal(made_store("float32"), lambda c: dataclasses.replace(c, fidelity={PATH: exact}))
    assert [(p.what, p.found) for p in problems] == [(f"measured error of {PATH}", "one, though it is exact")]


@pytest.mark.parametrize(
    ("precision", "kind", "name"),
    one_in(
        3,
        ["float32", "int8"],
        ["cls", "registers", "patches", "patch_mean"],
        ["count", "mean", "m2", "min", "max"],
    ),
)
def test_changed_statistics_are_reported(precision, kind, name):
    """One number of one channel, beyond what rounding leaves open; the object and commit are sealed anew."""
    objects = made_store(precision)
    place = open_store(objects).spec.token_kinds.index(kind)
    moments = open_store(objects).shard_statistics(1)
    changed = Statistics.from_array(moments.to_array().copy())
    exact = kind != "patches" or precision == "float32"
    array = getattr(changed, name)
    array[1, place, 5] += (1e-6 if exact else 1.0) * max(1.0, abs(array[1, place, 5]))
    encoded = encode_statistics(1, changed.to_array())
    data = b"".join(map(bytes, encoded.pieces))
    problems = reseal(objects, with_object(objects, encoded.key, data, encoded.record))
    assert f"statistics of layer_01/{kind}" in [p.what for p in problems] or any(
        p.what == f"measured error of {PATH}" for p in problems
    )
    assert {p.key for p in problems} <= {statistics_key(1), commit_key(1)}
    assert {p.shard for p in problems} == {1}
    if exact:
        label = {"m2": "M2"}.get(name, name)
        assert f"{label} of channel 5 is " in next(p.found for p in problems if p.key == statistics_key(1))


@pytest.mark.parametrize("kind", ["cls", "registers", "patches", "patch_mean", "patches_scale"])
def test_values_of_another_shard_are_reported_though_every_checksum_fits(kind):
    """A commit that names another shard's object, with that object's checksums: bytes are right, values are not."""
    objects = made_store("int8")
    spec = open_store(objects).spec
    commits, _ = read_commits(objects, open_store(objects).document)
    mine, theirs = (shard_object_key(spec, f"layer_01/{kind}", shard) for shard in (1, 0))
    problems = reseal(objects, with_object(objects, mine, objects.get(theirs), commits[0].objects[theirs]))
    assert problems
    assert {p.shard for p in problems} == {1}
    assert all("layer_01/" in p.what for p in problems)


def test_nan_in_a_valid_row_is_reported():
    objects = made_store("float32")
    key = "layer_01/cls/c/1/0"
    data = bytearray(objects.get(key))
    data[0:4] = np.float32(np.nan).tobytes()
    store = open_store(objects)
    record = read_commits(objects, store.document)[0][1].objects[key]
    chunks = record.chunks.copy()
    nbytes = int(chunks[0, 1])
    chunks[0, 2] = crc32c(bytes(data[:nbytes]))
    data[nbytes : nbytes + 4] = crc_bytes(int(chunks[0, 2]))
    changed = ObjectRecord(nbytes=record.nbytes, crc32c=crc32c(bytes(data)), chunks=chunks)
    problems = reseal(objects, with_object(objects, key, bytes(data), changed))
    assert [p.what for p in problems] == ["statistics of layer_01/cls"]
    assert "mean of channel 0 is nan" in problems[0].found


def test_moments_of_blocks_are_those_of_one_shot_whatever_the_offset():
    values = (np.random.default_rng(0).standard_normal((40, 9, 5)) + 1e4).astype(np.float32)
    found = moments_of_blocks(np.split(values, [3, 4, 20]), 5)
    assert list(moment_problems(found, moments_of(values))) == []
    near = moments_of(np.nextafter(values, np.float32(np.inf)))
    assert list(moment_problems(found, near)) != []


def test_an_empty_shard_has_the_moments_of_nothing():
    objects = MemoryObjects()
    spec = make_spec(n_samples=8)
    write_store(
        objects,
        spec,
        make_samples(8),
        lambda rows: np.ones((8, 3, 9, 8), np.float32),
        bad_images=dict.fromkeys(range(8), "empty"),
    )
    assert open_store(objects).verify() == []

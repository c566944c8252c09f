"""One pass: who gets what, what is read and how often, for any chunks, limits and workers."""

import numpy as np
import pytest

from analysis.measure import StoreAnalyses, class_numbers, measure_store
from analysis.pass_over import Analysis, batches, pass_nbytes, pass_over, stop_after
from infra.console import UserError
from infra.objects import MemoryObjects
from storage_schemas import open_store
from storage_schemas.errors import ChecksumError
from storage_schemas.keys import shard_object_key
from tests.analysis.test_distances import BAD, GOOD, LAYERS, RecordingObjects, planted
from tests.stores import make_spec, write_planted

CHUNKS = [
    {"samples_per_chunk": 1, "samples_per_shard": 1},
    {"samples_per_chunk": 4},
    {"samples_per_chunk": 21, "samples_per_shard": 21},
    {"backend": "webdataset"},
]


class Taker:
    """Keeps what it is given."""

    def __init__(self, *kinds: str, stop: int | None = None) -> None:
        self.kinds, self.rows, self.states, self.sizes = kinds, [], [], []
        self.analysis = Analysis(name="taker", kinds=kinds, update=self.update, stop=stop)

    def update(self, states, rows) -> None:
        assert set(states) == set(self.kinds)
        self.rows += rows.tolist()
        self.sizes.append(len(rows))
        self.states.append(np.concatenate([states[kind] for kind in self.kinds], axis=2))

    @property
    def all(self) -> np.ndarray:
        return np.concatenate(self.states)


@pytest.mark.parametrize("changes", CHUNKS, ids=str)
@pytest.mark.parametrize("batch_rows", [1, 8, 1024])
def test_everybody_gets_every_valid_row_in_order(changes, batch_rows):
    store = planted(**changes)
    takers = [Taker("cls"), Taker("cls", "patch_mean"), Taker("registers"), Taker("patches"), Taker("patches")]
    seen: list[int] = []
    n = pass_over(store, [one.analysis for one in takers], batch_rows=batch_rows, progress=seen.append)
    assert n == sum(seen) == len(GOOD)
    for one in takers:
        assert one.rows == GOOD
        expected = np.concatenate([store.read(tokens=kind) for kind in one.kinds], axis=2)
        np.testing.assert_array_equal(one.all, expected)


def test_batches_are_whole_chunks_of_the_size_that_was_asked():
    store = planted(samples_per_chunk=4)
    taker = Taker("cls")
    pass_over(store, [taker.analysis], batch_rows=9)  # two chunks of four; rows 5 and 20 are bad
    assert taker.sizes == [7, 8, 4]


def test_only_what_is_asked_for_is_read_and_nothing_twice():
    objects = RecordingObjects()
    store = planted(objects, samples_per_chunk=4)
    objects.read.clear()
    objects.keys.clear()
    takers = [Taker("cls"), Taker("cls"), Taker("registers")]
    pass_over(store, [one.analysis for one in takers], layers=[1, 3])
    keys = {key for key, _ in objects.read}
    assert {key.split("/")[0] for key in keys} == {"layer_01", "layer_03"}
    assert {key.split("/")[1] for key in keys} == {"cls", "registers"}
    stored = sum(n for key, n in objects.read if "/cls/" in key)
    assert stored == 2 * 20 * store.spec.dim * 4  # the last chunk holds one sample, whose image was bad
    assert len(objects.read) == 2 * 2 * 5


def test_each_analysis_has_its_own_end():
    store = planted()
    few, many, wide = Taker("cls", stop=7), Taker("cls", stop=15), Taker("patches", stop=stop_after(store, 3))
    assert pass_over(store, [few.analysis, many.analysis, wide.analysis]) == 14
    assert few.rows == [row for row in GOOD if row < 7]
    assert many.rows == [row for row in GOOD if row < 15]
    assert wide.rows == GOOD[:3]
    np.testing.assert_array_equal(wide.all, store.read(samples=GOOD[:3], tokens="patches"))


def test_stop_after_counts_valid_images():
    store = planted()
    assert [stop_after(store, n) for n in (0, 1, 5, 6, 19, 100)] == [0, 1, 5, 7, 20, 20]


def test_runs_of_batches_hold_every_row_once_and_no_chunk_twice():
    spec = make_spec(samples_per_chunk=4)
    rows = np.array([0, 1, 5, 7, 8, 12, 20])
    for batch_rows in (1, 4, 7, 8, 100):
        runs = batches(spec, rows, batch_rows)
        np.testing.assert_array_equal(np.concatenate(runs), rows)
        chunks = [chunk for run in runs for chunk in set((run // 4).tolist())]
        assert len(chunks) == len(set(chunks))
        assert all(np.ptp(run // 4) < max(1, batch_rows // 4) for run in runs)
    assert batches(spec, rows[:0]) == []


def test_memory_is_stated_for_vit_b():
    spec = make_spec(
        layers=tuple(range(13)), dim=768, n_registers=4, grid=(16, 16), samples_per_chunk=16, samples_per_shard=256
    )
    assert pass_nbytes(spec, ("cls", "patch_mean")) == 2 * 1024 * 13 * 2 * 768 * 4
    assert pass_nbytes(spec, ("cls", "patches")) == 2 * 16 * 13 * 256 * 768 * 4  # a chunk is more than the window


def test_problems_are_named_before_anything_is_read():
    store = planted(has_cls=False, n_registers=0)
    with pytest.raises(UserError, match=r"basins reads cls, which fake has not; the store has patches, patch_mean"):
        pass_over(store, [Analysis(name="basins", kinds=("cls",), update=lambda states, rows: None)])
    with pytest.raises(UserError, match="there is no image to analyse"):
        pass_over(store, [Taker("patches", stop=0).analysis])


def test_a_damaged_chunk_ends_the_pass_with_its_name():
    objects = MemoryObjects()
    store = planted(objects)
    key = shard_object_key(store.spec, "layer_02/cls", 1)
    data = bytearray(objects.get(key))
    data[3] ^= 1
    objects.put(key, bytes(data))
    with pytest.raises(ChecksumError, match="layer_02/cls"):
        pass_over(store, [Taker("cls").analysis])


def test_an_error_of_an_analysis_reaches_the_caller():
    def fail(states, rows) -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        pass_over(planted(), [Analysis(name="fails", kinds=("cls",), update=fail)])


@pytest.mark.parametrize("changes", CHUNKS, ids=str)
def test_findings_do_not_depend_on_chunks(changes):
    expected = measure_store(planted(samples_per_chunk=8, samples_per_shard=32), limit=100, wide_limit=11)
    found = measure_store(planted(**changes), limit=100, wide_limit=11)
    assert (found.n_images, found.n_images_wide) == (19, 11)
    assert list(found.cka) == ["cls", "patch_mean", "cls+patch_mean"]
    for kind in ("cls", "registers", "patches", "patch_mean"):
        for name in vars(expected.dynamics[kind]):
            one, other = (getattr(each.dynamics[kind], name) for each in (found, expected))
            np.testing.assert_allclose(one.mean, other.mean, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(
            found.covariances[kind].covariance, expected.covariances[kind].covariance, rtol=1e-6, atol=1e-6
        )
        np.testing.assert_allclose(
            found.updates[kind].covariance, expected.updates[kind].covariance, rtol=1e-6, atol=1e-12
        )
        np.testing.assert_allclose(found.cosines[kind].mean, expected.cosines[kind].mean, rtol=1e-6, atol=1e-12)
    for name in expected.cka:
        np.testing.assert_allclose(found.cka[name].values, expected.cka[name].values, rtol=1e-6)
    assert found.dynamics["patches"].speed.n == 11


def test_the_distance_of_a_report_is_that_of_the_phases():
    from analysis.distances import layer_distances

    store = planted()
    found = measure_store(store, limit=100, wide_limit=5)
    np.testing.assert_allclose(found.distance[1:, 1:], layer_distances(store).distance, rtol=1e-9, atol=1e-12)


def test_classes_are_measured_on_other_images_than_they_are_made_of():
    store = planted()
    asked = StoreAnalyses(store, limit=100, wide_limit=5)
    sums = asked.sums()
    asked.measure(asked.all_at_once(), sums)
    assert sums.directions.counts.sum() == 9
    assert asked.result(sums).basins.accuracy.n == 10


def test_class_numbers_follow_the_labels():
    numbers, n = class_numbers(planted())
    np.testing.assert_array_equal(numbers, np.arange(21) % 3)
    assert n == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": (3,)}, "holds 1 layer; analyses over depth need 2 or more"),
        ({"n_samples": 3}, "has 3 valid images; the unbiased HSIC needs 4 or more"),
    ],
)
def test_too_little_is_refused(changes, expected):
    objects = MemoryObjects()
    write_planted(objects, make_spec(**{"layers": LAYERS} | changes), {})
    with pytest.raises(UserError, match=expected):
        measure_store(open_store(objects), limit=100, wide_limit=5)


def test_bad_rows_are_the_planted_ones():
    assert set(BAD) | set(GOOD) == set(range(21))

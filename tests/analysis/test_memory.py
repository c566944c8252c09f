"""What a report holds in memory is what it says, however many images there are."""

import tracemalloc

import numpy as np
import pytest

from analysis.measure import measure_nbytes, measure_store
from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.from_arrays import write_store
from tests.stores import make_samples, make_spec

LAYERS = tuple(range(5))


def stored(folder, n_samples: int, **changes):
    spec = make_spec(
        layers=LAYERS, n_samples=n_samples, samples_per_shard=64, samples_per_chunk=16,
        **({"dim": 96, "grid": (4, 4)} | changes),
    )  # fmt: skip

    def states(rows: range) -> np.ndarray:
        shape = (len(rows), len(LAYERS), spec.n_tokens, spec.dim)
        return np.random.default_rng(rows.start).standard_normal(shape, np.float32)

    write_store(FolderObjects(folder), spec, make_samples(n_samples), states)
    return open_store(str(folder))


def peak(store, batch_rows: int) -> int:
    measure_store(store, limit=64, wide_limit=16, batch_rows=batch_rows)  # what is imported and kept once
    tracemalloc.start()
    try:
        measure_store(store, limit=10**6, wide_limit=10**6, batch_rows=batch_rows)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("batch_rows", "changes"),
    [
        (256, {}),  # batches of CLS and their kernels are most
        (16, {"dim": 160, "grid": (1, 1), "n_registers": 0}),  # sums are most
        (16, {"grid": (8, 8)}),  # slices of patches are most
    ],
)
def test_the_peak_is_below_what_is_stated_and_not_far(tmp_path, batch_rows: int, changes) -> None:
    store = stored(tmp_path, 320, **changes)
    stated = measure_nbytes(store.spec, 3, batch_rows)
    assert 0.3 * stated < peak(store, batch_rows) < stated


def test_four_times_the_images_take_no_more(tmp_path) -> None:
    few, many = stored(tmp_path / "few", 128), stored(tmp_path / "many", 512)
    assert measure_nbytes(few.spec, 3, 32) == measure_nbytes(many.spec, 3, 32)
    assert peak(many, 32) < 1.1 * peak(few, 32)


def test_vit_b_takes_what_the_page_on_analyses_says() -> None:
    spec = make_spec(
        layers=tuple(range(13)), dim=768, n_registers=4, grid=(16, 16), samples_per_chunk=16, samples_per_shard=256
    )
    assert measure_nbytes(spec, 1000) == pytest.approx(1.6e9, rel=0.05)

"""Plain webdataset reads from a store what was put in, bit for bit."""

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zarr

from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.keys import STATISTICS, array_kind
from storage_schemas.spec import PRECISIONS
from tests.storage_schemas.random_store import assert_our_reader_agrees, assert_rows, bits, write_random
from tests.stores import make_spec

#: Each precision with one codec; with the other where there is time.
FORMS = list(zip(("none", "gzip", "none", "gzip"), PRECISIONS, strict=True))
MORE_FORMS = [
    pytest.param(form, marks=pytest.mark.slow) for form in product(("none", "gzip"), PRECISIONS) if form not in FORMS
]


def rows_of(samples: Iterable[dict], kind: str, codec: str) -> np.ndarray:
    """What a pass of webdataset gives of one array; the keys of its samples are their indices."""
    name, rows = f"{kind}.npy.gz" if codec == "gzip" else f"{kind}.npy", []
    for sample in samples:
        assert sample["__key__"] == f"{len(rows):09d}"
        assert {key for key in sample if not key.startswith("__")} == {name}
        rows.append(sample[name])
    return np.stack(rows)


def read_tars(tars: list[str], kind: str, codec: str) -> np.ndarray:
    return rows_of(webdataset.WebDataset(tars, shardshuffle=False).decode(), kind, codec)


@pytest.fixture
def unclosed_files() -> Iterator[None]:
    """webdataset leaves files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(params=[*FORMS, *MORE_FORMS], ids="-".join, scope="module")
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, np.ndarray]]:
    codec, precision = request.param
    spec = make_spec(layers=(0, 1), backend="webdataset", codec=codec, precision=precision)
    assert spec.n_samples % spec.samples_per_chunk, "the last shard is partial, and its last chunk is"
    root = tmp_path_factory.mktemp("store")
    return root, write_random(FolderObjects(root), spec)


def test_every_array_reads_the_same_bits(stored, unclosed_files):
    root, truth = stored
    spec = open_store(root).spec
    for path, expected in truth.items():
        if path == STATISTICS:
            continue
        tars = [str(tar) for tar in sorted((root / path).glob("*.tar"))]
        assert len(tars) == spec.n_shards
        assert_rows(read_tars(tars, array_kind(path), spec.codec), expected, spec, path)


def test_our_reader_agrees(stored):
    root, truth = stored
    assert_our_reader_agrees(open_store(root), truth)


def test_zarr_reads_the_statistics(stored):
    """They are a Zarr array in this back end too; there is no group around it."""
    root, truth = stored
    found = np.asarray(zarr.open_array(root / STATISTICS, mode="r")[...])
    np.testing.assert_array_equal(bits(found), bits(truth[STATISTICS]))
    assert [path.relative_to(root).as_posix() for path in root.rglob("zarr.json")] == ["statistics/zarr.json"]

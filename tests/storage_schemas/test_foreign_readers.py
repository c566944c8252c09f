"""Readers that we did not write read from a store what was put in, bit for bit."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.keys import STATISTICS
from storage_schemas.spec import PRECISIONS
from tests.cases import one_param_in
from tests.storage_schemas.random_store import assert_our_reader_agrees, assert_rows, bits, write_random
from tests.stores import make_spec

CODECS = [("none", "none"), *product(("lz4", "zstd-1", "zstd-3"), ("byte", "bit"))]
# What plain zarr says of store.json, commits/ and the other keys of ours that are no part of a Zarr hierarchy.
strange_keys_are_fine = pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr")


def read_with_zarr(root: Path, path: str) -> np.ndarray:
    return np.asarray(zarr.open_array(root / path, mode="r")[...])


def read_with_zarrs(root: Path, path: str) -> np.ndarray:
    # strict: without it, the Rust pipeline hands what it does not know to zarr-python without a word
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        return np.asarray(zarr.open_array(root / path, mode="r")[...])


def read_with_tensorstore(root: Path, path: str) -> np.ndarray:
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / path)}}
    return tensorstore.open(store, open=True, read=True).result().read().result()


def read_with_xarray(root: Path, path: str) -> np.ndarray:
    group, _, name = path.rpartition("/")
    with xarray.open_zarr(root, group=group or None, consolidated=False) as dataset:
        return dataset[name].to_numpy()


READERS = [read_with_zarr, read_with_zarrs, read_with_tensorstore, read_with_xarray]


@pytest.fixture(params=one_param_in(4, PRECISIONS, CODECS), ids=lambda p: f"{p[1][0]}-{p[1][1]}-{p[0]}", scope="module")
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, np.ndarray]]:
    precision, (codec, shuffle) = request.param
    spec = make_spec(codec=codec, shuffle=shuffle, precision=precision)
    assert spec.n_samples % spec.samples_per_shard  # the last shard is partial, and its last chunk is
    assert spec.n_samples % spec.samples_per_chunk
    root = tmp_path_factory.mktemp("store")
    return root, write_random(FolderObjects(root), spec)


@strange_keys_are_fine
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__.removeprefix("read_with_"))
def test_every_array_reads_the_same_bits(read, stored):
    root, truth = stored
    for path, expected in truth.items():
        found = read(root, path)
        if path == STATISTICS:
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(bits(found), bits(expected), err_msg=path)
        else:
            assert_rows(found, expected, open_store(root).spec, path)


def test_our_reader_agrees_with_them(stored):
    root, truth = stored
    assert_our_reader_agrees(open_store(root), truth)


@strange_keys_are_fine
def test_xarray_opens_root_and_layers_with_named_axes(stored):
    root, truth = stored
    with xarray.open_zarr(root, consolidated=False) as dataset:
        assert dataset["head_input"].dims == ("sample", "dim2")
        assert dataset["statistics"].dims == ("shard", "layer", "kind", "statistic", "dim")
    with xarray.open_zarr(root, group="layer_01", consolidated=False) as dataset:
        assert dict(dataset.sizes) == {"sample": 21, "register": 2, "patch": 6, "dim": 8}
        spec = open_store(root).spec
        assert set(dataset.data_vars) == set(spec.array_kinds)
        assert dataset["patches"].attrs == ({"bits_of": "bfloat16"} if spec.precision == "bfloat16" else {})
        np.testing.assert_array_equal(
            dataset["patches"].isel(sample=20, patch=5).to_numpy(), truth["layer_01/patches"][20, 5]
        )


@pytest.mark.parametrize("read", [read_with_zarr, read_with_zarrs, read_with_tensorstore])
def test_a_flipped_bit_is_an_error_to_them_too(read, tmp_path):
    """So the checksums that we write are the ones that they check."""
    spec = make_spec()
    write_random(FolderObjects(tmp_path), spec)
    path = tmp_path / "layer_01/patches/c/0/0/0"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(Exception, match=r"(?i)checksum|digest"):
        read(tmp_path, "layer_01/patches")

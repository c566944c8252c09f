"""Readers that we did not write read a store from S3 servers that we did not write, bit for bit."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import fsspec
import numpy as np
import pytest
import tensorstore
import webdataset
import xarray
import zarr
from webdataset.tariterators import group_by_keys, tar_file_expander

from infra.objects import open_objects
from storage_schemas.keys import STATISTICS, array_kind
from storage_schemas.spec import StoreSpec
from tests.storage_schemas.random_store import BAD_ROWS, bits, write_random
from tests.storage_schemas.test_foreign_readers import strange_keys_are_fine
from tests.storage_schemas.test_foreign_webdataset import read_tars, rows_of, unclosed_files  # noqa: F401 - a fixture
from tests.stores import make_spec


@dataclass(frozen=True)
class Remote:
    """A store on a server, and what it holds."""

    location: str
    spec: StoreSpec
    truth: Mapping[str, np.ndarray]


def make_remote(location: str, **changes: object) -> Remote:
    spec = make_spec(layers=(0, 1), **changes)
    return Remote(location, spec, write_random(open_objects(location), spec))


def zarr_store(location: str) -> zarr.storage.FsspecStore:
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    return zarr.storage.FsspecStore.from_url(location, storage_options=options, read_only=True)


def read_with_zarr(location: str, path: str) -> np.ndarray:
    return np.asarray(zarr.open_array(zarr_store(f"{location}/{path}"), mode="r")[...])


def read_with_zarrs(location: str, path: str) -> np.ndarray:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        return read_with_zarr(location, path)


def read_with_tensorstore(location: str, path: str) -> np.ndarray:
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    kvstore = {
        "driver": "s3",
        "bucket": bucket,
        "path": f"{prefix}/{path}/",
        "endpoint": os.environ["AWS_ENDPOINT_URL"],
        "aws_region": os.environ["AWS_REGION"],
        "aws_credentials": {"type": "environment"},
    }
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result().read().result()


def read_with_xarray(location: str, path: str) -> np.ndarray:
    group, _, name = path.rpartition("/")
    with xarray.open_zarr(zarr_store(location), group=group or None, consolidated=False) as dataset:
        return dataset[name].to_numpy()


def check(remote: Remote, read: Callable[[str, str], np.ndarray]) -> None:
    for path, expected in remote.truth.items():
        found = read(remote.location, path)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        good = np.setdiff1d(np.arange(len(expected)), BAD_ROWS if path != STATISTICS else ())
        np.testing.assert_array_equal(bits(found[good]), bits(expected[good]), err_msg=path)


@strange_keys_are_fine
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_zarr_stores(s3_location, precision):
    remote = make_remote(s3_location, precision=precision, codec="zstd-1", shuffle="byte")
    for read in (read_with_zarr, read_with_zarrs, read_with_tensorstore, read_with_xarray):
        check(remote, read)


@pytest.mark.parametrize("codec", ["none", "gzip"])
def test_webdataset_stores(s3_location, unclosed_files, codec):  # noqa: F811
    """As files that are opened over S3, and through a pipe from another process, the ways that webdataset has."""
    remote = make_remote(s3_location, backend="webdataset", precision="int8", codec=codec)
    system = fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def read(location: str, path: str) -> np.ndarray:
        if path == STATISTICS:
            return read_with_zarr(location, path)
        tars = [
            {"url": f"s3://{tar}", "stream": system.open(tar)} for tar in sorted(system.glob(f"{location}/{path}/*"))
        ]
        assert len(tars) == remote.spec.n_shards
        samples = group_by_keys(tar_file_expander(tars))
        return rows_of(map(webdataset.autodecode.Decoder([]), samples), array_kind(path), codec)

    check(remote, read)
    key = f"{remote.location}/layer_01/patches/000000.tar"
    program = "import fsspec, shutil, sys; shutil.copyfileobj(fsspec.open(sys.argv[1]).open(), sys.stdout.buffer)"
    pipe = f"pipe:{shlex.join([sys.executable, '-c', program, key])}"
    found = read_tars([pipe], "patches", codec)
    good = np.setdiff1d(np.arange(remote.spec.samples_per_shard), BAD_ROWS)
    np.testing.assert_array_equal(found[good], remote.truth["layer_01/patches"][good])

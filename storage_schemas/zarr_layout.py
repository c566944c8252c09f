"""The Zarr v3 face of a store: zarr.json documents and the bytes around chunks in a shard object. Opens nothing.

A shard object is its chunks in order, each followed by its CRC32C and zeros up to a multiple of 64 bytes, then the
index of the sharding codec (offset and size of every chunk as little-endian uint64), then the CRC32C of the index.
"""

import json
import math
from typing import Any, TypeVar

import numpy as np
from crc32c import crc32c

from storage_schemas.codecs import chunk_shape, inner_codecs, kind_dtype, kind_fill, kind_shape
from storage_schemas.keys import STATISTIC_NAMES, STATISTICS, array_kind, layer_path, sharded_array_paths
from storage_schemas.spec import FORMAT_VERSION, HEAD_INPUT, StoreSpec

Count = TypeVar("Count", int, np.ndarray)

CRC_NBYTES = 4
#: Payloads begin at multiples of this. The kernel copies a chunk from its page cache a third faster from such an offset
#: (docs/decisions/020), and Zarr's index allows the gap.
ALIGNMENT_NBYTES = 64
_ABSENT = 2**64 - 1
_AXES = {
    "cls": ["sample", "dim"],
    "registers": ["sample", "register", "dim"],
    "patches": ["sample", "patch", "dim"],
    "patches_scale": ["sample", "dim"],
    "patch_mean": ["sample", "dim"],
    HEAD_INPUT: ["sample", "dim2"],  # a name of its own: xarray refuses a group where one name has two lengths
}


def zarr_documents(spec: StoreSpec) -> dict[str, bytes]:
    """Every zarr.json of a store, by key."""
    documents = {
        "zarr.json": _group({"format_version": FORMAT_VERSION, "grid": list(spec.grid), "teacher": spec.teacher})
    }
    for layer in spec.layers:
        documents[f"{layer_path(layer)}/zarr.json"] = _group({"layer": layer})
    for path in sharded_array_paths(spec):
        documents[f"{path}/zarr.json"] = _sharded_array(spec, path)
    documents[f"{STATISTICS}/zarr.json"] = statistics_document(spec)
    return documents


def index_nbytes(spec: StoreSpec) -> int:
    """Bytes of a shard object's index, its own CRC32C included."""
    return 16 * spec.chunks_per_shard + CRC_NBYTES


def index_bytes(spec: StoreSpec, offsets: list[int], nbytes: list[int]) -> bytes:
    """The sharding index for the chunks present; chunks past the end of the store are marked absent."""
    table = np.full((spec.chunks_per_shard, 2), _ABSENT, "<u8")
    table[: len(offsets), 0] = offsets
    table[: len(nbytes), 1] = nbytes
    return table.tobytes() + crc_bytes(crc32c(table.tobytes()))


def slot_nbytes(payload_nbytes: Count) -> Count:
    """Room that a payload takes in its object: itself, its CRC32C, and zeros up to where the next may begin."""
    return -(-(payload_nbytes + CRC_NBYTES) // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES


def crc_bytes(crc: int) -> bytes:
    """A CRC32C as Zarr's crc32c codec appends it."""
    return crc.to_bytes(CRC_NBYTES, "little")


def _sharded_array(spec: StoreSpec, path: str) -> bytes:
    kind = array_kind(path)
    shape = kind_shape(spec, kind)
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk_shape(spec, kind)),
            "codecs": inner_codecs(spec, path),
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    return _array(
        shape=(spec.n_samples, *shape),
        chunk=(spec.samples_per_shard, *shape),
        dtype=kind_dtype(spec, kind).name,
        codecs=[sharding],
        axes=_AXES[kind],
        attributes={"bits_of": "bfloat16"} if spec.precision == "bfloat16" and kind == "patches" else {},
        fill=kind_fill(spec, kind),
    )


def statistics_document(spec: StoreSpec) -> bytes:
    """The zarr.json of the statistics, which are a Zarr array in every store."""
    shape = (len(spec.layers), len(spec.token_kinds), len(STATISTIC_NAMES), spec.dim)
    return _array(
        shape=(spec.n_shards, *shape),
        chunk=(1, *shape),
        dtype="float64",
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        axes=["shard", "layer", "kind", "statistic", "dim"],
        attributes={
            "layers": list(spec.layers),
            "kinds": list(spec.token_kinds),
            "statistics": list(STATISTIC_NAMES),
        },
    )


def _array(
    *,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: str,
    codecs: list[dict[str, Any]],
    axes: list[str],
    attributes: dict[str, Any],
    fill: int | float = math.nan,
) -> bytes:
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if math.isnan(fill) else fill,
            "codecs": codecs,
            "dimension_names": axes,
            "attributes": attributes,
            "storage_transformers": [],
        }
    )


def _group(attributes: dict[str, Any]) -> bytes:
    return _json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode() + b"\n"

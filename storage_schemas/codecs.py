"""Chunks as bytes: dtypes, shapes, lossless codecs. Equal input gives equal bytes, in any thread."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numcodecs import blosc

from storage_schemas.errors import StoreError
from storage_schemas.keys import array_kind
from storage_schemas.precision import FILL_VALUES, STORED_DTYPES
from storage_schemas.spec import HEAD_INPUT, StoreSpec

BLOSC_OVERHEAD = 16  # bytes by which Blosc may exceed what it cannot compress; also the size of its header
_CNAMES = {"lz4": ("lz4", 5), "zstd-1": ("zstd", 1), "zstd-3": ("zstd", 3)}
_SHUFFLES = {"byte": blosc.SHUFFLE, "bit": blosc.BITSHUFFLE}
_SHUFFLE_NAMES = {"byte": "shuffle", "bit": "bitshuffle"}


class DecodeError(StoreError):
    """Bytes passed their checksum but are not a chunk of this codec and size."""


def kind_dtype(spec: StoreSpec, kind: str) -> np.dtype:
    """How values of a kind are stored: as the spec's precision says for patches, float32 for the small kinds."""
    return np.dtype(STORED_DTYPES[spec.precision] if kind == "patches" else "float32").newbyteorder("<")


def kind_fill(spec: StoreSpec, kind: str) -> int | float:
    """What rows without states hold in an array of a kind."""
    return FILL_VALUES[spec.precision] if kind == "patches" else np.nan


def kind_shape(spec: StoreSpec, kind: str) -> tuple[int, ...]:
    """Shape of one sample of a kind, without the sample axis."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (spec.dim,),
        "registers": (spec.n_registers, spec.dim),
        "patches": (spec.n_patches, spec.dim),
        "patches_scale": (spec.dim,),
        "patch_mean": (spec.dim,),
        HEAD_INPUT: (2 * spec.dim,),
    }
    return shapes[kind]


def chunk_shape(spec: StoreSpec, kind: str) -> tuple[int, ...]:
    """Shape of one chunk, samples first."""
    return (spec.samples_per_chunk, *kind_shape(spec, kind))


def raw_chunk_nbytes(spec: StoreSpec, kind: str) -> int:
    """Bytes of one chunk before the codec; with codec "none" also its payload on disk."""
    return math.prod(chunk_shape(spec, kind)) * kind_dtype(spec, kind).itemsize


def encode_chunk(spec: StoreSpec, kind: str, raw: memoryview) -> memoryview | bytes:
    """Compress one whole chunk; with codec "none" the input itself comes back."""
    if spec.codec == "none":
        return raw
    if threading.current_thread() is threading.main_thread():
        return _helper().submit(_blosc_compress, spec, kind, raw).result()
    return _blosc_compress(spec, kind, raw)


def decode_chunk(
    spec: StoreSpec, kind: str, payload: bytes | bytearray | memoryview, out: np.ndarray | None = None
) -> np.ndarray:
    """Undo `encode_chunk`.

    Args:
        spec: Of the store that the payload comes from.
        kind: Token kind, or "head_input".
        payload: Checked against its CRC32C already.
        out: Memory to decode into, at least a raw chunk of bytes; saves making new memory for each. Unused by "none".

    Returns:
        (samples_per_chunk, ..., dim) in the stored dtype; a view of the payload with codec "none".

    Raises:
        DecodeError: The payload is not such a chunk.
    """
    shape, dtype, nbytes = chunk_shape(spec, kind), kind_dtype(spec, kind), raw_chunk_nbytes(spec, kind)
    if spec.codec == "none":
        if len(payload) != nbytes:
            raise DecodeError(f"a {kind} chunk of {len(payload)} bytes; {nbytes} were expected")
        return np.frombuffer(payload, dtype).reshape(shape)
    decoded = np.empty(nbytes, np.uint8) if out is None else out[:nbytes]
    if len(payload) < BLOSC_OVERHEAD:
        raise DecodeError(f"a {kind} chunk of {len(payload)} bytes, too short for {spec.codec}")
    # Blosc believes both sizes of its header: at byte 4 the decoded one, at byte 12 its own
    decoded_nbytes, own_nbytes = (int.from_bytes(bytes(payload[i : i + 4]), "little") for i in (4, 12))
    if (decoded_nbytes, own_nbytes) != (nbytes, len(payload)):
        raise DecodeError(
            f"a {kind} chunk of {own_nbytes} bytes that decodes to {decoded_nbytes}; "
            f"{len(payload)} that decode to {nbytes} were expected"
        )
    try:
        blosc.decompress(payload, decoded)
    except (RuntimeError, ValueError) as error:
        raise DecodeError(f"a {kind} chunk that {spec.codec} cannot decode: {error}") from error
    return decoded.view(dtype).reshape(shape)


def inner_codecs(spec: StoreSpec, path: str) -> list[dict]:
    """The chunk codecs as zarr.json names them (Zarr v3 specification)."""
    codecs: list[dict] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if spec.codec != "none":
        cname, level = _CNAMES[spec.codec]
        configuration = {
            "cname": cname,
            "clevel": level,
            "shuffle": _SHUFFLE_NAMES[spec.shuffle],
            "typesize": kind_dtype(spec, array_kind(path)).itemsize,
            "blocksize": 0,
        }
        codecs.append({"name": "blosc", "configuration": configuration})
    return [*codecs, {"name": "crc32c"}]


def _blosc_compress(spec: StoreSpec, kind: str, raw: memoryview) -> bytes:
    cname, level = _CNAMES[spec.codec]
    array = np.frombuffer(raw, kind_dtype(spec, kind))
    return blosc.compress(array, cname.encode(), level, _SHUFFLES[spec.shuffle], blosc.AUTOBLOCKS)


@cache
def _helper() -> ThreadPoolExecutor:
    # numcodecs lets Blosc use its own threads when called from the main thread, and then blocks land in the chunk in
    # the order they finish: other bytes each time. Called from any other thread it works alone and is deterministic.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")

"""How arrays lie in objects, for either back end: the one place that chooses between them. Opens nothing.

An object is, for each chunk that holds samples, a payload and what follows it, and at last a tail. In Zarr a checksum
follows and the tail is the index of chunks; in a tar archive nothing follows and the tail marks its end.
"""

import numpy as np

from storage_schemas import tar_layout, zarr_layout
from storage_schemas.codecs import (
    BLOSC_OVERHEAD,
    chunk_shape,
    decode_chunk,
    encode_chunk,
    kind_dtype,
    raw_chunk_nbytes,
)
from storage_schemas.keys import STATISTICS, array_kind
from storage_schemas.spec import StoreSpec
from storage_schemas.zarr_layout import Count


def array_documents(spec: StoreSpec) -> dict[str, bytes]:
    """Every zarr.json of a store, by key; a WebDataset store has that of the statistics."""
    if _is_tar(spec):
        return {f"{STATISTICS}/zarr.json": zarr_layout.statistics_document(spec)}
    return zarr_layout.zarr_documents(spec)


def payload_nbytes(spec: StoreSpec, kind: str, n_rows: int) -> int:
    """Bytes of a chunk's payload before the codec; with codec "none" those on disk.

    Args:
        spec: Of the store.
        kind: Of the array.
        n_rows: Samples of the chunk: samples_per_chunk, but for the last one of the store.
    """
    return n_rows * tar_layout.member_nbytes(spec, kind) if _is_tar(spec) else raw_chunk_nbytes(spec, kind)


def payload_bounds(spec: StoreSpec, kind: str, n_rows: int) -> tuple[int, int]:
    """The least and the most bytes that a chunk's payload may have on disk."""
    if _is_tar(spec):
        least, most = tar_layout.least_member_nbytes(spec, kind), tar_layout.most_member_nbytes(spec, kind)
        return n_rows * least, n_rows * most
    raw = raw_chunk_nbytes(spec, kind)
    return (raw, raw) if spec.codec == "none" else (1, raw + BLOSC_OVERHEAD)


def room_nbytes(spec: StoreSpec, payload: Count) -> Count:
    """Bytes from the beginning of a payload of so many bytes to that of the next, or to the tail."""
    return payload if _is_tar(spec) else zarr_layout.slot_nbytes(payload)


def tail_nbytes(spec: StoreSpec) -> int:
    """Bytes behind the last chunk of an object."""
    return len(tar_layout.END_OF_ARCHIVE) if _is_tar(spec) else zarr_layout.index_nbytes(spec)


def object_nbytes(spec: StoreSpec, path: str, shard: int) -> int:
    """Size of the object of one array and shard; exact with codec "none", else that before compression."""
    kind = array_kind(path)
    n_full, n_rest = divmod(len(spec.shard_samples(shard)), spec.samples_per_chunk)
    rest = room_nbytes(spec, payload_nbytes(spec, kind, n_rest)) if n_rest else 0
    return n_full * full_chunk_nbytes(spec, kind) + rest + tail_nbytes(spec)


def full_chunk_nbytes(spec: StoreSpec, kind: str) -> int:
    """Room that a full chunk takes in an object with codec "none"."""
    return room_nbytes(spec, payload_nbytes(spec, kind, spec.samples_per_chunk))


def chunks_view(spec: StoreSpec, kind: str, memory: np.ndarray) -> np.ndarray:
    """(chunk, sample, ..., dim) of the values in the memory of a shard's object, each in its future place.

    The values of one sample are contiguous; in a tar archive those of the next begin further on.
    """
    shape, dtype = chunk_shape(spec, kind), kind_dtype(spec, kind)
    inner = np.empty(shape[1:], dtype).strides
    if _is_tar(spec):
        offset, row = tar_layout.VALUES_OFFSET, tar_layout.member_nbytes(spec, kind)
    else:
        offset, row = 0, raw_chunk_nbytes(spec, kind) // spec.samples_per_chunk
    return np.ndarray(
        (spec.chunks_per_shard, *shape),
        dtype,
        memory.data,
        offset,
        (full_chunk_nbytes(spec, kind), row, *inner),
    )


def encode_payload(spec: StoreSpec, kind: str, chunk: int, memory: memoryview) -> memoryview | bytes:
    """The payload of a chunk whose values lie in `memory` as `chunks_view` says; with codec "none" a part of that."""
    if _is_tar(spec):
        return tar_layout.encode_payload(spec, kind, chunk, memory)
    return encode_chunk(spec, kind, memory[: raw_chunk_nbytes(spec, kind)])


def trailer_bytes(spec: StoreSpec, nbytes: int, crc: int) -> bytes:
    """What follows a payload of so many bytes."""
    return b"" if _is_tar(spec) else zarr_layout.crc_bytes(crc).ljust(zarr_layout.slot_nbytes(nbytes) - nbytes, b"\0")


def tail_bytes(spec: StoreSpec, chunks: np.ndarray) -> bytes:
    """What an object ends with; `chunks` are those of its record."""
    if _is_tar(spec):
        return tar_layout.END_OF_ARCHIVE
    return zarr_layout.index_bytes(spec, chunks[:, 0].tolist(), (chunks[:, 1] + zarr_layout.CRC_NBYTES).tolist())


def decode_payload(
    spec: StoreSpec,
    kind: str,
    chunk: int,
    payload: bytes | bytearray | memoryview,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Undo `encode_payload`.

    Args:
        spec: Of the store that the payload comes from.
        kind: Of the array.
        chunk: Which one.
        payload: Checked against its CRC32C already.
        out: Memory to decode into, at least `raw_chunk_nbytes` bytes; saves making new memory for each. Unused by
            codec "none".

    Returns:
        (sample, ..., dim) in the stored dtype; with codec "none" a view of the payload. Zarr's last chunk of a store
        has rows past its end, that of a tar archive has not.

    Raises:
        DecodeError: The payload is not such a chunk.
    """
    if _is_tar(spec):
        return tar_layout.decode_payload(spec, kind, chunk, payload, out)
    return decode_chunk(spec, kind, payload, out)


def _is_tar(spec: StoreSpec) -> bool:
    return spec.backend == "webdataset"

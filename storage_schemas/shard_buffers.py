"""One shard in host memory, laid out as its objects will be, and its encoding into whole objects."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from storage_schemas.codecs import chunk_shape, encode_chunk, kind_dtype, kind_shape, raw_chunk_nbytes
from storage_schemas.commit import ObjectRecord
from storage_schemas.keys import array_kind, shard_object_key, sharded_array_paths, statistics_key
from storage_schemas.spec import StoreSpec
from storage_schemas.zarr_layout import CRC_NBYTES, crc_bytes, index_bytes, slot_nbytes


@dataclass(frozen=True, kw_only=True)
class EncodedObject:
    """One object, ready to put. `pieces` may be views of shard buffers: put it before the buffers are used again."""

    key: str
    pieces: list[bytes | memoryview]
    record: ObjectRecord


class ShardBuffers:
    """Host memory for one shard, reused for many.

    Values are written once, into the place that they have in the object, so that with codec "none" nothing is copied
    again before the put: each chunk's payload is followed by room for its CRC32C.

    Args:
        spec: Of the store.
        allocate: Gives n bytes of writable uint8 memory; pass an allocator of pinned memory for a GPU.
    """

    def __init__(self, spec: StoreSpec, allocate: Callable[[int], np.ndarray] | None = None) -> None:
        self.spec = spec
        make = allocate or (lambda nbytes: np.empty(nbytes, np.uint8))
        self._bytes = {
            path: make(spec.chunks_per_shard * _stride(spec, array_kind(path))) for path in sharded_array_paths(spec)
        }
        self._chunks = {path: self._chunk_view(path) for path in self._bytes}

    @staticmethod
    def nbytes(spec: StoreSpec) -> int:
        """Memory that the buffers of one shard take."""
        return sum(spec.chunks_per_shard * _stride(spec, array_kind(path)) for path in sharded_array_paths(spec))

    def _chunk_view(self, path: str) -> np.ndarray:
        kind = array_kind(path)
        item, shape = kind_dtype(self.spec, kind), chunk_shape(self.spec, kind)
        return np.ndarray(
            (self.spec.chunks_per_shard, *shape),
            item,
            buffer=self._bytes[path].data,
            strides=(_stride(self.spec, kind), *np.empty(shape, item).strides),
        )

    def begin(self, shard: int) -> None:
        """Mark the rows past the end of the store, which share the last chunk with real ones, as NaN."""
        n_rows = len(self.spec.shard_samples(shard))
        for row in range(n_rows, len(self.spec.shard_chunks(shard)) * self.spec.samples_per_chunk):
            self.invalidate(row)

    def invalidate(self, row: int) -> None:
        """Fill a row of every array with NaN, so that a plain reader cannot mistake it for a state."""
        chunk, place = divmod(row, self.spec.samples_per_chunk)
        for view in self._chunks.values():
            view[chunk, place] = np.nan

    def pieces(self, path: str, start: int, n_rows: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Contiguous destinations for rows start .. start + n_rows: (rows of the caller's array, view to fill)."""
        done = 0
        while done < n_rows:
            chunk, place = divmod(start + done, self.spec.samples_per_chunk)
            n = min(n_rows - done, self.spec.samples_per_chunk - place)
            yield slice(done, done + n), self._chunks[path][chunk, place : place + n]
            done += n

    def assign(self, path: str, start: int, values: np.ndarray) -> None:
        """Copy (row, ...) values into rows start ..; they must have the stored dtype and shape already."""
        assert values.dtype == kind_dtype(self.spec, array_kind(path)), (path, values.dtype)
        assert values.shape[1:] == kind_shape(self.spec, array_kind(path)), (path, values.shape)
        for rows, view in self.pieces(path, start, len(values)):
            view[...] = values[rows]

    def encode(self, path: str, shard: int) -> EncodedObject:
        """The object of one array: chunks, their checksums, the sharding index."""
        spec, kind = self.spec, array_kind(path)
        raw_nbytes, stride = raw_chunk_nbytes(spec, kind), _stride(spec, kind)
        n_chunks = len(spec.shard_chunks(shard))
        whole = self._bytes[path].data
        pieces: list[bytes | memoryview] = []
        chunks = np.empty((n_chunks, 3), np.int64)
        offset = object_crc = 0
        for i in range(n_chunks):
            payload = encode_chunk(spec, kind, whole[i * stride : i * stride + raw_nbytes])
            crc = crc32c(payload)
            trailer = crc_bytes(crc).ljust(slot_nbytes(len(payload)) - len(payload), b"\0")
            chunks[i] = offset, len(payload), crc
            object_crc = crc32c(trailer, crc32c(payload, object_crc))
            offset += len(payload) + len(trailer)
            if spec.codec == "none":
                whole[i * stride + raw_nbytes : (i + 1) * stride] = trailer
            else:
                pieces += [payload, trailer]
        if spec.codec == "none":
            pieces = [whole[: n_chunks * stride]]
        index = index_bytes(spec, chunks[:, 0].tolist(), (chunks[:, 1] + CRC_NBYTES).tolist())
        record = ObjectRecord(nbytes=offset + len(index), crc32c=crc32c(index, object_crc), chunks=chunks)
        return EncodedObject(key=shard_object_key(spec, path, shard), pieces=[*pieces, index], record=record)


def encode_statistics(shard: int, statistics: np.ndarray) -> EncodedObject:
    """The object of one shard's statistics, (layer, kind, statistic, dim) float64."""
    payload = np.ascontiguousarray(statistics, "<f8").tobytes()
    crc = crc32c(payload)
    trailer = crc_bytes(crc)
    record = ObjectRecord(
        nbytes=len(payload) + len(trailer),
        crc32c=crc32c(trailer, crc),
        chunks=np.array([[0, len(payload), crc]], np.int64),
    )
    return EncodedObject(key=statistics_key(shard), pieces=[payload, trailer], record=record)


def write_shard(
    put: Callable[[str, list[bytes | memoryview]], None],
    buffers: ShardBuffers,
    shard: int,
    statistics: np.ndarray,
) -> Mapping[str, ObjectRecord]:
    """Encode and put every data object of a shard, one after the other; the commit is the caller's.

    For callers that overlap or time the two halves, `ShardBuffers.encode` and `encode_statistics` are the parts.
    """
    records = {}
    for path in sharded_array_paths(buffers.spec):
        encoded = buffers.encode(path, shard)
        put(encoded.key, encoded.pieces)
        records[encoded.key] = encoded.record
    encoded = encode_statistics(shard, statistics)
    put(encoded.key, encoded.pieces)
    return {**records, encoded.key: encoded.record}


def _stride(spec: StoreSpec, kind: str) -> int:
    return slot_nbytes(raw_chunk_nbytes(spec, kind))

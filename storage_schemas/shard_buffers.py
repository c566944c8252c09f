"""One shard in host memory, laid out as its objects will be, and its encoding into whole objects."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from storage_schemas.codecs import kind_dtype, kind_fill, kind_shape
from storage_schemas.commit import ObjectRecord
from storage_schemas.keys import array_kind, shard_object_key, sharded_array_paths, statistics_key
from storage_schemas.layout import chunks_view, encode_payload, full_chunk_nbytes, tail_bytes, trailer_bytes
from storage_schemas.spec import StoreSpec
from storage_schemas.zarr_layout import crc_bytes


@dataclass(frozen=True, kw_only=True)
class EncodedObject:
    """One object, ready to put. `pieces` may be views of shard buffers: put it before the buffers are used again."""

    key: str
    pieces: list[bytes | memoryview]
    record: ObjectRecord


class ShardBuffers:
    """Host memory for one shard, reused for many.

    Values are written once, into the place that they have in the object, so that with codec "none" nothing is copied
    again before the put: there is room between them for what the back end adds.

    Args:
        spec: Of the store.
        allocate: Gives n bytes of writable uint8 memory; pass an allocator of pinned memory for a GPU.
        paths: Arrays to hold; None is all.
    """

    def __init__(
        self,
        spec: StoreSpec,
        allocate: Callable[[int], np.ndarray] | None = None,
        *,
        paths: Sequence[str] | None = None,
    ) -> None:
        self.spec = spec
        make = allocate or (lambda nbytes: np.empty(nbytes, np.uint8))
        self._bytes = {
            path: make(spec.chunks_per_shard * full_chunk_nbytes(spec, array_kind(path)))
            for path in (sharded_array_paths(spec) if paths is None else paths)
        }
        self._chunks = {path: chunks_view(spec, array_kind(path), memory) for path, memory in self._bytes.items()}

    @staticmethod
    def nbytes(spec: StoreSpec) -> int:
        """Memory that the buffers of one shard take."""
        kinds = [array_kind(path) for path in sharded_array_paths(spec)]
        return sum(spec.chunks_per_shard * full_chunk_nbytes(spec, kind) for kind in kinds)

    def begin(self, shard: int) -> None:
        """Mark the rows past the end of the store, which share the last chunk with real ones, as NaN."""
        n_rows = len(self.spec.shard_samples(shard))
        for row in range(n_rows, len(self.spec.shard_chunks(shard)) * self.spec.samples_per_chunk):
            self.invalidate(row)

    def invalidate(self, row: int) -> None:
        """Fill a row of every array with NaN (int8: its scale): a plain reader cannot mistake it for a state."""
        chunk, place = divmod(row, self.spec.samples_per_chunk)
        for path, view in self._chunks.items():
            view[chunk, place] = kind_fill(self.spec, array_kind(path))

    def pieces(self, path: str, start: int, n_rows: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Contiguous destinations for rows start .. start + n_rows: (rows of the caller's array, view to fill).

        One for each chunk, or for each row where rows do not adjoin: devices copy at once to contiguous memory only.
        """
        chunks, done = self._chunks[path], 0
        most = self.spec.samples_per_chunk if chunks[0].flags.c_contiguous else 1
        while done < n_rows:
            chunk, place = divmod(start + done, self.spec.samples_per_chunk)
            n = min(n_rows - done, self.spec.samples_per_chunk - place, most)
            yield slice(done, done + n), chunks[chunk, place : place + n]
            done += n

    def assign(self, path: str, start: int, values: np.ndarray) -> None:
        """Copy (row, ...) values into rows start ..; they must have the stored dtype and shape already."""
        assert values.dtype == kind_dtype(self.spec, array_kind(path)), (path, values.dtype)
        assert values.shape[1:] == kind_shape(self.spec, array_kind(path)), (path, values.shape)
        for rows, view in self.pieces(path, start, len(values)):
            view[...] = values[rows]

    def encode(self, path: str, shard: int) -> EncodedObject:
        """The object of one array: its chunks, each with what follows it, and the tail."""
        spec, kind = self.spec, array_kind(path)
        room, numbers = full_chunk_nbytes(spec, kind), spec.shard_chunks(shard)
        whole = self._bytes[path].data
        pieces: list[bytes | memoryview] = []
        chunks = np.empty((len(numbers), 3), np.int64)
        offset = object_crc = 0
        for i, chunk in enumerate(numbers):
            payload = encode_payload(spec, kind, chunk, whole[i * room : (i + 1) * room])
            crc = crc32c(payload)
            trailer = trailer_bytes(spec, len(payload), crc)
            chunks[i] = offset, len(payload), crc
            object_crc = crc32c(trailer, crc32c(payload, object_crc))
            if spec.codec == "none":
                whole[offset + len(payload) : offset + len(payload) + len(trailer)] = trailer
            else:
                pieces += [payload, trailer]
            offset += len(payload) + len(trailer)
        if spec.codec == "none":
            pieces = [whole[:offset]]
        tail = tail_bytes(spec, chunks)
        record = ObjectRecord(nbytes=offset + len(tail), crc32c=crc32c(tail, object_crc), chunks=chunks)
        return EncodedObject(key=shard_object_key(spec, path, shard), pieces=[*pieces, tail], record=record)


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

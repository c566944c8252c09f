"""Objects of one back end and codec as those of another: the same values, bit for bit. Opens nothing."""

import numpy as np

from storage_schemas.codecs import raw_chunk_nbytes
from storage_schemas.commit import ObjectRecord
from storage_schemas.copy_plan import CopyPlan
from storage_schemas.keys import array_kind
from storage_schemas.layout import decode_payload, object_nbytes
from storage_schemas.shard_buffers import EncodedObject, ShardBuffers


def recode_object(plan: CopyPlan, path: str, shard: int, data: memoryview, record: ObjectRecord) -> EncodedObject:
    """The copy's object of one array from the source's, whose bytes were checked.

    Args:
        plan: Of the copy; both sides have the same samples and chunks.
        path: Of the array.
        shard: Which one.
        data: The source's object.
        record: Of it.

    Raises:
        DecodeError: A chunk of it is none.
    """
    spec, kind = plan.source.spec, array_kind(path)
    out = np.empty(raw_chunk_nbytes(spec, kind), np.uint8) if spec.codec != "none" else None
    buffers = ShardBuffers(plan.spec, paths=[path])
    buffers.begin(shard)
    first = spec.shard_samples(shard).start
    for chunk, (offset, nbytes, _) in zip(spec.shard_chunks(shard), record.chunks.tolist()):
        rows = spec.chunk_samples(chunk)
        values = decode_payload(spec, kind, chunk, data[offset : offset + nbytes], out)
        buffers.assign(path, rows.start - first, values[: len(rows)])
    return buffers.encode(path, shard)


def recode_nbytes(plan: CopyPlan, path: str, shard: int) -> int:
    """Memory that `recode_object` takes beside the source's object: a chunk, the values, and those values coded."""
    chunk = raw_chunk_nbytes(plan.source.spec, array_kind(path))
    return chunk + (1 if plan.spec.codec == "none" else 2) * object_nbytes(plan.spec, path, shard)

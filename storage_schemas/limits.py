"""How large the objects beside the data may be. Nothing larger is read, whatever lies in its place.

The limits are far above what any real store needs, and low enough that a reader of a hostile one does not run out of
memory. Data objects need none: their sizes come from commits.
"""

from storage_schemas.documents import MAX_DOCUMENT_NBYTES
from storage_schemas.keys import INDEX_KEY, SAMPLES_KEY, commit_shard, is_teacher_key, sharded_array_paths
from storage_schemas.spec import StoreSpec

#: The largest published ViT, DINOv3's of seven billion parameters, takes 27 GB in float32.
MAX_TEACHER_FILE_NBYTES = 2**36
#: Of samples.parquet and of index.parquet, which are parsed whole; the index of ImageNet for a ViT-B takes 18 MB.
MAX_TABLE_NBYTES = 2**32
_TABLE_BASE_NBYTES = 2**20  # schema, footer, and all of a small table
_SAMPLE_NBYTES = 2**10  # a path and a class name, uncompressed; file systems allow 255 bytes for one name
_INDEX_OBJECT_NBYTES = 2**10  # a key, numbers, and the measured error, which metadata holds twice as text
_INDEX_CHUNK_NBYTES = 64  # three integers and their levels
_COMMIT_BASE_NBYTES = 2**16
_COMMIT_CHUNK_NBYTES = 64  # three numbers of at most 15 and 10 digits
_INDEX_SAMPLE_NBYTES = 64  # a bad image, likewise twice as text


def most_samples_nbytes(n_samples: int) -> int:
    """The most bytes that a samples.parquet may have, packed and unpacked."""
    return min(MAX_TABLE_NBYTES, _TABLE_BASE_NBYTES + n_samples * _SAMPLE_NBYTES)


def most_nbytes(spec: StoreSpec, key: str) -> int:
    """The most bytes that an object beside the data may have in a store of this identity."""
    if key == SAMPLES_KEY:
        return most_samples_nbytes(spec.n_samples)
    if key == INDEX_KEY:
        n_arrays = len(sharded_array_paths(spec))
        n_objects = (n_arrays + 1) * spec.n_shards  # statistics is one more, of one chunk
        n_chunks = n_arrays * spec.n_chunks + spec.n_shards
        rows_nbytes = n_objects * _INDEX_OBJECT_NBYTES + n_chunks * _INDEX_CHUNK_NBYTES
        return min(MAX_TABLE_NBYTES, _TABLE_BASE_NBYTES + rows_nbytes + spec.n_samples * _INDEX_SAMPLE_NBYTES)
    if commit_shard(key) is not None:
        n_objects = len(sharded_array_paths(spec)) + 1
        rows_nbytes = n_objects * (_INDEX_OBJECT_NBYTES + spec.chunks_per_shard * _COMMIT_CHUNK_NBYTES)
        most = _COMMIT_BASE_NBYTES + rows_nbytes + spec.samples_per_shard * _INDEX_SAMPLE_NBYTES
        return min(MAX_DOCUMENT_NBYTES, most)
    return MAX_TEACHER_FILE_NBYTES if is_teacher_key(key) else MAX_DOCUMENT_NBYTES

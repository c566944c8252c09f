"""What an extraction will take, worked out before the first image: bytes, objects, memory. Opens nothing."""

from dataclasses import dataclass

from infra.console import human_bytes
from pipeline.preprocess import DECODE_NBYTES_PER_PIXEL, LARGE_PIXELS
from storage_schemas.codecs import raw_chunk_nbytes
from storage_schemas.commit import statistics_nbytes
from storage_schemas.keys import array_kind, sharded_array_paths
from storage_schemas.shard_buffers import ShardBuffers
from storage_schemas.spec import StoreSpec
from storage_schemas.zarr_layout import CRC_NBYTES, index_nbytes, slot_nbytes

#: Interpreter, torch, timm, pyarrow and Ray's client in one process, before anything of the job: measured 0.8 GB.
BASE_NBYTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Numbers of one store.

    Attributes:
        n_samples: Images.
        n_shards: Units of work.
        n_objects: Data objects and commits.
        data_nbytes: Size of the data objects; exact with codec "none", else the size before compression.
        shard_nbytes: Size of one full shard.
        worker_nbytes: Memory that one worker stays under, weights included.
    """

    n_samples: int
    n_shards: int
    n_objects: int
    data_nbytes: int
    shard_nbytes: int
    worker_nbytes: int


def plan_store(spec: StoreSpec, *, weights_nbytes: int, n_states: int, depth: int, n_threads: int) -> StorePlan:
    """Work out a store's numbers.

    Args:
        spec: Its identity.
        weights_nbytes: Size of the teacher's weights.
        n_states: States that one forward pass makes, stored or not.
        depth: Shards in flight per worker.
        n_threads: Micro-batches in flight per worker.
    """
    n_objects = len(sharded_array_paths(spec)) + 2  # statistics and commit
    return StorePlan(
        n_samples=spec.n_samples,
        n_shards=spec.n_shards,
        n_objects=spec.n_shards * n_objects,
        data_nbytes=sum(shard_nbytes(spec, shard) for shard in _first_and_last(spec))
        + max(0, spec.n_shards - 2) * shard_nbytes(spec, 0),
        shard_nbytes=shard_nbytes(spec, 0),
        worker_nbytes=BASE_NBYTES
        + 4 * weights_nbytes  # as planned (where driver and worker are one), as read, as tensors, and the model
        + runner_nbytes(spec, n_states=n_states, depth=depth, n_threads=n_threads),
    )


def shard_nbytes(spec: StoreSpec, shard: int) -> int:
    """Bytes of a shard's data objects with codec "none"."""
    n_chunks = len(spec.shard_chunks(shard))
    arrays = sum(
        n_chunks * slot_nbytes(raw_chunk_nbytes(spec, array_kind(path))) + index_nbytes(spec)
        for path in sharded_array_paths(spec)
    )
    return arrays + statistics_nbytes(spec) + CRC_NBYTES


def runner_nbytes(spec: StoreSpec, *, n_states: int, depth: int, n_threads: int) -> int:
    """Memory that a worker needs beside its base and weights.

    Buffers of the shards in flight; for each thread all states of a micro-batch, the rounded patches of those stored,
    the float64 copy of one layer and its differences (6 states), and the inside of one teacher block (queries, keys,
    values, an MLP of ratio 4 before and after its activation: 16 states), and an image being decoded. One image over
    LARGE_PIXELS at a time takes DECODE_NBYTES_PER_PIXEL more, which only shows when there are such images.
    """
    state = spec.micro_batch * spec.n_tokens * spec.dim * 4
    rounded = 0 if spec.precision == "float32" else -(-len(spec.layers) // 2)
    teacher = state * (n_states + rounded + 6 + 16)
    return depth * ShardBuffers.nbytes(spec) + n_threads * (teacher + LARGE_PIXELS * DECODE_NBYTES_PER_PIXEL)


def describe(plan: StorePlan, spec: StoreSpec, location: str) -> list[str]:
    """The plan as lines to print."""
    bound = "" if spec.codec == "none" else f" before {spec.codec}"
    return [
        f"{location}: {plan.n_samples:,} images, layers {spec.layers[0]} to {spec.layers[-1]} of {spec.teacher}, "
        f"{spec.n_tokens} tokens x {spec.dim} channels, patches in {spec.precision}",
        f"  {human_bytes(plan.data_nbytes)}{bound} in {plan.n_objects:,} objects, {plan.n_shards:,} shards of "
        f"{human_bytes(plan.shard_nbytes)}; each worker stays under {human_bytes(plan.worker_nbytes)} of memory "
        f"(images over {LARGE_PIXELS // 10**6} Mpx: {DECODE_NBYTES_PER_PIXEL} MB more per Mpx of the largest)",
    ]


def _first_and_last(spec: StoreSpec) -> list[int]:
    return sorted({0, spec.n_shards - 1})

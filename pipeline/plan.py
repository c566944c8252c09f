"""What an extraction will take, worked out before the first image: bytes, objects, memory, requests. Opens nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from infra.console import counted, human_bytes
from pipeline.locations import is_remote
from pipeline.plan_requests import Requests, data_nbytes, extraction_requests, shard_nbytes, verify_requests
from pipeline.preprocess import DECODE_NBYTES_PER_PIXEL, LARGE_PIXELS
from pipeline.shard_writer import N_PUT_THREADS
from storage_schemas.indices import named_layers
from storage_schemas.keys import array_kind, sharded_array_paths
from storage_schemas.layout import full_chunk_nbytes
from storage_schemas.shard_buffers import ShardBuffers
from storage_schemas.spec import StoreSpec

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
        n_workers: As asked for, else one; each reads the teacher on its own.
        extraction: Requests and bytes of the whole of it on a remote store; its sign of life comes to that.
        verify: Requests and bytes of reading it all again.
    """

    n_samples: int
    n_shards: int
    n_objects: int
    data_nbytes: int
    shard_nbytes: int
    worker_nbytes: int
    n_workers: int
    extraction: Requests
    verify: Requests


def plan_store(
    spec: StoreSpec,
    *,
    location: str = "",
    teacher_files: Mapping[str, int],
    samples_nbytes: int = 0,
    n_states: int,
    depth: int,
    n_threads: int,
    n_workers: int = 1,
) -> StorePlan:
    """Work out a store's numbers.

    Args:
        spec: Its identity.
        location: Where it goes.
        teacher_files: Sizes of what goes under teacher/, by name.
        samples_nbytes: Size of samples.parquet.
        n_states: States that one forward pass makes, stored or not.
        depth: Shards in flight per worker.
        n_threads: Micro-batches in flight per worker.
        n_workers: How many there are.
    """
    n_objects = len(sharded_array_paths(spec)) + 2  # statistics and commit
    return StorePlan(
        n_samples=spec.n_samples,
        n_shards=spec.n_shards,
        n_objects=spec.n_shards * n_objects,
        data_nbytes=data_nbytes(spec),
        shard_nbytes=shard_nbytes(spec, 0),
        worker_nbytes=BASE_NBYTES
        + 4
        * sum(teacher_files.values())  # as planned (where driver and worker are one), as read, as tensors, the model
        + runner_nbytes(spec, n_states=n_states, depth=depth, n_threads=n_threads)
        + (upload_nbytes(spec, depth) if is_remote(location) else 0),
        n_workers=n_workers,
        extraction=extraction_requests(
            spec, teacher_files=teacher_files, samples_nbytes=samples_nbytes, n_workers=n_workers
        ),
        verify=verify_requests(spec, teacher_files=teacher_files, samples_nbytes=samples_nbytes),
    )


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


def upload_nbytes(spec: StoreSpec, depth: int) -> int:
    """Memory that a worker needs for objects on their way to a remote store.

    The client sends each from one piece of memory, twice as large for a moment; and with a codec the objects of a shard
    are encoded while those before are on their way.
    """
    kinds = {array_kind(path) for path in sharded_array_paths(spec)}
    largest = spec.chunks_per_shard * max(full_chunk_nbytes(spec, kind) for kind in kinds)
    encoded = 0 if spec.codec == "none" else depth * ShardBuffers.nbytes(spec)
    return 2 * N_PUT_THREADS * largest + encoded


def describe(plan: StorePlan, spec: StoreSpec, location: str) -> list[str]:
    """The plan as lines to print."""
    bound = "" if spec.codec == "none" else f" before {spec.codec}"
    return [
        f"{location}: {counted(plan.n_samples, 'image')}, {named_layers(spec.layers)} of {spec.teacher}, "
        f"{spec.n_tokens} tokens x {spec.dim} channels, patches in {spec.precision}",
        f"  {human_bytes(plan.data_nbytes)}{bound} in {plan.n_objects:,} objects, {counted(plan.n_shards, 'shard')} of "
        f"{human_bytes(plan.shard_nbytes)}; each worker stays under {human_bytes(plan.worker_nbytes)} of memory "
        f"(images over {LARGE_PIXELS // 10**6} Mpx: {DECODE_NBYTES_PER_PIXEL} MB more per Mpx of the largest)",
    ]

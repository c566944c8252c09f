"""What a large store costs the process that plans and drives it: seconds of a core and memory, by number of images."""

import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import TypeVar

from benchmarks.machine import this_machine
from benchmarks.report import Result
from pipeline.dispatch import Ledger
from pipeline.plan import plan_store
from pipeline.plan_requests import commit_nbytes, expected_commit, index_nbytes
from pipeline.sources import storage_order
from storage_schemas.commit import read_commit
from storage_schemas.samples import (
    Sample,
    Samples,
    samples_from_bytes,
    samples_of_table,
    samples_to_bytes,
    source_digest,
)
from storage_schemas.spec import StoreSpec

T = TypeVar("T")

NOTES = (
    "Everything is done in a process of its own for each number of images, by the functions that an extraction calls, "
    "on names like ImageNet's; the images themselves are not there, so what a file system or a server takes to list "
    "them is not in it. Seconds are of CPU time, which a busy machine hardly changes.",
    "Memory is the process's peak less what it had before the first step. A commit's size and the index's are those of "
    "pipeline.plan_requests; reading commits again (what a resumed run does without an index) is measured on the first "
    "few hundred.",
)

#: The teacher of ImageNet stores: 12 blocks of 768 channels, CLS, 4 registers, 16 x 16 patches.
VIT_BASE = StoreSpec(
    layers=tuple(range(13)),
    dim=768,
    has_cls=True,
    n_registers=4,
    grid=(16, 16),
    precision="float16",
    n_samples=1_281_167,
    samples_per_shard=256,
    samples_per_chunk=16,
    teacher="vit_base_patch14_reg4_dinov2.lvd142m",
    teacher_weights_digest="0" * 64,
    preprocessing={"image_size": 224},
    micro_batch=16,
    source_digest="1" * 64,
)


@dataclass(frozen=True, kw_only=True)
class ScaleBenchmark:
    """Sizes of this benchmark.

    Attributes:
        n_images: Numbers of images.
        n_commits: Commits that are read again, at most.
    """

    n_images: tuple[int, ...] = (128_117, 1_281_167, 5_000_000)
    n_commits: int = 300


QUICK = ScaleBenchmark(n_images=(600, 1200), n_commits=2)


def listing(n: int) -> Iterator[Sample]:
    """Names and sizes as ImageNet's, in order."""
    per_class = max(1, n // 1000)
    for i in range(n):
        label = i // per_class
        name = f"n{1_440_764 + 7_919 * label:08d}"
        yield Sample(
            sample_id=f"{name}/{name}_{i % per_class}.JPEG",
            label=label,
            class_name=name,
            nbytes=100_000 + i * 7919 % 90_000,
        )


def run(config: ScaleBenchmark) -> Result:
    """Measure each number of images."""
    rows: list[dict[str, float | int]] = []
    for n in config.n_images:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, n, config.n_commits).result())
    per_image = {key: value / rows[-1]["images"] for key, value in rows[-1].items() if key.endswith((" s", "MB"))}
    return Result(
        name="scale",
        title="What a store of many images costs its driver, ViT-B/14 at 224 px",
        machine=this_machine(),
        settings=asdict(config),
        rows=[dict(row) for row in rows],
        notes=NOTES,
        details={"per_image": per_image},
    )


def measure(n_images: int, n_commits: int) -> dict[str, float | int]:
    """One number of images; in a fresh process, as its peak of memory is asked for."""
    spec = replace(VIT_BASE, n_samples=n_images)
    before = _peak_nbytes()
    listed, list_s = _timed(lambda: Samples.of(listing(n_images)))
    samples, order_s = _timed(lambda: listed.take(storage_order(n_images, spec.order_seed)))
    _, digest_s = _timed(lambda: source_digest(listed))
    parquet, write_s = _timed(lambda: samples_to_bytes(samples))
    peak = _peak_nbytes() - before
    _, worker_s = _timed(lambda: samples_of_table(samples_from_bytes(parquet, n_images)))
    plan, plan_s = _timed(
        lambda: plan_store(spec, teacher_files={"model.safetensors": 346_000_000}, n_states=13, depth=3, n_threads=16)
    )
    shards = range(min(n_commits, spec.n_shards))
    documents = [expected_commit(spec, shard).to_bytes() for shard in shards]
    _, commits_s = _timed(lambda: [read_commit(spec, "0" * 64, i, data) for i, data in zip(shards, documents)])
    _, ledger_s = _timed(lambda: _through(Ledger(range(spec.n_shards), depth=3), spec.n_shards))
    return {
        "images": n_images,
        "shards": plan.n_shards,
        "objects": plan.n_objects,
        "list s": list_s,
        "order s": order_s,
        "digest s": digest_s,
        "samples.parquet s": write_s,
        "samples.parquet MB": len(parquet) / 1e6,
        "driver's memory MB": peak / 1e6,
        "a worker's reading s": worker_s,
        "plan s": plan_s,
        "commit kB": commit_nbytes(spec) / 1e3,
        "reading all commits s": commits_s / len(shards) * spec.n_shards,
        "index.parquet MB": index_nbytes(spec) / 1e6,
        "book-keeping s": ledger_s,
    }


def _through(ledger: Ledger, n_shards: int) -> None:
    """Every shard from the queue to its end, on 64 workers."""
    done = 0
    while done < n_shards:
        for worker in range(64):
            while (shard := ledger.feed(worker)) is not None:
                ledger.finished(worker, shard, None)
                done += 1


def _timed(what: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its CPU seconds."""
    began = time.process_time()
    return what(), time.process_time() - began


def _peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

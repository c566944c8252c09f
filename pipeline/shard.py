"""Do one shard: read and decode images, run the teacher, reduce and round, encode, write, commit. Knows no Ray.

The unit of parallel work inside a shard is the micro-batch. On a CPU each one is decoded, run and reduced by one
thread, with one thread of torch, so all cores are busy to the end and the values do not depend on how many there are.
On a GPU threads decode ahead and micro-batches take the device in turn.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import LifoQueue
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from infra.faults import FAULTS, Kind, Where
from infra.machine import n_cores
from infra.metrics import Metrics, StageClock, place_label
from infra.objects import Objects, open_objects
from infra.verdict import Pool
from pipeline.locations import is_remote
from pipeline.preprocess import BadImageError, decode_image, normalise
from pipeline.preprocessing import Preprocessing
from pipeline.shard_writer import N_PUT_THREADS, ShardWriter, Since, check_fidelity
from pipeline.source_errors import MAX_IMAGE_NBYTES, SourceError
from pipeline.states import Reduced, check_head_input, merge_reduced, reduce_micro_batch
from pipeline.teacher import Teacher, teacher_from_files
from storage_schemas.commit import Commit
from storage_schemas.create import StoreDocument, read_store_document
from storage_schemas.documents import sha256
from storage_schemas.errors import ChecksumError
from storage_schemas.keys import SAMPLES_KEY, TEACHER_PREFIX, array_path, commit_key
from storage_schemas.samples import Sample, samples_from_bytes, samples_of_table
from storage_schemas.shard_buffers import ShardBuffers
from storage_schemas.spec import HEAD_INPUT, StoreSpec

READ_TRIES = 4
READ_BACKOFF_S = 0.5


@runtime_checkable
class ImageBytes(Protocol):
    """The one verb that a shard needs of an image source."""

    def read(self, sample: Sample) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a worker tells the driver of a finished shard; a few hundred bytes.

    Attributes:
        n_samples: Rows of the shard, valid or not.
        bad_images: (sample_index, sample_id, code) of the invalid ones.
        nbytes: Bytes put, the commit included.
        seconds: Busy thread-seconds by stage.
        wall_s: From the first image to the commit.
        worker: Host and process.
        requests: Of this worker to a remote store, by verb, since its last report; also bytes_out and bytes_in.
        faults: Of this worker since its last report, by "where kind" (`infra.faults`).
        pools: Of this worker's threads.
    """

    shard: int
    n_samples: int
    bad_images: tuple[tuple[int, str, str], ...]
    nbytes: int
    seconds: dict[str, float]
    wall_s: float
    worker: str
    requests: dict[str, int]
    faults: dict[str, int]
    pools: tuple[Pool, ...]


@dataclass(frozen=True, kw_only=True)
class ShardElsewhere:
    """A shard that another job has, or has done.

    Attributes:
        run_id: The run that claims it.
        committed: Whether it is done; if not, nothing is known of its images yet.
        bad_images: As in `ShardReport`.
        nbytes: Bytes of its objects, the commit included; 0 if it is not committed.
        requests: As in `ShardReport`.
        faults: As in `ShardReport`.
    """

    shard: int
    run_id: str
    committed: bool
    bad_images: tuple[tuple[int, str, str], ...]
    nbytes: int
    requests: dict[str, int]
    faults: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """What a worker process needs to do shards; small and picklable, with nothing that only one machine knows.

    Attributes:
        store: Location of the store; its documents have been written already.
        source: Reads an image by its id.
        device: "cpu", "cuda", or "auto": the GPU if there is one.
        n_threads: Threads for images and, on a CPU, the teacher; None for all cores that this process may use.
        n_buffers: Shards in flight, each with buffers of its own.
        make_teacher: Makes the teacher; None takes the one in the store.
        run_id: Of the run, for its claims; None makes none.
        max_error: Largest relative MSE of a layer and kind against float32; None for any.
    """

    store: str
    source: ImageBytes
    device: str = "auto"
    n_threads: int | None = None
    n_buffers: int = 2
    make_teacher: Callable[[str], Teacher] | None = None
    run_id: str | None = None
    max_error: float | None = None

    def __call__(self) -> "ShardRunner":
        """Make the runner, in the worker process."""
        return ShardRunner(self, open_objects(self.store))


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda", from those or "auto"."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


class ShardRunner:
    """Does shards of one store, several at a time; made once per worker process.

    Args:
        config: What to do it with.
        objects: Of the store; its documents are read from there.
    """

    def __init__(self, config: RunnerConfig, objects: Objects) -> None:
        self._objects = objects
        self._run_id = config.run_id or ""
        self._source = config.source
        self._document = read_store_document(objects, objects.location)
        samples = _read_checked(objects, self._document, SAMPLES_KEY)
        self._samples = samples_of_table(samples_from_bytes(samples, self.spec.n_samples))
        device = resolve_device(config.device)
        self._on_gpu = device.startswith("cuda")
        self._n_threads = config.n_threads or n_cores()
        if not self._on_gpu:
            torch.set_num_threads(1)  # each micro-batch has a thread of ours; see the head of this file
        self._teacher = config.make_teacher(device) if config.make_teacher else self._stored_teacher(device)
        self._preprocessing = Preprocessing.from_dict(dict(self.spec.preprocessing))
        self._open = ExitStack()
        self._open.enter_context(FAULTS.told_to(_tell_ray(place_label(objects.location))))
        self._faults = Since(FAULTS.counts, FAULTS.counts())
        self._device_turn = threading.Lock()
        self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix="micro-batch")
        self._writer = ShardWriter(objects, self._document, self._pool, config.run_id)
        self._max_error = config.max_error
        self._pools = _thread_pools(
            self._n_threads, depth=config.n_buffers, on_gpu=self._on_gpu, remote=is_remote(objects.location)
        )
        self._buffers: LifoQueue[ShardBuffers] = LifoQueue()
        for _ in range(config.n_buffers):
            self._buffers.put(ShardBuffers(self.spec, _pinned if self._on_gpu else None))

    @property
    def spec(self) -> StoreSpec:
        return self._document.spec

    def check_source(self) -> None:
        """Read an image or two, for one machine of a cluster may lack what the others have.

        Raises:
            SourceError: Neither the first image nor the last can be read here.
        """
        for index in (0, len(self._samples) - 1):
            try:
                self._read_bytes(self._samples[index])
            except BadImageError:
                return  # bytes have come
            except SourceError as error:
                failure = error
            else:
                return
        raise failure

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        self._writer.close()
        self._open.close()

    def run(self, shard: int) -> ShardReport | ShardElsewhere:
        """Do one shard from images to commit, unless another job has it. May be called from several threads.

        Raises:
            FatalError: The store cannot be written, or MAX_ERROR is not held; no shard can pass.
            SourceError: An image could not be read, after several tries.
            StateError: The teacher's states cannot be stored.
        """
        began = time.monotonic()
        clock = StageClock()
        with clock("commit"):
            holder, commit = self._writer.find(shard)
        if commit is not None or holder != self._run_id:
            return self._elsewhere(shard, holder, commit)
        with self._borrow(clock) as buffers:
            buffers.begin(shard)
            bad, reduced = self._run_teacher(shard, buffers, clock)
            statistics, fidelity = merge_reduced(self.spec, reduced)
            check_fidelity(fidelity, self.spec.precision, self._max_error)
            for index, _ in bad:
                buffers.invalidate(index - self.spec.shard_samples(shard).start)
            written = self._writer.write(shard, buffers, statistics.to_array(), clock)
        with clock("commit"):
            document = Commit(
                shard=shard,
                store=self._document.digest,
                bad_images=tuple(bad),
                objects={encoded.key: encoded.record for encoded in written},
                fidelity=fidelity,
            ).to_bytes()
            # a plain put: whoever else commits this shard has the same bytes, and a damaged commit has to go
            self._writer.put(commit_key(shard), document)
        return ShardReport(
            shard=shard,
            n_samples=len(self.spec.shard_samples(shard)),
            bad_images=self._named(bad),
            nbytes=len(document) + sum(encoded.record.nbytes for encoded in written),
            seconds=clock.seconds(),
            wall_s=time.monotonic() - began,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            requests=self._writer.new_requests(),
            faults=self._faults.new(),
            pools=self._pools,
        )

    def _elsewhere(self, shard: int, holder: str, commit: Commit | None) -> ShardElsewhere:
        return ShardElsewhere(
            shard=shard,
            run_id=holder,
            committed=commit is not None,
            bad_images=self._named(commit.bad_images if commit else ()),
            nbytes=commit_nbytes(commit) if commit else 0,
            requests=self._writer.new_requests(),
            faults=self._faults.new(),
        )

    def _named(self, bad: Sequence[tuple[int, str]]) -> tuple[tuple[int, str, str], ...]:
        return tuple((index, self._samples[index].sample_id, code) for index, code in bad)

    @contextmanager
    def _borrow(self, clock: StageClock) -> Iterator[ShardBuffers]:
        with clock("waiting"):
            buffers = self._buffers.get()
        try:
            yield buffers
        finally:
            self._buffers.put(buffers)

    def _run_teacher(
        self, shard: int, buffers: ShardBuffers, clock: StageClock
    ) -> tuple[list[tuple[int, str]], list[Reduced]]:
        rows = self.spec.shard_samples(shard)
        starts = range(rows.start, rows.stop, self.spec.micro_batch)
        batches = [range(start, min(start + self.spec.micro_batch, rows.stop)) for start in starts]
        futures: list[Future[tuple[list[tuple[int, str]], Reduced]]] = [
            self._pool.submit(self._micro_batch, batch, batch.start - rows.start, buffers, clock) for batch in batches
        ]
        try:
            results = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            _wait_all(futures)  # they write into buffers that the next shard will get
        return [bad for found, _ in results for bad in found], [reduced for _, reduced in results]

    def _micro_batch(
        self, rows: range, place: int, buffers: ShardBuffers, clock: StageClock
    ) -> tuple[list[tuple[int, str]], Reduced]:
        pixels, bad = self._read_images(rows, clock)
        bad_rows = {index - rows.start for index, _ in bad}
        valid = [row for row in range(len(rows)) if row not in bad_rows] if bad else None
        if not self._on_gpu:
            return bad, self._forward(pixels, len(rows), valid, place, buffers, clock)
        with clock("waiting"):
            self._device_turn.acquire()
        try:
            return bad, self._forward(pixels, len(rows), valid, place, buffers, clock)
        finally:
            self._device_turn.release()

    def _read_images(self, rows: range, clock: StageClock) -> tuple[torch.Tensor, list[tuple[int, str]]]:
        """Always a full micro-batch: the same shapes give the same arithmetic. Missing and bad images are black."""
        size = self._preprocessing.image_size
        pixels = np.zeros((self.spec.micro_batch, 3, size, size), np.uint8)
        bad = []
        for i, index in enumerate(rows):
            try:
                with clock("read"):
                    data = self._read_bytes(self._samples[index])
                with clock("decode"):
                    pixels[i] = decode_image(data, self._preprocessing)
            except BadImageError as error:
                bad.append((index, error.code))
        return torch.from_numpy(pixels), bad

    def _read_bytes(self, sample: Sample) -> bytes:
        if sample.nbytes > MAX_IMAGE_NBYTES:
            raise BadImageError("too_large", f"{sample.nbytes:,} bytes; at most {MAX_IMAGE_NBYTES:,} are read")
        for attempt in range(1, READ_TRIES + 1):
            try:
                with FAULTS.at_source():
                    return self._source.read(sample)
            except SourceError as error:
                if not error.tried_again:  # else each try was counted where it was made
                    with FAULTS.at_source():
                        FAULTS.note("io")
                if error.tried_again or attempt == READ_TRIES:
                    raise
                time.sleep(READ_BACKOFF_S * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _forward(
        self,
        pixels: torch.Tensor,
        n_rows: int,
        valid: list[int] | None,
        place: int,
        buffers: ShardBuffers,
        clock: StageClock,
    ) -> Reduced:
        teacher, spec = self._teacher, self.spec
        with clock("device"), torch.inference_mode():
            # without pin_memory: 5 MB of pixels, behind a forward pass a hundred times as long
            inputs = normalise(pixels.to(teacher.device), self._preprocessing)
            states = teacher.layer_states_list(inputs)
            kept = [states[layer][:n_rows] for layer in spec.layers]
            index = torch.tensor(valid, dtype=torch.long, device=teacher.device) if valid is not None else None
            layers, reduced = reduce_micro_batch(spec, kept, index)
            if spec.has_head_input:
                head_input = teacher.head_input(teacher.final_norm(states[-1]))[:n_rows].float()
                check_head_input(head_input, index)
        began, computed = time.perf_counter(), self._moment()
        for layer, kinds in zip(spec.layers, layers):
            for kind, values in kinds.items():
                _copy(buffers, array_path(layer, kind), place, values)
        if spec.has_head_input:
            _copy(buffers, HEAD_INPUT, place, head_input)
        copied = self._moment()
        if computed is not None and copied is not None:
            torch.cuda.current_stream().synchronize()  # nothing of the buffers is read before this returns
        spent = time.perf_counter() - began
        # A GPU is still computing when it is told to copy, and the wait at the end is for both.
        copying = spent if computed is None or copied is None else min(computed.elapsed_time(copied) / 1000, spent)
        clock.add("copy", copying)
        clock.add("device", spent - copying)
        return reduced

    def _moment(self) -> torch.cuda.Event | None:
        """A mark in what the GPU has been told to do; None on a CPU, which does it at once."""
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _stored_teacher(self, device: str) -> Teacher:
        files = {
            key.removeprefix(TEACHER_PREFIX): _read_checked(self._objects, self._document, key)
            for key in self._document.documents
            if key.startswith(TEACHER_PREFIX)
        }
        return teacher_from_files(files, device=device, compute=self.spec.compute)


def commit_nbytes(commit: Commit) -> int:
    """Bytes of a shard's objects and of its commit."""
    return len(commit.to_bytes()) + sum(record.nbytes for record in commit.objects.values())


def _thread_pools(n_threads: int, *, depth: int, on_gpu: bool, remote: bool) -> tuple[Pool, ...]:
    """Which threads of a worker do what; the device is one more, as micro-batches take turns on it."""
    on_device = ("device", "copy")
    writing = () if remote else ("write",)
    images = ("read", "decode")
    micro_batches = (*images, "encode", *writing) if on_gpu else (*images, *on_device, "encode", *writing)
    pools = [Pool(stages=micro_batches, lanes=n_threads), Pool(stages=("commit",), lanes=depth)]
    if on_gpu:
        pools.append(Pool(stages=on_device, lanes=1))
    if remote:
        pools.append(Pool(stages=("write",), lanes=N_PUT_THREADS))
    return tuple(pools)


def _tell_ray(store: str) -> Callable[[Where, Kind], None]:
    """At once, and not with the next report: while a store is away there is none."""
    metrics = Metrics({"store": store})
    return lambda where, kind: metrics.add("errors", where=where, kind=kind)


def _copy(buffers: ShardBuffers, path: str, place: int, values: torch.Tensor) -> None:
    for rows, view in buffers.pieces(path, place, len(values)):
        torch.from_numpy(view).copy_(values[rows], non_blocking=True)


def _pinned(nbytes: int) -> np.ndarray:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def _wait_all(futures: list[Future]) -> None:
    for future in futures:
        if not future.cancelled():
            future.exception()


def _read_checked(objects: Objects, document: StoreDocument, key: str) -> bytes:
    data = objects.get(key)
    if sha256(data) != document.documents[key]:
        raise ChecksumError(key, f"{objects.location}/{key} is not the one that store.json names; make verify mends it")
    return data

"""Open a store and read from it. Offsets, sizes and checksums come from commits, never from the objects."""

import operator
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex, cast

import numpy as np
import pyarrow as pa
from crc32c import crc32c
from jaxtyping import Float32

from infra.objects import ObjectError, ObjectMissingError, Objects, ObjectTooLargeError, open_objects, read_range
from storage_schemas.codecs import DecodeError, kind_shape
from storage_schemas.commit import Commit, Fidelity, read_commit
from storage_schemas.commit_table import CommitTable, make_commit_table
from storage_schemas.create import StoreDocument, read_store_document
from storage_schemas.documents import sha256
from storage_schemas.errors import ChecksumError, NotAStoreError, NotCommittedError, Problem, SchemaError
from storage_schemas.find import splits_in
from storage_schemas.index import commits_from_index, is_index_of
from storage_schemas.indices import Indices, as_indices, named_layers
from storage_schemas.keys import (
    COMMITS_PREFIX,
    INDEX_KEY,
    SAMPLES_KEY,
    TEACHER_PREFIX,
    array_kind,
    array_path,
    commit_key,
    commit_shard,
    shard_object_key,
    statistics_key,
)
from storage_schemas.layout import decode_payload
from storage_schemas.limits import most_nbytes
from storage_schemas.precision import restore_patches
from storage_schemas.samples import samples_from_bytes
from storage_schemas.spec import HEAD_INPUT, StoreSpec
from storage_schemas.statistics import Statistics
from storage_schemas.sums import sum_shards

_N_READ_THREADS = 8
MISSING_COMMIT = "it is missing, though the store was finished once"


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where the stored bytes of one chunk lie, and what they must sum to."""

    key: str
    offset: int
    nbytes: int
    crc32c: int


class Store:
    """A store, read-only. Made by `open_store`."""

    def __init__(
        self, objects: Objects, document: StoreDocument, table: CommitTable, damaged_commits: dict[str, str]
    ) -> None:
        self.objects = objects
        self.document = document
        self.table = table
        self.damaged_commits = damaged_commits

    def __repr__(self) -> str:
        return (
            f"<Store {self.location}: {self.n_valid:,} valid of {self.n_samples:,} samples, "
            f"{named_layers(self.layers)} of {self.spec.teacher}, {self.spec.precision}>"
        )

    @property
    def location(self) -> str:
        return self.objects.location

    @property
    def spec(self) -> StoreSpec:
        return self.document.spec

    @property
    def layers(self) -> tuple[int, ...]:
        return self.spec.layers

    @property
    def n_samples(self) -> int:
        """Samples in the plan."""
        return self.spec.n_samples

    @property
    def n_committed(self) -> int:
        """Samples in committed shards."""
        return sum(len(self.spec.shard_samples(int(shard))) for shard in np.flatnonzero(self.committed))

    @property
    def n_valid(self) -> int:
        """Samples that can be read."""
        return int(self.valid.sum())

    @property
    def is_complete(self) -> bool:
        return bool(self.committed.all())

    @property
    def committed(self) -> np.ndarray:
        """(shard,) bool."""
        return self.table.committed

    @property
    def valid(self) -> np.ndarray:
        """(sample,) bool; False where the shard has no commit or the image was bad."""
        return self.table.valid

    @cached_property
    def samples(self) -> pa.Table:
        """sample_index, sample_id, label, class_name, nbytes, valid; row i is sample i.

        Raises:
            ChecksumError: samples.parquet is not the one that store.json names.
        """
        table = samples_from_bytes(self.read_document(SAMPLES_KEY), self.n_samples)
        return table.append_column("valid", pa.array(self.valid))

    def read_document(self, key: str) -> bytes:
        """A document named by store.json, checked against its digest.

        Raises:
            ChecksumError: Its bytes are not those that store.json names.
            SchemaError: It is larger than any such document, so nothing was read.
        """
        try:
            data = self.objects.get(key, at_most=most_nbytes(self.spec, key))
        except ObjectTooLargeError as error:
            raise SchemaError(self.location, [f"{error}. {self._repair_hint()}"]) from error
        if sha256(data) != self.document.documents[key]:
            raise ChecksumError(
                key,
                f"{self.location}/{key}: sha256 {sha256(data)[:16]}, "
                f"store.json says {self.document.documents[key][:16]}. {self._repair_hint()}",
            )
        return data

    def read_teacher_files(self) -> dict[str, bytes]:
        """The teacher's config, weights and head, by name; checked."""
        keys = [key for key in self.document.documents if key.startswith(TEACHER_PREFIX)]
        return {key.removeprefix(TEACHER_PREFIX): self.read_document(key) for key in keys}

    def chunk(self, layer: SupportsIndex, kind: str, chunk: SupportsIndex) -> ChunkLocation:
        """Where chunk `sample_index // samples_per_chunk` of one (layer, kind) lies.

        Raises:
            SchemaError: The store has no such layer or kind; names those it has.
            IndexError: No such chunk.
            NotCommittedError: Its shard has no commit.
        """
        layer = operator.index(layer)
        self._check_request((layer,), (kind,), self.spec.array_kinds)
        return self._location(array_path(layer, kind), operator.index(chunk))

    def read(
        self,
        layers: Indices | None = None,
        samples: Indices | None = None,
        tokens: str = "all",
    ) -> Float32[np.ndarray, "sample layer token dim"]:
        """Read states of some samples at some layers.

        Fetches only the chunks that hold the request; one shared by several samples is fetched and decoded once.

        Args:
            layers: Layer numbers, or one, order and repeats kept; None for all.
            samples: Sample indices in [0, n_samples), or one, order and repeats kept; None for every valid one.
            tokens: "all" for every token in the teacher's order, or one kind: "cls", "registers", "patches",
                "patch_mean". Always four axes: token has length 1 for cls and patch_mean.

        Returns:
            Residual-stream values as the teacher made them, not normalised, within the store's precision. 10.4 MB a
            sample for all of ViT-B/14.

        Raises:
            SchemaError: A layer or kind that the store lacks.
            IndexError: A sample outside the store; names the first and the valid range.
            TypeError: Layers or samples that are not integers in an order: a mask, a set, a generator.
            NotCommittedError: A sample whose shard is not committed, or whose image was bad; or, with samples=None,
                a damaged commit, since its samples would be missing from the answer.
            ChecksumError: Fetched bytes differ from the commit.
        """
        layers = self.layers if layers is None else as_indices(layers, "layer").tolist()
        rows = self._rows(samples)
        kinds = [k for k in self.spec.token_kinds if k != "patch_mean"] if tokens == "all" else [tokens]
        self._check_request(layers, kinds)
        rows = self._checked_rows(rows)
        sizes = [_n_tokens(self.spec, kind) for kind in kinds]
        out = np.empty((len(rows), len(layers), sum(sizes), self.spec.dim), np.float32)
        starts = np.cumsum([0, *sizes])
        work = [
            (array_path(layer, kind), out[:, i, starts[j] : starts[j + 1]])
            for i, layer in enumerate(layers)
            for j, kind in enumerate(kinds)
        ]
        self._fill(work, rows)
        return out

    def read_head_input(self, samples: Indices | None = None) -> Float32[np.ndarray, "sample dim2"]:
        """What linear heads read, [final-norm CLS; mean of final-norm patches], (sample, 2 dim); as `read` for rows."""
        if not self.spec.has_head_input:
            raise SchemaError(self.location, ["this teacher has no CLS token, so the store has no head_input"])
        rows = self._checked_rows(self._rows(samples))
        out = np.empty((len(rows), 2 * self.spec.dim), np.float32)
        self._fill([(HEAD_INPUT, out)], rows)
        if np.isnan(out).any():
            raise SchemaError(self.location, ["this store was made from arrays without head inputs; it holds none"])
        return out

    @property
    def statistics(self) -> Statistics:
        """Moments per layer, kind and channel, (layer, kind, dim) in the order of `layers` and `spec.token_kinds`.

        Of the valid samples of all committed shards, merged in shard order, so the order of work cannot show.

        Raises:
            NotCommittedError: A commit is damaged, so that a shard would be left out unseen.
            ChecksumError, ObjectMissingError, ShortObjectError: As for `fetch`.
        """
        return self._sums[0]

    @property
    def fidelity(self) -> dict[str, Fidelity]:
        """The measured error over all committed shards, by path of each array that was rounded; raises as above."""
        return self._sums[1]

    @cached_property
    def _sums(self) -> tuple[Statistics, dict[str, Fidelity]]:
        self._check_undamaged()
        shards = np.flatnonzero(self.committed).tolist()
        return sum_shards(self.spec, shards, self.shard_statistics, self.table.shard_fidelity)

    def shard_statistics(self, shard: SupportsIndex) -> Statistics:
        """Moments of one committed shard.

        Raises:
            IndexError: No such shard.
            NotCommittedError: It has no commit.
        """
        shard = operator.index(shard)
        if not 0 <= shard < self.spec.n_shards:
            raise IndexError(f"shard {shard} is not in the store; it has shards 0 to {self.spec.n_shards - 1}")
        offset, nbytes, crc = self.table.statistics[shard].tolist()
        if offset < 0:
            raise NotCommittedError(self._uncommitted(shard))
        payload = self.fetch(ChunkLocation(statistics_key(shard), offset, nbytes, crc))
        shape = (len(self.layers), len(self.spec.token_kinds), -1, self.spec.dim)
        return Statistics.from_array(np.frombuffer(payload, "<f8").reshape(shape))

    def fetch(self, location: ChunkLocation) -> bytearray:
        """The payload bytes of a chunk.

        Raises:
            ObjectMissingError, ShortObjectError: The object is not there or ends early.
            ChecksumError: The bytes are not those that were committed.
        """
        payload = read_range(self.objects, location.key, location.offset, location.nbytes)
        check_payload(self.location, location, payload)
        return payload

    def verify(self, *, progress: Callable[[int, int], None] | None = None, threads: int = 4) -> list[Problem]:
        """Re-read and check every object; see `storage_schemas.verify.verify_store`."""
        from storage_schemas.verify import verify_store  # the two modules need each other

        return verify_store(self.objects, progress=progress, threads=threads)

    def _location(self, path: str, chunk: int) -> ChunkLocation:
        if not 0 <= chunk < self.spec.n_chunks:
            raise IndexError(f"chunk {chunk} is not in the store; it has chunks 0 to {self.spec.n_chunks - 1}")
        offset, nbytes, crc = self.table.chunks[path][chunk].tolist()
        shard = chunk // self.spec.chunks_per_shard
        if offset < 0:
            raise NotCommittedError(self._uncommitted(shard))
        return ChunkLocation(shard_object_key(self.spec, path, shard), offset, nbytes, crc)

    def _uncommitted(self, shard: int) -> str:
        damage = self.damaged_commits.get(commit_key(shard))
        if damage:
            return f"{self.location}: the commit of shard {shard} is damaged: {damage}. {self._repair_hint()}"
        return (
            f"{self.location}: shard {shard} is not committed yet; {int(self.committed.sum())} of "
            f"{self.spec.n_shards} shards are. Run the same make extract again to finish it"
        )

    def _repair_hint(self) -> str:
        return f"Mend it: make verify STORE={self.location} IMAGES=<as extracted> REPAIR=1"

    def _check_request(self, layers: Sequence[int], kinds: Sequence[str], known: Sequence[str] | None = None) -> None:
        known = self.spec.token_kinds if known is None else known
        problems = [
            f"layer {layer} is not stored; the store has {', '.join(map(str, self.layers))}"
            for layer in dict.fromkeys(layers)
            if layer not in self.layers
        ]
        problems += [
            f"token kind {kind!r} is not stored; the store has {', '.join(known)}, or 'all'"
            for kind in kinds
            if kind not in known
        ]
        if problems:
            raise SchemaError(self.location, problems)

    def _rows(self, samples: Indices | None) -> np.ndarray:
        """The sample indices asked for, in the range of the store or not; None means every valid one."""
        if samples is None:
            self._check_undamaged()
            return np.flatnonzero(self.valid)
        return as_indices(samples, "sample")

    def _check_undamaged(self) -> None:
        """What is asked of all shards must not quietly leave out those whose commit was lost."""
        if self.damaged_commits:
            listed = [f"{key}: {what}" for key, what in sorted(self.damaged_commits.items())]
            more = [f"and {len(listed) - 5} more"] if len(listed) > 5 else []
            raise NotCommittedError(
                "\n  ".join([f"{self.location} has damaged commits:", *listed[:5], *more, self._repair_hint()])
            )

    def _checked_rows(self, rows: np.ndarray) -> np.ndarray:
        """The same as int64, all of them samples with states."""
        outside = rows[(rows < 0) | (rows >= self.n_samples)]
        if len(outside):
            raise IndexError(f"sample {outside[0]} is not in the store; it has samples 0 to {self.n_samples - 1}")
        rows = rows.astype(np.int64)
        invalid = rows[~self.valid[rows]]
        if len(invalid):
            first = int(invalid[0])
            code = self.table.bad_images.get(first)
            if code is None:
                raise NotCommittedError(self._uncommitted(first // self.spec.samples_per_shard))
            name = self.samples["sample_id"][first].as_py()
            raise NotCommittedError(
                f"{self.location}: sample {first} ({name}) has no states, its image was bad: {code}. "
                f"{len(invalid)} such samples were asked for; store.valid says which rows can be read"
            )
        return rows

    def _fill(self, work: list[tuple[str, np.ndarray]], rows: np.ndarray) -> None:
        chunk_of, place_of = np.divmod(rows, self.spec.samples_per_chunk)
        wanted = np.unique(chunk_of)
        takers = [(int(c), np.flatnonzero(chunk_of == c)) for c in wanted]

        failed = threading.Event()

        def one(path: str, out: np.ndarray, chunk: int, at: np.ndarray) -> None:
            if failed.is_set():  # or all the other chunks would be read before the error is seen
                return
            try:
                values = self._values(path, chunk, place_of[at])
            except BaseException:
                failed.set()
                raise
            out[at] = values if values.ndim == out.ndim else values[:, None]

        jobs = [(path, out, chunk, at) for path, out in work for chunk, at in takers]
        if len(jobs) == 1:
            one(*jobs[0])
            return
        with ThreadPoolExecutor(min(_N_READ_THREADS, len(jobs) or 1)) as pool:
            try:
                for done in [pool.submit(one, *job) for job in jobs]:
                    done.result()
            except BaseException:
                failed.set()  # also where it is the caller who was interrupted
                raise

    def _values(self, path: str, chunk: int, places: np.ndarray) -> np.ndarray:
        """States of some samples of a chunk, in float32."""
        stored = self._chunk_values(path, chunk)[places]
        layer, _, kind = path.rpartition("/")
        if kind != "patches":
            return stored
        scale = self._chunk_values(f"{layer}/patches_scale", chunk)[places] if self.spec.precision == "int8" else None
        return restore_patches(self.spec.precision, stored, scale)

    def _chunk_values(self, path: str, chunk: int) -> np.ndarray:
        location = self._location(path, chunk)
        try:
            return decode_payload(self.spec, array_kind(path), chunk, self.fetch(location))
        except DecodeError as error:
            raise DecodeError(f"{self.location}/{location.key}, chunk {chunk}: {error}") from error


def check_payload(location: str, chunk: ChunkLocation, payload: bytes | bytearray | memoryview) -> None:
    """Raise ChecksumError unless the payload is the committed one."""
    check_crc(location, chunk, crc32c(payload))


def check_crc(location: str, chunk: ChunkLocation, found: int) -> None:
    """Raise ChecksumError unless the CRC32C computed from a chunk's bytes is the committed one."""
    if found != chunk.crc32c:
        raise ChecksumError(
            chunk.key,
            f"{location}/{chunk.key}: bytes {chunk.offset} to {chunk.offset + chunk.nbytes} have crc32c {found:08x}, "
            f"the commit says {chunk.crc32c:08x}. Find all such places: make verify STORE={location}",
        )


def open_store(location: str | os.PathLike[str] | Objects | Sequence[str | os.PathLike[str] | Objects]) -> Store:
    """Open a store for reading.

    Args:
        location: Path of a store, or its objects; a list of stores of the same samples and settings presents the
            union of their layers.

    Returns:
        The store, finished or not: `n_committed` and `valid` say what is there.

    Raises:
        NotAStoreError: There is no store.json at the place; names the stores train and val if they are below it.
        UserError: A location that this version does not serve.
        SchemaError: store.json was changed, or stores of a list do not belong together; lists every problem.
        TypeError: The location is something else; says what, and what to give.
    """
    if isinstance(location, list | tuple):
        from storage_schemas.union import open_union  # it builds on this module

        return open_union([open_store(part) for part in location])
    objects = open_objects(location) if isinstance(location, str | os.PathLike) else _as_objects(location)
    try:
        document = read_store_document(objects, objects.location)
    except NotAStoreError as error:
        splits = splits_in(objects)
        if not splits:
            raise
        raise NotAStoreError(
            f"{objects.location} is not a store; it holds {'stores' if len(splits) > 1 else 'a store'} "
            f"{' and '.join(splits)}: open_store({f'{objects.location}/{splits[0]}'!r})"
        ) from error
    commits, damaged = read_commits(objects, document)
    return Store(objects, document, make_commit_table(document.spec, commits), damaged)


def _as_objects(location: object) -> Objects:
    if isinstance(location, Store):
        raise TypeError(f"open_store was given a Store, which is open already: {location.location}. Use it as it is")
    if not (hasattr(location, "location") and hasattr(location, "get")):
        raise TypeError(
            f"open_store was given {type(location).__name__}, expected the path of a store, its Objects, or a list of "
            'such; for example open_store("data/stores/digits/train")'
        )
    return cast(Objects, location)


def read_commits(
    objects: Objects, document: StoreDocument, *, use_index: bool = True
) -> tuple[list[Commit], dict[str, str]]:
    """All commits of a store, from its index if that is whole, else one by one; and what is wrong with the others.

    Args:
        objects: Of the store.
        document: Its identity.
        use_index: False reads the commits themselves, as whoever writes the index anew must.

    Returns:
        Sound commits in shard order, and the message of each damaged one by key. Where there is an index the store was
        finished once, so a commit that is missing then counts as damaged.
    """
    was_finished = has_index(objects)  # before the listing: the index is written after all commits
    listed = list_commits(objects)
    n_shards = document.spec.n_shards
    shards = {shard for shard in listed.values() if shard is not None and shard < n_shards}
    if use_index and len(shards) == n_shards:
        try:
            data = objects.get(INDEX_KEY, at_most=most_nbytes(document.spec, INDEX_KEY))
            return commits_from_index(document.spec, document.digest, data), {}
        except (SchemaError, ObjectError):
            pass  # the index only saves reading the commits; verify reports what is wrong with it
    commits, damaged = [], {}
    for key, commit in load_commits(objects, document, sorted(shards)):
        if isinstance(commit, Commit):
            commits.append(commit)
        else:
            damaged[key] = commit
    if was_finished:
        damaged |= {commit_key(shard): MISSING_COMMIT for shard in range(n_shards) if shard not in shards}
    return commits, damaged


def has_index(objects: Objects) -> bool:
    """Whether there is an index.parquet, whole or not: the store was finished once."""
    return any(info.key == INDEX_KEY for info in objects.list(INDEX_KEY))


def has_sound_index(objects: Objects, document: StoreDocument) -> bool:
    """Whether index.parquet is there, unchanged since it was written, and of this store.

    Takes milliseconds, where reading all commits of a store of ImageNet's size takes half a minute. A job that has
    committed nothing itself need not write the index again if this is true; one that has must.
    """
    try:
        data = objects.get(INDEX_KEY, at_most=most_nbytes(document.spec, INDEX_KEY))
    except (ObjectMissingError, ObjectTooLargeError):
        return False
    return is_index_of(document.spec, document.digest, data)


def list_commits(objects: Objects) -> dict[str, int | None]:
    """Keys under commits/ and the shard that each names, None for a strange key."""
    return {info.key: commit_shard(info.key) for info in objects.list(COMMITS_PREFIX)}


def load_commits(
    objects: Objects, document: StoreDocument, shards: Sequence[int]
) -> Iterator[tuple[str, Commit | str]]:
    """(key, commit) of each shard in order; for a damaged one (key, what is wrong with it)."""

    def one(shard: int) -> tuple[str, Commit | str]:
        key = commit_key(shard)
        try:
            return key, read_commit(
                document.spec, document.digest, shard, objects.get(key, at_most=most_nbytes(document.spec, key))
            )
        except (SchemaError, ObjectError) as error:
            return key, "; ".join(error.problems) if isinstance(error, SchemaError) else str(error)

    with ThreadPoolExecutor(_N_READ_THREADS) as pool:
        yield from pool.map(one, shards)


def _n_tokens(spec: StoreSpec, kind: str) -> int:
    shape = kind_shape(spec, kind) if kind in spec.token_kinds else ()
    return shape[0] if len(shape) == 2 else 1

"""The document that makes a shard exist: sizes and checksums of its objects, and what is known of its samples."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage_schemas.documents import MAX_DOCUMENT_NBYTES, seal, sha256, unseal
from storage_schemas.errors import SchemaError
from storage_schemas.keys import (
    STATISTIC_NAMES,
    array_kind,
    commit_key,
    shard_object_key,
    sharded_array_paths,
    statistics_key,
)
from storage_schemas.layout import payload_bounds, room_nbytes, tail_nbytes
from storage_schemas.spec import FORMAT_VERSION, StoreSpec
from storage_schemas.zarr_layout import CRC_NBYTES

BAD_IMAGE_CODES = ("empty", "not_an_image", "truncated", "undecodable", "too_large")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectRecord:
    """One object as it was written.

    Attributes:
        nbytes: Size of the whole object.
        crc32c: Of the whole object. By itself it says little: bytes followed by their own CRC32C, as every chunk is,
            have a CRC32C that does not depend on them. It guards trailers and index once the chunks are checked.
        chunks: (chunk, 3) int64: offset, payload bytes and payload CRC32C of each chunk that holds samples.
    """

    nbytes: int
    crc32c: int
    chunks: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Stored values against the teacher's float32 ones, over the valid samples of a shard, for one (layer, kind).

    Attributes:
        relative_mse: Sum of squared differences over sum of squares.
        r2: 1 - sum of squared differences / sum of squared deviations from the channel means.
        worst: Largest absolute difference.
    """

    relative_mse: float
    r2: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One finished shard.

    Attributes:
        shard: Which one.
        store: Digest of the store.json that it belongs to.
        bad_images: (sample_index, code) of images whose bytes did not decode; their rows are invalid.
        objects: By key, every data object of the shard.
        fidelity: By array path, only where rounding changed values.
    """

    shard: int
    store: str
    bad_images: tuple[tuple[int, str], ...]
    objects: Mapping[str, ObjectRecord]
    fidelity: Mapping[str, Fidelity]

    def to_bytes(self) -> bytes:
        """Canonical sealed JSON: equal commits give equal bytes."""
        return seal(self._document())

    @property
    def digest(self) -> str:
        return sha256(self.to_bytes())

    def _document(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "shard": self.shard,
            "store": self.store,
            "bad_images": [list(bad) for bad in self.bad_images],
            "objects": {
                key: {"nbytes": o.nbytes, "crc32c": o.crc32c, "chunks": o.chunks.tolist()}
                for key, o in self.objects.items()
            },
            "fidelity": {
                path: {"relative_mse": f.relative_mse, "r2": f.r2, "worst": f.worst}
                for path, f in self.fidelity.items()
            },
        }


def read_commit(spec: StoreSpec, store: str, shard: int, data: bytes) -> Commit:
    """Parse a commit and hold it against the store's identity.

    Args:
        spec: Identity of the store.
        store: Digest of its store.json.
        shard: The shard that the key names.
        data: The commit's bytes.

    Raises:
        SchemaError: Every way in which it is not this shard's commit of this store.
    """
    try:
        commit = _parse(json.loads(data) if len(data) <= MAX_DOCUMENT_NBYTES else None)
        exact = commit.to_bytes() == data  # which also means that its digest is right and its spelling canonical
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        exact = False
    if not exact:
        raise _why_not(shard, data)
    problems = commit_problems(spec, store, shard, commit)
    if problems:
        raise SchemaError(commit_key(shard), problems)
    return commit


def _why_not(shard: int, data: bytes) -> SchemaError:
    """What keeps these bytes from being a commit; the slow way, which says why."""
    key = commit_key(shard)
    document = unseal(key, data)
    if document.get("format_version") != FORMAT_VERSION:
        version = document.get("format_version")
        return SchemaError(key, [f"format version {version!r}; this version reads {FORMAT_VERSION}"])
    try:
        _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return SchemaError(key, [f"not a commit of this format: {type(error).__name__}: {error}"])
    return SchemaError(key, ["not a commit of this format: it holds more or other than the fields of one"])


def _parse(document: Any) -> Commit:
    """A commit from parsed JSON, values turned into the types they should have."""
    return Commit(
        shard=int(document["shard"]),
        store=str(document["store"]),
        bad_images=tuple((int(index), str(code)) for index, code in document["bad_images"]),
        objects={
            name: ObjectRecord(
                nbytes=int(record["nbytes"]),
                crc32c=int(record["crc32c"]),
                chunks=np.asarray(record["chunks"], np.int64).reshape(-1, 3),
            )
            for name, record in document["objects"].items()
        },
        fidelity={
            path: Fidelity(**{name: float(value) for name, value in values.items()})
            for path, values in document["fidelity"].items()
        },
    )


def commit_problems(spec: StoreSpec, store: str, shard: int, commit: Commit, *, objects_fit: bool = False) -> list[str]:
    """Everything in a commit that contradicts the store's identity.

    Args:
        spec: Identity of the store.
        store: Digest of its store.json.
        shard: The shard that this should be the commit of.
        commit: To be checked.
        objects_fit: True if `objects_fit` has found its objects in order, which is much faster for many commits.
    """
    if commit.store != store:
        return [f"belongs to a store.json with digest {commit.store[:16]}, this store's is {store[:16]}"]
    if commit.shard != shard:
        return [f"is the commit of shard {commit.shard}, stored as that of shard {shard}"]
    problems = []
    samples = spec.shard_samples(shard)
    for index, code in commit.bad_images:
        if index not in samples or code not in BAD_IMAGE_CODES:
            problems.append(f"bad image ({index!r}, {code!r}) is not of this shard or has an unknown code")
    indices = [index for index, _ in commit.bad_images]
    if indices != sorted(set(indices)):
        problems.append("bad images are not in order of sample_index, each once")
    if objects_fit and not commit.fidelity:
        return problems
    paths = sharded_array_paths(spec)
    problems += [f"fidelity of {path!r}, which is no array here" for path in sorted(set(commit.fidelity) - set(paths))]
    if objects_fit:
        return problems
    expected: dict[str, str | None] = {shard_object_key(spec, path, shard): path for path in paths}
    expected[statistics_key(shard)] = None
    problems += [f"does not list {key}" for key in sorted(set(expected) - set(commit.objects))]
    problems += [f"lists unknown {key}" for key in sorted(set(commit.objects) - set(expected))]
    for key, path in expected.items():
        if key in commit.objects:
            record = commit.objects[key]
            if not all(0 <= crc < 2**32 for crc in (record.crc32c, *record.chunks[:, 2].tolist())):
                problems.append(f"{key}: a crc32c is not in 0 to 2**32 - 1")
            check = _statistics_problems(spec, record) if path is None else _record_problems(spec, path, shard, record)
            problems += [f"{key}: {problem}" for problem in check]
    return problems


def objects_fit(
    spec: StoreSpec, nbytes: np.ndarray, crc32c: np.ndarray, n_chunks: np.ndarray, chunks: np.ndarray
) -> bool:
    """Whether the objects of all shards, in the order of `data_object_keys`, are as `commit_problems` wants them.

    Args:
        spec: Identity of the store.
        nbytes: (object,) int64.
        crc32c: (object,) int64.
        n_chunks: (object,) of its chunks; they follow one another in `chunks`.
        chunks: (chunk, 3) int64: offset, payload bytes and payload CRC32C.
    """
    n_arrays = len(sharded_array_paths(spec))
    bounds = _bounds(spec, spec.samples_per_chunk)
    is_statistics = np.arange(n_arrays + 1) == n_arrays
    n_objects, shape = (n_arrays + 1) * spec.n_shards, (spec.n_shards, n_arrays + 1)
    n_expected = np.where(
        is_statistics, 1, np.array([len(spec.shard_chunks(shard)) for shard in range(spec.n_shards)])[:, None]
    ).reshape(-1)
    if not len(nbytes) == len(crc32c) == len(n_chunks) == n_objects or not np.array_equal(n_chunks, n_expected):
        return False
    offset, payload, crc = chunks.T
    first = np.cumsum(n_chunks) - n_chunks
    least, most = (np.repeat(np.broadcast_to(bound, shape).reshape(-1), n_chunks) for bound in bounds)
    last = (first + n_chunks - 1)[-(n_arrays + 1) :]  # the last chunks of the store may hold fewer samples
    least[last], most[last] = _bounds(spec, len(spec.chunk_samples(spec.n_chunks - 1)))
    if len(chunks) != len(least) or (payload < least).any() or (payload > most).any():
        return False
    slots = room_nbytes(spec, payload)
    ends = np.cumsum(slots)
    places = ends - slots
    in_object = places - np.repeat(places[first], n_chunks)
    sizes = np.where(
        np.broadcast_to(is_statistics, shape).reshape(-1),
        payload[first] + CRC_NBYTES,
        ends[first + n_chunks - 1] - places[first] + tail_nbytes(spec),
    )
    every_crc = np.concatenate([crc, crc32c])
    return bool(
        (offset == in_object).all() and (nbytes == sizes).all() and ((every_crc >= 0) & (every_crc < 2**32)).all()
    )


def _bounds(spec: StoreSpec, n_rows: int) -> np.ndarray:
    """(2, object) int64: least and most payload bytes of a chunk of so many samples, of each object of a shard."""
    bounds = [payload_bounds(spec, array_kind(path), n_rows) for path in sharded_array_paths(spec)]
    return np.array([*bounds, 2 * (statistics_nbytes(spec),)]).T


def statistics_nbytes(spec: StoreSpec) -> int:
    """Payload bytes of one shard's statistics."""
    return len(spec.layers) * len(spec.token_kinds) * len(STATISTIC_NAMES) * spec.dim * 8


def _statistics_problems(spec: StoreSpec, record: ObjectRecord) -> list[str]:
    nbytes = statistics_nbytes(spec)
    if record.chunks[:, :2].tolist() != [[0, nbytes]] or record.nbytes != nbytes + CRC_NBYTES:
        return [f"is not one chunk of {nbytes} bytes and its checksum"]
    return []


def _record_problems(spec: StoreSpec, path: str, shard: int, record: ObjectRecord) -> list[str]:
    chunks, kind = spec.shard_chunks(shard), array_kind(path)
    if len(record.chunks) != len(chunks):
        return [f"{len(record.chunks)} chunks, expected {len(chunks)}"]
    # plain integers: there are few chunks in an object, but very many objects
    place, full = 0, payload_bounds(spec, kind, spec.samples_per_chunk)
    for chunk, (offset, nbytes, _) in zip(chunks, record.chunks.tolist()):
        if offset != place:
            return ["chunks do not lie where they belong in the object"]
        n_rows = len(spec.chunk_samples(chunk))
        least, most = full if n_rows == spec.samples_per_chunk else payload_bounds(spec, kind, n_rows)
        if not least <= nbytes <= most:
            return ["chunks have a wrong size"]
        place += room_nbytes(spec, nbytes)
    if place + tail_nbytes(spec) != record.nbytes:
        return ["chunks do not lie where they belong in the object"]
    return []

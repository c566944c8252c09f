"""What the copy of a store, or of a part of it, consists of, worked out before the first byte. Opens nothing."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from storage_schemas.commit import Commit, ObjectRecord
from storage_schemas.create import StoreDocument
from storage_schemas.documents import sha256
from storage_schemas.errors import SchemaError
from storage_schemas.indices import layer_ranges, named_layers
from storage_schemas.keys import (
    SAMPLES_KEY,
    STATISTIC_NAMES,
    STATISTICS,
    TEACHER_PREFIX,
    shard_object_key,
    sharded_array_paths,
    statistics_key,
)
from storage_schemas.layout import array_documents, object_nbytes
from storage_schemas.samples import samples_from_bytes, samples_of_table, samples_to_bytes
from storage_schemas.spec import BLOSC_CODECS, CODECS, CODECS_OF, SHUFFLES, StoreSpec


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of a store is copied, and in what form.

    Attributes:
        layers: To be copied, increasing; None is all.
        limit: Samples to be copied, rounded up to whole shards, since a shard's statistics are of states that are no
            longer there; None is all.
        backend: How arrays are laid out in the copy; None is as in the source.
        codec: How chunks are compressed in the copy; None is as in the source if the back end has it, else "none".
        shuffle: In front of the codec; None is as in the source with the source's codec, else what the codec takes.
    """

    layers: tuple[int, ...] | None = None
    limit: int | None = None
    backend: str | None = None
    codec: str | None = None
    shuffle: str | None = None


@dataclass(frozen=True, kw_only=True)
class CopyPlan:
    """A copy's identity, and what of it is not the source's own bytes.

    Attributes:
        source: Identity of the store that is copied.
        document: Identity of the copy; the source's own if nothing is left out or changed.
        made: Documents that differ from the source's, by key.
    """

    source: StoreDocument
    document: StoreDocument
    made: Mapping[str, bytes]

    @property
    def spec(self) -> StoreSpec:
        return self.document.spec

    @property
    def is_whole(self) -> bool:
        """Whether the copy is the same store, byte for byte."""
        return self.document.digest == self.source.digest

    @property
    def has_all_layers(self) -> bool:
        return self.spec.layers == self.source.spec.layers

    @property
    def encodes(self) -> bool:
        """Whether chunks are coded anew; else objects are copied as they are."""
        return _form(self.spec) != _form(self.source.spec)

    @property
    def paths(self) -> list[str]:
        """Of what each shard has an object, statistics last."""
        return [*sharded_array_paths(self.spec), STATISTICS]

    def source_key(self, path: str, shard: int) -> str:
        """The object of the source that one of the copy is made of."""
        return statistics_key(shard) if path == STATISTICS else shard_object_key(self.source.spec, path, shard)

    def source_nbytes(self, commit: Commit) -> int:
        """What of a shard is to be read."""
        return sum(commit.objects[self.source_key(path, commit.shard)].nbytes for path in self.paths)

    def target_nbytes(self, commit: Commit) -> int:
        """What of a shard is to be written at most."""
        if not self.encodes:
            return self.source_nbytes(commit)
        arrays = sum(object_nbytes(self.spec, path, commit.shard) for path in sharded_array_paths(self.spec))
        return arrays + commit.objects[statistics_key(commit.shard)].nbytes

    def copied_commit(self, commit: Commit, objects: Mapping[str, ObjectRecord]) -> Commit:
        """The copy's commit of a shard, as an extraction of its identity would have written it."""
        paths = set(sharded_array_paths(self.spec))
        return Commit(
            shard=commit.shard,
            store=self.document.digest,
            bad_images=commit.bad_images,
            objects=objects,
            fidelity={path: fidelity for path, fidelity in commit.fidelity.items() if path in paths},
        )

    def is_copied(self, commit: Commit, there: Commit) -> bool:
        """Whether a commit at the target is the one that copying this shard would write.

        It is another one if the shard was extracted again since. What was coded anew is known by what does not depend
        on it.
        """
        expected = self.copied_commit(commit, {})
        if (expected.bad_images, expected.fidelity) != (there.bad_images, there.fidelity):
            return False
        same = [] if self.encodes else [self.source_key(path, commit.shard) for path in self.paths[:-1]]
        if self.has_all_layers:
            same.append(statistics_key(commit.shard))
        return all(_is_equal(commit.objects[key], there.objects[key]) for key in same)

    def copied_statistics(self, payload: memoryview) -> np.ndarray:
        """Of a shard's statistics, those of the layers that the copy has, (layer, kind, statistic, dim)."""
        spec = self.source.spec
        shape = (len(spec.layers), len(spec.token_kinds), len(STATISTIC_NAMES), spec.dim)
        whole = np.frombuffer(payload, "<f8", count=math.prod(shape)).reshape(shape)
        return whole[[spec.layers.index(layer) for layer in self.spec.layers]]


def plan_copy(source: StoreDocument, samples: bytes, part: Part) -> CopyPlan:
    """The copy of a store, or of a part of it.

    Args:
        source: Identity of the store.
        samples: Its samples.parquet.
        part: What of it, and in what form.

    Raises:
        SchemaError: Layers that the store lacks, no samples, or a codec that the back end lacks; lists every problem.
    """
    spec = copied_spec(source.spec, part)
    if spec == source.spec:
        return CopyPlan(source=source, document=source, made={})
    made = array_documents(spec)
    if spec.n_samples != source.spec.n_samples:
        table = samples_from_bytes(samples, source.spec.n_samples)
        made[SAMPLES_KEY] = samples_to_bytes(samples_of_table(table)[: spec.n_samples])
    digests = {key: digest for key, digest in source.documents.items() if key.startswith(TEACHER_PREFIX)}
    digests[SAMPLES_KEY] = source.documents[SAMPLES_KEY]
    digests |= {key: sha256(data) for key, data in made.items()}
    return CopyPlan(source=source, document=StoreDocument(spec=spec, documents=digests), made=made)


def copied_spec(spec: StoreSpec, part: Part) -> StoreSpec:
    """Identity of the copy of a part of a store."""
    missing = [layer for layer in part.layers or () if layer not in spec.layers]
    problems = []
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        problems.append(f"{named_layers(missing)} {verb} not stored; the store has {layer_ranges(spec.layers)}")
    if part.limit is not None and part.limit < 1:
        problems.append(f"LIMIT={part.limit}: expected at least 1 sample")
    backend, codec, shuffle = _copied_form(spec, part)
    problems += _form_problems(backend, codec, shuffle)
    if problems:
        converts = (part.backend, part.codec, part.shuffle) != (None, None, None)
        raise SchemaError(f"this cannot be {'converted' if converts else 'copied'}", problems)
    n_samples = spec.n_samples
    if part.limit is not None:
        n_samples = min(-(-part.limit // spec.samples_per_shard) * spec.samples_per_shard, n_samples)
    return dataclasses.replace(
        spec, layers=part.layers or spec.layers, n_samples=n_samples, backend=backend, codec=codec, shuffle=shuffle
    )


def _copied_form(spec: StoreSpec, part: Part) -> tuple[str, str, str]:
    """Back end, codec and shuffle that are asked for, whether or not there is such a form."""
    backend = part.backend or spec.backend
    codec = part.codec or (spec.codec if spec.codec in CODECS_OF.get(backend, CODECS) else "none")
    shuffle = part.shuffle or (spec.shuffle if codec == spec.codec else "byte" if codec in BLOSC_CODECS else "none")
    return backend, codec, shuffle


def _form_problems(backend: str, codec: str, shuffle: str) -> list[str]:
    """Everything that keeps them from being a form, under the names of the settings."""
    problems = []
    if backend not in CODECS_OF:
        problems.append(f"FORMAT={backend}: expected one of {', '.join(CODECS_OF)}")
    codecs = CODECS_OF.get(backend, CODECS)
    if codec not in codecs:
        who = f"{backend} has" if backend in CODECS_OF else "expected one of"
        problems.append(f"CODEC={codec}: {who} {', '.join(codecs)}")
    if shuffle not in SHUFFLES:
        problems.append(f"SHUFFLE={shuffle}: expected one of {', '.join(SHUFFLES)}")
    elif codec in codecs and (codec in BLOSC_CODECS) != (shuffle != "none"):
        expected = "byte or bit" if codec in BLOSC_CODECS else f"none; {', '.join(BLOSC_CODECS)} have one"
        problems.append(f"SHUFFLE={shuffle}: with CODEC={codec} expected {expected}")
    return problems


def _form(spec: StoreSpec) -> tuple[str, str, str]:
    return spec.backend, spec.codec, spec.shuffle


def _is_equal(a: ObjectRecord, b: ObjectRecord) -> bool:
    return (a.nbytes, a.crc32c) == (b.nbytes, b.crc32c) and np.array_equal(a.chunks, b.chunks)

"""Begin a store: its documents, the identity last; and the record that holds their digests."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infra.objects import Get, ObjectMissingError, ObjectTooLargeError, Put
from storage_schemas.documents import MAX_DOCUMENT_NBYTES, seal, sha256, unseal
from storage_schemas.errors import NotAStoreError, SchemaError
from storage_schemas.keys import SAMPLES_KEY, STORE_KEY, TEACHER_PREFIX, is_teacher_key, zarr_json_keys
from storage_schemas.layout import array_documents
from storage_schemas.limits import most_nbytes
from storage_schemas.samples import Sample, samples_from_bytes, samples_to_bytes
from storage_schemas.spec import FORMAT_VERSION, StoreSpec, differences


@dataclass(frozen=True, kw_only=True)
class StoreDocument:
    """Content of store.json.

    Attributes:
        spec: The store's identity.
        documents: sha256 of samples.parquet, of every zarr.json and of every file under teacher/, by key.
    """

    spec: StoreSpec
    documents: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """Canonical sealed JSON."""
        return seal({"format_version": FORMAT_VERSION, "spec": self.spec.to_json(), "documents": dict(self.documents)})

    @property
    def digest(self) -> str:
        """What every commit names as its store."""
        return sha256(self.to_bytes())


def plan_documents(
    spec: StoreSpec, samples: Sequence[Sample], teacher_files: Mapping[str, bytes]
) -> tuple[StoreDocument, dict[str, bytes]]:
    """Everything a store begins with, as a pure function: store.json's content and the other documents by key."""
    assert len(samples) == spec.n_samples
    unfit = [f"{TEACHER_PREFIX}{name}" for name in teacher_files if not is_teacher_key(f"{TEACHER_PREFIX}{name}")]
    if unfit:
        raise SchemaError("teacher files", [f"{key!r} is not a plain name below {TEACHER_PREFIX}" for key in unfit])
    documents = array_documents(spec)
    documents[SAMPLES_KEY] = samples_to_bytes(samples)
    documents |= {f"{TEACHER_PREFIX}{name}": data for name, data in teacher_files.items()}
    too_large = [
        f"{key} has {len(data):,} bytes; at most {most_nbytes(spec, key):,} are supported"
        for key, data in documents.items()
        if len(data) > most_nbytes(spec, key)
    ]
    if too_large:
        raise SchemaError("documents of a new store", too_large)
    digests = {key: sha256(data) for key, data in documents.items()}
    return StoreDocument(spec=spec, documents=digests), documents


def create_store(
    objects: Put, spec: StoreSpec, samples: Sequence[Sample], teacher_files: Mapping[str, bytes]
) -> StoreDocument:
    """Write all documents of a new store, store.json last; interrupted, it is simply done again.

    Args:
        objects: Where the store will be.
        spec: Its identity.
        samples: In store order.
        teacher_files: Weights, config and head of the teacher, by name under teacher/.
    """
    document, documents = plan_documents(spec, samples, teacher_files)
    for key, data in documents.items():
        objects.put(key, data)
    objects.put(STORE_KEY, document.to_bytes())
    return document


def identity_differences(
    objects: Get, found: StoreDocument, expected: StoreDocument, samples: Sequence[Sample]
) -> list[str]:
    """How the identity in a store differs from the one asked for, a line each; empty if work there can go on.

    Samples are compared by what they say: another release of Arrow spells the same table in other bytes.

    Args:
        objects: Of the store.
        found: What its store.json says.
        expected: What `plan_documents` makes of the settings of this run.
        samples: Of this run.
    """
    return differences(found.spec, expected.spec) or [
        f"{key}: another content than the one in the store"
        for key in sorted({*expected.documents, *found.documents})
        if expected.documents.get(key) != found.documents.get(key)
        and not (key == SAMPLES_KEY and _holds_samples(objects, found, samples))
    ]


def _holds_samples(objects: Get, found: StoreDocument, samples: Sequence[Sample]) -> bool:
    try:
        data = objects.get(SAMPLES_KEY, at_most=most_nbytes(found.spec, SAMPLES_KEY))
    except (ObjectMissingError, ObjectTooLargeError):
        return False
    if sha256(data) != found.documents[SAMPLES_KEY]:
        return False
    n_samples = found.spec.n_samples
    return samples_from_bytes(data, n_samples).equals(samples_from_bytes(samples_to_bytes(samples), n_samples))


def read_store_document(objects: Get, location: str) -> StoreDocument:
    """Read and check store.json.

    Raises:
        NotAStoreError: There is none.
        SchemaError: It was changed, or this version does not know its format; lists every problem.
    """
    try:
        data = objects.get(STORE_KEY, at_most=MAX_DOCUMENT_NBYTES)
    except ObjectTooLargeError as error:
        raise SchemaError(f"{location}/{STORE_KEY}", [str(error)]) from error
    except ObjectMissingError as error:
        raise NotAStoreError(
            f"{location} is not a store: it has no {STORE_KEY}. Give the path of a store, or make one: make extract"
        ) from error
    return parse_store_document(data, f"{location}/{STORE_KEY}")


def parse_store_document(data: bytes, place: str) -> StoreDocument:
    """Parse store.json; `place` names it in errors."""
    document = unseal(place, data)
    if document.get("format_version") != FORMAT_VERSION:
        raise SchemaError(
            place, [f"format version {document.get('format_version')!r}; this version reads {FORMAT_VERSION}"]
        )
    spec_json, digests = document.get("spec"), document.get("documents")
    if not isinstance(spec_json, dict) or not isinstance(digests, dict):
        raise SchemaError(place, ["expected 'spec' and 'documents'"])
    try:
        spec = StoreSpec.from_json(spec_json)
    except SchemaError as error:
        raise SchemaError(place, error.problems) from error
    needed = {SAMPLES_KEY, *zarr_json_keys(spec)}
    problems = [f"names no digest of {key}" for key in sorted(needed - set(digests))]
    problems += [
        f"names {key!r}, which this format does not have"
        for key in sorted(set(digests) - needed)
        if not is_teacher_key(key)
    ]
    problems += [
        f"the digest of {key!r} is {digest!r}, expected 64 hexadecimal digits"
        for key, digest in sorted(digests.items())
        if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest))
    ]
    problems += [f"unknown field {name!r}" for name in sorted(set(document) - {"format_version", "spec", "documents"})]
    if problems:
        raise SchemaError(place, problems)
    return StoreDocument(spec=spec, documents=digests)

"""JSON documents with one spelling per content: canonical bytes, a digest of themselves, strict parsing."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from storage_schemas.errors import SchemaError

#: Python takes up to thirty times as much memory to parse one.
MAX_DOCUMENT_NBYTES = 2**23


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """Sorted keys, no spaces, one newline at the end, no NaN: equal content gives equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def sha256(data: bytes | bytearray | memoryview) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def seal(document: Mapping[str, Any]) -> bytes:
    """Canonical bytes of the document with a `digest` of all the rest added."""
    assert "digest" not in document
    return canonical_json({**document, "digest": sha256(canonical_json(document))})


def unseal(key: str, data: bytes) -> dict[str, Any]:
    """Parse a sealed document and check its digest and spelling, so that no changed byte goes unseen.

    Raises:
        SchemaError: The bytes are not such a document, or were changed since they were written.
    """
    if len(data) > MAX_DOCUMENT_NBYTES:
        raise SchemaError(key, [f"document of {len(data):,} bytes; at most {MAX_DOCUMENT_NBYTES:,} are read"])
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SchemaError(key, [f"not a JSON document: {type(error).__name__}: {error}"]) from error
    if not isinstance(document, dict) or not isinstance(document.get("digest"), str):
        raise SchemaError(key, ["expected a JSON object with a 'digest'"])
    written = document.pop("digest")
    try:
        content = canonical_json(document)
        actual = sha256(content)
        spelled = canonical_json({**document, "digest": actual})
    except (ValueError, RecursionError) as error:
        raise SchemaError(key, [f"not a document of this format: {type(error).__name__}: {error}"]) from error
    if actual != written:
        raise SchemaError(key, [f"content digest is {actual[:16]}, the document says {written[:16]}: it was changed"])
    if spelled != data:
        raise SchemaError(key, ["content is right but its bytes were changed (spacing or order)"])
    return document

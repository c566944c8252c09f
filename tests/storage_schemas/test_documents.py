"""Sealed documents: one spelling per content, and no changed byte goes unseen."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_schemas import documents
from storage_schemas.documents import canonical_json, seal, sha256, unseal
from storage_schemas.errors import SchemaError
from tests.strategies import json_values

documents_of_any_content = st.dictionaries(st.text().filter(lambda name: name != "digest"), json_values, max_size=4)


@given(documents_of_any_content)
def test_sealed_documents_read_back(document):
    assert unseal("key", seal(document)) == document


def test_the_bytes_are_those_of_the_format():
    """FORMAT.md, "Sealed documents": worked out by hand."""
    inner = b'{"a":[1,2.5],"b":"\\u00e9"}\n'
    assert canonical_json({"b": "é", "a": [1, 2.5]}) == inner
    digest = sha256(inner)
    assert seal({"b": "é", "a": [1, 2.5]}) == b'{"a":[1,2.5],"b":"\\u00e9","digest":"%s"}\n' % digest.encode()


@given(documents_of_any_content, st.data())
def test_every_changed_byte_is_seen(document, data):
    sealed = bytearray(seal(document))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SchemaError, match="key"):
        unseal("key", bytes(sealed))


@given(documents_of_any_content, st.data())
def test_every_cut_is_seen(document, data):
    sealed = seal(document)
    with pytest.raises(SchemaError):
        unseal("key", sealed[: data.draw(st.integers(0, len(sealed) - 1))])


SOUND = seal({"a": 1, "b": {"c": [1, 2]}})
HOSTILE = {
    "empty": (b"", "not a JSON document"),
    "text": (b"hello", "not a JSON document"),
    "no UTF-8": (b"\xff\xfe\x00", "not a JSON document"),
    "a list": (b"[1, 2]", "expected a JSON object"),
    "no digest": (b"{}", "with a 'digest'"),
    "digest is a number": (b'{"digest": 5}', "with a 'digest'"),
    "spaces": (SOUND.replace(b",", b", "), "bytes were changed"),
    "indented": (json.dumps(json.loads(SOUND), indent=1).encode(), "bytes were changed"),
    "no last newline": (SOUND[:-1], "bytes were changed"),
    "another newline": (SOUND + b"\n", "bytes were changed"),
    "a byte order mark": (b"\xef\xbb\xbf" + SOUND, "not a JSON document|bytes were changed"),
    "UTF-16": (SOUND.decode().encode("utf-16"), "bytes were changed|not a JSON document"),
    "two documents": (SOUND + SOUND, "not a JSON document"),
    "a key twice": (SOUND.replace(b'{"a":1', b'{"a":1,"a":1'), "bytes were changed"),
    "a key twice, first other": (SOUND.replace(b'{"a":1', b'{"a":2,"a":1'), "bytes were changed"),
    "1.0 for 1": (SOUND.replace(b'"a":1', b'"a":1.0'), "content digest"),
    "NaN": (SOUND.replace(b'"a":1', b'"a":NaN'), "not a document of this format"),
    "infinity": (SOUND.replace(b'"a":1', b'"a":1e999'), "not a document of this format"),
    "a huge integer": (SOUND.replace(b'"a":1', b'"a":' + b"9" * 5000), "not a JSON document"),
    "deep": (b'{"digest":"x","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "RecursionError"),
    "just too deep to write": (b'{"digest":"x","a":' + b"[" * 985 + b"]" * 985 + b"}", "RecursionError|content digest"),
    "an escaped letter": (SOUND.replace(b'"a"', b'"\\u0061"'), "bytes were changed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents_are_refused_by_name(name):
    data, message = HOSTILE[name]
    with pytest.raises(SchemaError, match=message) as caught:
        unseal("commits/000001.json", data)
    assert str(caught.value).startswith("commits/000001.json:")


def test_a_document_of_100_megabytes_is_not_parsed(monkeypatch):
    def never(data: bytes) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(documents.json, "loads", never)
    with pytest.raises(SchemaError, match=r"document of 100,000,000 bytes; at most 8,388,608 are read"):
        unseal("store.json", bytes(100_000_000))


def test_errors_list_every_problem_and_survive_a_process_border():
    import pickle

    error = SchemaError("store.json", ["first", "second"])
    sent = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own exception, made here
    assert str(sent) == "store.json:\n  first\n  second"
    assert sent.problems == ("first", "second")

"""FORMAT.md is the norm: its tables and the code say the same, so that neither can drift alone."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import storage_schemas
from infra.objects import MemoryObjects
from storage_schemas import documents, index, keys, limits, samples, spec, tar_layout, zarr_layout
from storage_schemas.codecs import BLOSC_OVERHEAD, inner_codecs, kind_dtype, kind_shape
from storage_schemas.commit import BAD_IMAGE_CODES, Commit, Fidelity, ObjectRecord
from storage_schemas.create import StoreDocument
from storage_schemas.spec import StoreSpec
from tests.stores import make_spec, write_planted

PAGE = (Path(storage_schemas.__file__).parent / "FORMAT.md").read_text()


def section(title: str) -> str:
    parts = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    assert title in sections, f"FORMAT.md has no section {title!r}"
    return sections[title]


def tables(title: str) -> list[list[list[str]]]:
    """The tables of a section, each as rows of cells without their heads; backticks are left off."""
    blocks = re.findall(r"(?:^\|.*\n)+", section(title), flags=re.MULTILINE)
    parsed = [
        [[c.strip() for c in line.strip().strip("|").split("|")] for line in block.splitlines()] for block in blocks
    ]
    return [[[cell.replace("`", "") for cell in row] for row in table[2:]] for table in parsed]


def first_column(title: str, which: int = 0) -> list[str]:
    return [row[0] for row in tables(title)[which]]


def field_names(of: type) -> list[str]:
    return [field.name for field in dataclasses.fields(of)]


@pytest.fixture(scope="module")
def store() -> MemoryObjects:
    objects = MemoryObjects()
    write_planted(objects, make_spec(), {5: "truncated"}, teacher_files={"config.json": b"{}"})
    return objects


JSON_TYPES = {
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, float),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "object": lambda v: isinstance(v, dict),
}


def fits(value: object, what: str) -> bool:
    if what.startswith("list of ["):
        inner = what.removeprefix("list of [").removesuffix("]").split(", ")
        return isinstance(value, list) and all(len(v) == len(inner) and all(map(fits, v, inner)) for v in value)
    if what == "list of integers":
        return isinstance(value, list) and all(fits(v, "integer") for v in value)
    return JSON_TYPES[what](value)


def check_fields(title: str, document: dict, which: int = 0) -> None:
    """The document has exactly the fields of the table, each of the type that the table says."""
    rows = {row[0]: row[1] for row in tables(title)[which]}
    assert set(document) == set(rows), title
    for name, what in rows.items():
        assert fits(document[name], what), f"{title}: {name} is {document[name]!r}, the page says {what}"


def test_dataclass_fields_are_those_of_the_tables():
    assert first_column("Fields of store.json") == ["format_version", *field_names(StoreDocument), "digest"]
    assert first_column("Fields of spec") == field_names(StoreSpec)
    assert first_column("Fields of a commit") == ["format_version", *field_names(Commit), "digest"]
    assert first_column("Fields of an object's record") == field_names(ObjectRecord)
    assert first_column("Fields of fidelity") == field_names(Fidelity)


def test_written_documents_have_those_fields_and_types(store):
    document = json.loads(store.get("store.json"))
    check_fields("Fields of store.json", document)
    check_fields("Fields of spec", document["spec"])
    for shard in range(3):
        commit = json.loads(store.get(keys.commit_key(shard)))
        check_fields("Fields of a commit", commit)
        for record in commit["objects"].values():
            check_fields("Fields of an object's record", record)
        assert commit["fidelity"]
        for fidelity in commit["fidelity"].values():
            check_fields("Fields of fidelity", fidelity)


def test_allowed_values_are_those_of_the_table():
    said = {row[0]: tuple(row[1].split(", ")) for row in tables("Allowed values")[0]}
    assert said == {
        "backends": spec.BACKENDS,
        "precisions": spec.PRECISIONS,
        "codecs": spec.CODECS,
        **{f"codecs of {backend}": codecs for backend, codecs in spec.CODECS_OF.items()},
        "shuffles": spec.SHUFFLES,
        "compute precisions": spec.COMPUTE_PRECISIONS,
        "kinds of tokens": spec.KINDS,
        "kinds of arrays": spec.ARRAY_KINDS,
        "statistics": keys.STATISTIC_NAMES,
        "codes of bad images": BAD_IMAGE_CODES,
    }


def test_limits_are_those_of_the_table():
    said = {row[0]: int(row[1].replace(",", "")) for row in tables("Allowed values")[1]}
    assert list(said.values()) == [
        spec.MAX_SAMPLES,
        spec.MAX_TAR_SAMPLES,
        spec.MAX_SHARDS,
        spec.MAX_CHUNKS,
        spec.MAX_SHARD_SAMPLES,
        spec.MAX_SHARD_CHUNKS,
        spec.MAX_CHUNK_NBYTES,
        spec.TAR_SAMPLE_NBYTES,
    ]
    sealed = " ".join(section("Sealed documents").split())
    assert f"of more than {documents.MAX_DOCUMENT_NBYTES:,} bytes" in sealed
    assert f"a file of the teacher of more than {limits.MAX_TEACHER_FILE_NBYTES:,};" in sealed
    assert f"neither of more than {limits.MAX_TABLE_NBYTES:,}." in sealed
    base, one = limits.most_nbytes(make_spec(n_samples=1), "samples.parquet"), make_spec(n_samples=2)
    per_sample = limits.most_nbytes(one, "samples.parquet") - base
    assert f"`samples.parquet` of more than {base - per_sample:,} and {per_sample:,} for each sample" in sealed
    small = make_spec(n_samples=8, layers=(0,))  # one shard of two chunks, of five arrays, and statistics
    n_objects, n_chunks = 6, 5 * 2 + 1
    expected = 1_048_576 + 1_024 * n_objects + 64 * n_chunks + 64 * small.n_samples
    assert limits.most_nbytes(small, "index.parquet") == expected
    assert f"at most {BLOSC_OVERHEAD} bytes" in section("Zarr")
    assert f"multiple of {zarr_layout.ALIGNMENT_NBYTES} bytes" in " ".join(section("Zarr").split())
    assert f"first multiple of {zarr_layout.ALIGNMENT_NBYTES} behind" in section("Fields of an object's record")
    archive = " ".join(section("WebDataset").split())
    assert f"a header of {tar_layout.NPY_HEADER_NBYTES} bytes in all" in archive
    assert f"then {len(tar_layout.END_OF_ARCHIVE):,} zeros" in archive
    assert f"| `format_version` | integer | {spec.FORMAT_VERSION};" in section("Fields of store.json")


def test_columns_are_those_of_the_tables():
    for title, schema in (("Columns of samples.parquet", samples.SCHEMA), ("Columns of index.parquet", index.SCHEMA)):
        assert [(row[0], row[1]) for row in tables(title)[0]] == [(f.name, str(f.type)) for f in schema]
        assert not any(f.nullable for f in schema)


def test_metadata_of_the_index(store):
    table = pq.read_table(pa.BufferReader(store.get(keys.INDEX_KEY)))
    check_fields("Columns of index.parquet", json.loads(table.schema.metadata[b"index"]), which=1)


def test_kinds_are_those_of_the_table():
    stored = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}
    for changes in ({}, {"has_cls": False}, {"n_registers": 0}, *({"precision": name} for name in stored)):
        made = make_spec(**changes)
        conditions = {
            "has_cls": made.has_cls,
            "n_registers > 0": made.n_registers > 0,
            "precision is int8": made.precision == "int8",
            "always": True,
        }
        rows = tables("Kinds")[0]
        there = [row[0] for row in rows if conditions[row[3]]]
        assert there == [*made.array_kinds, *(["head_input"] if made.has_head_input else [])]
        for name, axes, dtype, _ in rows:
            lengths = {"dim": made.dim, "register": made.n_registers, "patch": made.n_patches, "dim2": 2 * made.dim}
            assert kind_shape(made, name) == tuple(lengths[axis] for axis in axes.split(", "))
            assert kind_dtype(made, name) == np.dtype(stored[made.precision] if dtype == "precision" else dtype)
            path = name if name == "head_input" else f"layer_00/{name}"
            if name in there:
                document = json.loads(zarr_layout.zarr_documents(made)[f"{path}/zarr.json"])
                assert document["dimension_names"] == ["sample", *axes.split(", ")]


@pytest.mark.parametrize("backend", spec.BACKENDS)
def test_every_key_of_a_store_is_in_the_table_and_the_reverse(backend):
    store, patterns = MemoryObjects(), []
    write_planted(store, make_spec(backend=backend, precision="int8"), teacher_files={"config.json": b"{}"})
    for row in tables("Keys")[0]:
        assert row[2] in ("all", *spec.BACKENDS)
        if row[2] not in ("all", backend):
            continue
        for form in row[0].split(" or "):
            pattern = re.escape(form).replace("SSSSSS", r"\d{6,}").replace(r"/c/S", r"/c/\d+").replace("LL", r"\d\d")
            patterns.append(pattern.replace("KIND", f"(?:{'|'.join(spec.ARRAY_KINDS)})").replace("NAME", r"[\w.-]+"))
    found = [info.key for info in store.list()]
    for key in found:
        assert any(re.fullmatch(pattern, key) for pattern in patterns), f"{key} is not in the table of keys"
    for pattern in patterns:
        if not pattern.startswith("log/"):
            assert any(re.fullmatch(pattern, key) for key in found), f"no key of a store is like {pattern}"
    assert keys.LOG_PREFIX == "log/"


def test_codecs_are_those_of_the_table():
    for codec, payload in tables("Zarr")[0]:
        for name, shuffle in (("byte", "shuffle"), ("bit", "bitshuffle")):
            made = make_spec(codec=codec, shuffle="none" if codec == "none" else name)
            blosc = [c["configuration"] for c in inner_codecs(made, "layer_00/patches") if c["name"] == "blosc"]
            if codec == "none":
                assert blosc == []
                continue
            [configuration] = blosc
            assert payload == f"Blosc 1 with {configuration['cname']}, level {configuration['clevel']}"
            assert configuration["shuffle"] == shuffle
            assert (configuration["typesize"], configuration["blocksize"]) == (2, 0)
    assert first_column("Zarr") == list(spec.CODECS_OF["zarr"])
    assert first_column("WebDataset") == list(spec.CODECS_OF["webdataset"])
    said = {row[0]: row[1] for row in tables("WebDataset")[0]}["gzip"]
    assert f"level {tar_layout.GZIP_LEVEL};" in said
    memory = np.zeros(10**4, np.uint8).data
    archive = tar_layout.encode_payload(make_spec(backend="webdataset", codec="gzip"), "patches", 0, memory)
    assert archive[512:522].hex(" ") in said


def test_the_parser_of_this_test_sees_tables():
    """A page whose tables were not found would agree with anything."""
    assert len(re.findall(r"^\|---", PAGE, flags=re.MULTILINE)) == 15
    assert all(tables(title) for title in ("Keys", "Kinds", "Allowed values", "Fields of spec"))

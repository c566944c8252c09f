"""The identity of a store, its chunk arithmetic and its keys."""

import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infra.objects import check_key
from storage_schemas.codecs import chunk_shape, kind_dtype, raw_chunk_nbytes
from storage_schemas.errors import SchemaError
from storage_schemas.keys import (
    array_kind,
    commit_key,
    commit_shard,
    is_owned,
    is_shard_object,
    is_teacher_key,
    shard_object_keys,
    sharded_array_paths,
    zarr_json_keys,
)
from storage_schemas.spec import MAX_CHUNK_NBYTES, Span, StoreSpec, differences
from tests.stores import make_spec
from tests.strategies import json_values, specs

#: Chunks that just fit, without the headers of an archive.
WIDE = {"dim": 4000, "n_registers": 0, "grid": (1, 1), "samples_per_chunk": 2**16, "samples_per_shard": 2**16}
VIT_B = {
    "layers": tuple(range(13)),
    "dim": 768,
    "n_registers": 4,
    "grid": (16, 16),
    "n_samples": 1_281_167,
    "samples_per_shard": 256,
    "samples_per_chunk": 16,
}


@given(specs())
def test_identities_survive_json(spec):
    assert StoreSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(specs())
def test_shards_and_chunks_tile_the_samples(spec):
    samples = [i for shard in range(spec.n_shards) for i in spec.shard_samples(shard)]
    assert samples == list(range(spec.n_samples))
    chunks = [c for shard in range(spec.n_shards) for c in spec.shard_chunks(shard)]
    assert chunks == list(range(spec.n_chunks))
    for shard in range(spec.n_shards):
        assert {i // spec.samples_per_chunk for i in spec.shard_samples(shard)} == set(spec.shard_chunks(shard))
        assert {i // spec.samples_per_shard for i in spec.shard_samples(shard)} == {shard}
        for chunk in spec.shard_chunks(shard):
            assert {i // spec.samples_per_chunk for i in spec.chunk_samples(chunk)} == {chunk}
    assert [i for chunk in range(spec.n_chunks) for i in spec.chunk_samples(chunk)] == samples
    for outside in (-1, spec.n_chunks):
        with pytest.raises(IndexError, match=rf"it has chunks 0 to {spec.n_chunks - 1}"):
            spec.chunk_samples(outside)
    assert spec.n_tokens == int(spec.has_cls) + spec.n_registers + spec.grid[0] * spec.grid[1]


@given(specs(), st.integers(-3, 100))
def test_shards_outside_are_refused(spec, shard):
    assume(not 0 <= shard < spec.n_shards)
    with pytest.raises(IndexError, match=rf"shard {shard} is not in the store; it has shards 0 to {spec.n_shards - 1}"):
        spec.shard_samples(shard)


@given(specs())
def test_keys_are_plain_unique_and_owned(spec):
    keys = [key for shard in range(spec.n_shards) for key in shard_object_keys(spec, shard)]
    assert len(keys) == len(set(keys)) == spec.n_shards * (len(sharded_array_paths(spec)) + 1)
    every = {*keys, *zarr_json_keys(spec), *(commit_key(shard) for shard in range(spec.n_shards))}
    assert [key for key in every if is_shard_object(spec, key)] == [key for key in every if key in keys]
    later = dataclasses.replace(spec, n_samples=spec.n_samples + spec.samples_per_shard)
    assert not any(is_shard_object(spec, key) for key in shard_object_keys(later, spec.n_shards))
    for key in every:
        assert check_key(key) == key
        assert is_owned(key)


def test_the_headers_of_archives_count():
    assert make_spec(**WIDE).samples_per_chunk == 2**16


@given(st.integers(0, 10**9))
def test_commit_keys_name_their_shard(shard):
    assert commit_shard(commit_key(shard)) == shard


STRANGE_COMMITS = [
    "0.json",
    "1.json",
    "0000001.json",
    "000001.JSON",
    "000001.json.put",
    "-00001.json",
    "٠٠٠٠٠١.json",
    "",
]


@pytest.mark.parametrize("name", STRANGE_COMMITS)
def test_other_names_are_no_commits(name):
    assert commit_shard(f"commits/{name}") is None


@pytest.mark.parametrize(
    "key",
    [
        "teacher/..",
        "teacher/../store.json",
        "teacher/a/b",
        "teacher/.hidden",
        "teacher/",
        "teacher/a\n",
        "teacher/\ud800",
        "log/../../etc/passwd",
        "log/..",
        "log/",
        "commits/x.json",
        "layer_00/cls/c/../0",
        "layer_00/cls/c/x",
        "layer_00/secret",
        "layer_00/cls/00001.tar",
        "layer_00/cls/٠٠٠٠٠١.tar",
        "layer_00/cls/000001.tar.gz",
        "layer_00/cls/000001.tar/x",
        "layer_00/cls/../000001.tar",
        "layer_00/000001.tar",
        "statistics/000001.tar",
        "layer_٠٠/zarr.json",
        "layer_000/zarr.json",
        "layer_00/cls/c/٠",
        "store.json\n",
        "x/store.json",
        "STORE.JSON",
        "thesis.tex",
        "",
    ],
    ids=repr,
)
def test_foreign_keys_are_not_owned(key):
    """`--overwrite` deletes owned keys only, and store.json may name only these."""
    assert not is_owned(key)
    assert not is_teacher_key(key)


def test_teacher_and_log_keys_are_owned():
    assert is_teacher_key("teacher/weights.safetensors")
    assert not is_teacher_key("store.json")
    assert is_owned("log/2026-01-01T00-00-00_host-3/status.json")


BAD_FIELDS = {
    "backend": "hdf5",
    "precision": "float64",
    "codec": "brotli",
    "compute": "int4",
    "dim": 0,
    "n_samples": 0,
    "samples_per_shard": "8",
    "samples_per_chunk": True,
    "micro_batch": 1.0,
    "n_registers": -1,
    "order_seed": 4.2,
    "has_cls": 1,
    "grid": [2],
    "layers": [2, 1],
    "teacher": "",
    "teacher_weights_digest": None,
    "source_digest": 7,
    "preprocessing": [0.5, 0.5],
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_each_bad_field_is_named(name):
    with pytest.raises(SchemaError, match=name.rstrip("s")):
        StoreSpec.from_json(make_spec().to_json() | {name: BAD_FIELDS[name]})


def test_all_bad_fields_are_listed_at_once():
    with pytest.raises(SchemaError) as caught:
        StoreSpec.from_json(make_spec().to_json() | BAD_FIELDS)
    assert len(caught.value.problems) >= len(BAD_FIELDS)


@pytest.mark.parametrize(("name", "value"), [("layers", 3), ("layers", "012"), ("grid", {"rows": 2}), ("grid", None)])
def test_lists_must_be_lists(name, value):
    with pytest.raises(SchemaError, match=rf"{name} is .*expected a list"):
        StoreSpec.from_json(make_spec().to_json() | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_shard": 6}, "samples_per_shard 6 is not a multiple of samples_per_chunk 4"),
        ({"codec": "lz4"}, "shuffle is 'none' with codec 'lz4'"),
        ({"shuffle": "bit"}, "shuffle is 'bit' with codec 'none'"),
        ({"codec": "gzip"}, "codec is 'gzip' with backend 'zarr', which has none, lz4, zstd-1, zstd-3"),
        ({"backend": "webdataset", "codec": "lz4", "shuffle": "bit"}, "which has none, gzip"),
        ({"backend": "webdataset", "codec": "gzip", "shuffle": "bit"}, "shuffle is 'bit' with codec 'gzip'"),
        ({"preprocessing": {"mean": (0.5, 0.5)}}, "no tuples"),
        ({"preprocessing": {"mean": float("nan")}}, "plain JSON"),
        ({"layers": ()}, "layers are"),
        ({"layers": (0, 0, 1)}, "layers are"),
        ({"layers": (100,)}, "from 0 to 99"),
        ({"n_samples": 2**31}, "at most 2,147,483,647 are supported"),
        ({"backend": "webdataset", "n_samples": 10**9 + 1}, "a WebDataset store has at most 1,000,000,000"),
        ({"backend": "webdataset", "codec": "lz4", "shuffle": "bit"}, "backend 'webdataset', which has none, gzip"),
        ({**WIDE, "backend": "webdataset"}, "a chunk has 2172649472 bytes"),
        ({"n_samples": 2**31 - 1, "samples_per_chunk": 1}, "chunks in all, at most"),
        ({"n_samples": 2**31 - 1}, "shards, at most 4,194,304 are supported"),
        ({"samples_per_shard": 4 * 10**12}, "chunks in all, at most"),
        ({"dim": 10**400}, "dim is 10+.*0, expected an integer from 1 to"),
        ({"dim": 2**20, "grid": (32, 32)}, "take fewer samples_per_chunk"),
    ],
)
def test_what_does_not_fit_together_is_said(changes, message):
    with pytest.raises(SchemaError, match=message):
        make_spec(**changes)


@given(specs(), st.dictionaries(st.sampled_from([*make_spec().to_json(), "other"]), json_values, min_size=1))
def test_any_change_of_the_json_gives_another_identity_or_an_error(spec, changes):
    document = spec.to_json() | changes
    try:
        found = StoreSpec.from_json(document)
    except SchemaError:
        return
    assert found.to_json() == document


@pytest.mark.parametrize("name", ["dim", "source_digest", "backend"])
def test_missing_and_unknown_fields_are_named(name):
    document = make_spec().to_json()
    del document[name]
    with pytest.raises(SchemaError, match=rf"(?s)unknown field 'colour'.*missing field '{name}'"):
        StoreSpec.from_json(document | {"colour": "red"})


def test_differences_name_each_field_with_both_values():
    assert differences(make_spec(), make_spec()) == []
    assert differences(make_spec(dim=8), make_spec(dim=16, codec="lz4", shuffle="bit")) == [
        "dim: the store has 8, this run asks for 16",
        "codec: the store has 'none', this run asks for 'lz4'",
        "shuffle: the store has 'none', this run asks for 'bit'",
    ]


def test_sizes_at_vit_b_14_are_those_of_the_design():
    """Design, section 2: 10.4 MB a sample in float32, 6 MB chunks and 100 MB objects in float16, 13.35 TB in all."""
    spec = make_spec(**VIT_B, precision="float32")
    per_sample = sum(
        raw_chunk_nbytes(spec, kind) // spec.samples_per_chunk for kind in ("cls", "registers", "patches")
    ) * len(spec.layers)
    assert per_sample == 13 * 261 * 768 * 4 == 10_423_296
    assert per_sample * spec.n_samples == pytest.approx(13.35e12, rel=1e-3)
    half = make_spec(**VIT_B, precision="float16")
    assert raw_chunk_nbytes(half, "patches") == 16 * 256 * 768 * 2
    assert raw_chunk_nbytes(half, "patches") * half.chunks_per_shard == pytest.approx(100e6, rel=0.01)
    assert (half.n_shards, half.n_chunks) == (5005, 80_073)


def test_kinds_follow_the_teacher():
    assert make_spec().token_kinds == ("cls", "registers", "patches", "patch_mean")
    bare = make_spec(has_cls=False, n_registers=0)
    assert bare.token_kinds == ("patches", "patch_mean")
    assert not bare.has_head_input
    assert "head_input" not in sharded_array_paths(bare)
    assert make_spec(precision="int8").token_kinds == make_spec().token_kinds == make_spec().array_kinds
    assert make_spec(precision="int8").array_kinds == ("cls", "registers", "patches", "patches_scale", "patch_mean")
    assert array_kind("layer_07/patches") == "patches"
    assert array_kind("head_input") == "head_input"


@given(specs())
def test_chunk_bytes_are_what_their_shape_says(spec):
    for kind in (*spec.array_kinds, "head_input"):
        n_values = 1
        for n in chunk_shape(spec, kind):
            n_values *= n
        assert raw_chunk_nbytes(spec, kind) == n_values * kind_dtype(spec, kind).itemsize <= MAX_CHUNK_NBYTES
        stored = {"bfloat16": "uint16"}.get(spec.precision, spec.precision)
        assert kind_dtype(spec, kind).name == (stored if kind == "patches" else "float32")


@pytest.mark.parametrize(("text", "span"), [("0-7", Span(0, 7)), (" 7 - 10 ", Span(7, 10)), ("10-12", Span(10, 12))])
def test_spans_are_read_as_typed(text, span):
    assert Span.parse(text) == span
    assert Span.parse(str(span)) == span
    assert list(span.states) == list(range(span.start, span.stop + 1))
    assert span.n_states == len(span.states)


@pytest.mark.parametrize("text", ["7-0", "3-3", "-1-2", "a-b", "", "0", "0-7-9", "0..7", "1.5-3"])
def test_other_spans_are_refused_with_an_example(text):
    with pytest.raises(SchemaError, match=r"for example BLOCK=0-7"):
        Span.parse(text)

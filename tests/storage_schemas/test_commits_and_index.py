"""Commits and the index: round trips, and forged ones that are sealed correctly."""

import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.objects import MemoryObjects, ObjectError
from storage_schemas import open_store
from storage_schemas.codecs import raw_chunk_nbytes
from storage_schemas.commit import (
    Commit,
    Fidelity,
    ObjectRecord,
    commit_problems,
    objects_fit,
    read_commit,
    statistics_nbytes,
)
from storage_schemas.create import (
    StoreDocument,
    identity_differences,
    parse_store_document,
    plan_documents,
    read_store_document,
)
from storage_schemas.documents import seal, sha256, unseal
from storage_schemas.errors import SchemaError, StoreError
from storage_schemas.index import SCHEMA, commits_from_index, index_to_bytes, seal_parquet, unseal_parquet
from storage_schemas.keys import (
    INDEX_KEY,
    SAMPLES_KEY,
    array_kind,
    commit_key,
    shard_object_key,
    shard_object_keys,
    sharded_array_paths,
    statistics_key,
)
from storage_schemas.reader import has_sound_index, read_commits
from storage_schemas.samples import samples_from_bytes
from storage_schemas.spec import StoreSpec
from storage_schemas.verify import verify_store
from storage_schemas.zarr_layout import CRC_NBYTES, index_nbytes, slot_nbytes
from tests import examples
from tests.stores import make_samples, make_spec, write_planted
from tests.strategies import bad_images, json_values, specs

STORE = "5" * 64


def any_record(spec: StoreSpec, path: str, shard: int, rng: np.random.Generator) -> ObjectRecord:
    """Worked out from FORMAT.md, not by the code that checks it."""
    raw, offset, chunks = raw_chunk_nbytes(spec, array_kind(path)), 0, []
    is_tar, plain = spec.backend == "webdataset", spec.codec == "none"
    file = 128 + raw // spec.samples_per_chunk
    for chunk in spec.shard_chunks(shard):
        if is_tar:
            n_rows = min(spec.samples_per_chunk, spec.n_samples - chunk * spec.samples_per_chunk)
            most = n_rows * (512 + -(-(file if plain else file + file // 8 + 64) // 512) * 512)
            least = most if plain else n_rows * 1024
        else:
            least, most = (raw, raw) if plain else (1, raw + 16)
        nbytes = int(rng.integers(least, most, endpoint=True))
        chunks.append([offset, nbytes, int(rng.integers(2**32))])
        offset += nbytes if is_tar else slot_nbytes(nbytes)
    nbytes = offset + (1024 if is_tar else index_nbytes(spec))
    return ObjectRecord(nbytes=nbytes, crc32c=int(rng.integers(2**32)), chunks=np.array(chunks, np.int64))


def any_commit(spec: StoreSpec, shard: int, bad: dict[int, str], rng: np.random.Generator) -> Commit:
    """Any sizes, checksums and measures that a commit of this spec can have."""
    objects, fidelity = {}, {}
    for path in sharded_array_paths(spec):
        objects[shard_object_key(spec, path, shard)] = any_record(spec, path, shard, rng)
        if rng.integers(2):
            relative_mse, r2, worst = rng.standard_cauchy(3).tolist()
            fidelity[path] = Fidelity(relative_mse=relative_mse, r2=r2, worst=worst)
    nbytes = statistics_nbytes(spec)
    objects[statistics_key(shard)] = ObjectRecord(
        nbytes=nbytes + CRC_NBYTES, crc32c=0, chunks=np.array([[0, nbytes, 2**32 - 1]], np.int64)
    )
    here = tuple(sorted((i, code) for i, code in bad.items() if i in spec.shard_samples(shard)))
    return Commit(shard=shard, store=STORE, bad_images=here, objects=objects, fidelity=fidelity)


@settings(max_examples=examples.of(40))
@given(specs(), st.data(), st.integers(0, 2**32))
def test_commits_and_index_round_trip(spec, data, seed):
    bad, rng = data.draw(bad_images(spec.n_samples)), np.random.default_rng(seed)
    made = [any_commit(spec, shard, bad, rng) for shard in range(spec.n_shards)]
    for commit in made:
        assert read_commit(spec, STORE, commit.shard, commit.to_bytes()).to_bytes() == commit.to_bytes()
    index = index_to_bytes(spec, STORE, made)
    assert [c.to_bytes() for c in commits_from_index(spec, STORE, index)] == [c.to_bytes() for c in made]


def fit(spec: StoreSpec, commits: list[Commit]) -> bool:
    records = [c.objects[key] for c in commits for key in shard_object_keys(spec, c.shard)]
    return objects_fit(
        spec,
        np.array([r.nbytes for r in records]),
        np.array([r.crc32c for r in records]),
        np.array([len(r.chunks) for r in records]),
        np.concatenate([r.chunks for r in records]),
    )


@settings(max_examples=examples.of(150))
@given(specs(), st.data(), st.integers(0, 2**32))
def test_objects_checked_at_once_are_judged_as_one_by_one(spec, data, seed):
    """Sound ones, and ones with a single number changed, or a chunk too many or too few."""
    made = [any_commit(spec, shard, {}, np.random.default_rng(seed)) for shard in range(spec.n_shards)]
    assert fit(spec, made)
    shard = data.draw(st.integers(0, spec.n_shards - 1))
    objects = dict(made[shard].objects)
    key = data.draw(st.sampled_from(sorted(objects)))
    record = objects[key]
    place = data.draw(st.sampled_from(["nbytes", "crc32c", "chunk", "one more", "one less"]))
    delta = data.draw(st.sampled_from([-(2**40), -64, -1, 1, 4, 64, 2**32, 2**62]))
    chunks = record.chunks.copy()
    if place == "chunk":
        chunks[data.draw(st.integers(0, len(chunks) - 1)), data.draw(st.integers(0, 2))] += delta
    elif place == "one more":
        chunks = np.concatenate([chunks, chunks[-1:]])
    elif place == "one less":
        chunks = chunks[:-1]
    else:
        record = dataclasses.replace(record, **{place: getattr(record, place) + delta})
    objects[key] = dataclasses.replace(record, chunks=chunks)
    made[shard] = dataclasses.replace(made[shard], objects=objects)
    problems = [p for c in made for p in commit_problems(spec, STORE, c.shard, c)]
    assert fit(spec, made) == (not problems), problems


@pytest.fixture
def objects() -> MemoryObjects:
    made = MemoryObjects()
    write_planted(made, make_spec(), {5: "truncated", 6: "empty"}, teacher_files={"config.json": b"{}"})
    return made


def forge(objects: MemoryObjects, key: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a sealed document and seal it again, as an attacker or a faulty writer would."""
    document = unseal(key, objects.get(key))
    changed = change(document)
    objects.put(key, seal(document if changed is None else changed))


CLS = "layer_00/cls/c/0/0"


def set_chunk(place: int, value: object) -> Callable[[dict], None]:
    return lambda d: d["objects"][CLS]["chunks"][0].__setitem__(place, value)


FORGED_COMMITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (lambda d: d | {"format_version": 2}, "format version 2; this version reads 1"),
    "no version": (lambda d: d.pop("format_version") and None, "format version None"),
    "another shard": (lambda d: d | {"shard": 1}, "is the commit of shard 1, stored as that of shard 0"),
    "another store": (lambda d: d | {"store": "7" * 64}, "belongs to a store.json with digest 7777"),
    "shard as text": (lambda d: d | {"shard": "0"}, "more or other than the fields"),
    "shard as truth": (lambda d: d | {"shard": False}, "more or other than the fields"),
    "unknown field": (lambda d: d | {"colour": "red"}, "more or other than the fields"),
    "missing field": (lambda d: {name: d[name] for name in d if name != "bad_images"}, "KeyError"),
    "objects as a list": (lambda d: d | {"objects": []}, "AttributeError"),
    "objects as null": (lambda d: d | {"objects": None}, "AttributeError"),
    "bad images as text": (lambda d: d | {"bad_images": "ab"}, "not a commit of this format"),
    "bad image elsewhere": (lambda d: d | {"bad_images": [[9, "empty"]]}, "is not of this shard"),
    "bad image twice": (lambda d: d | {"bad_images": [[5, "empty"], [5, "empty"]]}, "each once"),
    "bad images unordered": (lambda d: d | {"bad_images": [[6, "empty"], [5, "empty"]]}, "in order"),
    "unknown code": (lambda d: d | {"bad_images": [[5, "ugly"]]}, "unknown code"),
    "fractional index": (lambda d: d | {"bad_images": [[5.5, "empty"]]}, "more or other than the fields"),
    "object missing": (lambda d: d["objects"].pop(CLS) and None, f"does not list {CLS}"),
    "statistics missing": (lambda d: d["objects"].pop("statistics/c/0/0/0/0/0") and None, "does not list statistics"),
    "object of another shard": (
        lambda d: d["objects"].update({"layer_00/cls/c/1/0": d["objects"][CLS]}),
        "lists unknown layer_00/cls/c/1/0",
    ),
    "object outside": (
        lambda d: d["objects"].update({"../../etc/passwd": d["objects"][CLS]}),
        r"lists unknown \.\./\.\./etc/passwd",
    ),
    "negative offset": (set_chunk(0, -4), "do not lie where they belong"),
    "another offset": (set_chunk(0, 4), "do not lie where they belong"),
    "another size": (set_chunk(1, 4), "chunks have a wrong size"),
    "fractional offset": (set_chunk(0, 0.5), "more or other than the fields"),
    "crc as text": (set_chunk(2, "ff"), "ValueError"),
    "crc too large": (set_chunk(2, 2**32), "crc32c is not in 0 to"),
    "huge integer": (set_chunk(2, 10**40), "OverflowError"),
    "chunk of two": (lambda d: d["objects"][CLS]["chunks"].__setitem__(0, [0, 128]), "ValueError"),
    "a chunk too few": (lambda d: d["objects"][CLS]["chunks"].pop() and None, "1 chunks, expected 2"),
    "no chunks": (lambda d: d["objects"][CLS].update(chunks=[]), "0 chunks, expected 2"),
    "another object size": (lambda d: d["objects"][CLS].update(nbytes=1), "do not lie where they belong"),
    "object crc as text": (lambda d: d["objects"][CLS].update(crc32c="0"), "more or other than the fields"),
    "object crc negative": (lambda d: d["objects"][CLS].update(crc32c=-1), "crc32c is not in 0 to"),
    "statistics elsewhere": (
        lambda d: d["objects"]["statistics/c/0/0/0/0/0"]["chunks"][0].__setitem__(0, 8),
        "is not one chunk of",
    ),
    "statistics in no chunk": (
        lambda d: d["objects"]["statistics/c/0/0/0/0/0"].update(chunks=[]),
        "is not one chunk of",
    ),
    "fidelity of nothing": (
        lambda d: d["fidelity"].update(nothing={"relative_mse": 0.0, "r2": 1.0, "worst": 0.0}),
        "fidelity of 'nothing', which is no array here",
    ),
    "fidelity with another field": (lambda d: d["fidelity"]["layer_00/patches"].update(best=1.0), "TypeError"),
    "fidelity as text": (lambda d: d["fidelity"]["layer_00/patches"].update(r2="1.0"), "more or other than the fields"),
}


@pytest.mark.parametrize("name", FORGED_COMMITS)
def test_forged_commits_are_refused_and_reported(objects, name):
    change, message = FORGED_COMMITS[name]
    forge(objects, commit_key(0), change)
    objects.delete(INDEX_KEY)
    store = open_store(objects)
    assert list(store.committed) == [False, True, True]
    with pytest.raises(Exception, match=rf"(?s)the commit of shard 0 is damaged: .*{message}"):
        store.read([0], [0])
    problems = {p.key: p for p in verify_store(objects)}
    assert problems[commit_key(0)].shard == 0


def test_a_compressed_chunk_may_not_claim_more_than_its_codec_can_make():
    """Or a reader would make room for it before a single byte is checked."""
    made, spec = MemoryObjects(), make_spec(codec="lz4", shuffle="byte", samples_per_shard=4)
    write_planted(made, spec)

    def inflate(document: dict[str, Any]) -> None:
        record = document["objects"][CLS]
        record["nbytes"] += 10**15 - record["chunks"][0][1]
        record["chunks"][0][1] = 10**15

    forge(made, commit_key(0), inflate)
    made.delete(INDEX_KEY)
    assert "wrong size" in open_store(made).damaged_commits[commit_key(0)]


FORGED_STORES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (lambda d: d | {"format_version": 99}, "format version 99; this version reads 1"),
    "no spec": (lambda d: d | {"spec": None}, "expected 'spec' and 'documents'"),
    "documents as list": (lambda d: d | {"documents": []}, "expected 'spec' and 'documents'"),
    "bad spec": (lambda d: d["spec"].update(dim=0), "dim is 0"),
    "climbing key": (lambda d: d["documents"].update({"teacher/../../x": "0" * 64}), "does not have"),
    "parent key": (lambda d: d["documents"].update({"teacher/..": "0" * 64}), "does not have"),
    "absolute key": (lambda d: d["documents"].update({"/etc/passwd": "0" * 64}), "does not have"),
    "surrogate key": (lambda d: d["documents"].update({"teacher/\ud800": "0" * 64}), "does not have"),
    "commit as document": (lambda d: d["documents"].update({"commits/000000.json": "0" * 64}), "does not have"),
    "no samples": (lambda d: d["documents"].pop(SAMPLES_KEY) and None, "names no digest of samples.parquet"),
    "no zarr.json": (lambda d: d["documents"].pop("layer_00/zarr.json") and None, "no digest of layer_00/zarr.json"),
    "digest as number": (lambda d: d["documents"].update({SAMPLES_KEY: 5}), "expected 64 hexadecimal digits"),
    "digest too short": (lambda d: d["documents"].update({SAMPLES_KEY: "ab"}), "expected 64 hexadecimal digits"),
    "unknown field": (lambda d: d | {"colour": "red"}, "unknown field 'colour'"),
    "too many samples": (lambda d: d["spec"].update(n_samples=10**15), "at most 2,147,483,647 are supported"),
}


@pytest.mark.parametrize("name", FORGED_STORES)
def test_forged_identities_are_refused_and_reported(objects, name):
    change, message = FORGED_STORES[name]
    forge(objects, "store.json", change)
    with pytest.raises(SchemaError, match=message):
        open_store(objects)
    assert [p.key for p in verify_store(objects)] == ["store.json"]


def test_another_identity_under_the_same_commits_makes_all_of_them_foreign(objects):
    other = MemoryObjects()
    write_planted(other, make_spec(order_seed=1))
    objects.put("store.json", other.get("store.json"))
    store = open_store(objects)
    assert store.n_committed == 0
    with pytest.raises(Exception, match=r"commit of shard 0 is damaged: belongs to a store.json with digest"):
        store.read([0], [0])
    keys = {p.key for p in verify_store(objects)}
    assert keys >= {"commits/000000.json", "commits/000001.json", "commits/000002.json", "index.parquet"}


@pytest.mark.parametrize("what", ["commits/000000.json", CLS, "statistics/c/0/0/0/0/0", INDEX_KEY])
def test_objects_of_another_store_in_place_of_ours(objects, what):
    """Of the same shapes, and sound in themselves, as a racing job with another spec would leave them."""
    other = MemoryObjects()
    write_planted(other, make_spec(order_seed=1), seed=1)
    objects.put(what, other.get(what))
    assert what in {p.key for p in verify_store(objects)}


class TestIndex:
    def test_an_index_is_a_plain_parquet_file_to_others(self, objects, tmp_path):
        path = tmp_path / "index.parquet"
        path.write_bytes(objects.get(INDEX_KEY))
        table = pq.read_table(path)
        assert table.schema.names == SCHEMA.names
        assert table["key"].to_pylist()[:2] == [CLS, "layer_00/registers/c/0/0/0"]

    def test_sealing_is_undone(self):
        sink = io.BytesIO()
        pq.write_table(pa.table({"a": [1, 2, 3]}), sink)
        assert unseal_parquet("key", seal_parquet(sink.getvalue())) == sink.getvalue()

    @pytest.mark.parametrize("data", [b"", b"PAR1", b"x" * 200, b"\xff" * 200, b"\0" * 50])
    def test_what_is_no_sealed_parquet_is_refused(self, data):
        with pytest.raises(SchemaError, match=r"no whole Parquet file|it was changed"):
            unseal_parquet("index.parquet", data)

    @given(st.data())
    @settings(max_examples=examples.of(60))
    def test_every_changed_byte_is_seen_before_anything_is_parsed(self, data):
        sound = _index_bytes()
        changed = bytearray(sound)
        changed[data.draw(st.integers(0, len(sound) - 1))] ^= data.draw(st.integers(1, 255))
        with pytest.raises(SchemaError, match=r"no whole Parquet file|it was changed"):
            unseal_parquet("index.parquet", bytes(changed))

    def test_a_damaged_index_costs_nothing_but_time(self, objects):
        objects.put(INDEX_KEY, objects.get(INDEX_KEY)[:-1])
        store = open_store(objects)
        assert store.is_complete
        assert store.read().shape[0] == 19
        assert [p.key for p in verify_store(objects)] == [INDEX_KEY]

    def test_whether_an_index_is_sound_is_told_without_reading_commits(self, objects):
        document = read_store_document(objects, "")
        data = objects.get(INDEX_KEY)
        for key in [info.key for info in objects.list("commits/")]:
            objects.delete(key)
        assert has_sound_index(objects, document)
        other = MemoryObjects()
        write_planted(other, make_spec(order_seed=1))
        table = _table(objects)
        cut = table.slice(1).replace_schema_metadata(table.schema.metadata)
        for write in (
            lambda: objects.delete(INDEX_KEY),
            lambda: objects.put(INDEX_KEY, data[:-1]),
            lambda: objects.put(INDEX_KEY, data[:200] + bytes([data[200] ^ 1]) + data[201:]),
            lambda: objects.put(INDEX_KEY, other.get(INDEX_KEY)),
            lambda: _put_index(objects, cut),
            lambda: _put_index(objects, table.replace_schema_metadata(None)),
        ):
            write()
            assert not has_sound_index(objects, document)

    def test_an_index_of_an_earlier_content_is_reported_and_can_be_passed_over(self, objects):
        """A repaired shard has a new commit; its old index still reads, so whoever writes it anew must not use it."""
        forge(objects, commit_key(1), lambda d: d["objects"]["layer_00/cls/c/1/0"]["chunks"][0].__setitem__(2, 7))
        document = open_store(objects).document
        by_index, _ = read_commits(objects, document)
        by_commit, _ = read_commits(objects, document, use_index=False)
        assert by_index[1].digest != by_commit[1].digest
        assert "differs from the commit of shard 1" in {p.what for p in verify_store(objects) if p.key == INDEX_KEY}

    def test_a_missing_commit_under_an_index_is_damage(self, objects):
        objects.delete(commit_key(1))
        store = open_store(objects)
        assert store.damaged_commits == {commit_key(1): "it is missing, though the store was finished once"}
        for whole in (store.read, lambda: store.statistics, store.read_head_input):
            with pytest.raises(Exception, match=r"(?s)has damaged commits:.*commits/000001.json: it is missing"):
                whole()
        assert store.read([0], [0]).shape == (1, 1, 9, 8)  # what is committed can still be asked for by name

    def test_without_index_the_store_is_merely_unfinished(self, objects):
        objects.delete(commit_key(1))
        objects.delete(INDEX_KEY)
        store = open_store(objects)
        assert (store.damaged_commits, store.is_complete, store.n_committed) == ({}, False, 13)
        assert store.read().shape[0] == 11
        assert store.statistics.count[0, 0, 0] == 11

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m | {"format_version": 3}, "format version 3"),
            (lambda m: m | {"store": "9" * 64}, "belongs to store 9999"),
            (lambda m: m | {"store": None}, "belongs to store None"),
            (lambda m: m | {"bad_images": [[1, "ugly"]]}, "unknown code"),
            (lambda m: m | {"bad_images": 3}, "TypeError"),
            (lambda m: m | {"fidelity": [[0]]}, "ValueError"),
            (lambda m: {}, "KeyError"),
            (lambda m: [], "TypeError"),
        ],
    )
    def test_forged_metadata(self, objects, change, message):
        table = _table(objects)
        forged = change(json.loads(table.schema.metadata[b"index"]))
        _put_index(objects, table.replace_schema_metadata({"index": json.dumps(forged)}))
        self._refused(objects, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.drop(["crc32c"]), "columns are"),
            (lambda t: t.slice(1), "does not list layer_00/cls/c/0/0"),
            (lambda t: t.slice(0, 14), "lists 1 shards, expected 0 to 2"),
            (lambda t: t.slice(0, 0), "lists 0 shards"),
            (lambda t: t.slice(0, t.num_rows - 1), "shard 2: does not list statistics"),
            (lambda t: _with_number(t, "nbytes", 3), r"shard 0: layer_00/patch_mean/c/0/0: chunks do not lie where"),
            (lambda t: _with_number(t, "crc32c", -1), r"shard 0: layer_00/patch_mean/c/0/0: a crc32c is not in 0"),
            (lambda t: _with_number(t, "chunk_offset", [0, 64]), r"layer_00/patch_mean/c/0/0: chunks do not lie where"),
            (lambda t: _with_number(t, "chunk_nbytes", [1, 128]), r"layer_00/patch_mean/c/0/0: chunks have a wrong"),
            (lambda t: _with_number(t, "chunk_crc32c", [2**32, 0]), r"layer_00/patch_mean/c/0/0: a crc32c is not"),
            (lambda t: _with_number(t, "key", "../x"), r"shard 0: lists unknown \.\./x"),
            (lambda t: pa.concat_tables([t, t]), "lists an object twice"),
            (lambda t: _with_shard(t, 77), "lists 4 shards"),
            (lambda t: _with_shard(t, -1), "lists 4 shards"),
        ],
    )
    def test_forged_rows(self, objects, change, message):
        table = _table(objects)
        changed = change(table).replace_schema_metadata(table.schema.metadata)
        _put_index(objects, changed)
        self._refused(objects, message)

    def test_an_index_without_our_metadata(self, objects):
        _put_index(objects, _table(objects).replace_schema_metadata(None))
        self._refused(objects, "KeyError")

    def _refused(self, objects: MemoryObjects, message: str) -> None:
        document = open_store(objects).document
        with pytest.raises(SchemaError, match=message):
            commits_from_index(document.spec, document.digest, objects.get(INDEX_KEY))
        assert [p.key for p in verify_store(objects)] == [INDEX_KEY]
        assert open_store(objects).is_complete


@cache
def _index_bytes() -> bytes:
    made = MemoryObjects()
    write_planted(made, make_spec(n_samples=5))
    return made.get(INDEX_KEY)


def _table(objects: MemoryObjects) -> pa.Table:
    return pq.read_table(io.BytesIO(objects.get(INDEX_KEY)))


def _put_index(objects: MemoryObjects, table: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    objects.put(INDEX_KEY, seal_parquet(sink.getvalue()))


def _with_number(table: pa.Table, name: str, value: object) -> pa.Table:
    """Another value in the fourth row, of layer_00/patch_mean in shard 0."""
    field, values = SCHEMA.field(name), table[name].to_pylist()
    values[3] = value
    return table.set_column(SCHEMA.names.index(name), field, pa.array(values, field.type))


def _with_shard(table: pa.Table, shard: int) -> pa.Table:
    shards = table["shard"].to_pylist()
    shards[-1] = shard
    return table.set_column(0, SCHEMA.field("shard"), pa.array(shards, pa.int32()))


@given(specs(), st.dictionaries(st.from_regex(r"\A[a-z][a-z._-]{0,8}\Z"), st.binary(max_size=9), max_size=3))
@settings(max_examples=examples.of(30))
def test_store_documents_round_trip(spec, teacher_files):
    document, documents = plan_documents(spec, make_samples(spec.n_samples), teacher_files)
    assert isinstance(document, StoreDocument)
    assert parse_store_document(document.to_bytes(), "store.json") == document
    assert set(document.documents) == set(documents)
    again, _ = plan_documents(spec, make_samples(spec.n_samples), teacher_files)
    assert again.to_bytes() == document.to_bytes()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".hidden"])
def test_teacher_files_must_have_plain_names(name):
    with pytest.raises(SchemaError, match="is not a plain name below teacher/"):
        plan_documents(make_spec(), make_samples(21), {name: b""})


class TestIdentityDifferences:
    """What resuming asks: is the store that is there the one that this run would make?"""

    def asked(self, objects, samples=None, files=None, **changes) -> list[str]:
        spec, samples = make_spec(**changes), make_samples(21) if samples is None else samples
        expected, _ = plan_documents(spec, samples, {"config.json": b"{}"} if files is None else files)
        return identity_differences(objects, read_store_document(objects, ""), expected, samples)

    def test_the_same(self, objects):
        assert self.asked(objects) == []

    def test_another_release_of_arrow_is_the_same(self, objects):
        """Simulated by another compression of the same table, which store.json names."""
        sink = io.BytesIO()
        table = samples_from_bytes(objects.get(SAMPLES_KEY), 21)
        pq.write_table(table, sink, compression="gzip")
        assert sink.getvalue() != objects.get(SAMPLES_KEY)
        objects.put(SAMPLES_KEY, sink.getvalue())
        forge(objects, "store.json", lambda d: d["documents"].update({SAMPLES_KEY: sha256(sink.getvalue())}))
        assert self.asked(objects) == []
        objects.put(SAMPLES_KEY, sink.getvalue() + b"x")
        assert self.asked(objects) == ["samples.parquet: another content than the one in the store"]

    def test_other_settings_and_files(self, objects):
        assert self.asked(objects, dim=16) == ["dim: the store has 8, this run asks for 16"]
        others = [dataclasses.replace(s, nbytes=s.nbytes + 1) for s in make_samples(21)]
        assert self.asked(objects, others) == ["samples.parquet: another content than the one in the store"]
        changed = self.asked(objects, files={"config.json": b"{ }", "head.safetensors": b""})
        assert changed == [
            "teacher/config.json: another content than the one in the store",
            "teacher/head.safetensors: another content than the one in the store",
        ]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value inside a JSON document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*path, name))


def with_value(document: Any, path: tuple, value: Any) -> Any:
    """The document with another value at a place, or without that place if the value is `...`."""
    if not path:
        return {} if value is ... else value
    changed = dict(document) if isinstance(document, dict) else list(document)
    if len(path) == 1 and value is ...:
        del changed[path[0]]
    else:
        changed[path[0]] = with_value(changed[path[0]], path[1:], value)
    return changed


hostile = st.one_of(
    json_values,
    st.just(...),
    st.sampled_from(
        [-1, 2**31, 2**63, 2**64, 10**30, "", "..", "../../x", "/etc/passwd", [], {}, [[]], [[0, 0, 0]], 1.5]
    ),
)


@settings(max_examples=examples.of(150))
@given(key=st.sampled_from(["store.json", "commits/000000.json"]), data=st.data(), value=hostile)
def test_any_forged_value_is_refused_or_harmless(key, data, value):
    """Sealed correctly: whatever it says, only our errors are raised, and verify reports it or it is the same store."""
    objects = _copy(_small_store())
    document = unseal(key, objects.get(key))
    place = data.draw(st.sampled_from(list(places(document))))
    forged = with_value(document, place, value)
    if not isinstance(forged, dict) or "digest" in forged:
        return
    objects.put(key, seal(forged))
    problems = verify_store(objects)
    assert problems or objects.get(key) == _small_store().get(key), f"{place} = {value!r} is not reported"
    try:
        store = open_store(objects)
        found = store.read([0], [0, 1])
        _ = store.statistics, store.samples, store.read_teacher_files()
    except (StoreError, ObjectError, IndexError):
        return
    np.testing.assert_array_equal(found, open_store(_small_store()).read([0], [0, 1]))


@cache
def _small_store() -> MemoryObjects:
    made = MemoryObjects()
    spec = make_spec(n_samples=5, layers=(0,), samples_per_shard=4, samples_per_chunk=2)
    write_planted(made, spec, {3: "empty"}, teacher_files={"config.json": b"{}"})
    return made


def _copy(objects: MemoryObjects) -> MemoryObjects:
    made = MemoryObjects()
    for info in objects.list():
        made.put(info.key, objects.get(info.key))
    return made

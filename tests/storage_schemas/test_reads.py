"""Asking a store: order, errors, and that only what was asked for is fetched."""

import inspect
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.console import UserError
from infra.objects import FolderObjects, MemoryObjects, ObjectMissingError, ShortObjectError
from storage_schemas import open_store
from storage_schemas.codecs import DecodeError
from storage_schemas.commit import Commit
from storage_schemas.copy import copy_store
from storage_schemas.create import create_store, read_store_document
from storage_schemas.errors import ChecksumError, NotAStoreError, NotCommittedError, SchemaError
from storage_schemas.find import find_stores
from storage_schemas.indices import as_indices
from storage_schemas.inspect import next_command
from storage_schemas.keys import COMMITS_PREFIX, commit_key, shard_object_key
from storage_schemas.reader import Store
from storage_schemas.shard_buffers import ShardBuffers, write_shard
from storage_schemas.spec import BACKENDS, Span, StoreSpec
from storage_schemas.statistics import Statistics
from tests.stores import make_samples, make_spec, planted_states, write_planted

SPEC = make_spec()
BAD = {5: "truncated", 20: "empty"}


@pytest.fixture(scope="module", params=BACKENDS)
def objects(request: pytest.FixtureRequest) -> MemoryObjects:
    made = MemoryObjects()
    write_planted(made, make_spec(backend=request.param), BAD, teacher_files={"config.json": b"{}"})
    return made


@pytest.fixture(scope="module")
def store(objects: MemoryObjects) -> Store:
    return open_store(objects)


def spec_of(objects: MemoryObjects) -> StoreSpec:
    return read_store_document(objects, "").spec


STATES = planted_states(SPEC, range(21))


class TestOrder:
    @given(
        st.lists(st.sampled_from([i for i in range(21) if i not in BAD]), max_size=12),
        st.lists(st.sampled_from(SPEC.layers), max_size=4),
    )
    def test_order_and_repeats_are_kept(self, store, rows, layers):
        expected = STATES[np.array(rows, int)][:, np.array(layers, int)]
        np.testing.assert_array_equal(store.read(layers, rows), expected)
        np.testing.assert_array_equal(store.read(layers, np.array(rows, np.int32), "patches"), expected[:, :, 3:])

    def test_tokens_come_in_the_order_of_the_teacher(self, store):
        both = store.read([1], [0, 7])
        parts = [store.read([1], [0, 7], kind) for kind in ("cls", "registers", "patches")]
        assert [part.shape for part in parts] == [(2, 1, 1, 8), (2, 1, 2, 8), (2, 1, 6, 8)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=2), both)

    def test_patch_mean_is_the_mean_of_the_raw_patches(self, store):
        mean = STATES[:3, :, 3:].astype(np.float64).mean(axis=2).astype(np.float32)
        np.testing.assert_array_equal(store.read(samples=[0, 1, 2], tokens="patch_mean")[:, :, 0], mean)

    def test_by_default_every_valid_sample_at_every_layer(self, store):
        np.testing.assert_array_equal(store.read(), STATES[[i for i in range(21) if i not in BAD]])

    def test_nothing_asked_nothing_given(self, store):
        assert store.read([0], []).shape == (0, 1, 9, 8)
        assert store.read([], [0]).shape == (1, 0, 9, 8)
        assert store.read([0], np.array([], int)).shape == (0, 1, 9, 8)


class TestNumbers:
    """Whatever kind of integers a notebook has at hand; pytest checks the types of arguments, as notebooks may not."""

    @pytest.mark.parametrize(
        "samples",
        [
            [np.int64(3), np.int64(0)],
            (3, 0),
            range(3, -1, -3),
            np.array([3, 0], np.uint8),
            np.array([3, 0], np.uint64),
            np.array([3, 0], object),
            np.arange(4)[::-3],
        ],
        ids=lambda x: f"{type(x).__name__} of {type(x[0]).__name__}",
    )
    def test_several_samples(self, store, samples):
        np.testing.assert_array_equal(store.read(samples=samples), STATES[[3, 0]])
        assert store.read_head_input(samples).shape == (2, 16)

    @pytest.mark.parametrize("layers", [[np.int64(2), np.int8(0)], (2, 0), range(2, -1, -2), np.array([2, 0])], ids=str)
    def test_several_layers(self, store, layers):
        np.testing.assert_array_equal(store.read(layers, [0, 3]), STATES[[0, 3]][:, [2, 0]])

    @pytest.mark.parametrize("number", [np.int64(2), 2, np.uint16(2), np.array(2)], ids=lambda x: type(x).__name__)
    def test_one_number(self, store, number):
        np.testing.assert_array_equal(store.read(layers=number, samples=number), STATES[[2]][:, [2]])
        assert store.read_head_input(number).shape == (1, 16)
        assert store.chunk(number, "cls", number) == store.chunk(2, "cls", 2)
        np.testing.assert_array_equal(store.shard_statistics(number).count, store.shard_statistics(2).count)
        assert store.spec.shard_samples(number) == store.spec.shard_samples(2)
        assert store.spec.shard_chunks(number) == store.spec.shard_chunks(2)

    def test_spans_hold_integers_of_python(self):
        span = Span(np.int64(0), np.int64(7))
        assert (span, str(span), type(span.start), span.n_states) == (Span(0, 7), "0-7", int, 8)

    def test_bad_images_of_a_store_from_arrays(self):
        made = MemoryObjects()
        write_planted(made, SPEC, {np.int64(5): "truncated"})
        assert np.flatnonzero(~open_store(made).valid).tolist() == [5]

    def test_paths_of_every_kind(self, tmp_path):
        write_planted(FolderObjects(tmp_path / "train"), SPEC)
        assert open_store(tmp_path / "train").n_valid == open_store(str(tmp_path / "train")).n_valid == 21
        assert find_stores(tmp_path) == find_stores(str(tmp_path)) == {"train": str(tmp_path / "train")}
        assert next_command([open_store(tmp_path / "train")], tmp_path).endswith(f"STORE={tmp_path}")

    @pytest.mark.parametrize("row", [2**63, 2**64, 10**30, -(10**30)])
    def test_numbers_too_large_for_an_int64_are_named_as_they_are(self, store, row):
        for samples in ([0, row], [row], [-1, row][::-1]):
            with pytest.raises(IndexError, match=rf"sample {row} is not in the store; it has samples 0 to 20"):
                store.read([0], samples)
        with pytest.raises(SchemaError, match=f"layer {row} is not stored; the store has 0, 1, 2"):
            store.read([row], [0])

    def test_a_uint64_is_not_taken_for_a_negative_number(self, store):
        with pytest.raises(IndexError, match=r"sample 9223372036854775808 is not in the store"):
            store.read([0], np.array([2**63], np.uint64))

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({3, 0}, "samples were given as set, expected a number, or a list, range or array"),
            ((i for i in range(3)), "samples were given as generator, expected a number, or a list"),
            ({3: 0}, "samples were given as dict, expected"),
            ("3", "samples were given as str, expected"),
            (3.5, "samples were given as float, expected"),
            (np.float64(3), "samples are float64 values, expected sample indices"),
            (["3"], "samples are <U1 values, expected sample indices"),
            ([None], "samples are object values, expected sample indices"),
            (np.zeros((2, 3), int), r"samples were given as an array of shape \(2, 3\), expected one axis"),
        ],
        ids=["set", "generator", "dict", "str", "float", "float64", "texts", "none", "two axes"],
    )
    def test_what_has_no_order_or_is_no_number(self, asked, message):
        with pytest.raises(TypeError, match=message):
            as_indices(asked, "sample")


class TestErrors:
    def test_what_is_no_location(self, store):
        untyped = inspect.unwrap(open_store)  # as where nothing checks types
        with pytest.raises(TypeError, match=r"was given NoneType, expected the path of a store"):
            untyped(None)
        with pytest.raises(TypeError, match=r"was given int, expected the path of a store"):
            untyped(7)
        with pytest.raises(TypeError, match=r"was given a Store, which is open already"):
            untyped(store)

    @pytest.mark.parametrize(("layer", "named"), [(3, "3"), (-1, "-1"), (99, "99")])
    def test_layers_that_are_not_there(self, store, layer, named):
        with pytest.raises(SchemaError, match=rf"layer {named} is not stored; the store has 0, 1, 2"):
            store.read([0, layer], [0])
        with pytest.raises(SchemaError, match=rf"layer {named} is not stored"):
            store.chunk(layer, "cls", 0)

    def test_kinds_that_are_not_there(self, store):
        with pytest.raises(
            SchemaError, match="'keys' is not stored; the store has cls, registers, patches, patch_mean"
        ):
            store.read([0], [0], tokens="keys")
        bare = MemoryObjects()
        write_planted(bare, make_spec(n_registers=0))
        with pytest.raises(SchemaError, match="'registers' is not stored; the store has cls, patches, patch_mean"):
            open_store(bare).read([0], [0], tokens="registers")

    def test_every_problem_is_listed(self, store):
        with pytest.raises(SchemaError) as caught:
            store.read([7, 0, 8, 7], [0], "keys")
        assert len(caught.value.problems) == 3

    @pytest.mark.parametrize("row", [-1, 21, 10**6])
    def test_samples_outside(self, store, row):
        with pytest.raises(IndexError, match=rf"sample {row} is not in the store; it has samples 0 to 20"):
            store.read([0], [0, row])

    def test_bad_images_are_named_with_their_reason(self, store):
        with pytest.raises(
            NotCommittedError, match=r"sample 5 \(class2/0005.png\) has no states, .*: truncated. 2 such"
        ):
            store.read([0], [0, 5, 20])

    @pytest.mark.parametrize("samples", [[True, False], np.ones(21, bool), np.zeros(3), np.array(["a"])], ids=str)
    def test_masks_and_reals_are_no_indices(self, store, samples):
        with pytest.raises(TypeError, match=r"expected sample indices; np\.flatnonzero"):
            store.read([0], samples)
        with pytest.raises(TypeError, match="expected sample indices"):
            store.read_head_input(samples)

    @pytest.mark.parametrize("chunk", [-1, 6])
    def test_chunks_outside(self, store, chunk):
        with pytest.raises(IndexError, match=rf"chunk {chunk} is not in the store; it has chunks 0 to 5"):
            store.chunk(0, "cls", chunk)

    @pytest.mark.parametrize("shard", [-1, 3])
    def test_shards_outside(self, store, shard):
        with pytest.raises(IndexError, match=rf"shard {shard} is not in the store; it has shards 0 to 2"):
            store.shard_statistics(shard)

    def test_what_is_no_store(self, tmp_path):
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(NotAStoreError, match=r"is not a store: it has no store\.json.*make extract"):
                open_store(place)
        (tmp_path / "file").write_bytes(b"x")
        with pytest.raises(NotAStoreError, match="is not a store"):
            open_store(tmp_path / "file")

    def test_a_folder_of_stores_says_which_to_open(self, tmp_path):
        write_planted(FolderObjects(tmp_path / "val"), make_spec(n_samples=1))
        with pytest.raises(NotAStoreError, match=rf"it holds a store val: open_store\('{tmp_path}/val'\)"):
            open_store(tmp_path)
        write_planted(FolderObjects(tmp_path / "train"), make_spec(n_samples=1))
        with pytest.raises(
            NotAStoreError, match=rf"it holds stores train and val: open_store\('{tmp_path}/train'\)"
        ) as caught:
            open_store(str(tmp_path))
        assert open_store(str(caught.value).partition("open_store('")[2].removesuffix("')")).n_samples == 1

    def test_places_that_are_not_served(self):
        with pytest.raises(UserError, match=r"gs://bucket/x: give a local path without '://', or s3://"):
            open_store("gs://bucket/x")
        with pytest.raises(NotAStoreError, match=r"gs://bucket/x: give a local path without '://', or s3://"):
            find_stores("gs://bucket/x")

    def test_a_union_of_nothing(self):
        with pytest.raises(SchemaError, match="give at least one store"):
            open_store([])


class TestDamage:
    @pytest.fixture
    def damaged(self, objects) -> MemoryObjects:
        made = MemoryObjects()
        for info in objects.list():
            made.put(info.key, objects.get(info.key))
        return made

    def test_a_flipped_bit_names_key_and_both_checksums(self, damaged):
        key = shard_object_key(spec_of(damaged), "layer_01/patches", 1)
        nbytes = open_store(damaged).chunk(1, "patches", 2).nbytes
        data = bytearray(damaged.get(key))
        data[3] ^= 1
        damaged.put(key, data)
        with pytest.raises(
            ChecksumError, match=rf"{key}: bytes 0 to {nbytes} have crc32c [0-9a-f]{{8}}, the commit says"
        ) as e:
            open_store(damaged).read([1], [8])
        assert e.value.key == key
        assert open_store(damaged).read([1], [12]).shape == (1, 1, 9, 8)  # another chunk of the same object is sound

    def test_missing_and_short_objects_are_named(self, damaged):
        key = shard_object_key(spec_of(damaged), "layer_01/cls", 0)
        damaged.put(key, damaged.get(key)[: open_store(damaged).chunk(1, "cls", 0).nbytes + 12])
        assert open_store(damaged).read([1], [0], "cls").shape == (1, 1, 1, 8)
        with pytest.raises(ShortObjectError, match=key):
            open_store(damaged).read([1], [4], "cls")
        damaged.delete(key)
        with pytest.raises(ObjectMissingError, match=f"{key} is missing"):
            open_store(damaged).read([1], [0], "cls")

    def test_changed_documents(self, damaged):
        damaged.put("teacher/config.json", b"{ }")
        damaged.put("samples.parquet", damaged.get("samples.parquet") + b" ")
        store = open_store(damaged)
        with pytest.raises(ChecksumError, match=r"teacher/config.json: sha256 \w+, store.json says \w+.*REPAIR=1"):
            store.read_teacher_files()
        with pytest.raises(ChecksumError, match=r"samples\.parquet"):
            _ = store.samples

    def test_stray_objects_are_reported(self, damaged):
        beyond, of_the_other = "layer_00/cls/c/3/0", "layer_00/cls/000001.tar"
        if spec_of(damaged).backend == "webdataset":
            beyond, of_the_other = "layer_00/cls/000003.tar", "layer_00/cls/c/1/0"
        damaged.put(beyond, b"x")
        damaged.put(of_the_other, b"x")
        damaged.put("notes.txt", b"x")
        damaged.put("commits/readme.json", b"x")
        damaged.put("commits/000003.json", b"x")
        damaged.put("log/run/status.json", b"x")
        found = {problem.key: problem.what for problem in open_store(damaged).verify()}
        assert found == {
            beyond: "no commit names this object",
            of_the_other: "no commit names this object",
            "notes.txt": "not an object of this format",
            "commits/readme.json": "not a commit of this store",
            "commits/000003.json": "not a commit of this store",
        }

    def test_a_longer_object_is_reported(self, damaged):
        """Readers would never see its tail; verify still does, without reading it."""
        key = shard_object_key(spec_of(damaged), "layer_01/cls", 0)
        damaged.put(key, damaged.get(key) + bytes(1000))
        [problem] = open_store(damaged).verify()
        assert (problem.key, problem.what, problem.shard) == (key, "object has the wrong size", 0)

    def test_members_of_another_chunk_are_refused_by_their_names(self):
        """Sound bytes that a wrong table leads to: archives say which samples they hold."""
        made = MemoryObjects()
        write_planted(made, make_spec(backend="webdataset"))
        store = open_store(made)
        store.table.chunks["layer_01/cls"][1] = store.table.chunks["layer_01/cls"][0]
        message = r"layer_01/cls/000000\.tar, chunk 1: a tar header of '000000000\.cls.*'000000004\.cls.* expected"
        with pytest.raises(DecodeError, match=message):
            store.read([1], [4], "cls")


class TestUnfinished:
    def test_a_store_may_be_read_while_it_grows(self):
        objects = MemoryObjects()
        create_store(objects, SPEC, make_samples(21), {})
        store = open_store(objects)
        assert (store.n_samples, store.n_committed, store.n_valid) == (21, 0, 0)
        assert store.read().shape == (0, 3, 9, 8)
        assert store.verify() == []
        with pytest.raises(
            NotCommittedError, match=r"shard 0 is not committed yet; 0 of 3 shards are\. Run the same make"
        ):
            store.read([0], [3])
        with pytest.raises(NotCommittedError, match="shard 1 is not committed yet"):
            store.chunk(0, "cls", 2)
        with pytest.raises(NotCommittedError, match="shard 2 is not committed yet"):
            store.shard_statistics(2)

    def test_objects_without_commit_are_no_problem_and_no_data(self, objects):
        growing = MemoryObjects()
        for info in objects.list():
            if info.key not in (commit_key(1), "index.parquet"):
                growing.put(info.key, objects.get(info.key))
        store = open_store(growing)
        assert store.verify() == []
        assert store.committed.tolist() == [True, False, True]
        assert store.n_committed == 13
        with pytest.raises(NotCommittedError):
            store.read([0], [8])


class CountingObjects(MemoryObjects):
    """Counts the bytes of objects read in part or whole, commits and documents not among them."""

    fetched = 0
    requests = 0

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        nbytes = sum(buffer.nbytes for buffer in buffers)
        with self._lock:
            self.fetched += nbytes
            self.requests += 1
        return super().read_parts(key, start, buffers)


class FirstGone(CountingObjects):
    """Everything else is read slowly, and not before the first object was asked for."""

    GONE = "layer_00/cls/c/0/0"

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        if key == self.GONE:
            self.asked.set()
        else:
            self.asked.wait(100)
            time.sleep(0.2)
        return super().read_parts(key, start, buffers)


class TestOnlyWhatIsNeeded:
    def counting(self, objects: MemoryObjects) -> CountingObjects:
        made = CountingObjects()
        for info in objects.list():
            made.put(info.key, objects.get(info.key))
        return made

    def test_a_shared_chunk_is_fetched_once(self, objects):
        counting = self.counting(objects)
        open_store(counting).read([0, 2], [0, 1, 2, 3, 3, 0], "patches")
        of_a_sample = {"zarr": 6 * 8 * 2, "webdataset": 1024}[spec_of(objects).backend]
        assert (counting.requests, counting.fetched) == (2, 2 * 4 * of_a_sample)

    def test_only_chunks_that_hold_the_request(self, objects):
        counting = self.counting(objects)
        open_store(counting).read([1], [16, 4], "cls")
        of_a_sample = {"zarr": 8 * 4, "webdataset": 1024}[spec_of(objects).backend]
        assert (counting.requests, counting.fetched) == (2, 2 * 4 * of_a_sample)

    def test_an_error_ends_a_read_at_once(self):
        """Not after all the other chunks, which may take hours."""
        objects = FirstGone()
        write_planted(objects, make_spec(n_samples=400, samples_per_shard=4, samples_per_chunk=1, layers=(0,)))
        objects.delete(FirstGone.GONE)
        with pytest.raises(ObjectMissingError):
            open_store(objects).read()
        assert objects.requests < 300, "of 1,200"

    def test_opening_reads_no_data(self, objects):
        counting = self.counting(objects)
        open_store(counting)
        assert counting.fetched == 0

    def test_cls_of_all_layers_is_less_than_a_hundredth_at_vit_b_14(self):
        """The shape of ViT-B/14 with registers; two chunks are enough, as shares do not depend on their number."""
        spec = make_spec(
            layers=tuple(range(13)),
            dim=768,
            n_registers=4,
            grid=(16, 16),
            n_samples=32,
            samples_per_shard=32,
            samples_per_chunk=16,
        )
        objects = CountingObjects()
        write_blank(objects, spec)
        stored = sum(info.nbytes for info in objects.list())
        store = open_store(objects)
        assert store.read(tokens="cls").shape == (32, 13, 1, 768)
        assert objects.fetched / stored < 0.01
        assert objects.fetched == 32 * 13 * 768 * 4, "nothing but the CLS tokens"


def write_blank(objects: MemoryObjects, spec) -> None:
    """A store of zeros, without the float64 work of a real one."""
    document = create_store(objects, spec, make_samples(spec.n_samples), {})
    buffers = ShardBuffers(spec, lambda nbytes: np.zeros(nbytes, np.uint8))
    shape = (len(spec.layers), len(spec.token_kinds), spec.dim)
    for shard in range(spec.n_shards):
        records = write_shard(objects.put, buffers, shard, Statistics.empty(shape).to_array())
        commit = Commit(shard=shard, store=document.digest, bad_images=(), objects=records, fidelity={})
        objects.put(commit_key(shard), commit.to_bytes())


class TestUnion:
    def pair(self, **changes) -> list[MemoryObjects]:
        made = []
        for layers in ((0, 1), (1, 2)):
            objects = MemoryObjects(f"memory://{layers[0]}/")
            spec = make_spec(layers=layers, **(changes if layers[0] else {}))
            write_planted(objects, spec, BAD)
            made.append(objects)
        return made

    def test_layers_of_both_under_one_roof(self):
        first, second = self.pair()
        union = open_store([first, second])
        assert union.layers == (0, 1, 2)
        assert union.n_valid == 19
        alone = [open_store(first), open_store(second)]
        np.testing.assert_array_equal(union.read([0, 1]), alone[0].read())
        np.testing.assert_array_equal(union.read([2]), alone[1].read([2]))
        np.testing.assert_array_equal(union.read([2, 0], [3, 3])[:, 1], alone[0].read([0], [3, 3])[:, 0])
        np.testing.assert_array_equal(union.statistics.mean[2], alone[1].statistics.mean[1])
        np.testing.assert_array_equal(union.statistics.mean[:2], alone[0].statistics.mean)
        np.testing.assert_array_equal(union.read_head_input(), alone[0].read_head_input())
        assert union.samples.equals(alone[0].samples)
        assert union.verify() == []

    def test_chunks_lie_where_the_union_says(self):
        union = open_store(self.pair())
        for layer in (0, 1, 2):
            where = union.chunk(layer, "patches", 3)
            assert where.key == shard_object_key(union.spec, f"layer_{layer:02d}/patches", 1)
            assert len(union.fetch(where)) == where.nbytes

    def test_damage_in_either_is_reported_with_its_place(self):
        first, second = self.pair()
        second.delete("layer_02/cls/c/0/0")
        first.delete("layer_00/cls/c/0/0")
        problems = open_store([first, second]).verify()
        assert [p.key for p in problems] == ["memory://0//layer_00/cls/c/0/0", "memory://1//layer_02/cls/c/0/0"]
        with pytest.raises(ObjectMissingError, match="layer_02/cls/c/0/0"):
            open_store([first, second]).read([2], [0])

    def test_a_sample_must_be_committed_in_both(self):
        first, second = self.pair()
        for key in ("index.parquet", commit_key(1)):
            second.delete(key)
        union = open_store([first, second])
        assert union.committed.tolist() == [True, False, True]
        with pytest.raises(NotCommittedError, match="shard 1 is not committed yet"):
            union.read([0], [8])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"teacher_weights_digest": "5" * 64}, "teacher_weights_digest"),
            ({"order_seed": 1}, "order_seed"),
            ({"precision": "float32"}, "precision: memory://a/ has 'float16', memory://b/ has 'float32'"),
            ({"n_samples": 20}, "(?s)n_samples.*memory://b/ is of other samples than memory://a/"),
        ],
    )
    def test_stores_that_do_not_belong_together(self, changes, message):
        first, second = MemoryObjects("memory://a/"), MemoryObjects("memory://b/")
        write_planted(first, make_spec(layers=(0, 1)))
        write_planted(second, make_spec(layers=(2,), **changes))
        with pytest.raises(SchemaError, match=message):
            open_store([first, second])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"backend": "webdataset"}, "backend: memory://a/ has 'zarr', memory://b/ has 'webdataset'"),
            ({"codec": "lz4", "shuffle": "byte"}, "codec: memory://a/ has 'none', memory://b/ has 'lz4'"),
        ],
    )
    def test_stores_of_other_forms_are_told_how_to_become_one(self, changes, message):
        first, second = MemoryObjects("memory://a/"), MemoryObjects("memory://b/")
        write_planted(first, make_spec(layers=(0, 1)), BAD)
        write_planted(second, make_spec(layers=(2,), **changes), BAD)
        with pytest.raises(SchemaError, match=message) as error:
            open_store([first, second])
        assert error.value.problems[-1].startswith("bring them into one form first: make convert STORE=memory://b/ TO=")
        converted = MemoryObjects("memory://c/")
        copy_store(second, converted, backend="zarr", codec="none")
        union = open_store([first, converted])
        np.testing.assert_array_equal(union.read([2]), open_store(second).read())

    @pytest.mark.parametrize("form", [{"backend": "webdataset", "codec": "gzip"}, {"precision": "int8"}])
    def test_unions_of_every_form(self, form):
        whole, parts = MemoryObjects(), [MemoryObjects("memory://a/"), MemoryObjects("memory://b/")]
        write_planted(whole, make_spec(**form), BAD)
        for part, layers in zip(parts, ((0, 2), (1,))):
            copy_store(whole, part, layers=layers)
        union, one = open_store(parts), open_store(whole)
        assert union.spec == one.spec
        for kind in ("all", "patches", "patch_mean"):
            np.testing.assert_array_equal(union.read(tokens=kind), one.read(tokens=kind))
        np.testing.assert_array_equal(union.statistics.to_array(), one.statistics.to_array())
        assert union.fidelity == one.fidelity
        assert union.verify() == []

    def test_documents_are_those_of_the_store_that_holds_the_layer(self):
        """So two unions are told apart by the layers of either store, and each document can be read."""
        first, second = self.pair()
        union = open_store([first, second])
        assert {key.partition("/")[0] for key in union.document.documents} >= {"layer_00", "layer_01", "layer_02"}
        for key in union.document.documents:
            assert union.read_document(key)

    def test_a_union_is_read_only(self):
        union = open_store(self.pair())
        for change in (lambda: union.objects.put("x", b""), lambda: union.objects.delete("x"), union.objects.sweep):
            with pytest.raises(PermissionError, match="read-only"):
                change()

    def test_one_store_is_no_union(self):
        [only, _] = self.pair()
        assert type(open_store([only])) is Store


def test_documents_are_written_before_store_json_and_commits_last():
    """A reader that sees store.json finds all it names; one that sees a commit finds its objects."""
    order: list[str] = []

    class Recording(MemoryObjects):
        def put(self, key, data) -> None:
            order.append(key)
            super().put(key, data)

    objects = Recording()
    write_planted(objects, SPEC, teacher_files={"config.json": b"{}"})
    at = {key: i for i, key in enumerate(order)}
    assert len(at) == len(order), "nothing is written twice"
    document = read_store_document(objects, "")
    assert max(at[key] for key in document.documents) < at["store.json"]
    for key in order:
        if key.startswith(COMMITS_PREFIX):
            store = open_store(objects)
            shard = int(key[8:14])
            for kind in store.spec.token_kinds:
                assert at[shard_object_key(SPEC, f"layer_02/{kind}", shard)] < at[key]
    assert order[-1] == "index.parquet"


def test_a_folder_and_its_representation(tmp_path):
    write_planted(FolderObjects(tmp_path / "store"), SPEC, BAD)
    store = open_store(tmp_path / "store")
    assert repr(store) == f"<Store {tmp_path / 'store'}: 19 valid of 21 samples, layers 0 to 2 of fake, float16>"
    write_planted(FolderObjects(tmp_path / "part"), make_spec(layers=(0, 2)))
    assert "layers 0, 2 of fake" in repr(open_store(tmp_path / "part"))
    assert store.verify(threads=1) == []
    seen: list[tuple[int, int]] = []
    store.verify(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == store.table.stored_nbytes
    assert seen == sorted(seen)

"""Damage of every kind to every kind of object: verify reports it, and no read ever gives it out as data."""

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from infra.objects import MemoryObjects, ObjectError, Objects
from storage_schemas import open_store
from storage_schemas.errors import StoreError
from storage_schemas.from_arrays import split_kinds
from storage_schemas.keys import layer_path
from storage_schemas.reader import load_commits
from storage_schemas.spec import StoreSpec
from storage_schemas.verify import check_object, verify_store
from tests.stores import make_spec, planted_head_inputs, planted_states, write_planted

# Two stores, since whole objects of uncompressed chunks have checksums that do not depend on what is in them.
SMALL = {"n_samples": 14, "layers": (0, 1)}
SPECS = (make_spec(codec="zstd-1", shuffle="byte", **SMALL), make_spec(precision="float32", **SMALL))
BAD_IMAGES = {5: "truncated", 13: "empty"}
VALID = [i for i in range(14) if i not in BAD_IMAGES]
TEACHER_FILES = {"config.json": b'{"name": "fake"}\n', "weights.safetensors": bytes(range(256)) * 4}

KINDS = {
    "store.json": r"store\.json",
    "samples.parquet": r"samples\.parquet",
    "zarr.json": r"(.*/)?zarr\.json",
    "commit": r"commits/.*",
    "index": r"index\.parquet",
    "statistics": r"statistics/c/.*",
    "data": r"(layer_.*|head_input)/c/.*",
    "teacher": r"teacher/.*",
}
SINGLE = ("store.json", "samples.parquet", "index")  # there is one of each, so nothing to swap it with
CASES_PER_KIND = 38  # 304 in all


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A sound store and what it holds."""

    spec: StoreSpec
    objects: MemoryObjects
    states: np.ndarray
    patch_means: np.ndarray
    head_inputs: np.ndarray
    statistics: np.ndarray
    samples: list[dict]


@cache
def sound(which: int) -> Truth:
    spec, objects = SPECS[which], MemoryObjects()
    write_planted(objects, spec, BAD_IMAGES, teacher_files=TEACHER_FILES)
    store, rows = open_store(objects), range(spec.n_samples)
    assert store.verify() == []
    states = planted_states(spec, rows)
    return Truth(
        spec=spec,
        objects=objects,
        states=states,
        patch_means=split_kinds(spec, states)["patch_mean"],
        head_inputs=planted_head_inputs(spec, rows),
        statistics=store.statistics.to_array(),
        samples=store.samples.drop(["valid"]).to_pylist(),
    )


def copy_of(source: MemoryObjects) -> MemoryObjects:
    made = MemoryObjects()
    for info in source.list():
        made.put(info.key, source.get(info.key))
    return made


def keys_of(objects: Objects, kind: str) -> list[str]:
    return [info.key for info in objects.list() if re.fullmatch(KINDS[kind], info.key)]


def damage(objects: MemoryObjects, kind: str, how: str, rng: random.Random) -> list[str]:
    """Damage one object, or swap two; gives their keys."""
    keys = keys_of(objects, kind)
    key = rng.choice(keys)
    data = objects.get(key)
    if how == "flip":
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        objects.put(key, changed)
    elif how == "truncate":
        objects.put(key, data[: rng.randrange(len(data))])
    elif how == "delete":
        objects.delete(key)
    else:
        other = rng.choice([k for k in keys if objects.get(k) != data and same_array(k, key)])
        objects.put(key, objects.get(other))
        objects.put(other, data)
        return [key, other]
    return [key]


def same_array(a: str, b: str) -> bool:
    """Shard objects are swapped within one array, where sizes agree; other things with any of their kind."""
    return "/c/" not in a or a.partition("/c/")[0] == b.partition("/c/")[0]


def right_or_error(what: str, read: Callable[[], bool]) -> bool:
    """Whether the read gave the right values; False if it raised one of our errors."""
    try:
        right = read()
    except (StoreError, ObjectError):
        return False
    assert right, f"wrong data was given out: {what}"
    return True


def check_reads(objects: Objects, truth: Truth, damaged: Sequence[str]) -> None:
    """Everything that a reader can ask of the store is right or raises."""
    try:
        store = open_store(objects)
    except (StoreError, ObjectError):
        return
    wholes = {
        "states": lambda: np.array_equal(store.read(), truth.states[VALID]),
        "patch means": lambda: np.array_equal(store.read(tokens="patch_mean")[:, :, 0], truth.patch_means[VALID]),
        "head inputs": lambda: np.array_equal(store.read_head_input(), truth.head_inputs[VALID]),
    }
    right = [right_or_error(f"all {what}", read) for what, read in wholes.items()]
    if not all(right):
        for what, read in single_reads(store, truth, damaged):
            right_or_error(what, read)
    for row in BAD_IMAGES:
        with pytest.raises((StoreError, ObjectError)):
            store.read([0], [row])
    right_or_error("statistics", lambda: np.array_equal(store.statistics.to_array(), truth.statistics))
    right_or_error("samples", lambda: store.samples.drop(["valid"]).to_pylist() == truth.samples)
    right_or_error("teacher files", lambda: store.read_teacher_files() == TEACHER_FILES)


def single_reads(store, truth: Truth, damaged: Sequence[str]) -> Iterator[tuple[str, Callable[[], bool]]]:
    """One row of every chunk, kind by kind, of the layers that were damaged, or of the first."""
    spec = truth.spec
    layers = [layer for layer in spec.layers if any(layer_path(layer) in key for key in damaged)] or [0]
    for row in VALID[:: spec.samples_per_chunk - 1]:
        yield (
            f"head_input of {row}",
            lambda row=row: np.array_equal(store.read_head_input([row]), truth.head_inputs[row : row + 1]),
        )
        for layer in layers:
            for kind, values in split_kinds(spec, truth.states[row, spec.layers.index(layer)]).items():
                yield (
                    f"{kind} at layer {layer} of sample {row}",
                    lambda row=row, layer=layer, kind=kind, values=values: np.array_equal(
                        store.read([layer], [row], kind)[0, 0], values.reshape(-1, spec.dim)
                    ),
                )


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_reported_and_never_read_as_data(kind):
    hows = ("flip", "truncate", "delete") if kind in SINGLE else ("flip", "truncate", "delete", "swap")
    for case in range(CASES_PER_KIND):
        how, truth = hows[case % len(hows)], sound(case // len(hows) % 2)
        objects = copy_of(truth.objects)
        keys = damage(objects, kind, how, random.Random(f"{kind} {case}"))
        reported = {problem.key for problem in verify_store(objects)}
        assert reported, f"verify does not report {how} of {keys} (case {case})"
        if kind != "store.json":  # without which nothing else can be judged
            assert reported >= set(keys), f"{how} of {keys} (case {case})"
        check_reads(objects, truth, keys)


@pytest.mark.parametrize("which", [0, 1])
def test_any_flipped_byte_of_a_shard_is_reported(which):
    """Every single place: payloads, the checksums between them, the sharding index and its own checksum."""
    spec = dataclasses.replace(SPECS[which], n_samples=5, dim=2, grid=(1, 1))
    objects = MemoryObjects()
    write_planted(objects, spec)
    [commit, *_] = [record for _, record in load_commits(objects, open_store(objects).document, [0])]
    n_places = 0
    for key, record in commit.objects.items():
        data = bytearray(objects.get(key))
        for place in range(len(data)):
            data[place] ^= 1 << place % 8
            objects.put(key, data)
            assert [p.key for p in check_object(objects, len(data), 0, key, record)] == [key], f"byte {place} of {key}"
            data[place] ^= 1 << place % 8
            n_places += 1
        objects.put(key, data)
        assert check_object(objects, len(data), 0, key, record) == []
    assert n_places == sum(record.nbytes for record in commit.objects.values()) > 1000


def test_the_check_itself_can_fail():
    """A store of other states, sound in itself, is wrong data."""
    other = MemoryObjects()
    write_planted(other, SPECS[0], BAD_IMAGES, seed=1, teacher_files=TEACHER_FILES)
    with pytest.raises(AssertionError, match="wrong data was given out: all states"):
        check_reads(other, sound(0), [])


@pytest.mark.parametrize("kind", ["statistics", "data"])
def test_whole_object_checksums_alone_would_not_see_a_swap(kind):
    """Why verify looks at every chunk: two objects of one array, other bytes, the same CRC32C over the whole."""
    from crc32c import crc32c

    objects = sound(1).objects
    first, second = [key for key in keys_of(objects, kind) if same_array(key, keys_of(objects, kind)[0])][:2]
    assert objects.get(first) != objects.get(second)
    assert crc32c(objects.get(first)) == crc32c(objects.get(second))

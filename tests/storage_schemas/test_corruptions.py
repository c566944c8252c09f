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
from storage_schemas.from_arrays import split_kinds, write_store
from storage_schemas.keys import layer_path
from storage_schemas.object_checks import byte_problems, check_object
from storage_schemas.reader import load_commits
from storage_schemas.spec import ARRAY_KINDS, BACKENDS, HEAD_INPUT, StoreSpec
from storage_schemas.verify import verify_store
from tests.stores import as_stored, make_samples, make_spec, planted_head_inputs, planted_states, write_planted

# One of each back end compressed, one not: whole objects of plain chunks may have checksums that do not depend on what
# is in them. int8, since it has every kind of array.
SMALL = {"n_samples": 14, "layers": (0, 1)}
SPECS = {
    "zarr": (
        make_spec(codec="zstd-1", shuffle="byte", **SMALL),
        make_spec(precision="int8", **SMALL),
    ),
    "webdataset": (
        make_spec(backend="webdataset", codec="gzip", **SMALL),
        make_spec(backend="webdataset", precision="int8", **SMALL),
    ),
}
BAD_IMAGES = {5: "truncated", 13: "empty"}
VALID = [i for i in range(14) if i not in BAD_IMAGES]
TEACHER_FILES = {"config.json": b'{"name": "fake"}\n', "weights.safetensors": bytes(range(256)) * 4}

DATA = {kind: rf"(layer_.*/)?{kind}/(c/.*|\d+\.tar)" for kind in (*ARRAY_KINDS, HEAD_INPUT)}
KINDS = {
    "store.json": r"store\.json",
    "samples.parquet": r"samples\.parquet",
    "zarr.json": r"(.*/)?zarr\.json",
    "commit": r"commits/.*",
    "index": r"index\.parquet",
    "teacher": r"teacher/.*",
    "statistics": r"statistics/c/.*",
    **DATA,
}
HOWS = ("flip", "truncate", "delete", "swap", "foreign")
N_DEFAULT, N_SLOW = 5, 40  # of each kind and back end: each damage once, 130 and 1,040 in all


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A sound store and what it holds."""

    spec: StoreSpec
    objects: MemoryObjects
    states: np.ndarray
    kinds: dict[str, np.ndarray]
    head_inputs: np.ndarray
    statistics: np.ndarray
    samples: list[dict]


@cache
def sound(backend: str, which: int) -> Truth:
    spec, objects = SPECS[backend][which], MemoryObjects()
    write_planted(objects, spec, BAD_IMAGES, teacher_files=TEACHER_FILES)
    store, rows = open_store(objects), range(spec.n_samples)
    assert store.verify() == []
    raw = planted_states(spec, rows)
    return Truth(
        spec=spec,
        objects=objects,
        states=as_stored(spec, raw),
        kinds=split_kinds(spec, raw) | {"patches": split_kinds(spec, as_stored(spec, raw))["patches"]},
        head_inputs=planted_head_inputs(spec, rows),
        statistics=store.statistics.to_array(),
        samples=store.samples.drop(["valid"]).to_pylist(),
    )


@cache
def foreign(backend: str, which: int, changes: str) -> MemoryObjects:
    """A sound store of another identity and content; with the same shapes, or with others."""
    spec = dataclasses.replace(SPECS[backend][which], **{"same": {"order_seed": 43}, "other": {"dim": 6}}[changes])
    objects = MemoryObjects()
    samples = [dataclasses.replace(sample, label=7) for sample in make_samples(spec.n_samples)]
    teacher_files = {name: data[::-1] for name, data in TEACHER_FILES.items()}
    write_store(
        objects,
        spec,
        samples,
        lambda rows: planted_states(spec, rows, seed=1),
        head_inputs_of=lambda rows: planted_head_inputs(spec, rows, seed=1),
        bad_images=BAD_IMAGES,
        teacher_files=teacher_files,
    )
    return objects


def copy_of(source: MemoryObjects) -> MemoryObjects:
    made = MemoryObjects()
    for info in source.list():
        made.put(info.key, source.get(info.key))
    return made


def keys_of(objects: Objects, kind: str) -> list[str]:
    return [info.key for info in objects.list() if re.fullmatch(KINDS[kind], info.key)]


def damage(objects: MemoryObjects, others: MemoryObjects, kind: str, how: str, rng: random.Random) -> list[str]:
    """Damage one object, put one of `others` in its place, or swap two; gives their keys."""
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
    elif how == "foreign":
        key = rng.choice([k for k in keys_of(others, kind) if k in keys and others.get(k) != objects.get(k)])
        objects.put(key, others.get(key))
    else:
        differing = [k for k in keys if objects.get(k) != data]
        alike = [k for k in differing if len(objects.get(k)) == len(data)]  # the hardest to see
        other = rng.choice(alike or differing)
        objects.put(key, objects.get(other))
        objects.put(other, data)
        return [key, other]
    return [key]


def hows_of(objects: Objects, kind: str) -> tuple[str, ...]:
    """Where there is one object of a kind, it cannot be swapped with another."""
    return HOWS if len(keys_of(objects, kind)) > 1 else tuple(how for how in HOWS if how != "swap")


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
        "patch means": lambda: np.array_equal(
            store.read(tokens="patch_mean")[:, :, 0], truth.kinds["patch_mean"][VALID]
        ),
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
            for kind, values in truth.kinds.items():
                expected = values[row, spec.layers.index(layer)].reshape(-1, spec.dim)
                yield (
                    f"{kind} at layer {layer} of sample {row}",
                    lambda row=row, layer=layer, kind=kind, expected=expected: np.array_equal(
                        store.read([layer], [row], kind)[0, 0], expected
                    ),
                )


def check_damage(backend: str, kind: str, case: int) -> None:
    which = 1 if kind == "patches_scale" else (case + case // len(HOWS)) % 2
    truth = sound(backend, which)
    objects, hows = copy_of(truth.objects), hows_of(truth.objects, kind)
    how = hows[case % len(hows)]
    rng = random.Random(f"{backend} {kind} {case}")
    others = foreign(backend, which, "other" if kind == "zarr.json" else rng.choice(("same", "other")))
    keys = damage(objects, others, kind, how, rng)
    reported = {problem.key for problem in verify_store(objects)}
    assert reported, f"verify does not report {how} of {keys} (case {case})"
    if kind != "store.json":  # without which nothing else can be judged
        assert reported >= set(keys), f"{how} of {keys} (case {case})"
    check_reads(objects, truth, keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_damage_is_reported_and_never_read_as_data(backend, kind):
    for case in range(N_DEFAULT):
        check_damage(backend, kind, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_1040_random_damages(backend, kind):
    for case in range(N_DEFAULT, N_DEFAULT + N_SLOW):
        check_damage(backend, kind, case)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_flipped_byte_of_a_shard_is_reported(backend, which):
    """Every single place: payloads, the checksums between them, the sharding index or the end of the archive."""
    spec = dataclasses.replace(SPECS[backend][which], n_samples=5, dim=2, grid=(1, 1), layers=(1,))
    objects = MemoryObjects()
    write_planted(objects, spec)
    [commit, *_] = [record for _, record in load_commits(objects, open_store(objects).document, [0])]
    n_places = 0
    for key, record in commit.objects.items():
        data = bytearray(objects.get(key))
        view = memoryview(data)
        for place in range(len(data)):
            data[place] ^= 1 << place % 8
            assert [p.key for p in byte_problems(view, 0, key, record)] == [key], f"byte {place} of {key}"
            data[place] ^= 1 << place % 8
            n_places += 1
        assert check_object(objects, len(data), 0, key, record) == byte_problems(view, 0, key, record) == []
    assert n_places == sum(record.nbytes for record in commit.objects.values()) > 1000


def test_the_check_itself_can_fail():
    """A store of other states, sound in itself, is wrong data."""
    other = MemoryObjects()
    write_planted(other, SPECS["zarr"][0], BAD_IMAGES, seed=1, teacher_files=TEACHER_FILES)
    with pytest.raises(AssertionError, match="wrong data was given out: all states"):
        check_reads(other, sound("zarr", 0), [])


@pytest.mark.parametrize("kind", ["statistics", "cls", "patches"])
def test_whole_object_checksums_alone_would_not_see_a_swap(kind):
    """Why verify looks at every chunk: two objects of one array, other bytes, the same CRC32C over the whole."""
    from crc32c import crc32c

    objects = sound("zarr", 1).objects
    first, second = keys_of(objects, kind)[:2]
    assert objects.get(first) != objects.get(second)
    assert crc32c(objects.get(first)) == crc32c(objects.get(second))

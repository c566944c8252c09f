"""Small stores with planted states, for tests of everything that reads one."""

from functools import lru_cache
from typing import Any

import numpy as np

from infra.objects import FolderObjects, MemoryObjects, Objects
from storage_schemas.from_arrays import write_store
from storage_schemas.precision import restore_patches, round_patches
from storage_schemas.samples import Sample
from storage_schemas.spec import StoreSpec


def make_spec(**changes: Any) -> StoreSpec:
    """A tiny teacher's store: 3 layers, CLS + 2 registers + 2 x 3 patches, 8 channels, 21 samples in 3 shards."""
    values: dict[str, Any] = {
        "layers": (0, 1, 2),
        "dim": 8,
        "has_cls": True,
        "n_registers": 2,
        "grid": (2, 3),
        "precision": "float16",
        "n_samples": 21,
        "samples_per_shard": 8,
        "samples_per_chunk": 4,
        "teacher": "fake",
        "teacher_weights_digest": "0" * 64,
        "preprocessing": {"image_size": 32},
        "micro_batch": 4,
        "source_digest": "1" * 64,
    }
    return StoreSpec(**(values | changes))


def make_samples(n: int) -> list[Sample]:
    return [
        Sample(sample_id=f"class{i % 3}/{i:04d}.png", label=i % 3, class_name=f"class{i % 3}", nbytes=100 + i)
        for i in range(n)
    ]


def planted_states(spec: StoreSpec, rows: range, seed: int = 0) -> np.ndarray:
    """(sample, layer, token, dim) float32 that float16 holds exactly; a function of the sample index alone."""
    out = np.empty((len(rows), len(spec.layers), spec.n_tokens, spec.dim), np.float32)
    for i, row in enumerate(rows):
        out[i] = np.random.default_rng((seed, row)).integers(-1000, 1000, out.shape[1:]) / 64
    return out


def as_stored(spec: StoreSpec, states: np.ndarray) -> np.ndarray:
    """States as a reader gets them back: patches rounded to the precision."""
    first_patch = spec.n_tokens - spec.n_patches
    restored = restore_patches(spec.precision, *round_patches(spec.precision, states[..., first_patch:, :]))
    return np.concatenate([states[..., :first_patch, :], restored], axis=-2)


def planted_head_inputs(spec: StoreSpec, rows: range, seed: int = 0) -> np.ndarray:
    """(sample, 2 dim) float32, a function of the sample index alone."""
    made = [np.random.default_rng((seed, row, 1)).standard_normal(2 * spec.dim) for row in rows]
    return np.array(made, np.float32)


def write_planted(
    objects: Objects,
    spec: StoreSpec,
    bad_images: dict[int, str] | None = None,
    seed: int = 0,
    teacher_files: dict[str, bytes] | None = None,
) -> None:
    """Write a store of planted states. Small ones in memory or in a folder are made once and then copied."""
    bad, files = tuple((bad_images or {}).items()), tuple((teacher_files or {}).items())
    is_small = spec.n_samples * len(spec.layers) * spec.n_tokens * spec.dim <= 100_000
    if type(objects) in (MemoryObjects, FolderObjects) and is_small:
        for key, data in _planted(_Hashed(spec), bad, seed, files, (make_samples, planted_states, planted_head_inputs)):
            objects.put(key, data)
    else:
        write_planted_anew(objects, spec, bad_images, seed, teacher_files)


class _Hashed:
    """A spec by all of its values: what it holds of preprocessing has no hash."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec, self._values = spec, repr(spec)

    def __hash__(self) -> int:
        return hash(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._values == other._values


@lru_cache(maxsize=100)
def _planted(
    hashed: _Hashed,
    bad_images: tuple[tuple[int, str], ...],
    seed: int,
    teacher_files: tuple[tuple[str, bytes], ...],
    made_by: tuple[object, ...],  # the functions below, or what a test has put in their places
) -> list[tuple[str, bytes]]:
    made = MemoryObjects()
    write_planted_anew(made, hashed.spec, dict(bad_images), seed, dict(teacher_files))
    return [(info.key, made.get(info.key)) for info in made.list()]


def write_planted_anew(
    objects: Objects,
    spec: StoreSpec,
    bad_images: dict[int, str] | None = None,
    seed: int = 0,
    teacher_files: dict[str, bytes] | None = None,
) -> None:
    """`write_planted` without copies, piece by piece into these objects: for tests of how that is done."""
    write_store(
        objects,
        spec,
        make_samples(spec.n_samples),
        lambda rows: planted_states(spec, rows, seed),
        head_inputs_of=lambda rows: planted_head_inputs(spec, rows, seed),
        bad_images=bad_images or {},
        teacher_files=teacher_files or {},
    )

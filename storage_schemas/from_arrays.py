"""Make a store from states that are already in memory: other frameworks' activations, tests, benchmarks."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from infra.objects import Objects
from storage_schemas.commit import Commit, Fidelity
from storage_schemas.create import create_store
from storage_schemas.errors import SchemaError
from storage_schemas.index import index_to_bytes
from storage_schemas.keys import INDEX_KEY, array_path, commit_key
from storage_schemas.precision import restore_patches, round_patches
from storage_schemas.samples import Sample
from storage_schemas.shard_buffers import ShardBuffers, write_shard
from storage_schemas.spec import HEAD_INPUT, StoreSpec
from storage_schemas.statistics import Statistics


def write_store(
    objects: Objects,
    spec: StoreSpec,
    samples: Sequence[Sample],
    states_of: Callable[[range], Float32[np.ndarray, "sample layer token dim"]],
    *,
    head_inputs_of: Callable[[range], Float32[np.ndarray, "sample dim2"]] | None = None,
    bad_images: Mapping[int, str] | Mapping[np.integer, str] | None = None,
    teacher_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a whole store from arrays, shard by shard.

    Args:
        objects: Where it goes.
        spec: Its identity.
        samples: In store order.
        states_of: Gives float32 states of a range of sample indices, layers as in `spec.layers`, tokens in order.
        head_inputs_of: Likewise what linear heads read, [final-norm CLS; mean of final-norm patches]. Without it that
            array holds NaN, and asking the store for it raises.
        bad_images: Code by index of samples without states; what `states_of` gives for them is ignored.
        teacher_files: As for `create_store`.

    Raises:
        SchemaError: States of another shape or type, not finite, or that the precision cannot hold; names the place.
    """
    document = create_store(objects, spec, samples, teacher_files or {})
    buffers = ShardBuffers(spec)
    commits = []
    for shard in range(spec.n_shards):
        rows = spec.shard_samples(shard)
        bad = {int(index): code for index, code in (bad_images or {}).items() if index in rows}
        valid = [i for i in range(len(rows)) if rows[i] not in bad]
        states = np.zeros((len(rows), len(spec.layers), spec.n_tokens, spec.dim), np.float32)
        states[valid] = _checked(states_of(rows), f"states of samples {rows}", states.shape)[valid]
        buffers.begin(shard)
        statistics, fidelity = _fill(buffers, spec, states, valid)
        if spec.has_head_input:
            head_inputs = np.full((len(rows), 2 * spec.dim), np.nan, np.float32)
            if head_inputs_of is not None:
                found = head_inputs_of(rows)
                head_inputs[valid] = _checked(found, f"head inputs of samples {rows}", head_inputs.shape)[valid]
            buffers.assign(HEAD_INPUT, 0, head_inputs)
        for index in bad:
            buffers.invalidate(index - rows.start)
        commit = Commit(
            shard=shard,
            store=document.digest,
            bad_images=tuple(sorted(bad.items())),
            objects=write_shard(objects.put, buffers, shard, statistics.to_array()),
            fidelity=fidelity,
        )
        objects.put(commit_key(shard), commit.to_bytes())
        commits.append(commit)
    objects.put(INDEX_KEY, index_to_bytes(spec, document.digest, commits))


def split_kinds(
    spec: StoreSpec, states: Float32[np.ndarray, "*batch token dim"]
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Tokens in the teacher's order to the kinds of the format; patch_mean is reduced in float64."""
    first_register, first_patch = int(spec.has_cls), int(spec.has_cls) + spec.n_registers
    patches = states[..., first_patch:, :]
    every = {
        "cls": states[..., 0, :],
        "registers": states[..., first_register:first_patch, :],
        "patches": patches,
        "patch_mean": patches.mean(axis=-2, dtype=np.float64).astype(np.float32),
    }
    return {kind: every[kind] for kind in spec.token_kinds}


def _fill(
    buffers: ShardBuffers, spec: StoreSpec, states: np.ndarray, valid: list[int]
) -> tuple[Statistics, dict[str, Fidelity]]:
    shape = (len(spec.layers), len(spec.token_kinds), spec.dim)
    moments, fidelity = Statistics.empty(shape), {}
    for i, layer in enumerate(spec.layers):
        for j, (kind, values) in enumerate(split_kinds(spec, states[:, i]).items()):
            seen = values[valid].reshape(-1, spec.dim).astype(np.float64)
            if not np.isfinite(seen).all():
                raise SchemaError(array_path(layer, kind), ["holds a state that is NaN or infinite"])
            rounds = kind == "patches" and spec.precision != "float32"
            restored = _assign_rounded(buffers, layer, values) if rounds else values
            if not rounds:
                buffers.assign(array_path(layer, kind), 0, values)
            if len(seen):
                mean = seen.mean(axis=0)
                m2 = ((seen - mean) ** 2).sum(axis=0)
                moments.count[i, j], moments.mean[i, j], moments.m2[i, j] = len(seen), mean, m2
                moments.min[i, j], moments.max[i, j] = seen.min(axis=0), seen.max(axis=0)
                if rounds:
                    error = restored[valid].reshape(-1, spec.dim).astype(np.float64) - seen
                    fidelity[array_path(layer, kind)] = make_fidelity(
                        float((error**2).sum()), float((seen**2).sum()), float(m2.sum()), float(np.abs(error).max())
                    )
    return moments, fidelity


def _assign_rounded(buffers: ShardBuffers, layer: int, patches: np.ndarray) -> np.ndarray:
    """Put the patches of a shard as its precision keeps them; returns what a reader will get."""
    precision = buffers.spec.precision
    try:
        stored, scale = round_patches(precision, patches)
    except SchemaError as error:
        raise SchemaError(array_path(layer, "patches"), error.problems) from error
    buffers.assign(array_path(layer, "patches"), 0, stored)
    if scale is not None:
        buffers.assign(array_path(layer, "patches_scale"), 0, scale)
    return restore_patches(precision, stored, scale)


def _checked(values: np.ndarray, what: str, shape: tuple[int, ...]) -> np.ndarray:
    if values.shape != shape or values.dtype != np.float32:
        raise SchemaError(what, [f"shape {values.shape} of {values.dtype}, expected {shape} of float32"])
    return values


def make_fidelity(squared_error: float, squares: float, deviations: float, worst: float) -> Fidelity:
    """Fidelity from its sums; exact values have relative error 0 and R2 1 even where all values are equal."""
    return Fidelity(
        relative_mse=squared_error / squares if squares else 0.0,
        r2=1 - squared_error / deviations if deviations else float(squared_error == 0),
        worst=worst,
    )

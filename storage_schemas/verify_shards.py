"""The data objects of one shard, re-read and checked: their bytes, then what the commit says of the values in them."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from threading import Lock

import numpy as np

from infra.objects import GetRange
from storage_schemas.codecs import DecodeError, raw_chunk_nbytes
from storage_schemas.commit import Commit
from storage_schemas.consistency import (
    fidelity_problems,
    mean_problems,
    moment_problems,
    moments_of,
    moments_of_blocks,
    patch_sums,
)
from storage_schemas.errors import Problem
from storage_schemas.keys import (
    STATISTIC_NAMES,
    array_kind,
    array_path,
    commit_key,
    shard_object_key,
    sharded_array_paths,
    statistics_key,
)
from storage_schemas.layout import decode_payload
from storage_schemas.object_checks import read_checked
from storage_schemas.spec import HEAD_INPUT, StoreSpec
from storage_schemas.statistics import Statistics


class ShardChecks:
    """Checks of one shard that may run in any threads, each once; one holds at most one large object in memory.

    Args:
        objects: Of the store.
        spec: Its identity.
        commit: Of the shard.
        sizes: Of all objects, as listed.
        advance: Told the bytes of each object that has been checked.
    """

    def __init__(
        self,
        objects: GetRange,
        spec: StoreSpec,
        commit: Commit,
        sizes: Mapping[str, int],
        advance: Callable[[int], None],
    ) -> None:
        self.objects, self.spec, self.commit, self.sizes, self.advance = objects, spec, commit, sizes, advance
        self._lock = Lock()
        self._read_statistics: tuple[Statistics | None, list[Problem]] | None = None
        samples = spec.shard_samples(commit.shard)
        self._valid = np.ones(len(samples), bool)
        self._valid[[index - samples.start for index, _ in commit.bad_images]] = False

    def checks(self) -> list[Callable[[], list[Problem]]]:
        """What there is to do: the statistics, each layer, head_input."""
        layers = [partial(self._check_layer, layer) for layer in self.spec.layers]
        return [self._check_statistics, *layers, *([self._check_head_input] if self.spec.has_head_input else [])]

    def _check_statistics(self) -> list[Problem]:
        """The object itself, and that errors are given of what was rounded and of nothing else."""
        rounded = {path for path in sharded_array_paths(self.spec) if self._is_rounded(path)}
        problems = [
            self._fidelity_problem(
                path, "none, though it was rounded" if path in rounded else "one, though it is exact"
            )
            for path in sorted(rounded ^ set(self.commit.fidelity))
        ]
        return [*self._statistics[1], *problems]

    def _check_head_input(self) -> list[Problem]:
        return self._read(HEAD_INPUT)[1]

    def _check_layer(self, layer: int) -> list[Problem]:
        """The objects of a layer, patches last; then its values."""
        arrays: dict[str, np.ndarray] = {}
        problems: list[Problem] = []
        kinds: list[str] = [kind for kind in self.spec.array_kinds if kind != "patches"]
        try:
            for kind in kinds:
                data, found = self._read(array_path(layer, kind))
                problems += found
                if not found:
                    arrays[kind] = np.concatenate(list(self._values(array_path(layer, kind), data)))
            data, found = self._read(array_path(layer, "patches"))
            problems += found
            if not problems and self._statistics[0] is not None:
                with np.errstate(all="ignore"):  # NaN and infinity are among what is looked for
                    return list(self._value_problems(layer, arrays, data, self._statistics[0]))
        except _UndecodableError as error:
            problems.append(error.problem)
        return problems

    def _value_problems(
        self, layer: int, arrays: dict[str, np.ndarray], data: memoryview, statistics: Statistics
    ) -> Iterator[Problem]:
        """What the values of a layer say against its statistics and measured errors."""
        spec, path, place = self.spec, array_path(layer, "patches"), self.spec.layers.index(layer)
        stated = {kind: _select(statistics, place, j) for j, kind in enumerate(spec.token_kinds)}
        found = {
            kind: list(moment_problems(moments_of(arrays[kind]), stated[kind])) for kind in stated if kind in arrays
        }
        found["patch_mean"] += mean_problems(stated["patches"], stated["patch_mean"])
        blocks = self._values(path, data)
        if not self._is_rounded(path):
            found["patches"] = list(moment_problems(moments_of_blocks(blocks, spec.dim), stated["patches"]))
        elif stated["patches"].count.tolist() != [float(self._valid.sum() * spec.n_patches)] * spec.dim:
            found["patches"] = [
                f"count is {stated['patches'].count[0]:.12g}, there are {self._valid.sum()} valid samples"
            ]
        elif path in self.commit.fidelity:
            scale = arrays.get("patches_scale")
            sums = patch_sums(spec.precision, _aligned(blocks, scale, arrays["patch_mean"]), stated["patches"])
            fidelity = self.commit.fidelity[path]
            wrong = list(fidelity_problems(spec.precision, fidelity, stated["patches"], sums, spec.n_patches, scale))
            if wrong:
                yield self._fidelity_problem(path, "; ".join(wrong))
        for kind, wrong in found.items():
            if wrong:
                yield Problem(
                    key=statistics_key(self.commit.shard),
                    what=f"statistics of {array_path(layer, kind)}",
                    expected="moments of the stored values",
                    found="; ".join(wrong),
                    shard=self.commit.shard,
                )

    @property
    def _statistics(self) -> tuple[Statistics | None, list[Problem]]:
        """Moments of the shard, None if their object is damaged; read once."""
        with self._lock:
            if self._read_statistics is None:
                key = statistics_key(self.commit.shard)
                data, problems = self._read_object(key)
                spec = self.spec
                shape = (len(spec.layers), len(spec.token_kinds), len(STATISTIC_NAMES), spec.dim)
                array = None if problems else np.frombuffer(data, "<f8", count=math.prod(shape)).reshape(shape)
                self._read_statistics = None if array is None else Statistics.from_array(array), problems
            return self._read_statistics

    def _is_rounded(self, path: str) -> bool:
        return array_kind(path) == "patches" and self.spec.precision != "float32" and bool(self._valid.any())

    def _read(self, path: str) -> tuple[memoryview, list[Problem]]:
        return self._read_object(shard_object_key(self.spec, path, self.commit.shard))

    def _read_object(self, key: str) -> tuple[memoryview, list[Problem]]:
        record = self.commit.objects[key]
        found = read_checked(self.objects, self.sizes.get(key), self.commit.shard, key, record)
        self.advance(record.nbytes)
        return found

    def _values(self, path: str, data: memoryview) -> Iterator[np.ndarray]:
        """Stored values of the valid samples, chunk by chunk; each is gone when the next is asked for."""
        spec, kind, shard = self.spec, array_kind(path), self.commit.shard
        key = shard_object_key(spec, path, shard)
        out = np.empty(raw_chunk_nbytes(spec, kind), np.uint8) if spec.codec != "none" else None
        first = spec.shard_samples(shard).start
        for chunk, (offset, nbytes, _) in zip(spec.shard_chunks(shard), self.commit.objects[key].chunks.tolist()):
            rows = spec.chunk_samples(chunk)
            valid = self._valid[rows.start - first : rows.stop - first]
            try:
                values = decode_payload(spec, kind, chunk, data[offset : offset + nbytes], out)[: len(rows)]
            except DecodeError as error:
                problem = Problem(key=key, what="undecodable", expected="a chunk", found=str(error), shard=shard)
                raise _UndecodableError(problem) from error
            yield values if valid.all() and kind == "patches" else values[valid]

    def _fidelity_problem(self, path: str, found: str) -> Problem:
        return Problem(
            key=commit_key(self.commit.shard),
            what=f"measured error of {path}",
            expected="one that its values allow",
            found=found,
            shard=self.commit.shard,
        )


class _UndecodableError(Exception):
    """A chunk has the bytes that were committed, but they are no chunk."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def _select(statistics: Statistics, layer: int, kind: int) -> Statistics:
    return Statistics.from_array(statistics.to_array()[layer, kind])


def _aligned(
    blocks: Iterator[np.ndarray], scale: np.ndarray | None, patch_mean: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
    """Each block of patches with the rows of the small kinds that belong to it."""
    start = 0
    for block in blocks:
        rows = slice(start, start + len(block))
        yield block, None if scale is None else scale[rows], patch_mean[rows]
        start += len(block)

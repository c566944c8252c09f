"""Where every chunk of a store lies and what its checksum is, as arrays; filled from commits."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from storage_schemas.commit import Commit, Fidelity
from storage_schemas.keys import shard_object_key, sharded_array_paths, statistics_key
from storage_schemas.spec import StoreSpec


@dataclass(frozen=True, kw_only=True)
class CommitTable:
    """All commits of a store, in the form that readers look things up in; 24 bytes a chunk.

    Attributes:
        committed: (shard,) bool.
        valid: (sample,) bool; False where the shard has no commit or the image was bad.
        bad_images: Code by sample index.
        chunks: By array path, (chunk, 3) int64 of payload offset, bytes and CRC32C; -1 where nothing is committed.
        statistics: (shard, 3) int64, likewise, for the statistics object.
        stored_nbytes: Size of all committed data objects together.
        shard_fidelity: By path of each array that was rounded, (shard, 3) float64 of relative_mse, r2 and worst; NaN
            where nothing was measured.
    """

    committed: np.ndarray
    valid: np.ndarray
    bad_images: dict[int, str]
    chunks: dict[str, np.ndarray]
    statistics: np.ndarray
    stored_nbytes: int
    shard_fidelity: dict[str, np.ndarray]

    @property
    def fidelity(self) -> dict[str, Fidelity]:
        """By array path, the worst of all shards; empty where nothing was rounded."""
        return {
            path: Fidelity(
                relative_mse=float(np.nanmax(each[:, 0])),
                r2=float(np.nanmin(each[:, 1])),
                worst=float(np.nanmax(each[:, 2])),
            )
            for path, each in self.shard_fidelity.items()
        }


def make_commit_table(spec: StoreSpec, commits: Iterable[Commit]) -> CommitTable:
    """Collect checked commits; each shard at most once."""
    paths = sharded_array_paths(spec)
    committed = np.zeros(spec.n_shards, bool)
    valid = np.zeros(spec.n_samples, bool)
    chunks = {path: np.full((spec.n_chunks, 3), -1, np.int64) for path in paths}
    statistics = np.full((spec.n_shards, 3), -1, np.int64)
    bad_images: dict[int, str] = {}
    fidelity: dict[str, np.ndarray] = {}
    stored_nbytes = 0
    for commit in commits:
        assert not committed[commit.shard]
        committed[commit.shard] = True
        samples, places = spec.shard_samples(commit.shard), spec.shard_chunks(commit.shard)
        valid[samples.start : samples.stop] = True
        for path in paths:
            chunks[path][places.start : places.stop] = commit.objects[shard_object_key(spec, path, commit.shard)].chunks
        statistics[commit.shard] = commit.objects[statistics_key(commit.shard)].chunks[0]
        bad_images |= dict(commit.bad_images)
        stored_nbytes += sum(record.nbytes for record in commit.objects.values())
        for path, found in commit.fidelity.items():
            each = fidelity.setdefault(path, np.full((spec.n_shards, 3), np.nan))
            each[commit.shard] = found.relative_mse, found.r2, found.worst
    valid[list(bad_images)] = False
    return CommitTable(
        committed=committed,
        valid=valid,
        bad_images=bad_images,
        chunks=chunks,
        statistics=statistics,
        stored_nbytes=stored_nbytes,
        shard_fidelity=fidelity,
    )

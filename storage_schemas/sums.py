"""What the shards of a store say together: moments and measured errors, pooled in one pass over their statistics."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from storage_schemas.commit import Fidelity
from storage_schemas.from_arrays import make_fidelity
from storage_schemas.keys import array_path
from storage_schemas.spec import StoreSpec
from storage_schemas.statistics import Statistics, merge

_N_THREADS = 8
_WINDOW = 32  # shards whose statistics are in memory at once; those of a ViT-B take 1.6 MB


def sum_shards(
    spec: StoreSpec,
    shards: Sequence[int],
    read: Callable[[int], Statistics],
    measured: Mapping[str, np.ndarray],
) -> tuple[Statistics, dict[str, Fidelity]]:
    """Pool shards in their order, so that the order of work cannot show.

    Args:
        spec: Of the store.
        shards: Those to pool, increasing.
        read: Gives the moments of one; called from several threads.
        measured: By array path, (shard, 3) relative_mse, r2 and worst of each shard, NaN where there is none.

    Returns:
        Moments (layer, kind, dim), and by array path the error over all shards: sums of squared errors over sums of
        squares, never a mean of ratios; R2 is about the channel means of all shards together.
    """
    total = Statistics.empty((len(spec.layers), len(spec.token_kinds), spec.dim))
    squared_errors = {path: np.zeros(2) for path in measured}  # and the squares that they are relative to
    kinds = list(enumerate(spec.token_kinds))
    places = {array_path(layer, kind): (i, j) for i, layer in enumerate(spec.layers) for j, kind in kinds}
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for start in range(0, len(shards), _WINDOW):
            window = shards[start : start + _WINDOW]
            for shard, moments in zip(window, pool.map(read, window)):
                total = merge(total, moments)
                for path, sums in squared_errors.items():
                    relative_mse = measured[path][shard, 0]
                    if not np.isnan(relative_mse):
                        squares = (moments.m2 + moments.count * moments.mean**2)[places[path]].sum()
                        sums += relative_mse * squares, squares
    return total, {
        path: make_fidelity(
            float(sums[0]), float(sums[1]), float(total.m2[places[path]].sum()), float(np.nanmax(measured[path][:, 2]))
        )
        for path, sums in squared_errors.items()
    }

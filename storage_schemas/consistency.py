"""Whether what a commit says of a shard's values can be true: statistics and measured error against what is stored.

The float32 states are gone, but much is known of them. The small kinds are stored exactly, so their moments must come
out again. Rounded patches q = x + e leave less room than one would think, with |e|^2 = SSE the sum that the measured
error gives: per channel n (mean q - mean x)^2 sums to at most SSE, and so does, per sample, P (mean q - patch_mean)^2;
the norms of q and of x about one centre differ by at most sqrt(SSE), their extremes by at most the largest error; SSE
and the largest error bound each other; and neither exceeds what rounding to the precision can do. What passes all that
can still be a little wrong: only computing the states again finds out (RECOMPUTE).

Blocks of 2^18 values keep it in a core's cache. One core does 0.5 GB/s of float16 or int8, 0.8 of bfloat16 and 1.4 of
float32, measured at ViT-B size on two busy cores.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from storage_schemas.commit import Fidelity
from storage_schemas.precision import restore_patches
from storage_schemas.statistics import Statistics, merge

_EXACT = 1e-9  # relative, of moments that must come out again
_LOOSE = 1e-3  # relative, of sums of squared errors: the pipeline adds those of one sample in float32
_NOISE = 2.0**-20  # relative to a norm, of what is summed here in float32 before it goes on in float64
_TINY = 2.0**-126  # below it float32 has fewer digits, or on some devices none
_BLOCK_VALUES = 2**18
_BLOCK_PATCHES = 16  # added in float32, then in float64
#: Largest relative error of rounding to nearest, and the largest absolute one below the normal range.
_ROUNDING = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, _TINY)}


@dataclass(frozen=True, kw_only=True)
class PatchSums:
    """What one pass over the stored patches of a shard's valid samples gives.

    Attributes:
        mean: Per channel.
        squares: Sum of squared differences from the float32 mean of the statistics, over all channels.
        min: Per channel.
        max: Per channel.
        mean_errors: Sum of squared differences of the samples' patch means from the exactly stored ones.
    """

    mean: np.ndarray
    squares: float
    min: np.ndarray
    max: np.ndarray
    mean_errors: float


def moments_of(values: np.ndarray) -> Statistics:
    """One pass in float64 over (..., dim)."""
    wide = values.reshape(-1, values.shape[-1]).astype(np.float64)
    if not len(wide):
        return Statistics.empty(wide.shape[1:])
    mean = wide.mean(axis=0)
    low, high = wide.min(axis=0), wide.max(axis=0)
    wide -= mean
    return Statistics(
        count=np.full(mean.shape, float(len(wide))),
        mean=mean,
        m2=np.square(wide, out=wide).sum(axis=0),
        min=low,
        max=high,
    )


def moments_of_blocks(blocks: Iterable[np.ndarray], dim: int) -> Statistics:
    """Of exactly stored values that come in blocks (sample, patch, dim)."""
    total = Statistics.empty((dim,))
    for block in blocks:
        for part in _parts(block):
            total = merge(total, moments_of(part))
    return total


def moment_problems(found: Statistics, stated: Statistics) -> Iterator[str]:
    """How moments of exactly stored values differ from those stated, both per channel."""
    size = np.maximum(np.abs(found.min), np.abs(found.max))
    with np.errstate(invalid="ignore"):
        room = {
            "count": 0.0,
            "min": 0.0,
            "max": 0.0,
            "mean": _EXACT * (np.abs(found.mean) + np.sqrt(found.m2 / found.count)),
            "M2": _EXACT * found.m2 + found.count * (1e-13 * size) ** 2,
        }
        for name, most in room.items():
            here, there = getattr(found, name.lower()), getattr(stated, name.lower())
            bad = ~((np.abs(here - there) <= most) | (here == there))
            if bad.any():
                channel = int(np.flatnonzero(bad)[0])
                yield f"{name} of channel {channel} is {here[channel]:.12g}, stated is {there[channel]:.12g}"


def patch_sums(
    precision: str,
    blocks: Iterable[tuple[np.ndarray, np.ndarray | None, np.ndarray]],
    stated: Statistics,
) -> PatchSums:
    """Go once over rounded patches.

    Args:
        precision: Of the store.
        blocks: Of valid samples: stored patches (sample, patch, dim), their scale (sample, dim) for int8, and the
            exactly stored patch_mean (sample, dim).
        stated: Moments of the patches, per channel.
    """
    size = float(np.maximum(np.abs(stated.min), np.abs(stated.max)).max())
    dtype = np.float32 if 1e-15 < size < 1e15 else np.float64  # squares of larger or smaller ones do not fit
    centre = stated.mean.astype(np.float32)
    total, squares = np.zeros(len(centre)), np.zeros(len(centre))
    low, high = np.full(len(centre), np.inf), np.full(len(centre), -np.inf)
    mean_errors, n_values = 0.0, 0
    for stored, scale, patch_mean in blocks:
        step = max(1, _BLOCK_VALUES // (stored.shape[1] * stored.shape[2]))
        for start in range(0, len(stored), step):
            rows = slice(start, start + step)
            values = restore_patches(precision, stored[rows], None if scale is None else scale[rows])
            values = values.astype(dtype, copy=False)
            n_patches = values.shape[1]
            sums = _sum_patches(values)
            total += sums.sum(axis=0)
            n_values += len(values) * n_patches
            mean_errors += float(np.square(sums / n_patches - patch_mean[rows]).sum())
            low, high = np.minimum(low, values.min(axis=(0, 1))), np.maximum(high, values.max(axis=(0, 1)))
            values -= centre
            squares += _sum_patches(np.square(values, out=values)).sum(axis=0)
    return PatchSums(mean=total / n_values, squares=float(squares.sum()), min=low, max=high, mean_errors=mean_errors)


def fidelity_problems(
    precision: str, fidelity: Fidelity, stated: Statistics, sums: PatchSums, n_patches: int, scale: np.ndarray | None
) -> Iterator[str]:
    """What the measured error of rounded patches contradicts.

    Args:
        precision: Of the store.
        fidelity: As the commit states it.
        stated: Moments of the patches before rounding, per channel.
        sums: Of the stored patches.
        n_patches: Of one sample.
        scale: Of int8, (sample, dim) of the valid samples.
    """
    squares, deviations = float((stated.m2 + stated.count * stated.mean**2).sum()), float(stated.m2.sum())
    squared_error = fidelity.relative_mse * squares
    n, worst = stated.count[0], fidelity.worst
    if not _is_r2(fidelity.r2, squared_error, deviations):
        expected = 1 - squared_error / deviations if deviations else float(squared_error == 0)
        yield f"r2 is {fidelity.r2!r}, relative_mse and statistics give {expected!r}"
    most, largest = _most_error(precision, stated, squares, scale, n_patches)
    if not 0 <= squared_error <= most * (1 + _LOOSE):
        yield f"relative_mse is {fidelity.relative_mse:.3g}, {precision} gives at most {most / squares:.3g}"
    if not 0 <= worst <= largest * (1 + _LOOSE):
        yield f"worst is {worst:.3g}, {precision} gives at most {largest:.3g}"
    if not worst**2 <= squared_error * (1 + _LOOSE) or not squared_error <= n * stated.mean.size * worst**2 * (
        1 + _LOOSE
    ):
        yield f"worst is {worst:.3g}, which a relative_mse of {fidelity.relative_mse:.3g} excludes"
    norm, noise = np.sqrt(squared_error) * (1 + _LOOSE), _NOISE * np.sqrt(squares)
    centre = stated.mean.astype(np.float32)
    true_norm = np.sqrt(float((stated.m2 + stated.count * (stated.mean - centre) ** 2).sum()))
    for what, least in (
        ("means of channels", np.sqrt(n * float(np.square(sums.mean - stated.mean).sum()))),
        ("means of samples", np.sqrt(n_patches * sums.mean_errors)),
        ("squares", abs(np.sqrt(sums.squares) - true_norm)),
    ):
        if not least <= norm + noise:
            found = f"{(least / np.sqrt(squares)) ** 2:.3g}" if squares else "more"
            yield f"relative_mse is {fidelity.relative_mse:.3g}, {what} of the stored patches show at least {found}"
    for name in ("min", "max"):
        difference = np.abs(getattr(sums, name) - getattr(stated, name))
        if not (difference <= worst * (1 + _LOOSE)).all():
            yield f"worst is {worst:.3g}, but the {name} of a channel differs by {difference.max():.3g}"


def mean_problems(patches: Statistics, patch_mean: Statistics) -> Iterator[str]:
    """Whether the stated means of the patches and of their means per sample agree, as far as float32 goes."""
    size = np.maximum(np.abs(patch_mean.min), np.abs(patch_mean.max))
    excess = np.abs(patches.mean - patch_mean.mean) - (2.0**-23 * size + _TINY)
    if not (excess <= 0).all():
        channel = int(np.argmax(excess))
        yield (
            f"mean of channel {channel} is {patch_mean.mean[channel]:.9g} by patch_mean, "
            f"stated is {patches.mean[channel]:.9g}"
        )


def _most_error(
    precision: str, stated: Statistics, squares: float, scale: np.ndarray | None, n_patches: int
) -> tuple[float, float]:
    """The largest sum of squared errors, and the largest error, that rounding to nearest can make."""
    if scale is not None:  # int8
        half = scale.astype(np.float64) / 2 + _TINY
        return n_patches * float(np.square(half).sum()), float(half.max(initial=_TINY))
    relative, absolute = _ROUNDING[precision]
    size = float(np.maximum(np.abs(stated.min), np.abs(stated.max)).max())
    return relative**2 * squares + float(stated.count.sum()) * absolute**2, max(relative * size, absolute)


def _is_r2(r2: float, squared_error: float, deviations: float) -> bool:
    if not deviations:
        return r2 == float(squared_error == 0)
    lost = squared_error / deviations
    return abs(1 - lost - r2) <= 1e-13 + _EXACT * lost


def _sum_patches(values: np.ndarray) -> np.ndarray:
    """(sample, dim) float64 of float32 (sample, patch, dim): a few patches at a time in float32."""
    total = np.zeros((values.shape[0], values.shape[2]))
    for start in range(0, values.shape[1], _BLOCK_PATCHES):
        total += values[:, start : start + _BLOCK_PATCHES].sum(axis=1)
    return total


def _parts(block: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _BLOCK_VALUES // max(1, block[0].size)) if len(block) else 1
    for start in range(0, len(block), step):
        yield block[start : start + step]

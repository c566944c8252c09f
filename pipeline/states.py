"""One micro-batch of teacher states to what the store keeps: kinds, rounded values, moments, rounding errors.

All of it runs on the teacher's device, before anything is copied, and every reduction is per channel, in float64 and
in a fixed order, so that equal states give equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32

from pipeline.dispatch import FinalError
from storage_schemas.commit import Fidelity
from storage_schemas.from_arrays import make_fidelity
from storage_schemas.keys import array_path
from storage_schemas.precision import INT8_MAX, LARGEST
from storage_schemas.spec import Kind, StoreSpec
from storage_schemas.statistics import Statistics, merge

_WIDE = torch.float64


class StateError(FinalError, ValueError):
    """The teacher produced a state that cannot be stored; names layer, kind, channel and value."""


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What one micro-batch contributes to its shard beside its rows.

    Attributes:
        moments: Of the valid rows, (layer, kind, dim).
        squared_error: Sum over valid rows of (stored - float32)^2 of the patches, (layer,) float64.
        worst: Largest |stored - float32| of the patches, (layer,).
    """

    moments: Statistics
    squared_error: np.ndarray
    worst: np.ndarray


def reduce_micro_batch(
    spec: StoreSpec, states: Sequence[Float32[torch.Tensor, "batch token dim"]], valid: torch.Tensor | None
) -> tuple[list[dict[Kind, torch.Tensor]], Reduced]:
    """Split each layer's tokens into the kinds of the store, round them, and reduce what the shard keeps of them.

    Args:
        spec: Of the store.
        states: One per stored layer, tokens in the teacher's order.
        valid: Rows that count in the reductions, or None for all.

    Returns:
        For each layer its kinds as stored, on the teacher's device; and the reductions.

    Raises:
        StateError: A state of a valid row is NaN, infinite, or too large for the precision.
    """
    assert len(states) == len(spec.layers)
    first_register, first_patch = int(spec.has_cls), int(spec.has_cls) + spec.n_registers
    shape = (len(spec.layers), len(spec.token_kinds), spec.dim)
    moments = torch.zeros((*shape[:2], 5, spec.dim), dtype=_WIDE, device=states[0].device)
    errors = torch.zeros((len(spec.layers), 2, spec.dim), dtype=_WIDE, device=states[0].device)
    nothing_valid = valid is not None and len(valid) == 0
    layers: list[dict[Kind, torch.Tensor]] = []
    for i, state in enumerate(states):
        patches = state[:, first_patch:]
        rounded = round_patches(spec.precision, patches)
        mean, patch_moments = _patch_moments(patches, valid)
        small: dict[Kind, torch.Tensor] = {"cls": state[:, 0], "registers": state[:, first_register:first_patch]}
        every = {**small, **rounded, "patches": _bits(rounded["patches"]), "patch_mean": mean}
        layers.append({kind: every[kind] for kind in spec.array_kinds})
        if not nothing_valid:
            moments[i, spec.token_kinds.index("patches")] = patch_moments
            if spec.precision != "float32":
                errors[i] = _rounding_errors(_take(restore_patches(rounded), valid), _take(patches, valid))
    if nothing_valid:
        nothing = np.zeros(len(spec.layers))
        return layers, Reduced(moments=Statistics.empty(shape), squared_error=nothing, worst=nothing)
    for j, kind in enumerate(spec.token_kinds):
        if kind != "patches":  # few values: all layers at once spare many small operations
            moments[:, j] = _moments(torch.stack([_take(layer[kind], valid).reshape(-1, spec.dim) for layer in layers]))
    host, host_errors = moments.cpu().numpy(), errors.cpu().numpy()
    _check_finite(spec, host)
    return layers, Reduced(
        moments=Statistics.from_array(host),
        squared_error=host_errors[:, 0].sum(axis=-1),
        worst=host_errors[:, 1].max(axis=-1),
    )


def round_patches(precision: str, patches: Float32[torch.Tensor, "batch patch dim"]) -> dict[Kind, torch.Tensor]:
    """The patches as a store keeps them, on their device; for int8 with their scale.

    The same values as `storage_schemas.precision.round_patches`, bit for bit, but unchecked: what is too large shows in
    the moments.
    """
    if precision == "int8":
        # without minus zeros, where all is zero
        scale = torch.maximum(patches.amax(dim=1), -patches.amin(dim=1)).abs_() / INT8_MAX
        steps = patches / torch.where(scale > 0, scale, 1.0)[:, None]
        return {"patches": steps.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), "patches_scale": scale}
    return {"patches": patches.to(getattr(torch, precision))}


def restore_patches(rounded: Mapping[Kind, torch.Tensor]) -> Float32[torch.Tensor, "batch patch dim"]:
    """What a reader of the store will get for them."""
    stored = rounded["patches"].float()
    return stored.mul_(rounded["patches_scale"][:, None]) if "patches_scale" in rounded else stored


def check_head_input(head_input: Float32[torch.Tensor, "batch dim2"], valid: torch.Tensor | None) -> None:
    """Raise StateError if what a linear head reads of a valid row is NaN or infinite; names channel and value."""
    rows = _take(head_input, valid)
    bad = (~torch.isfinite(rows)).nonzero()
    if len(bad):
        row, channel = bad[0].tolist()
        raise StateError(
            f"head_input, channel {channel}: {float(rows[row, channel]):g}; and {len(bad) - 1} more. The final norm of "
            "the teacher gives values that are not finite; look at its weights"
        )


def _bits(stored: torch.Tensor) -> torch.Tensor:
    """As NumPy, and so a store, can hold it."""
    return stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored


def merge_reduced(spec: StoreSpec, parts: Sequence[Reduced]) -> tuple[Statistics, dict[str, Fidelity]]:
    """A shard's statistics and fidelity from those of its micro-batches, merged in their order."""
    total = Statistics.empty((len(spec.layers), len(spec.token_kinds), spec.dim))
    for part in parts:
        total = merge(total, part.moments)
    if spec.precision == "float32":
        return total, {}
    j = spec.token_kinds.index("patches")
    squared_error = np.sum([part.squared_error for part in parts], axis=0)
    worst = np.max([part.worst for part in parts], axis=0)
    squares = (total.m2 + total.count * total.mean**2)[:, j].sum(axis=-1)
    deviations = total.m2[:, j].sum(axis=-1)
    fidelity = {
        array_path(layer, "patches"): make_fidelity(
            float(squared_error[i]), float(squares[i]), float(deviations[i]), float(worst[i])
        )
        for i, layer in enumerate(spec.layers)
        if total.count[i, j, 0] > 0
    }
    return total, fidelity


def _take(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    return values if valid is None else values[valid]


def _moments(values: Float32[torch.Tensor, "layer row dim"]) -> torch.Tensor:
    """(layer, statistic, dim) over rows. Two passes, so a large mean costs no digits."""
    wide = values.to(_WIDE)
    n = values.shape[1]
    mean = wide.sum(dim=1) / n
    m2 = wide.sub_(mean[:, None]).square_().sum(dim=1)
    low, high = values.amin(dim=1), values.amax(dim=1)
    return torch.stack([torch.full_like(mean, n), mean, m2, low.to(_WIDE), high.to(_WIDE)], dim=1)


def _patch_moments(
    patches: Float32[torch.Tensor, "batch patch dim"], valid: torch.Tensor | None
) -> tuple[Float32[torch.Tensor, "batch dim"], torch.Tensor]:
    """The mean over each sample's patches, and (statistic, dim) over the patches of the valid samples.

    Nine tenths of all reducing happens here, so the float64 copy is made once, and no reduction spans two axes, which
    torch does several times more slowly on CPUs.
    """
    n_patches = patches.shape[1]
    wide = patches.to(_WIDE)
    sums = wide.sum(dim=1)
    patch_mean = (sums / n_patches).float()
    wide, sums, patches = _take(wide, valid), _take(sums, valid), _take(patches, valid)
    if not len(patches):
        return patch_mean, torch.zeros((5, patches.shape[-1]), dtype=_WIDE, device=patches.device)
    n = len(patches) * n_patches
    mean = sums.sum(dim=0) / n
    m2 = wide.sub_(mean).square_().sum(dim=1).sum(dim=0)
    low, high = patches.amin(dim=1).amin(dim=0), patches.amax(dim=1).amax(dim=0)
    return patch_mean, torch.stack([torch.full_like(mean, n), mean, m2, low.to(_WIDE), high.to(_WIDE)])


def _rounding_errors(restored: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """(2, dim): sums of squared differences per channel, and largest absolute ones. Overwrites `restored`."""
    difference = restored.sub_(exact)
    worst = torch.maximum(difference.amax(dim=1).amax(dim=0), -difference.amin(dim=1).amin(dim=0))
    squared = difference.square_().sum(dim=1).to(_WIDE).sum(dim=0)
    return torch.stack([squared, worst.to(_WIDE)])


def _check_finite(spec: StoreSpec, moments: np.ndarray) -> None:
    low, high = moments[:, :, 3], moments[:, :, 4]
    limits = dict.fromkeys(spec.token_kinds, LARGEST["float32"])
    limits["patches"] = LARGEST[spec.precision]
    problems = []
    for j, kind in enumerate(spec.token_kinds):
        largest = np.maximum(np.abs(low[:, j]), np.abs(high[:, j]))
        for i, channel in zip(*np.nonzero(~(largest <= limits[kind]))):
            problems.append(f"layer {spec.layers[i]}, {kind}, channel {channel}: {largest[i, channel]:g}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise StateError(
            f"states that {spec.precision} cannot hold (largest {limits['patches']:g}): {shown}. "
            "Store them with PRECISION=float32, or look at the teacher if they are not finite"
        )

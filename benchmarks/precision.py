"""What rounding patch states loses and saves: error and bytes of each precision, on states of real images."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod

import numpy as np

from benchmarks.machine import this_machine
from benchmarks.real_states import States, digits_states, photo_states
from benchmarks.report import Cell, Goal, Result
from storage_schemas.codecs import kind_dtype, kind_shape
from storage_schemas.precision import restore_patches, round_patches
from storage_schemas.spec import PRECISIONS, StoreSpec

MOST_LOST_R2 = 5e-4
MOST_BYTES = 0.51
NOTES = (
    "R2 is 1 - squared error / squared deviation of the float32 states from their mean per channel, of one layer; "
    "relative MSE is squared error / sum of squares. Worst and median are over the layers, 0 to 12. The worst absolute "
    "error is in units of the layer's root mean square.",
    "digits_vit: digits it was not trained on. ViT-B/14: crops of two photographs at 224 px, random weights.",
    "Bytes are those of a sample's patches and, for int8, of its scales, against patches in float16; other kinds are "
    "float32 in all of them and add 2 % (ViT-B/14).",
)


@dataclass(frozen=True, kw_only=True)
class PrecisionBenchmark:
    """Sizes of this benchmark: images of digits and photographs; 0 leaves the teacher out."""

    n_digits: int = 128
    n_photos: int = 8


QUICK = PrecisionBenchmark(n_digits=8, n_photos=0)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What rounding does to one layer."""

    r2: float
    relative_mse: float
    worst: float


def run(config: PrecisionBenchmark) -> Result:
    """Round, restore, compare, layer by layer."""
    teachers: list[tuple[str, int, Callable[[int], States]]] = [
        ("digits_vit", config.n_digits, digits_states),
        ("ViT-B/14, random", config.n_photos, photo_states),
    ]
    rows: list[dict[str, Cell]] = []
    goals: list[Goal] = []
    details: dict[str, list[dict[str, float]]] = {}
    for teacher, n_samples, states_of in teachers:
        if not n_samples:
            continue
        states = states_of(n_samples)
        grid, dim = int(states.shape[2] ** 0.5), states.shape[3]
        ratio = {p: _sample_nbytes(p, grid, dim) / _sample_nbytes("float16", grid, dim) for p in PRECISIONS}
        for precision in PRECISIONS[1:]:
            errors = [layer_error(precision, states[:, layer]) for layer in range(states.shape[1])]
            details[f"{teacher}, {precision}"] = [asdict(error) for error in errors]
            rows.append(_row(teacher, precision, errors, ratio[precision]))
            if precision == "int8":
                lost = 1 - min(error.r2 for error in errors)
                goals.append(Goal(what=f"{teacher}: int8, worst 1 - R2", found=lost, at_most=MOST_LOST_R2))
        if teacher.startswith("ViT-B"):
            goals.append(Goal(what=f"{teacher}: bytes, int8 / float16", found=ratio["int8"], at_most=MOST_BYTES))
    return Result(
        name="precision",
        title="Patch states in fewer bits: error and bytes",
        machine=this_machine(),
        settings=asdict(config),
        rows=rows,
        goals=goals,
        notes=NOTES,
        details=details,
    )


def layer_error(precision: str, patches: np.ndarray) -> LayerError:
    """Of (sample, patch, dim) float32 states."""
    stored, scale = round_patches(precision, np.ascontiguousarray(patches))
    error = restore_patches(precision, stored, scale).astype(np.float64) - patches
    truth = patches.astype(np.float64)
    squares, mean = (truth**2).sum(), truth.mean(axis=(0, 1))
    return LayerError(
        r2=float(1 - (error**2).sum() / ((truth - mean) ** 2).sum()),
        relative_mse=float((error**2).sum() / squares),
        worst=float(np.abs(error).max() / np.sqrt(squares / truth.size)),
    )


def _row(teacher: str, precision: str, errors: list[LayerError], ratio: float) -> dict[str, Cell]:
    worst = min(range(len(errors)), key=lambda layer: errors[layer].r2)
    return {
        "states": teacher,
        "precision": precision,
        "worst R2": f"{errors[worst].r2:.7f}",
        "at layer": worst,
        "median R2": f"{np.median([error.r2 for error in errors]):.7f}",
        "worst relative MSE": f"{max(error.relative_mse for error in errors):.1e}",
        "median relative MSE": f"{np.median([error.relative_mse for error in errors]):.1e}",
        "worst error": f"{max(error.worst for error in errors):.1e}",
        "bytes of float16": f"{ratio:.4f}",
    }


def _sample_nbytes(precision: str, grid: int, dim: int) -> int:
    """Of the patches of one sample and layer, and their scales."""
    spec = StoreSpec(
        layers=(0,),
        dim=dim,
        has_cls=True,
        n_registers=4,
        grid=(grid, grid),
        precision=precision,
        n_samples=1,
        samples_per_shard=1,
        samples_per_chunk=1,
        teacher="any",
        teacher_weights_digest="0" * 64,
        micro_batch=1,
        source_digest="0" * 64,
    )
    kinds = [kind for kind in ("patches", "patches_scale") if kind in spec.array_kinds]
    return sum(prod(kind_shape(spec, kind)) * kind_dtype(spec, kind).itemsize for kind in kinds)

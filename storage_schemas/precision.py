"""Patch states in fewer bits, and back. Everything else in a store is float32. Opens nothing.

The pipeline rounds on the teacher's device (`pipeline.states`), the trainer restores there; tests hold both to this.
"""

import numpy as np
from jaxtyping import Float32, Shaped

from storage_schemas.errors import SchemaError

#: How each precision lies in memory and on disk. NumPy and Zarr know no bfloat16, so its bits are stored as integers.
STORED_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}
#: What rows without states hold in the patches; int8 has no NaN, so there the scale is NaN.
FILL_VALUES = {"float32": np.nan, "float16": np.nan, "bfloat16": 0x7FC0, "int8": 0}
#: The largest magnitude that each holds; a larger state is an error of the writer, never an infinity.
LARGEST = {
    "float32": float(np.finfo(np.float32).max),
    "float16": 65504.0,
    "bfloat16": float.fromhex("0x1.fep127"),
    "int8": float(np.finfo(np.float32).max),
}
INT8_MAX = 127


def round_patches(
    precision: str, patches: Float32[np.ndarray, "*batch patch dim"]
) -> tuple[Shaped[np.ndarray, "*batch patch dim"], Float32[np.ndarray, "*batch dim"] | None]:
    """Patch states as a store keeps them, each rounded to nearest, ties to even.

    Args:
        precision: One of `spec.PRECISIONS`.
        patches: Finite values.

    Returns:
        Stored values, and for int8 their scale: the largest magnitude over a sample's patches, per channel, / 127.

    Raises:
        SchemaError: A value is too large for the precision; names it.
    """
    if patches.size and not np.abs(patches).max() <= LARGEST[precision]:
        raise SchemaError("patches", [f"{np.abs(patches).max():g} does not fit {precision}"])
    if precision == "int8":
        return _round_int8(patches)
    return _bfloat16_bits(patches) if precision == "bfloat16" else patches.astype(precision), None


def restore_patches(
    precision: str,
    stored: Shaped[np.ndarray, "*batch patch dim"],
    scale: Float32[np.ndarray, "*batch dim"] | None = None,
) -> Float32[np.ndarray, "*batch patch dim"]:
    """Undo `round_patches`, within its error.

    Args:
        precision: Of the store.
        stored: In the stored dtype.
        scale: For int8 the states of patches_scale, of the same samples.
    """
    if precision == "int8":
        assert scale is not None
        return stored * scale[..., None, :]  # int8 times float32 is float32
    if precision == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _round_int8(
    patches: Float32[np.ndarray, "*batch patch dim"],
) -> tuple[Shaped[np.ndarray, "*batch patch dim"], Float32[np.ndarray, "*batch dim"]]:
    scale = np.abs(patches).max(axis=-2) / np.float32(INT8_MAX)
    divisor = np.where(scale > 0, scale, np.float32(1))[..., None, :]
    return np.clip(np.rint(patches / divisor), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def _bfloat16_bits(values: Float32[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

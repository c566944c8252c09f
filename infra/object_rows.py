"""Bytes into rows of an array, checksummed on the way: by a little C where it could be built, else in Python."""

import numpy as np
from crc32c import crc32c

from infra.native import scatter_rows_function
from infra.object_verbs import GetParts

SMALL_ROW_NBYTES = 2**16  # without the compiled reader, a system call for each row would cost more than a copy


def read_rows_in_python(objects: GetParts, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
    """`FolderObjects.read_rows` for any objects, without C."""
    nbytes = row_nbytes(out, rows)
    if nbytes < SMALL_ROW_NBYTES:
        whole = np.empty((len(rows), *out.shape[1:]), out.dtype)
        for _ in objects.read_parts(key, start, [whole.data.cast("B")]):
            pass
        out[rows[rows >= 0]] = whole[rows >= 0]
        return crc32c(whole.data.cast("B"))
    nowhere = memoryview(bytearray(nbytes))
    parts = [out[row].data.cast("B") if row >= 0 else nowhere for row in rows.tolist()]
    crc = 0
    for part in objects.read_parts(key, start, parts):
        crc = crc32c(part, crc)
    return crc


def scatter_rows(data: np.ndarray, out: np.ndarray, rows: np.ndarray) -> int:
    """Copy piece i of some bytes to `out[rows[i]]`, or nowhere if that is negative; returns the CRC32C of all.

    Args:
        data: (byte,) uint8: the pieces one after another, each as long as a row.
        out: (row, ...), and `rows`, as in `FolderObjects.read_rows`; checked by `row_nbytes`.
    """
    native, rows = scatter_rows_function(), np.ascontiguousarray(rows, np.int64)
    if native is not None:
        nbytes = len(data) // len(rows)
        return native(data.ctypes.data, out.ctypes.data, out.strides[0], rows.ctypes.data, len(rows), nbytes)
    for piece, row in zip(data.view(out.dtype).reshape(len(rows), *out.shape[1:]), rows.tolist()):
        if row >= 0:
            out[row] = piece
    return crc32c(data.data)


def row_nbytes(out: np.ndarray, rows: np.ndarray) -> int:
    """Bytes of a row. Everything is checked even under `python -O`: C will write to these places.

    Raises:
        ValueError: Something would be written outside `out`, or over what is not plain bytes.
    """
    if not out.ndim or not len(out):
        raise ValueError(f"an array of shape {out.shape} has no rows to read into")
    if rows.ndim != 1 or rows.dtype.kind != "i" or not len(rows):
        raise ValueError(f"rows are {rows.dtype} of shape {rows.shape}; some integers along one axis were expected")
    if rows.max() >= len(out):
        raise ValueError(f"row {rows.max()} is past the end of an array of {len(out)} rows")
    if out.dtype.hasobject or not out[0].nbytes:
        raise ValueError(f"rows of {out[0].nbytes} bytes of {out.dtype} cannot be read into")
    if not out[0].flags.c_contiguous or not out.flags.writeable:
        raise ValueError("the rows of the array must be contiguous, and it must be writable")
    return out[0].nbytes

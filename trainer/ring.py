"""The memory of a stream: rows for the samples of the batches in flight, made once and used again and again."""

import mmap
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import prod

import numpy as np
import torch

from storage_schemas.codecs import kind_dtype, kind_shape
from storage_schemas.spec import StoreSpec

STREAM_KINDS = ("cls", "registers", "patches", "patches_scale")  # delivered as stored, where the store has them

_PAGE_NBYTES = 4096
_ALIGNMENT = _PAGE_NBYTES  # of each kind's first row; the kernel copies to odd addresses at a third of the speed
_TOUCH_NBYTES = 64 * 2**20


def stream_kinds(spec: StoreSpec) -> tuple[str, ...]:
    """The kinds that a batch holds."""
    return tuple(kind for kind in STREAM_KINDS if kind in spec.array_kinds)


def n_prefix(spec: StoreSpec) -> int:
    """Tokens before the first patch."""
    return spec.n_tokens - spec.n_patches


def ring_nbytes(spec: StoreSpec, n_states: int, n_rows: int) -> int:
    """Bytes of a ring, with alignment."""
    return sum(_aligned(n_rows * n_states * prod(shape) * dtype.itemsize) for _, dtype, shape in _layout(spec))


class Ring:
    """Rows for samples, each (row, state, ...) in the stored dtype; pinned if CUDA is there.

    Attributes:
        n_rows: Samples that fit.
        tokens: (row, state, token, dim) in the dtype of the patches, in the teacher's order. The patches are read into
            it; the tokens before them are stored in a finer dtype and have arrays of their own. None for int8, in
            whose dtype the other tokens mean nothing.
        arrays: By kind; that of the patches is a part of `tokens`.
        sample_index: Which sample a row holds.
    """

    def __init__(self, spec: StoreSpec, n_states: int, n_rows: int) -> None:
        self.n_rows = n_rows
        self.sample_index = np.full(n_rows, -1, np.int64)
        nbytes = ring_nbytes(spec, n_states, n_rows)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a tenth of the time to touch, an eighth less to copy into
            with suppress(OSError):  # a kernel built without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        _touch(np.frombuffer(memory, np.uint8))
        self.arrays: dict[str, np.ndarray] = {}
        start = 0
        for kind, dtype, shape in _layout(spec):
            array = np.frombuffer(memory, dtype, n_rows * n_states * prod(shape), start)
            self.arrays[kind] = array.reshape(n_rows, n_states, *shape)
            start += _aligned(array.nbytes)
        self.tokens: np.ndarray | None = None
        if _has_tokens(spec):
            self.tokens = self.arrays["patches"]
            self.arrays["patches"] = self.tokens[:, :, n_prefix(spec) :]
        if torch.cuda.is_available():
            _pin(self, np.frombuffer(memory, np.uint8).ctypes.data, nbytes)


def _layout(spec: StoreSpec) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    """What one state of a row holds, by kind: dtype and shape; the patches with room for the tokens before them."""
    shapes = {kind: kind_shape(spec, kind) for kind in stream_kinds(spec)}
    if _has_tokens(spec):
        shapes["patches"] = (spec.n_tokens, spec.dim)
    return [(kind, kind_dtype(spec, kind), shape) for kind, shape in shapes.items()]


def _has_tokens(spec: StoreSpec) -> bool:
    return spec.precision != "int8"


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _touch(memory: np.ndarray) -> None:
    """Have the system hand out the pages now: a lack of them shows here, and the first batches come sooner."""
    blocks = [memory[start : start + _TOUCH_NBYTES : _PAGE_NBYTES] for start in range(0, len(memory), _TOUCH_NBYTES)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(block.fill, 0) for block in blocks]:
            done.result()


def _pin(ring: Ring, address: int, nbytes: int) -> None:
    """Lock the memory for copies to a CUDA device, until the ring goes.

    torch's own pinned memory rounds sizes up to a power of two, too much for a ring of gigabytes.
    """
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(address, nbytes, 0)
    if int(code) != 0:
        warnings.warn(
            f"{nbytes / 1e9:.1f} GB of stream buffers could not be pinned (CUDA error {int(code)}); copies to the "
            "device will be slower. Raise the locked-memory limit (ulimit -l) or use fewer lanes",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    weakref.finalize(ring, cudart.cudaHostUnregister, address)

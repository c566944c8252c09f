"""One batch: host buffers as stored, and the way to a device, where they become activations."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int64

from trainer.chunk_reader import ChunkReader
from trainer.ring import Ring


@dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """A batch on its device.

    Attributes:
        activations: States of the span, tokens in the teacher's order: CLS, registers, patches in row order.
        sample_index: Row b belongs to sample sample_index[b] of the store.
    """

    activations: Float[torch.Tensor, "batch state token dim"]
    sample_index: Int64[torch.Tensor, " batch"]


class HostBatch:
    """This rank's share of one batch, in the stream's own memory, as stored.

    The arrays are valid until the next batch is asked for, `release()` or the stream's end, and are overwritten then;
    copy what is to be kept. They are pinned if CUDA is available. A share may be empty.

    Attributes:
        number: Of the batch in the pass, from 0.
        n_batch: Samples of the whole batch, over all ranks.
        sample_index: (sample,); not overwritten.
        cls: (sample, state, dim) float32, or None if the teacher has none.
        registers: (sample, state, register, dim) float32, or None.
        patches: (sample, state, patch, dim) in the store's precision; contiguous for one state of one sample. NumPy has
            no bfloat16: its bits are uint16, and `torch.from_numpy(patches).view(torch.bfloat16)` are the numbers.
        tokens: (sample, state, token, dim) in the store's precision, tokens in the teacher's order; contiguous. The
            patches were read into it; asking for it rounds CLS and registers to the store's precision. Bits as in
            `patches` for bfloat16. An int8 store has none: only its patches have a scale.
        patches_scale: (sample, state, dim) float32 for int8 stores, else None; patches times it are the states.
    """

    def __init__(
        self, reader: ChunkReader, ring: Ring, place: int, number: int, n_batch: int, copier: "Copier"
    ) -> None:
        rows = reader.rows(place)
        self._place, self.number, self.n_batch = place, number, n_batch
        self.sample_index: Int64[np.ndarray, " sample"] = ring.sample_index[rows].copy()
        self._arrays = {kind: array[rows] for kind, array in ring.arrays.items()}
        self._tokens = None if ring.tokens is None else ring.tokens[rows]
        self._has_prefix, self._is_bfloat16 = False, reader.precision == "bfloat16"
        self._reader, self._copier = reader, copier
        self._copied: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self.sample_index)

    @property
    def cls(self) -> np.ndarray | None:
        return self._array("cls")

    @property
    def registers(self) -> np.ndarray | None:
        return self._array("registers")

    @property
    def patches(self) -> np.ndarray:
        patches = self._array("patches")
        assert patches is not None
        return patches

    @property
    def patches_scale(self) -> np.ndarray | None:
        return self._array("patches_scale")

    @property
    def tokens(self) -> np.ndarray:
        self._check_held()
        if self._tokens is None:
            raise ValueError(
                "an int8 batch has no `tokens`: CLS and registers are float32, and patches have a scale. Take `cls`, "
                "`registers`, `patches` and `patches_scale`, or to(device, dtype).activations"
            )
        if not self._has_prefix:
            _write_prefix(self._prefix(), self._tensor(self._tokens))
            self._has_prefix = True
        return self._tokens

    def _prefix(self) -> list[torch.Tensor]:
        """The tokens before the patches, (sample, state, token, dim) each."""
        parts = [torch.from_numpy(self._arrays[kind]) for kind in ("cls", "registers") if kind in self._arrays]
        return [part.unsqueeze(2) if part.ndim == 3 else part for part in parts]

    def _stored(self) -> "Stored":
        scale = self.patches_scale
        return Stored(
            prefix=self._prefix(),
            patches=self._tensor(self.patches if self._tokens is None else self._tokens),
            scale=None if scale is None else torch.from_numpy(scale),
        )

    def _tensor(self, patches: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(patches)
        return tensor.view(torch.bfloat16) if self._is_bfloat16 else tensor

    def _array(self, kind: str) -> np.ndarray | None:
        self._check_held()
        return self._arrays.get(kind)

    def _check_held(self) -> None:
        if not self._arrays:
            raise RuntimeError(f"batch {self.number} was released; copy what you need before asking for the next one")

    def to(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        out: torch.Tensor | None = None,
    ) -> DeviceBatch:
        """Copy to a device, undo int8 there and assemble the tokens in the teacher's order.

        On CUDA the copies run on a stream of their own, beside the step that is under way; the current stream waits for
        them, the host does not.

        Args:
            device: Where to.
            dtype: Of the activations.
            out: Memory of an earlier result to write into, at least as many samples; the host saves making it anew.
        """
        self._check_held()
        device, stored = torch.device(device), self._stored()
        if device.type == "cuda":
            activations, index, self._copied = self._copier.copy(stored, self.sample_index, device, dtype, out)
        else:
            activations = _make_out(stored.shape, device, dtype, out)
            stored.assemble(activations)
            index = torch.from_numpy(self.sample_index).to(device)
        return DeviceBatch(activations=activations, sample_index=index)

    def release(self) -> None:
        """Give the memory back before the next batch is asked for."""
        if self._arrays:
            self._arrays, self._tokens = {}, None
            self._reader.release(self._place, self._copied)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """A batch's values as stored, on one device.

    Attributes:
        prefix: The tokens before the patches, (sample, state, token, dim) each.
        patches: Contiguous. Without a scale there is room before them for the prefix: (sample, state, token, dim).
        scale: Of int8 patches, (sample, state, dim).
    """

    prefix: Sequence[torch.Tensor]
    patches: torch.Tensor
    scale: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the activations."""
        n_room = 0 if self.scale is None else sum(part.shape[2] for part in self.prefix)
        batch, state, token, dim = self.patches.shape
        return batch, state, token + n_room, dim

    def to(self, device: torch.device) -> "Stored":
        """Copied there, as bytes, without waiting for it."""
        prefix = [part.to(device, non_blocking=True) for part in self.prefix]
        patches = self.patches.to(device, non_blocking=True)
        scale = None if self.scale is None else self.scale.to(device, non_blocking=True)
        return Stored(prefix=prefix, patches=patches, scale=scale)

    def assemble(self, activations: torch.Tensor) -> None:
        """Write everything to (sample, state, token, dim), tokens in the teacher's order."""
        first_patch = _write_prefix(self.prefix, activations)
        out = activations[:, :, first_patch:]
        if self.scale is None:
            out.copy_(self.patches[:, :, first_patch:])
        else:
            _restore_int8(self.patches, self.scale, out)


class Copier:
    """Copies to CUDA devices on a stream of their own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(
        self,
        stored: "Stored",
        sample_index: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]:
        """Returns activations, sample index, and the event after which the host memory may be overwritten."""
        current = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        beside = self._streams[device]
        with torch.cuda.stream(beside):
            # first, while the stream is idle: the host waits for this one, as its memory is not pinned
            index = torch.from_numpy(sample_index).to(device)
            staged = stored.to(device)
            copied = torch.cuda.Event(blocking=True)
            copied.record(beside)
            if out is not None:
                beside.wait_stream(current)  # the step that still reads it
            activations = _make_out(stored.shape, device, dtype, out)
            staged.assemble(activations)
        current.wait_stream(beside)
        for made in (activations, index):
            made.record_stream(current)
        return activations, index, copied


def _make_out(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, device=device, dtype=dtype)
    if out.shape[1:] != shape[1:] or out.shape[0] < shape[0] or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}; at least {shape} {dtype} on {device} was expected"
        )
    return out[: shape[0]]


def _write_prefix(prefix: Sequence[torch.Tensor], activations: torch.Tensor) -> int:
    """Write (batch, state, token, dim) parts side by side along the tokens; returns where the patches begin."""
    start = 0
    for part in prefix:
        activations[:, :, start : start + part.shape[2]].copy_(part)
        start += part.shape[2]
    return start


def _restore_int8(
    patches: Int8[torch.Tensor, "batch state patch dim"],
    scale: Float32[torch.Tensor, "batch state dim"],
    out: Float[torch.Tensor, "batch state patch dim"],
) -> None:
    """Write patches times scale, computed in float32."""
    if out.is_cuda:
        torch.mul(patches, scale.unsqueeze(2), out=out)  # one kernel, without a copy in float32
        return
    n, patch, dim = patches.shape[0] * patches.shape[1], *patches.shape[2:]
    each = zip(patches.view(n, patch, dim), scale.view(n, 1, dim), out.view(n, patch, dim))
    for one, factor, to in each:  # a state of a sample at a time: the second pass finds it in the cache
        to.copy_(one).mul_(factor)

"""From images or a store to what a readout reads: decode in threads, normalise, backbone, pool."""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from infra.console import UserError, human_bytes
from infra.machine import n_cores
from pipeline.preprocess import normalise
from storage_schemas import Store
from storage_schemas.errors import SchemaError
from trainer.order import random64
from trainer.probes.backbone import Backbone
from trainer.probes.task import LabelledImages, Task

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Features and targets, on the device."""

#: Features of images that are the same at every pass are kept in memory if they take no more than this, bytes.
KEEP_NBYTES = 2**31

_MICRO_BATCH = 64  # images or states in the backbone at a time
_AHEAD = 3  # micro-batches of images being loaded while one is in the backbone
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Products in `precision`, one of "float32", "bfloat16" and "float16"."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=_HALF[precision])


def augmentation_seed(seed: int, epoch: int, index: int) -> int:
    """Of the augmentation of one sample at one pass."""
    key = int(random64(seed, np.array([epoch]))[0])
    return int(random64(key, np.array([index]))[0] >> np.uint64(1))


class Features:
    """The features of one data set, in any order, as often as they are wanted."""

    def __init__(
        self, data: LabelledImages | Store, task: Task, backbone: Backbone, *, seed: int, augmented: bool
    ) -> None:
        """Open nothing yet.

        Args:
            data: Images, or a store.
            task: How they are prepared and pooled, and in which precision.
            backbone: On its device.
            seed: Of the augmentation.
            augmented: Whether each pass over images has its own augmentation.
        """
        self._task, self._backbone, self._seed = task, backbone, seed
        self._device = backbone.teacher.device
        self._source: _Images | _States
        if isinstance(data, Store):
            self._source, self._augmented = _States(data, backbone), False
        else:
            self._source, self._augmented = _Images(data, task, backbone), augmented
        self._may_keep = not self._augmented
        self._kept: Batch | None = None
        if isinstance(data, Store) and task.reads_head_input and backbone.trained is None:
            stored = stored_head_input(data)
            self._kept = None if stored is None else (stored, stored_labels(data))

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, order: Sequence[int], batch_size: int, epoch: int) -> Generator[Batch, None, None]:
        """Batches of these samples; the last one may be smaller. Close it to end its threads early.

        Args:
            order: Places in [0, len).
            batch_size: Of all batches but the last.
            epoch: Of the augmentation, where there is one.

        Raises:
            UserError: An image cannot be used; or the features of a store do not fit into memory.
        """
        if self._may_keep and self._kept is None:
            self._keep()
        if self._kept is not None:
            features, targets = self._kept
            for first in range(0, len(order), batch_size):
                rows = torch.as_tensor(order[first : first + batch_size], dtype=torch.int64)
                yield features[rows].to(self._device), targets[rows].to(self._device)
            return
        parts: list[Batch] = []
        n_parts = 0
        for features, targets in self._computed(order, epoch if self._augmented else None, batch_size):
            parts.append((features, targets))
            n_parts += len(targets)
            if n_parts == batch_size:
                yield torch.cat([f for f, _ in parts]), torch.cat([t for _, t in parts])
                parts, n_parts = [], 0
        if parts:
            yield torch.cat([f for f, _ in parts]), torch.cat([t for _, t in parts])

    def _keep(self) -> None:
        """Compute everything once, if it is small enough; states of a store must be."""
        n_samples, kept, first = len(self), None, 0
        for features, targets in self._computed(range(n_samples), None, _MICRO_BATCH):
            if kept is None:
                nbytes = n_samples * (features[0].nbytes + targets[0].nbytes)
                if not self._fits(nbytes):
                    return
                kept = (torch.empty(n_samples, *features.shape[1:]), _empty_like(targets, n_samples))
            rows = slice(first, first + len(targets))
            kept[0][rows], kept[1][rows] = features, targets
            first += len(targets)
        self._kept = kept

    def _fits(self, nbytes: int) -> bool:
        if isinstance(self._source, _Images):
            self._may_keep = nbytes <= KEEP_NBYTES
            return self._may_keep
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if nbytes > memory // 2:
            raise UserError(
                f"the features of {len(self):,} samples take {human_bytes(nbytes)}, more than half of the "
                f"{human_bytes(memory)} of this machine: probe a store with fewer samples, or on a larger machine"
            )
        return True

    def _computed(self, order: Sequence[int], epoch: int | None, batch_size: int) -> Iterator[Batch]:
        """In pieces that divide the batches."""
        pieces = [
            order[start : min(start + _MICRO_BATCH, first + batch_size)]
            for first in range(0, len(order), batch_size)
            for start in range(first, min(first + batch_size, len(order)), _MICRO_BATCH)
        ]
        precision = self._task.settings.precision
        for inputs, targets in self._source.read(pieces, self._seed, epoch):
            with torch.no_grad(), autocast(self._device, precision):
                features = self._task.features(self._source.tokens(inputs))
            yield features.float(), targets.to(self._device)


class _Images:
    """Images, decoded and augmented in threads."""

    def __init__(self, images: LabelledImages, task: Task, backbone: Backbone) -> None:
        self._images, self._task, self._backbone = images, task, backbone

    def __len__(self) -> int:
        return len(self._images)

    def read(self, pieces: Sequence[Sequence[int]], seed: int, epoch: int | None) -> Iterator[Batch]:
        """Pixels as 0..255, and targets, by piece."""

        def load(index: int) -> tuple[Tensor, Tensor]:
            draw = None if epoch is None else torch.Generator().manual_seed(augmentation_seed(seed, epoch, index))
            return self._images.load(index, draw)

        waiting: deque[list[Future]] = deque()
        pool = ThreadPoolExecutor(n_cores(), thread_name_prefix="probe-images")
        try:
            ahead = iter(pieces)
            for piece in ahead:
                waiting.append([pool.submit(load, int(index)) for index in piece])
                if len(waiting) > _AHEAD:
                    yield _stacked(waiting.popleft())
            while waiting:
                yield _stacked(waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def tokens(self, pixels: Tensor) -> Tensor:
        teacher = self._backbone.teacher
        normal = normalise(pixels.to(teacher.device), teacher.preprocessing)
        return self._backbone.tokens(self._task.prepare(normal))


class _States:
    """States of a store; of each sample the one that the backbone goes on from."""

    def __init__(self, store: Store, backbone: Backbone) -> None:
        self._store, self._backbone = store, backbone
        self._rows = np.flatnonzero(store.valid)
        self._labels = stored_labels(store)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, pieces: Sequence[Sequence[int]], seed: int, epoch: int | None) -> Iterator[Batch]:
        """States and labels, by piece; one piece ahead."""

        def load(piece: Sequence[int]) -> tuple[Tensor, Tensor]:
            places = np.asarray(piece)
            states = self._store.read(layers=[self._backbone.stored_layer], samples=self._rows[places])[:, 0]
            return torch.from_numpy(states), self._labels[torch.from_numpy(places)]

        with ThreadPoolExecutor(1, thread_name_prefix="probe-states") as pool:
            upcoming: deque[Future] = deque()
            for piece in pieces:
                upcoming.append(pool.submit(load, piece))
                if len(upcoming) > 1:
                    yield upcoming.popleft().result()
            while upcoming:
                yield upcoming.popleft().result()

    def tokens(self, states: Tensor) -> Tensor:
        return self._backbone.tokens_of(states.to(self._backbone.teacher.device))


def stored_head_input(store: Store) -> Float32[Tensor, "sample dim2"] | None:
    """The teacher's [final-norm CLS; mean of final-norm patches] for each valid sample, float32; None if not stored."""
    if not store.spec.has_head_input:
        return None
    try:
        return torch.from_numpy(store.read_head_input())
    except SchemaError:  # a store that was made from arrays
        return None


def stored_labels(store: Store) -> Int64[Tensor, " sample"]:
    """Class of each valid sample."""
    return torch.from_numpy(store.samples["label"].to_numpy()[store.valid].copy()).long()


def _stacked(loading: Sequence[Future]) -> Batch:
    loaded = [future.result() for future in loading]
    return torch.stack([pixels for pixels, _ in loaded]), torch.stack([target for _, target in loaded])


def _empty_like(targets: Tensor, n_samples: int) -> Tensor:
    return torch.empty(n_samples, *targets.shape[1:], dtype=targets.dtype)

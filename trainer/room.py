"""How many trainings this machine has room for at a time: by GPUs, cores and memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from infra.console import human_bytes
from infra.machine import n_cores
from storage_schemas import Store
from trainer.config import TrainConfig
from trainer.judge import validation_lanes
from trainer.machine import torch_threads
from trainer.reading_threads import is_remote
from trainer.stream import stream_memory_nbytes
from trainer.train import make_model

# Of one process: Python, torch, timm and what else is imported, at its peak before a step: 0.92 to 0.96 GB. And values
# of one token that one application of a block takes, in channels: 27 are kept for its gradient, the rest is for what
# the backward pass makes meanwhile. With ViT-B's block, batches of 2 and a span of 2, a training took 1.48 GB where
# this says 1.60. tests/trainer/test_room.py holds both.
_PROCESS_NBYTES = 1_100_000_000
_KEPT_CHANNELS = 40
_COPIES_OF_WEIGHTS = 5  # weights, gradients, two moments, and those from before the first step


@dataclass(frozen=True, kw_only=True)
class Room:
    """Trainings at a time.

    Attributes:
        at_once: How many.
        why: In words.
        threads: Of torch for each; None where they compute on GPUs.
        devices: For each of them a device; they may repeat.
        gpus: For each of them CUDA_VISIBLE_DEVICES, where it is several processes; else empty.
    """

    at_once: int
    why: str
    threads: int | None
    devices: tuple[str, ...]
    gpus: tuple[str, ...] = ()


def find_room(
    needs_nbytes: Sequence[int],
    dim: int,
    *,
    device: str | None,
    threads: int | None,
    at_once: int | None,
    workers: int = 1,
) -> Room:
    """For how many trainings there is room.

    Args:
        needs_nbytes: Memory of one process of each training.
        dim: Channels of their blocks.
        device: As typed; None takes all GPUs, one for each training, else the CPU.
        threads: Of torch for each, as typed.
        at_once: As typed; None decides by what is free.
        workers: Processes of each training, each with a GPU of its own where there are as many.
    """
    n_gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
    devices: tuple[str, ...]
    gpus: tuple[str, ...] = ()
    if n_gpus and workers > 1:
        fits, devices = max(1, n_gpus // workers), ("cuda",)
        why, gpus = f"{n_gpus} GPUs, {workers} for each", _groups(n_gpus, workers)
    elif n_gpus:
        fits, why, devices = n_gpus, f"{n_gpus} GPUs", tuple(f"cuda:{index}" for index in range(n_gpus))
    elif device is not None and device.startswith("cuda"):
        fits, why, devices = 1, f"DEVICE={device}", (device,)
    else:
        each = (threads or torch_threads(dim)) * workers
        fits, why, devices = max(1, n_cores() // each), f"{n_cores()} cores, {each} for each", ("cpu",)
    free, need = psutil.virtual_memory().available, max(needs_nbytes) * workers
    by_memory = max(1, int(free // need))
    if by_memory < fits:
        fits, why = by_memory, f"{human_bytes(free)} of memory are free, each may take {human_bytes(need)}"
    chosen = min(at_once or fits, len(needs_nbytes))
    why = why if at_once is None else f"AT_ONCE={at_once}"
    on_cpu = devices == ("cpu",)
    return Room(
        at_once=chosen,
        why=why,
        threads=(threads or torch_threads(dim, chosen * workers)) if on_cpu else None,
        devices=tuple(devices[slot % len(devices)] for slot in range(chosen)),
        gpus=tuple(gpus[slot % len(gpus)] for slot in range(chosen)) if gpus else (),
    )


def _groups(n_gpus: int, size: int) -> tuple[str, ...]:
    """GPUs in groups, as CUDA_VISIBLE_DEVICES names them, which may be some of the machine's already."""
    typed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = typed.split(",")[:n_gpus] if typed else [str(index) for index in range(n_gpus)]
    groups = [",".join(names[first : first + size]) for first in range(0, n_gpus - size + 1, size)]
    return tuple(groups) or (",".join(names),)


def training_memory_nbytes(config: TrainConfig, train: Store, validation: Store, micro_batch: int | None = None) -> int:
    """About what one process takes of this machine's memory to train on a CPU; on a GPU, less.

    Args:
        config: Of the training.
        train: What it reads.
        validation: What it validates on.
        micro_batch: Most samples of one forward and backward pass.
    """
    spec, n_samples = train.spec, min(micro_batch or config.batch_size, config.batch_size)
    values = n_samples * spec.n_tokens * spec.dim  # of one state
    n_layers = config.span.n_states - 1
    passes = 2 if config.teacher_forcing_steps else 1
    weights = 4 * sum(p.numel() for p in make_model(config, spec).parameters())
    streams = stream_memory_nbytes(spec, config.span, config.batch_size, lanes=config.lanes, remote=is_remote(train))
    streams += stream_memory_nbytes(
        validation.spec, config.span, config.batch_size, lanes=validation_lanes(config), remote=is_remote(validation)
    )
    states = 4 * config.batch_size * spec.n_tokens * spec.dim * config.span.n_states
    return (
        _PROCESS_NBYTES
        + _COPIES_OF_WEIGHTS * weights
        + streams
        + 2 * states
        + 4 * _KEPT_CHANNELS * values * n_layers * passes
    )

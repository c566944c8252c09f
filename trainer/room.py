"""How many trainings this machine has room for at a time: by GPUs, cores and memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from infra.console import human_bytes
from infra.machine import n_cores
from storage_schemas import Store
from trainer.chunk_reader import is_remote
from trainer.config import TrainConfig
from trainer.judge import validation_lanes
from trainer.machine import torch_threads
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
    """

    at_once: int
    why: str
    threads: int | None
    devices: tuple[str, ...]


def find_room(
    needs_nbytes: Sequence[int], dim: int, *, device: str | None, threads: int | None, at_once: int | None
) -> Room:
    """For how many trainings there is room.

    Args:
        needs_nbytes: Memory of each training.
        dim: Channels of their blocks.
        device: As typed; None takes all GPUs, one for each training, else the CPU.
        threads: Of torch for each, as typed.
        at_once: As typed; None decides by what is free.
    """
    n_gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
    if n_gpus:
        fits, why, devices = n_gpus, f"{n_gpus} GPUs", tuple(f"cuda:{index}" for index in range(n_gpus))
    elif device is not None and device.startswith("cuda"):
        fits, why, devices = 1, f"DEVICE={device}", (device,)
    else:
        each = threads or torch_threads(dim)
        fits, why, devices = max(1, n_cores() // each), f"{n_cores()} cores, {each} for each", ("cpu",)
    free = psutil.virtual_memory().available
    by_memory = max(1, int(free // max(needs_nbytes)))
    if by_memory < fits:
        fits, why = by_memory, f"{human_bytes(free)} of memory are free, each may take {human_bytes(max(needs_nbytes))}"
    chosen = min(at_once or fits, len(needs_nbytes))
    why = why if at_once is None else f"AT_ONCE={at_once}"
    on_cpu = devices == ("cpu",)
    return Room(
        at_once=chosen,
        why=why,
        threads=(threads or torch_threads(dim, chosen)) if on_cpu else None,
        devices=tuple(devices[slot % len(devices)] for slot in range(chosen)),
    )


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

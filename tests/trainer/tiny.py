"""A tiny teacher with a head, stores of its states, and runs over them that take well under a second."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

from infra.objects import Objects, open_objects
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import Span, StoreSpec
from storage_schemas.from_arrays import write_store
from storage_schemas.samples import Sample
from trainer.config import TrainConfig
from trainer.data import TrainingData, open_training_data
from trainer.machine import Machine

N_CLASSES = 3
CPU = Machine(device=torch.device("cpu"), compile=False)


def tiny_teacher() -> Teacher:
    """fake_vit (state l is state 0 plus l (l + 1) / 2) with a seeded head of three classes."""
    return with_head(load_teacher("fake_vit", weights="random:0"))


def with_head(teacher: Teacher) -> Teacher:
    """With a seeded head of three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = nn.Linear(2 * teacher.dim, N_CLASSES)
    return dataclasses.replace(teacher, head=head.requires_grad_(False))


def write_tiny(
    objects: Objects,
    teacher: Teacher,
    n_samples: int,
    seed: int,
    teacher_files: dict[str, bytes] | None = None,
    **changes: object,
) -> None:
    """A float32 store of the teacher's states on random pixels; labels are the teacher's own but for every fourth."""
    pixels = torch.randn(
        n_samples, 3, teacher.image_size, teacher.image_size, generator=torch.Generator().manual_seed(seed)
    )
    states = teacher.layer_states(pixels)
    labels = teacher.logits(states[:, -1]).argmax(-1).numpy()
    labels[::4] = (labels[::4] + 1) % N_CLASSES
    samples = [
        Sample(sample_id=f"{label}/{i:04d}.png", label=int(label), class_name=str(label), nbytes=1)
        for i, label in enumerate(labels)
    ]
    spec = StoreSpec(
        **{
            "layers": tuple(range(teacher.n_layers)),
            "dim": teacher.dim,
            "has_cls": teacher.has_cls,
            "n_registers": teacher.n_registers,
            "grid": teacher.grid,
            "precision": "float32",
            "n_samples": n_samples,
            "samples_per_shard": 8,
            "samples_per_chunk": 4,
            "teacher": teacher.name,
            "teacher_weights_digest": teacher.weights_digest,
            "micro_batch": 4,
            "source_digest": f"{seed:064d}",
            **changes,
        }
    )
    layers = list(spec.layers)
    array = states.numpy()

    def states_of(rows: range) -> np.ndarray:
        return np.ascontiguousarray(array[rows.start : rows.stop, layers])

    write_store(objects, spec, samples, states_of, teacher_files=teacher_files or teacher.to_files())


def write_tiny_pair(root: str | Path, **changes: object) -> str:
    """Stores train (41 samples) and val (18) below a folder or S3 prefix."""
    teacher = tiny_teacher()
    write_tiny(open_objects(f"{root}/train"), teacher, 41, 0, **changes)
    write_tiny(open_objects(f"{root}/val"), teacher, 18, 1, **changes)
    return str(root)


def tiny_data(root: Path, block: str = "0-2", device: torch.device | str = "cpu") -> TrainingData:
    return open_training_data(write_tiny_pair(root), block, device=device)


def tiny_config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "recipe": "test",
        "spans": (Span(0, 2),),
        "seed": 0,
        "n_heads": 2,
        "depth_scaling": True,
        "loss": "mse",
        "noise": 0.01,
        "n_steps": 12,
        "batch_size": 16,
        "lanes": 4,
        "peak_learning_rate": 1e-2,
        "final_learning_rate": 1e-6,
        "warmup_steps": 2,
        "teacher_forcing_steps": 6,
        "teacher_forcing_minimum": 0.0,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
        "precision": "float32",
        "log_every": 5,
        "validate_every": 4,
        "validation_samples": 10,
        "checkpoint_every": 3,
    }
    return TrainConfig(**(values | changes))

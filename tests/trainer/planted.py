"""Stores of planted states, and Raptors trained on them in seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from torch import Tensor

from infra.objects import FolderObjects, open_objects
from storage_schemas import Span, StoreSpec
from storage_schemas.from_arrays import write_store
from storage_schemas.samples import Sample
from tests.trainer.tiny import CPU, tiny_config
from trainer.data import open_training_data
from trainer.losses import mse
from trainer.raptor import Raptor
from trainer.run_files import RunFiles
from trainer.train import train
from trainer.trained import read_trained
from trainer.validation import Validation, ValidationSet, validate


def write_states(root: Path, array: Float32[np.ndarray, "sample layer 5 dim"]) -> None:
    """A store of these states: CLS and 2 x 2 patches, no teacher."""
    n_samples, n_states, _, dim = array.shape
    spec = StoreSpec(
        layers=tuple(range(n_states)),
        dim=dim,
        has_cls=True,
        n_registers=0,
        grid=(2, 2),
        precision="float32",
        n_samples=n_samples,
        samples_per_shard=64,
        samples_per_chunk=8,
        teacher="planted",
        teacher_weights_digest="0" * 64,
        micro_batch=8,
        source_digest=f"{n_samples:064d}",
    )
    samples = [Sample(sample_id=f"0/{i}.png", label=0, class_name="0", nbytes=1) for i in range(n_samples)]
    write_store(
        open_objects(str(root)), spec, samples, lambda rows: np.ascontiguousarray(array[rows.start : rows.stop])
    )


def trained(store: str, place: Path, initial: Mapping[str, Tensor] | None = None, **changes: object) -> str:
    """Where a run is, once it is finished: 80 steps of 16 at 1e-2 but for the changes."""
    common = {"noise": 0.0, "n_steps": 80, "warmup_steps": 4, "teacher_forcing_steps": 20, "lanes": 32}
    config = tiny_config(**{**common, "validate_every": 1000, "checkpoint_every": 1000, **changes})
    data = open_training_data(store, ",".join(map(str, config.spans)), variable="BLOCKS")
    run = RunFiles(FolderObjects(place))
    with run.exclusive():
        run.claim({"train": config.to_json(), "data": data.identity})
        train(config, data, run, machine=CPU, initial=initial)
    return run.location


def joined(places: Sequence[str], spans: Sequence[Span]) -> Raptor:
    """One Raptor of the blocks of these runs."""
    return Raptor([block for place in places for block in read_trained(place).raptor.blocks], spans)


def rolled_out(store: str, raptor: Raptor) -> Validation:
    """On all validation samples, from the first state of the spans to the last."""
    data = open_training_data(store, ",".join(map(str, raptor.spans)), variable="BLOCKS")
    truth = ValidationSet(store=data.validation, teacher=None, batch_size=32, lanes=1)
    return validate(raptor, truth, data.span, mse, machine=CPU)

"""Why a Raptor is trained as it is: teacher forcing alone does not last through a roll-out, roll-out repairs it, and
training blocks together improves on blocks trained alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
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
from trainer.validation import ALL_TOKENS, ValidationSet, validate

DIM, N_TOKENS = 8, 5
SPANS = (Span(0, 3), Span(3, 6))
BLOCKS = ",".join(map(str, SPANS))
GROWTH = 1.25  # of what a step keeps: an error made early is twice as large three steps later


def write_planted(root: Path, n_samples: int, seed: int) -> None:
    """States of a teacher of two phases, each one map applied three times: a stretch and a mix of channels."""
    mixes = np.random.default_rng(7).standard_normal((len(SPANS), DIM, DIM)) / np.sqrt(DIM)
    states = [np.random.default_rng(seed).standard_normal((n_samples, N_TOKENS, DIM))]
    for span, mix in zip(SPANS, mixes):
        for _ in range(span.start, span.stop):
            states.append(GROWTH * states[-1] + 0.5 * np.tanh(2 * states[-1] @ mix))
    array = np.stack(states, axis=1).astype(np.float32)
    spec = StoreSpec(
        layers=tuple(range(array.shape[1])),
        dim=DIM,
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
        source_digest=f"{seed:064d}",
    )
    samples = [Sample(sample_id=f"0/{i}.png", label=0, class_name="0", nbytes=1) for i in range(n_samples)]
    write_store(
        open_objects(str(root)), spec, samples, lambda rows: np.ascontiguousarray(array[rows.start : rows.stop])
    )


@pytest.fixture
def store(tmp_path: Path) -> str:
    write_planted(tmp_path / "states" / "train", 256, 0)
    write_planted(tmp_path / "states" / "val", 64, 1)
    return str(tmp_path / "states")


def trained(store: str, place: Path, initial: Mapping[str, Tensor] | None = None, **changes: object) -> str:
    """Where a run is, once it is finished; as long as every other, whatever it is for."""
    common = {"noise": 0.0, "n_steps": 80, "warmup_steps": 4, "teacher_forcing_steps": 20, "lanes": 32}
    config = tiny_config(**{**common, "validate_every": 1000, "checkpoint_every": 1000, **changes})
    data = open_training_data(store, ",".join(map(str, config.spans)), variable="BLOCKS")
    run = RunFiles(FolderObjects(place))
    with run.exclusive():
        run.claim({"train": config.to_json(), "data": data.identity})
        train(config, data, run, machine=CPU, initial=initial)
    return run.location


def joined(places: Sequence[str]) -> Raptor:
    return Raptor([block for place in places for block in read_trained(place).raptor.blocks], SPANS)


def rolled_out_r2(store: str, raptor: Raptor) -> list[float]:
    """By layer, 1 to 6, from state 0 on."""
    data = open_training_data(store, BLOCKS, variable="BLOCKS")
    truth = ValidationSet(store=data.validation, teacher=None, batch_size=32, lanes=1)
    return validate(raptor, truth, data.span, mse, machine=CPU).r2[ALL_TOKENS]


def test_teacher_forcing_alone_falls_behind_in_a_rollout_and_stage_2_comes_out_ahead(
    store: str, tmp_path: Path
) -> None:
    forced = joined([trained(store, tmp_path / f"f{s}", spans=(s,), teacher_forcing_minimum=1.0) for s in SPANS])
    rolled = joined([trained(store, tmp_path / f"r{s}", spans=(s,)) for s in SPANS])
    place = trained(store, tmp_path / "joint", rolled.state_dict(), spans=SPANS, teacher_forcing_steps=0)
    forced_r2, rolled_r2, joint_r2 = (rolled_out_r2(store, one) for one in (forced, rolled, joined([place])))
    behind = [b - a for a, b in zip(forced_r2, rolled_r2)]
    assert abs(behind[0]) < 0.005, "of the first step, which is no roll-out, both make the same"
    assert 0.005 < behind[2] < behind[5], "and the further it is rolled out, the more is lost"
    assert joint_r2[-1] > rolled_r2[-1] + 0.02
    assert forced_r2[-1] < rolled_r2[-1] - 0.01

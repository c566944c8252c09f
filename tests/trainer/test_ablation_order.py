"""Why a Raptor is trained as it is: teacher forcing alone does not last through a roll-out, roll-out repairs it, and
training blocks together improves on blocks trained alone.
"""

from pathlib import Path

import numpy as np
import pytest

from storage_schemas import Span
from tests.trainer.planted import joined, rolled_out, trained, write_states
from trainer.validation import ALL_TOKENS

DIM = 8
SPANS = (Span(0, 3), Span(3, 6))
GROWTH = 1.25  # of what a step keeps: an error made early is twice as large three steps later


def planted_states(n_samples: int, seed: int) -> np.ndarray:
    """Of a teacher of two phases, each one map applied three times: a stretch and a mix of channels."""
    mixes = np.random.default_rng(7).standard_normal((len(SPANS), DIM, DIM)) / np.sqrt(DIM)
    states = [np.random.default_rng(seed).standard_normal((n_samples, 5, DIM))]
    for span, mix in zip(SPANS, mixes):
        for _ in range(span.start, span.stop):
            states.append(GROWTH * states[-1] + 0.5 * np.tanh(2 * states[-1] @ mix))
    return np.stack(states, axis=1).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> str:
    write_states(tmp_path / "states" / "train", planted_states(256, 0))
    write_states(tmp_path / "states" / "val", planted_states(64, 1))
    return str(tmp_path / "states")


def test_teacher_forcing_alone_falls_behind_in_a_rollout_and_stage_2_comes_out_ahead(
    store: str, tmp_path: Path
) -> None:
    forced = joined([trained(store, tmp_path / f"f{s}", spans=(s,), teacher_forcing_minimum=1.0) for s in SPANS], SPANS)
    rolled = joined([trained(store, tmp_path / f"r{s}", spans=(s,)) for s in SPANS], SPANS)
    place = trained(store, tmp_path / "joint", rolled.state_dict(), spans=SPANS, teacher_forcing_steps=0)
    forced_r2, rolled_r2, joint_r2 = (
        rolled_out(store, one).r2[ALL_TOKENS] for one in (forced, rolled, joined([place], SPANS))
    )
    behind = [b - a for a, b in zip(forced_r2, rolled_r2)]
    assert abs(behind[0]) < 0.005, "of the first step, which is no roll-out, both make the same"
    assert 0.005 < behind[2] < behind[5], "and the further it is rolled out, the more is lost"
    assert joint_r2[-1] > rolled_r2[-1] + 0.02
    assert joint_r2[0] < rolled_r2[0] - 0.004, "errors of the last states reach the first step, which gives way to them"
    assert forced_r2[-1] < rolled_r2[-1] - 0.01

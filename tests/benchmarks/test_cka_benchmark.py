"""The CKA benchmark times two ways to one matrix, and says so if they are not one."""

import numpy as np
import pytest

from analysis.similarity import minibatch_cka
from benchmarks import cka


def test_quick_run_reports_both_and_their_difference():
    result = cka.run(cka.QUICK)
    slow, fast = result.rows
    assert fast["times as fast"] == pytest.approx(slow["seconds"] / fast["seconds"])
    difference = result.goals[1]
    assert difference.met
    assert difference.found < 1e-10
    assert np.shape(result.details["matrix"]) == (3, 3)


def test_the_loop_is_minibatch_cka_of_all_rows():
    batches = [cka.make_states(cka.QUICK, batch) for batch in range(3)]
    np.testing.assert_allclose(
        cka.cka_by_pairs(cka.QUICK, batches), minibatch_cka(np.concatenate(batches), batch_rows=32).values, atol=1e-10
    )


def test_a_difference_misses_the_goal(monkeypatch):
    monkeypatch.setattr(cka, "cka_by_pairs", lambda config, batches: np.eye(config.n_layers))
    assert not cka.run(cka.QUICK).goals[1].met


def test_layers_are_related_but_not_the_same():
    found = cka.cka_fast(cka.QUICK, [cka.make_states(cka.QUICK, batch) for batch in range(3)])
    assert 0.1 < found[0, 2] < found[0, 1] < 0.99

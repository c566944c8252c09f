"""Models run on few images at a time, with the numbers of all at once; what is stated of memory is on the page."""

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import model_runs
from analysis.interventions import token_kinds, track_perturbation
from analysis.model_memory import models_nbytes
from analysis.model_runs import EPSILONS, self_correction
from pipeline.teacher import Teacher, load_teacher
from tests.stores import make_spec

PAGE = Path(__file__).parents[2] / "docs" / "analyses.md"


def test_pushes_of_parts_are_means_over_their_images(monkeypatch):
    teacher = load_teacher("digits_vit")
    x = teacher.embed(torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)))
    monkeypatch.setattr(model_runs, "_ROWS_AT_ONCE", 3)
    monkeypatch.setattr(model_runs, "EPSILONS", EPSILONS[:1])
    rows_at_once: list[int] = []
    plain = Teacher.run_blocks

    def run_blocks(model, states, start, stop):
        rows_at_once.append(len(states))
        return plain(model, states, start, stop)

    monkeypatch.setattr(Teacher, "run_blocks", run_blocks)
    seen: list[int] = []
    found = self_correction(teacher, x, seed=4, progress=seen.append)
    assert max(rows_at_once) == 3
    assert seen == [3, 2]
    assert [one.start for one in found] == list(range(12))
    kinds = token_kinds(has_cls=teacher.has_cls, n_registers=teacher.n_registers, n_patches=teacher.n_patches)
    state = plain(teacher, x, 0, 10)
    with torch.no_grad():
        parts = [
            track_perturbation(teacher, part, 10, epsilon=EPSILONS[0], kinds=kinds, seed=seed)
            for part, seed in ((state[:3], 4), (state[3:], 5))
        ]
    for kind in kinds:
        expected = (3 * parts[0].angles[kind] + 2 * parts[1].angles[kind]) / 5
        np.testing.assert_allclose(found[10].angles[kind], expected, rtol=1e-4)


def test_vit_b_takes_what_the_page_on_analyses_says() -> None:
    spec = make_spec(layers=tuple(range(13)), dim=768, n_registers=4, grid=(16, 16))
    assert models_nbytes(spec, 12, 12, 64, 1024) == pytest.approx(2.6e9, rel=0.05)
    first = make_spec(layers=(0, 1, 2), dim=768, n_registers=4, grid=(16, 16))
    assert models_nbytes(first, 12, 12, 64, 1024) == models_nbytes(spec, 12, 12, 64, 1024)
    assert "sections that run models hold at most 2.6 GB" in PAGE.read_text().replace("\n", " ")

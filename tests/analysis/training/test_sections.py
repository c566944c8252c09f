"""What the pages say of planted trainings: verdicts with their numbers, tables with a row for each checkpoint."""

import numpy as np
import pytest

from analysis.page import Origin, Table, page_html
from analysis.training import sections, spectra_sections, study_sections
from analysis.training.runs import Run
from analysis.training.sections import paths_section, training_section
from analysis.training.spectra_sections import decay_section, sample_size_section, spectra_over_training
from analysis.training.study_sections import rank_correlation, study_section, sweep
from tests.analysis.training.planted import record, run

ORIGIN = Origin(data="planted", n_images=5, seed=0, command="make curves")


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    """Matplotlib is not asked: test_doors draws a page."""
    drawings = {sections: ("curves", "heat_maps", "plane_paths"), spectra_sections: ("depth_curves",)}
    for module, names in {**drawings, study_sections: ("curves",)}.items():
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: b"<svg/>")


def table(section, name: str) -> Table:
    return next(part for part in section.parts if isinstance(part, Table) and part.name == name)


def test_overfitting_is_said_with_what_falls_from_the_least_held_out_loss_on():
    falling = run("few", {0: (2.3, 0.9, 0.8), 5: (0.5, 0.7, 0.6), 20: (0.9, 0.5, 0.4)})
    said = " ".join(training_section([falling], ORIGIN).text)
    assert "held-out loss is least at epoch 5 (0.500) and 0.900 at epoch 20" in said
    assert "similarity cls 0.700 to 0.500" in said
    assert "4 of 4 fall here" in said
    assert "untrained against epoch 20: R2 cls 0.800 against 0.400" in said
    assert "here so in 4 of 4" in said
    learning = run("all", {0: (2.3, 0.5, 0.4), 20: (0.1, 0.9, 0.8)})
    said = " ".join(training_section([learning], ORIGIN).text)
    assert "least at the last checkpoint, epoch 20 (0.100; training loss 0.048): it has not begun to rise." in said
    assert "here so in 0 of 4" in said


def test_one_table_has_every_checkpoint_with_the_untrained_one():
    runs = [
        run("a", {0: (2.3, 0.9, 0.8), 5: (0.5, 0.7, 0.6)}),
        run("b", {0: (2.2, 0.1, None), 7: (0.4, 0.2, None)}, 0.3),
    ]
    found = table(training_section(runs, ORIGIN), "training")
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    assert [(row["run"], row["epoch"], row["stochastic depth"]) for row in rows] == [
        ("a", 0, 0.0), ("a", 5, 0.0), ("b", 0, 0.3), ("b", 7, 0.3),
    ]  # fmt: skip
    assert [row["val loss"] for row in rows] == [2.3, 0.5, 2.2, 0.4]
    assert rows[1]["train loss"] == pytest.approx(1 / 6)
    assert rows[1]["similarity patches"] == pytest.approx(0.7)
    assert rows[1]["R2 cls"] == pytest.approx(0.6)
    assert np.isnan(rows[3]["R2 cls"])
    assert rows[0]["contrast"] == pytest.approx(0.4)


def test_trends_are_stated_tap_by_tap():
    tilts = [[0.9, 0.9, 0.9, 0.9, 0.9], [0.5, 0.5, 0.5, 0.2, 0.5], [0.3, 0.3, 0.3, 0.6, 0.1]]
    records = [record(epoch, of_taps) for epoch, of_taps in zip((0, 4, 20), tilts)]
    section = spectra_over_training(records, ORIGIN)
    said = " ".join(section.text)
    assert "Effective rank rises over training, says the paper: does not hold everywhere" in said
    assert "it rises at 5 of 5 taps; it turns back at block 2 (epoch 4" in said
    assert "at block 2." in next(line for line in section.text if line.startswith("Ranks and anisotropy all"))
    assert "CLS final ends with the highest effective rank and the lowest anisotropy, says the paper: holds" in said
    assert "that of CLS final since epoch 20" in said
    rows = [dict(zip(table(section, "trends").columns, row, strict=True)) for row in table(section, "trends").rows]
    assert [row["tap"] for row in rows if row["scalar"] == "stable_rank" and row["turned"]] == ["block 2"]
    assert len(table(section, "epochs").rows) == 15
    assert "On the way" not in said
    dips = [record(epoch, [tilt] * 5) for epoch, tilt in zip((0, 4, 20), (0.5, 0.9, 0.2))]
    dipped = next(line for line in spectra_over_training(dips, ORIGIN).text if line.startswith("Stable rank"))
    assert "turns back at none. On the way it is on the other side of where it began at PatchEmbed (epoch 4)," in dipped
    falls = [record(epoch, [tilt] * 4 + [0.9 + epoch]) for epoch, tilt in zip((0, 4, 20), (0.9, 0.5, 0.3))]
    never = next(line for line in spectra_over_training(falls, ORIGIN).text if line.startswith("Stable rank"))
    assert "does not hold everywhere. From epoch 0 to 20 it rises at 4 of 5 taps, not at CLS final; it turns" in never
    assert "turns back at none" in never
    monotone = spectra_over_training([record(0, [0.9] * 5), record(9, [0.5] * 5)], ORIGIN)
    assert sum(": holds. From epoch 0 to 9" in line for line in monotone.text) == 6
    assert page_html("t", {}, [section, monotone]).count("<figure>") == 12


def test_few_vectors_are_said_to_allow_less():
    one = record(3, [0.9] * 5)
    section = sample_size_section(
        {"Layer_00_PatchEmbed": 196_000, "Layer_03_CLS_Final": 1_000}, 384, _named(one), ORIGIN
    )
    assert (
        "1,000 vectors of 384 channels, as CLS final has, reach a participation ratio of about 277.5" in section.text[0]
    )
    assert "196,000 as PatchEmbed has 383.2" in section.text[0]
    first, last = table(section, "sample_size").rows
    assert last[2] == pytest.approx(384 / 1.384)
    assert last[4] == pytest.approx(last[3] / last[2])
    assert first[1] == 196_000


def _named(one):
    return type(one)(
        epoch=one.epoch, scalars=dict(zip(("Layer_00_PatchEmbed", "Layer_03_CLS_Final"), one.scalars.values()))
    )


def test_ways_are_on_the_plane_of_the_last_checkpoint():
    several = run("p = 0.5", {0: (2.3, 0.9, None), 5: (0.5, 0.7, None)})
    section = paths_section(several, ORIGIN)
    found = table(section, "cls_paths_p___0_5")
    last = several.last.measured
    np.testing.assert_allclose(
        [row[2:] for row in found.rows if row[0] == 5], last.plane.project(last.cls_path), atol=1e-12
    )
    assert [row[1] for row in found.rows[:6]] == ["PosEmbed", "block 1", "block 2", "block 3", "block 4", "CLS final"]
    np.testing.assert_allclose(
        [row[2:] for row in found.rows if row[0] == 0], last.plane.project(several.points[0].measured.cls_path)
    )


def test_spectra_that_flatten_are_counted():
    section = decay_section(run("p = 0", {0: (2.3, 0.9, None), 5: (0.5, 0.7, None)}), ORIGIN)
    assert "larger at epoch 5 than at epoch 0 at 7 of 7 taps." in section.text[0]
    rows = [row for row in table(section, "singular_values").rows if row[:2] == [5, "CLS final"]]
    np.testing.assert_allclose([row[3] for row in rows], 4 * np.exp(-np.arange(5) / 6))
    np.testing.assert_allclose([row[4] for row in rows], np.exp(-np.arange(5) / 6))
    assert len(section.parts) == 5 + 1
    falling = run("p = 0", {5: (2.3, 0.9, None), 6: (0.5, 0.7, None)})
    steeper = Run(name="back", points=falling.points[::-1])
    assert (
        "at epoch 5 than at epoch 6 at 0 of 7 taps, not at PatchEmbed, PosEmbed,"
        in decay_section(steeper, ORIGIN).text[0]
    )


def study(similarities: list[list[float]], r2: float | None = 0.5) -> dict[float, list[Run]]:
    chances = [0.0, 0.2, 0.7]
    return {
        p: [run(f"p = {p:g}", {0: (2.3, 0.1, r2), 9: (0.3, one, r2)}, p) for one in of_seeds]
        for p, of_seeds in zip(chances, similarities, strict=True)
    }


def test_a_sweep_takes_the_last_checkpoints_over_seeds():
    found = sweep(study([[0.1, 0.3], [0.4, 0.4], [0.6, 0.8]]), "similarity cls")
    np.testing.assert_allclose(found.mean, [0.2, 0.4, 0.7])
    np.testing.assert_allclose(found.std, [np.sqrt(0.02), 0, np.sqrt(0.02)], atol=1e-12)
    assert (found.n_rising, found.rank_correlation) == (2, 1)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.1, 0.2, 0.3], "holds. 0.100 at 0, 0.200 at 0.2, 0.300 at 0.7; rank correlation 1.00"),
        ([0.1, 0.4, 0.3], "holds on the whole, not at every step. 0.100 at 0"),
        ([0.4, 0.5, 0.3], "does not hold. 0.400 at 0"),
    ],
)
def test_verdicts_on_the_statement_of_the_paper(values, verdict):
    section = study_section(study([[one] for one in values]), ORIGIN)
    assert f"Similarity cls rises with stochastic depth, says the Raptor paper: {verdict}" in " ".join(section.text)
    assert "those with 0.7 to be read" in section.text[-1]
    assert [row[3] for row in table(section, "stochastic_depth").rows] == [9, 9, 9]


@pytest.mark.parametrize(("highest", "expected"), [(0.4, []), (0.7, ["50.0% to 57.0%, more than 5 points apart"])])
def test_teachers_that_have_not_learned_equally_much_are_said_so(highest, expected):
    """Planted teachers name half of the images rightly, and more by a tenth of their chance."""
    runs = {p: [run(f"p = {p:g}", {9: (0.3, 0.5, None)}, p)] for p in (0.0, highest)}
    text = study_section(runs, ORIGIN).text
    said = [line for line in text if "not learned equally much" in line]
    assert [part in line for part, line in zip(expected, said, strict=True)] == [True] * len(expected)
    assert "one teacher each, so that chance is not told from effect" in text[0]


def test_without_raptors_there_is_no_fit_on_the_page():
    section = study_section(study([[0.1], [0.2], [0.3]], r2=None), ORIGIN)
    assert not any("R2" in line or "Raptor accuracy" in line for line in section.text)
    assert len(section.parts) == 4


def test_rank_correlation_of_known_orders():
    x = np.arange(4.0)
    assert rank_correlation(x, x**3) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(2 / np.sqrt(5))
    assert np.isnan(rank_correlation(x, np.ones(4)))

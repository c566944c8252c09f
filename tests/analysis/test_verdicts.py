"""Verdicts on statements of papers: criteria that are met and missed by planted numbers, and when there is none."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from analysis import dynamics_report, report
from analysis.accumulate import Moments
from analysis.dynamics import Basins, Dynamics
from analysis.gallery.encoders import Alike
from analysis.gallery.sections import Encoder, encoders_section
from analysis.linear_depth import linear_windows
from analysis.model_report import swap_section
from analysis.model_runs import N_SWAPPED, Swaps
from analysis.page import Origin
from analysis.paths import Paths
from analysis.paths_report import linear_section, paths_section
from analysis.phase_report import even_score, find_phases
from analysis.report_paths import named_paths
from analysis.similarity import CkaAccumulator, dropped_text
from analysis.verdicts import verdict
from analysis.vision.measure import LayerProbes
from analysis.vision.probe_section import probe_section
from analysis.vision.sections import skip_section
from analysis.vision.skip_sections import trained_section
from analysis.vision.skip_training import WHOLE, SkipModel
from analysis.vision.skips import SkipAblation
from infra.objects import MemoryObjects
from storage_schemas import open_store
from tests.analysis.matrices import block_distances
from tests.stores import make_samples, make_spec, write_planted

ORIGIN = Origin(data="here", n_images=64, seed=0, command="make report")
HOLDS, NOT, NONE = "This holds here.", "This does not hold here.", "Not judged here:"


def moments(mean: Any, n: int = 64) -> Moments:
    values = np.asarray(mean, dtype=np.float64)
    return Moments(n=n, mean=values, std=np.zeros_like(values))


def dynamics(speed: list[float], coherence: list[float] | None = None) -> Dynamics:
    n = len(speed) + 1
    states = moments(coherence or np.ones(n))
    rising = moments(np.linspace(0, 1, n))
    return Dynamics(
        to_final=rising, norm=rising, speed=moments(speed), state_coherence=states, update_coherence=moments(speed)
    )


def findings(n_images: int = 64, **kinds: Dynamics) -> Any:
    n = len(next(iter(kinds.values())).norm.mean)
    return SimpleNamespace(layers=tuple(range(n)), dynamics=kinds, n_images_wide=n_images)


def said(text: list[str]) -> str:
    return " ".join(text)


def test_too_few_images_and_undefined_numbers_are_not_judged() -> None:
    assert verdict(True) == HOLDS
    assert verdict(False, n_images=32, values=[1.0]) == NOT
    assert verdict(True, n_images=31) == "Not judged here: of 31 images, where a verdict takes 32."
    assert NONE in verdict(True, n_images=99, values=[1.0, np.nan])


@pytest.mark.parametrize("cuts", [[3.5], [2.5, 6.5], [1.5, 4.5, 5.5]])
def test_chance_of_cuts_is_that_of_all_choices_of_places(cuts: list[float]) -> None:
    places = list(range(2, 9))
    choices = list(itertools.combinations(places, len(cuts)))
    hits = [sum(min(abs(cut - place) for place in chosen) <= 0.5 for cut in cuts) for chosen in choices]
    assert report.chance_hits(cuts, places) == pytest.approx(np.mean(hits))


def test_where_speeds_are_cut_is_among_the_places_that_chance_knows() -> None:
    """A jump at the first step that can begin a phase, and at the last."""
    for speed in ([9, 1, 5, 5, 5, 5.0], [9, 1, 1, 1, 1, 5.0]):
        found = report.speed_jumps(findings(cls=dynamics(speed)), 2)
        assert found["cls"][0] in (2, 5)
    places = findings(cls=dynamics([9, 1, 5, 5, 5, 5.0])).layers[2:-1]
    assert (places[0], places[-1]) == (2, 5)


@pytest.mark.parametrize(
    ("cls", "registers", "n", "expected"),
    [
        ([9, 0.2, 0.2, 0.2, 0.9], 0.1, 64, HOLDS),
        ([9, 0.2, 0.2, 0.2, 0.2], 0.1, 64, NOT),  # CLS does not turn late
        ([9, 0.2, 0.2, 0.2, 0.9], 0.29, 64, NOT),  # registers within a tenth of patches
        ([9, 0.2, 0.2, 0.2, 0.9], 0.1, 16, NONE),
    ],
)
def test_speeds_by_kind(cls: list[float], registers: float, n: int, expected: str) -> None:
    kinds = {"cls": dynamics(cls), "registers": dynamics([9, *[registers] * 4]), "patches": dynamics([9, *[0.3] * 4])}
    assert expected in said(dynamics_report._speed_statement(findings(n, **kinds)))
    assert dynamics_report._speed_statement(findings(cls=kinds["cls"])) == []


@pytest.mark.parametrize(
    ("coherence", "expected"),
    [
        ([0.9, 0.2, 0.2, 0.2, 0.25, 0.3, 0.6], HOLDS),
        ([0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], NOT),  # as steep before
        ([0.9, 0.2, 0.2, 0.2, 0.2, 0.2, 0.24], NOT),  # hardly rises
    ],
)
def test_late_coherence(coherence: list[float], expected: str) -> None:
    assert expected in said(dynamics_report._coherence_statement(findings(patches=dynamics([0.1] * 6, coherence))))


def test_speeds_at_boundaries_of_phases_have_a_margin() -> None:
    for step, expected in ((0.5, HOLDS), (0.104, NOT)):
        found = findings(cls=dynamics([9, 0.1, 0.1, step, 0.1, 0.1]))
        assert expected in said(report._crossing_statement(found, [3.5]))


def test_ranks_are_judged_after_the_embedding_and_of_enough_vectors() -> None:
    def judged(stable: list[float], n: int) -> str:
        updates: Any = SimpleNamespace(n=n, mean=np.zeros((len(stable), 8)))
        return dynamics_report._rank_statement("cls", stable, range(len(stable) + 1), updates)

    assert HOLDS in judged([1, 6, 5, 4], 8)
    assert NOT in judged([9, 6, 5, 5.9], 8)  # the step from layer 0 is another matter
    assert NONE in judged([1, 6, 5, 4], 7)
    assert NONE in judged([6, 4], 8)
    assert "lowest, 4, at the step from layer 3" in judged([1, 6, 5, 4], 8)


@pytest.mark.parametrize(
    ("ratio", "accuracy", "n", "expected"),
    [
        ([1.0, 0.9, 0.5], 0.9, 64, HOLDS),
        ([1.0, 0.9, 0.85], 0.9, 64, NOT),  # no smaller than at the first layer, but for a margin
        ([1.0, 2.0, 1.1], 0.9, 64, NOT),
        ([1.0, 0.9, 0.5], 0.6, 64, NOT),  # two classes; no better than chance
        ([1.0, 0.9, 0.5], 0.9, 9, NONE),
    ],
)
def test_class_basins(ratio: list[float], accuracy: float, n: int, expected: str) -> None:
    basins = Basins(within=moments(ratio, n), between=np.ones(3), accuracy=moments([accuracy] * 3, n), n_classes=2)
    paths = Paths(points=np.zeros((1, 3, 2)), labels=np.array([7]), explained=np.array([0.6, 0.4]))
    section = paths_section("cls", paths, {"cls": dynamics([0.1, 0.1])}, basins, (0, 1, 2), ORIGIN)
    assert NONE in section.text[0]  # two steps have no shape of an S
    assert expected in section.text[1]


def test_paths_bear_the_labels_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import tests.stores

    labelled = [replace(one, label=100 + 50 * (one.label or 0)) for one in make_samples(21)]
    monkeypatch.setattr(tests.stores, "make_samples", lambda n: labelled)
    objects = MemoryObjects()
    write_planted(objects, make_spec())
    paths = Paths(points=np.zeros((3, 3, 2)), labels=np.array([2, 0, 1]), explained=np.array([0.6, 0.4]))
    assert named_paths(paths, open_store(objects)).labels.tolist() == [200, 100, 150]


@pytest.mark.parametrize(("n", "judged"), [(40, True), (5, False)])
def test_operators_of_fewer_images_than_channels_are_not_judged(n: int, judged: bool) -> None:
    states = np.random.default_rng(0).standard_normal((n, 6, 6))
    windows = {"cls": linear_windows(states, states, 4), "patch_mean": linear_windows(states, states, 4)}
    section = linear_section(windows, {"cls": []}, ORIGIN)
    assert [NONE in one for one in section.text] == [not judged] * 5
    assert ("fitted to 5 images, where an operator of 6 channels takes as many" in section.text[0]) is not judged


def test_one_operator_over_all_layers_says_nothing_of_depth() -> None:
    states = np.random.default_rng(0).standard_normal((40, 3, 6))
    section = linear_section({"cls": linear_windows(states, states, 2)}, {"cls": []}, ORIGIN)
    assert "Not judged here: one operator spans all layers" in section.text[1]


@pytest.mark.parametrize(
    ("intra", "inter", "expected"), [(0.85, 0.3, HOLDS), (0.7, 0.3, NOT), (0.85, 0.5, NOT), (None, 0.3, NONE)]
)
def test_layer_swaps(intra: float | None, inter: float, expected: str) -> None:
    by_kind = {("intra", n): [] if intra is None else [intra] * 4 for n in N_SWAPPED}
    swaps = Swaps(clean=0.9, by_kind=by_kind | {("inter", n): [inter] * 4 for n in N_SWAPPED})
    assert expected in swap_section(swaps, images="", origin=ORIGIN).text[-1]


def test_skips_that_are_only_taken_away_are_not_judged() -> None:
    cka = np.full((2, 3, 3), 0.5)
    found = SkipAblation(cka=cka, clean_cka=np.ones((3, 3)), accuracy=None, clean_accuracy=None, n_images=64)
    text = said(list(skip_section(found, images="", origin=ORIGIN).text))
    assert NONE in text
    assert "make skips" in text


def test_rows_of_short_batches_are_said() -> None:
    sums = CkaAccumulator(2)
    for n in (8, 3):
        sums.update(np.random.default_rng(0).standard_normal((n, 2, 5)))
    assert dropped_text(sums.result()) == " and 3 left out, of batches below 4"


def test_probes_of_few_test_images_or_hardly_ahead_are_not_said_to_hold() -> None:
    def judged(cls: float | None, n_test: int) -> str:
        of_cls = {} if cls is None else {"cls": np.array([0.5, cls])}
        probes = LayerProbes(
            layers=(0, 1),
            pooled=of_cls | {"mean of all": np.array([0.5, 0.8])},
            registers=np.zeros((2, 0)),
            patches=np.full((2, 1), 0.3),
            places=np.array([0]),
            grid=(2, 2),
            shuffled=np.full((2, 3), 0.1),
            chance=0.1,
            n_fit=20,
            least_shots=10,
            n_test=n_test,
            tested_on="there",
        )
        return probe_section(probes, ORIGIN).text[-1]

    assert HOLDS in judged(0.83, 64)
    assert NOT in judged(0.81, 64)
    assert NONE in judged(0.83, 31)
    assert "this teacher has no CLS" in judged(None, 64)


@pytest.mark.parametrize(
    ("distance", "n", "expected"),
    [
        (block_distances([4, 5, 3], noise=0.02), 64, HOLDS),
        (1 - np.cos(0.12 * np.subtract.outer(np.arange(12), np.arange(12))), 64, NOT),  # turns evenly
        (block_distances([4, 5, 3], noise=0.02), 16, NONE),
        (np.zeros((12, 12)), 64, NONE),
    ],
)
def test_phases_of_encoders_are_judged_against_a_depth_that_moves_evenly(
    distance: np.ndarray, n: int, expected: str
) -> None:
    phases = find_phases(distance, 3, None, "normalised_association")
    same = Moments(n=n, mean=np.ones((13, 13)), std=np.zeros((13, 13)))
    alike = Alike(layers=tuple(range(13)), cosines={"cls": same}, cka=None)
    origin = Origin(data="here", n_images=n, seed=None, command="make gallery")
    one = Encoder(teacher="fake", location="there", dim=8, alike=alike, phases=phases, origin=origin)
    section = encoders_section({"one": one}, origin)
    assert expected in section.text[-1]
    assert "The phases of 1 of 1 encoders" in section.text[-1] or expected != HOLDS


def test_a_depth_that_moves_evenly_scores_as_its_own_best_cut() -> None:
    even = find_phases(1 - np.cos(0.12 * np.subtract.outer(np.arange(9), np.arange(9))), 2, None, "cut")
    assert even_score(even) == pytest.approx(even.chosen.score)


@pytest.mark.parametrize(
    ("across", "accuracy", "n", "expected"),
    [
        (0.3, 0.93, 64, [HOLDS, HOLDS]),
        (0.6, 0.96, 64, [NOT, NOT]),
        (0.3, 0.85, 64, [HOLDS, NOT]),
        (0.3, 0.93, 9, [NONE] * 2),
    ],
)
def test_models_trained_without_skips(across: float, accuracy: float, n: int, expected: list[str]) -> None:
    """The third of six blocks in the middle has lost its skips."""
    same, parted = np.full((7, 7), 0.8), np.full((7, 7), 0.8)
    parted[:3, 3:] = parted[3:, :3] = across
    models = [
        SkipModel(block=block, cka=cka, accuracy=right, loss=0.1)
        for block, cka, right in ((WHOLE, same, 0.97), (3, parted, accuracy))
    ]
    origin = Origin(data="here", n_images=n, seed=0, command="make skips")
    text = trained_section(models, origin).text
    assert [one in said for one, said in zip(expected, text[-2:], strict=True)] == [True, True]

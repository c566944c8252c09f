"""`make positions`: a page of what the experiments found, what is kept of them, and what is refused."""

import base64
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

import analysis.positions.images
from analysis.__main__ import main
from analysis.page import Origin
from analysis.plots import pictures
from analysis.positions import experiments, sections, vit_sections
from analysis.positions.experiments import Experiment, run_experiments
from analysis.positions.sections import (
    gaussian_section,
    planted_section,
    transfer_section,
)
from analysis.positions.vit_sections import permuted_section, vit_section
from infra.console import JobError, UserError
from infra.objects import open_objects
from tests.analysis.positions.test_vits import planted

SECTIONS = [
    "Learning planted sets",
    "The control: no sets in the data",
    "Linear rules, and transfer",
    "Permuted pixels",
    "Attention by position against ordinary attention",
]
ORIGIN = Origin(data="d", n_images=5, seed="0 to 1", command="make positions")


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(analysis.positions.images, "load_images", lambda place: planted())


@pytest.fixture
def _undrawn(monkeypatch):
    """Sections without their drawings, which take a second each; `a_page_with_its_drawings` (slow) has them."""
    for name in ("curves", "pictures"):
        for module in (sections, vit_sections):
            monkeypatch.setattr(module, name, lambda *_, **__: b"<svg/>")


def positions(out, *more: str) -> str:
    typed = ["positions", "--out", str(out), "--seeds", "1", "--epochs", "1", "--steps", "10", "--samples", "200"]
    assert main([*typed, *more]) == 0
    return (out / "report.html").read_text()


def counted(name: str, calls: list[str], value: float = 1.0, **settings: float) -> Experiment:
    return Experiment(name=name, settings=settings, run=lambda tell: calls.append(name) or {"value": value})


@pytest.mark.usefixtures("_small", "_undrawn")
def test_a_page_with_all_experiments_and_nothing_done_twice(tmp_path, monkeypatch, capsys):
    page = positions(tmp_path)
    assert re.findall(r"<h2>(.*?)</h2>", page) == SECTIONS
    said = capsys.readouterr().out
    assert f"saved  {tmp_path}/report.html: {page.count('<figure>')} figures; 7 tables" in said
    assert "nothing random" not in page
    assert "200 planted samples (Assumption 1); seed 0;" in page
    assert "One seed." in page
    assert f"make positions OUT={tmp_path} SEEDS=1 EPOCHS=1 STEPS=10 ARGS='--samples 200'" in page.replace(
        "&#x27;", "'"
    )
    tables = sorted(path.stem for path in (tmp_path / "tables").iterdir())
    assert tables == sorted(
        ["accuracy", "gaussian_course", "permuted", "planted_course", "transfer", "transfer_course", "vit_positions"]
    )
    kept = {path.name: path.read_bytes() for path in (tmp_path / "experiments").iterdir()}
    assert len(kept) == 7

    def never(*_, **__):
        raise AssertionError("it was done already")

    for name in ("train_simple", "train_vit", "linear_accuracy", "linear_error"):
        monkeypatch.setattr(experiments, name, never)
    assert positions(tmp_path) == page
    assert {path.name: path.read_bytes() for path in (tmp_path / "experiments").iterdir()} == kept


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_a_page_with_its_drawings(tmp_path):
    page = positions(tmp_path)
    drawn = [base64.b64decode(one) for one in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(drawn) == page.count("<figure>") == 9
    assert all(ElementTree.fromstring(one).tag.endswith("svg") for one in drawn)


def test_pictures_are_svg_and_the_same_each_time():
    values = {"a": np.array([[0.0, np.nan], [1.0, -1.0]]), "b": np.eye(3)}
    one, again = (pictures(values, unit="cosine", limits=(-1, 1)) for _ in range(2))
    assert one == again
    text = ElementTree.fromstring(one)
    assert text.tag.endswith("svg")
    assert len(list(text.iter("{http://www.w3.org/2000/svg}image"))) == 3  # and the bar of colours


def test_what_was_interrupted_is_done_and_the_rest_is_not(tmp_path):
    kept, calls = open_objects(str(tmp_path)), list[str]()

    def interrupted(tell):
        raise KeyboardInterrupt

    wanted = [counted("a", calls, 1.5), Experiment(name="b", settings={}, run=interrupted), counted("c", calls)]
    with pytest.raises(KeyboardInterrupt):
        run_experiments(wanted, kept)
    found = run_experiments([wanted[0], counted("b", calls, 2.5), wanted[2]], kept)
    assert calls == ["a", "b", "c"]
    assert [found[name]["value"] for name in "abc"] == [1.5, 2.5, 1.0]


def test_other_settings_are_another_experiment_and_a_torn_record_is_made_again(tmp_path):
    kept, calls = open_objects(str(tmp_path)), list[str]()
    run_experiments([counted("a", calls, 1, steps=5)], kept)
    run_experiments([counted("a", calls, 2, steps=6)], kept)
    assert run_experiments([counted("a", calls, 9, steps=5)], kept)["a"]["value"] == 1
    assert len(calls) == 2
    [torn] = [
        path
        for path in (tmp_path / "experiments").iterdir()
        if json.loads(path.read_text())["settings"] == {"steps": 5}
    ]
    torn.write_text(torn.read_text()[:-4])
    assert run_experiments([counted("a", calls, 3, steps=5)], kept)["a"]["value"] == 3


def test_a_training_that_diverges_is_named(tmp_path):
    def diverges(tell):
        raise ValueError("the loss is nan at step 5")

    with pytest.raises(JobError, match="planted-seed4: the loss is nan at step 5"):
        run_experiments([Experiment(name="planted-seed4", settings={}, run=diverges)], open_objects(str(tmp_path)))


def test_all_problems_come_at_once_and_before_anything_is_done(tmp_path):
    with pytest.raises(UserError) as error:
        main(["positions", "--images", str(tmp_path), "--out", str(tmp_path / "o"), "--seeds", "0", "--epochs", "0"])
    assert [part in str(error.value) for part in ("SEEDS=0", "EPOCHS=0", "Found neither")] == [True] * 3
    assert not (tmp_path / "o/report.html").exists()


def course(**changes) -> dict:
    values = {
        "steps": [0, 10, 20],
        "error": [0.5, 0.1, 0.02],
        "alignment": [0.1, 0.9, 1.0],
        "rows": [0.0, 1.0, 0.75],
        "overlap": [0.2, 1.0, 0.9],
        "chance": 0.2,
        "attention": np.random.default_rng(0).standard_normal((16, 16)).tolist(),
    }
    return values | changes


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "that holds: 0% of rows before training, at most 100%, after 10 steps, and 75% at the end"),
        ({"rows": [0.0, 0.9, 0.75]}, "that does not hold: 0% of rows before training, at most 90%"),
        ({"error": [0.5, 0.4, 0.06]}, "that does not hold"),
    ],
)
def test_the_statement_of_learned_sets_follows_the_numbers(changes, expected):
    assert expected in planted_section([course(**changes)], ORIGIN).text[1]


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"overlap": [0.2, 0.2, 0.25]}, "that holds: the error falls from 0.500 to 0.020"),
        ({"overlap": [0.2, 0.5, 0.8]}, "that does not hold"),
        ({"overlap": [0.2, 0.2, 0.2], "error": [0.5, 0.5, 0.5]}, "that does not hold"),
    ],
)
def test_the_statement_of_the_control_follows_the_numbers(changes, expected):
    assert expected in gaussian_section([course(**changes)], ORIGIN).text[0]


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize(
    ("linear", "anew", "expected"),
    [
        (0.2, [0.3, 0.2], ("an eighth or more. Here that holds", "samples. Here that holds: at 16")),
        (0.1, [0.3, 0.2], ("an eighth or more. Here that does not hold", "lower in 2 of 2 pairs")),
        (0.2, [0.3, 0.0], ("an eighth or more. Here that holds", "samples. Here that does not hold: at 16")),
    ],
)
def test_the_statements_of_transfer_follow_the_numbers(linear, anew, expected):
    found = course(linear=[0.4, linear], sum_rule=0.15, few=[16, 64], kept=[0.05, 0.02], anew=anew)
    text = " ".join(transfer_section([found], ORIGIN).text)
    assert [part in text for part in expected] == [True, True]


def vit(positions: np.ndarray, accuracy: float, order=None) -> dict:
    drawn = np.random.default_rng(7).standard_normal(positions.shape)
    seen = positions if order is None else positions[order]
    order = np.arange(len(seen)) if order is None else order
    return {
        "accuracy": accuracy,
        "losses": [2.0, 1.0],
        "before": drawn.tolist(),
        "after": seen.tolist(),
        "order": order.tolist(),
    }


def local() -> np.ndarray:
    from timm.layers import build_sincos2d_pos_embed

    return build_sincos2d_pos_embed((6, 6), 16, temperature=10.0).numpy().astype(float)


@pytest.mark.usefixtures("_undrawn")
def test_positions_that_follow_a_permutation_are_told_from_those_that_do_not():
    order = np.random.default_rng(0).permutation(36)
    plain, follows = vit(local(), 0.9), vit(local(), 0.9, order)
    section = permuted_section({"in order": [plain], "permuted": [follows]}, (6, 6), ORIGIN, "pixels")
    assert "Here that holds: of a patch's neighbours in the picture 100%" in section.text[0]
    rows = {row[0]: row[2] for row in section.parts[1].rows}
    assert rows["permuted, put back"] == 1
    assert rows["permuted, as the model sees them"] < 0.35
    stays = follows | {"after": local().tolist()}  # local in the sequence, which is not how the picture was
    section = permuted_section({"in order": [plain], "permuted": [stays]}, (6, 6), ORIGIN)
    assert "Here that does not hold" in section.text[0]


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize(
    ("pixels", "n_test", "expected"),
    [
        (0.8, 100, "4.00 points; here the lower one is +13.00 points from it. This holds here."),
        (0.91, 100, "2.86 points; here the lower one is +2.00 points from it. This does not hold here."),
        (0.9, 400, "1.50 points; here the lower one is +3.00 points from it. This holds here."),
        (0.95, 100, "here the lower one is -2.00 points from it. This does not hold here."),
        (0.8, 31, "Not judged here: of 31 images"),
    ],
)
def test_accuracies_stand_beside_the_baseline_and_the_paper(pixels, n_test, expected):
    found = {
        "ordinary": [vit(local(), 0.97), vit(local(), 0.95)],
        "positional": [vit(local(), 0.94), vit(local(), 0.92)],
    }
    text = vit_section("digits", found, {"accuracy": pixels}, (6, 6), n_test, ORIGIN).text
    assert "ordinary 96.00% (deviation 1.41%); positional 93.00% (deviation 1.41%)" in text[0]
    assert "Ordinary less positional: 3.00 points" in text[0]
    assert expected in text[1]

"""What a page says of itself: the command that made it, how much of a store it is of, and how it judges."""

import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from analysis.__main__ import main
from infra.objects import open_objects
from storage_schemas import open_store
from tests.stores import make_spec, write_planted


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 samples of which 16 are committed."""
    place = tmp_path_factory.mktemp("half") / "store"
    write_planted(open_objects(str(place)), make_spec(layers=tuple(range(5)), n_samples=24))
    for name in ("index.parquet", "commits/000001.json"):
        os.remove(place / name)
    return place


def test_an_unfinished_store_is_reported_as_such_with_all_that_was_typed(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    typed = ["--k", "2", "--seed", "3", "--wide-limit", "9", "--model-limit", "8"]
    assert main(["report", "--store", str(half), "--out", str(tmp_path), *typed]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<dt>unfinished</dt><dd>16 of 24 samples are committed: the store is not finished</dd>" in page
    assert f"{half} is not finished: a report of the 16 images that are there" in capsys.readouterr().err
    command = page.split("<dt>command</dt><dd>")[1].split("</dd>")[0].replace("&#x27;", "'")
    assert shlex.split(command)[4:] == ["K=2", "SEED=3", "ARGS=--wide-limit 9 --model-limit 8"]


def test_a_gallery_says_which_stores_are_not_finished(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    assert main(["gallery", "--stores", str(half), "--out", str(tmp_path), "--k", "2", "--wide-limit", "9"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<dt>unfinished, store</dt><dd>16 of 24 samples are committed: the store is not finished</dd>" in page
    assert "a gallery of the 16 images that are there" in capsys.readouterr().err
    assert "--wide-limit 9" in page
    assert "Images: store: 16." in page


def test_a_store_that_ends_before_its_teacher_is_said_to(half: Path) -> None:
    from analysis.report_models import TEACHER, depth_text

    store = open_store(str(half))
    teachers: list[Any] = [SimpleNamespace(n_layers=13), SimpleNamespace(n_layers=5)]
    assert (depth_text(store, {TEACHER: teachers[0]}) or "").startswith("the store ends at layer 4 of 12: last layers")
    assert depth_text(store, {TEACHER: teachers[1]}) is None
    assert depth_text(store, {}) is None

"""The page needs nothing but itself, says of each figure where it comes from, and its tables are their CSV."""

import base64
import csv
import io
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from analysis.page import Figure, Origin, Section, Table, page_html, table_csv
from analysis.plots import curves, depth_overview, heat_maps, signed_maps

ORIGIN = Origin(data="a <store>", n_images=1438, seed=3, command="make report STORE='x & y'")
X = np.arange(5.0)


def table(**changes) -> Table:
    values = {
        "name": "numbers",
        "title": "Numbers",
        "caption": "Some.",
        "columns": ["kind", "a, b", "c"],
        "rows": [["cls", 1 / 3, None], ['quoted "kind"', float("nan"), 5]],
        "origin": ORIGIN,
    }
    return Table(**(values | changes))


def figure(svg: bytes = b"<svg/>") -> Figure:
    return Figure(title="A <figure>", svg=svg, caption="Angles, radians.", origin=ORIGIN)


class Links(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]
        assert tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(*parts) -> str:
    return page_html("Title & more", {"store": "a <store>"}, [Section(title="First", text=["One < two."], parts=parts)])


def test_nothing_is_fetched_and_everything_is_escaped():
    html = page(figure(), table())
    assert all(link.startswith(("data:", "#")) for link in Links(html).found)
    assert "url(" not in html
    assert "@import" not in html
    for raw in ("a <store>", "One < two", "A <figure>", "x & y"):
        assert raw not in html
    assert "1,438 images of a &lt;store&gt;; seed 3; make report" in html


def test_a_figure_without_chance_says_so():
    origin = Origin(data="s", n_images=4, seed=None, command="c")
    assert str(origin) == "4 images of s; nothing random; c"


def test_csv_has_all_digits_and_the_page_carries_it():
    text = table_csv(table())
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["kind", "a, b", "c"]
    assert float(rows[1][1]) == 1 / 3
    assert rows[1][2] == ""
    assert rows[2][:2] == ['quoted "kind"', "nan"]
    [link] = [link for link in Links(page(table())).found if link.startswith("data:text/csv")]
    assert base64.b64decode(link.partition(",")[2]).decode() == text


MATRIX = np.cos(X[:, None] - X)
LINES = {"cls": (X, X**2 + 1, X / 10), "patches": (X, X + 1, None)}
DRAWINGS: dict[str, Callable[[], bytes]] = {
    "heat": lambda: heat_maps(
        {"cls": MATRIX, "patches": MATRIX, "registers": MATRIX}, rows=range(5), columns=range(5),
        unit="cosine", limits=(0, 1), cuts=[1.5],
    ),
    "curves": lambda: curves(LINES, x_name="layer", y_name="angle, radians", cuts=[2.5], log_y=True),
    "raw and normed": lambda: curves(LINES, x_name="layer", y_name="cosine", cuts=[2.5], dashed=["patches"]),
    "signed": lambda: signed_maps({"layer 1": MATRIX, "none": MATRIX * np.nan}, unit="covariance", largest=1.0,
                                  axis_name="channel"),
    "overview": lambda: depth_overview(
        MATRIX[1:, 1:], MATRIX, LINES, layers=range(1, 5), states=range(5), cuts=[2.5], jumps={"cls": [2.0]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWINGS)
def test_drawings_are_svg_that_fetches_nothing_and_are_the_same_each_time(name):
    one, again = DRAWINGS[name](), DRAWINGS[name]()
    assert one == again
    root = ElementTree.fromstring(one)
    assert root.tag.endswith("svg")
    links = re.findall(rb'(?:href|src)="([^"]*)"', one)
    assert all(link.startswith((b"#", b"data:")) for link in links)
    assert b"<script" not in one


def test_dashed_lines_have_the_colours_of_the_others():
    dashed, plain = DRAWINGS["raw and normed"](), DRAWINGS["curves"]()
    strokes = re.findall(rb"<path[^>]*?stroke: (#[0-9a-f]{6}); stroke-width: 1.6", dashed)
    assert len(set(strokes)) == 1
    assert dashed.count(b"stroke-dasharray") > plain.count(b"stroke-dasharray")


def test_a_busy_machine_is_nobodys_fault(monkeypatch):
    """Matplotlib warns where looking for the place of a legend takes more than a second, by this clock."""
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(hours))
    DRAWINGS["curves"]()


def test_undefined_values_are_drawn_as_gaps():
    matrix = np.full((3, 3), np.nan)
    heat_maps({"none": matrix}, rows=range(3), columns=range(3), unit="CKA", limits=(0, 1))
    curves({"none": (X, np.full(5, np.nan), np.full(5, np.nan))}, x_name="layer", y_name="rank")

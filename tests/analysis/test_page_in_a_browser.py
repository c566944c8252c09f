"""The page as a browser shows it, on a laptop and on a phone."""

from pathlib import Path

import numpy as np
import pytest

from analysis.page import Figure, Origin, Section, Table, page_html
from analysis.plots import curves, depth_overview, heat_maps, paths_on_plane
from tests.browser import CHROMIUM, look_at

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

ORIGIN = Origin(
    data="s3://a-bucket-with-a-long-name/and/a/long/prefix/without/any/place/to/break/a/line/train",
    n_images=10_240,
    seed=0,
    command="make report STORE=s3://a-bucket-with-a-long-name/and/a/long/prefix/without/any/place/to/break OUT=out",
)


def page(text: str = "A statement with its number.") -> str:
    x = np.arange(13.0)
    matrix = np.cos(x[:, None] - x)
    drawings = {
        "Heat maps": heat_maps(
            {"cls": matrix, "patches": matrix}, rows=range(13), columns=range(13), unit="cosine", limits=(0, 1)
        ),
        "Curves": curves({"cls": (x, x**2, x)}, x_name="layer", y_name="angle, radians"),
        "Overview": depth_overview(
            matrix[1:, 1:], matrix, {"cls": (x, x, None)}, layers=range(1, 13), states=range(13), cuts=[4.5],
            jumps={"cls": [4.0]},
        ),
        "Paths": paths_on_plane(
            np.random.default_rng(0).standard_normal((4, 13, 2)), [0, 0, 1, 1], x_name="first", y_name="second"
        ),
    }  # fmt: skip
    parts: list[Figure | Table] = [
        Figure(title=name, svg=svg, caption="What it shows.", origin=ORIGIN) for name, svg in drawings.items()
    ]
    table = Table(
        name="wide", title="A wide table", caption="Many columns.", columns=["layer", *map(str, range(40))],
        rows=[[i, *np.linspace(0, 1, 40).tolist()] for i in range(13)], origin=ORIGIN,
    )  # fmt: skip
    section = Section(title="A section", text=[text], parts=[*parts, table])
    html = page_html("A teacher on a store", {"store": ORIGIN.data, "command": ORIGIN.command}, [section] * 3)
    return html.replace("<details>", "<details open>")


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)], ids=["laptop", "phone"])
def test_it_opens_without_errors_and_fits(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "report.html").write_text(page())
    found = look_at(tmp_path / "report.html", width=width, height=height)
    assert found.complaints == []
    assert found.requests == []
    assert (found.n_images, found.broken) == (12, [])
    assert found.overflow <= 0
    assert found.covered == []
    assert found.picture.startswith(b"\x89PNG")


def test_what_is_looked_for_would_be_found(tmp_path: Path) -> None:
    bad = page().replace("</body>", '<img src="none.png" alt="lost"><pre style="width:900px">x</pre></body>')
    (tmp_path / "report.html").write_text(bad)
    found = look_at(tmp_path / "report.html", width=390, height=844)
    assert found.overflow > 0
    assert found.broken == ["lost"]
    assert [address.rpartition("/")[2] for address in found.requests] == ["none.png"]
    assert found.complaints

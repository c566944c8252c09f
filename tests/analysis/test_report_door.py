"""`make report` end to end: a page with figures and tables from a small store, and what is refused before it starts."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.page import PAGE
from infra.console import UserError
from infra.objects import open_objects
from pipeline.teacher import load_teacher
from tests.s3_servers import read_only_environment
from tests.stores import make_spec, write_planted

SECTIONS = [
    "Phases, angular speed and CKA",
    "Similarity",
    "Dynamics",
    "Spectra",
    "Paths",
    "Paths of tokens",
    "Depth as a linear system",
]
VISION = ["Sub-layers", "Localisation", "Linear probes", "Effective receptive field", "Without skip connections"]


def write(place, **changes):
    write_planted(open_objects(str(place)), make_spec(**{"layers": tuple(range(7))} | changes))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def report(store, out, *more: str) -> str:
    assert main(["report", "--store", str(store), "--out", str(out), "--k", "2", *more]) == 0
    return (out / PAGE).read_text()


def test_a_store_without_teacher_has_its_page_and_tables(tmp_path, capsys):
    write(tmp_path / "store")
    page = report(tmp_path / "store", tmp_path / "out")
    assert re.findall(r"<h2>(.*?)</h2>", page) == SECTIONS
    assert f"make report STORE={tmp_path / 'store'} OUT={tmp_path / 'out'} K=2" in page
    saved = capsys.readouterr().out
    tables = sorted(path.name for path in (tmp_path / "out/tables").iterdir())
    assert f"{page.count('<figure>')} figures; {len(tables)} tables" in saved
    assert tables == sorted(
        [f"cosine_{kind}.csv" for kind in ("cls", "registers", "patches", "patch_mean")]
        + ["cka_cls.csv", "cka_patch_mean.csv", "cka_cls_patch_mean.csv", "dynamics.csv", "spectra.csv"]
        + ["eigenvalues.csv", "paths.csv", "token_paths.csv", "linear_depth.csv", "linear_eigenvalues.csv"]
    )
    with (tmp_path / "out/tables/cosine_cls.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["layer", *map(str, range(7))]
    np.testing.assert_allclose([float(row[i + 1]) for i, row in enumerate(rows[1:])], 1)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_the_same_store_gives_the_same_page(tmp_path, undrawn):
    """Drawings of the same numbers are the same each time: `test_page.py`."""
    write(tmp_path / "store")
    assert report(tmp_path / "store", tmp_path / "out") == report(tmp_path / "store", tmp_path / "out")


def test_a_store_without_cls_has_a_report_of_what_it_has(tmp_path, undrawn):
    write(tmp_path / "store", has_cls=False, n_registers=0)
    page = report(tmp_path / "store", tmp_path / "out")
    assert "patch_mean" in page
    assert "registers" not in re.sub(r"<span class.*?</span>|<dd>.*?</dd>|Mean over .*?</figcaption>", "", page)


def test_registers_without_cls_and_as_many_layers_as_vit_l_are_reported(tmp_path, undrawn):
    write(tmp_path / "store", has_cls=False, n_registers=2, layers=tuple(range(25)))
    page = report(tmp_path / "store", tmp_path / "out", "--limit", "12", "--wide-limit", "12")
    assert re.findall(r"<h2>(.*?)</h2>", page) == SECTIONS
    tables = tmp_path / "out/tables"
    names = {path.stem for path in tables.iterdir()}
    assert {name for name in names if "cosine" in name} == {"cosine_registers", "cosine_patches", "cosine_patch_mean"}
    assert {name for name in names if "cka" in name} == {"cka_patch_mean"}
    with (tables / "cosine_registers.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == rows[0][1:] == [str(layer) for layer in range(25)]


@pytest.mark.parametrize(
    ("more", "changes", "expected"),
    [
        (["--limit", "3"], {}, "LIMIT=3: expected 4 or more images"),
        (["--k", "0"], {}, "K=0: expected 1 or more phases"),
        (["--k", "4"], {}, "K=4: layers 1 to 6 are cut into at most 3 phases of 2"),
        (["--k", "1"], {"layers": (0, 1)}, "holds layers 0, 1; a report needs layers 0 to 2 or more"),
        ([], {"layers": (3, 4)}, "holds layers 3, 4; a report needs layers 0 to 2 or more, none left out"),
        ([], {"n_samples": 3}, "has 3 valid images, expected 4 or more"),
        (["--run", "nowhere"], {}, "nowhere"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_it_starts(tmp_path, more, changes, expected):
    write(tmp_path / "store", **changes)
    with pytest.raises(UserError, match=re.escape(expected)):
        report(tmp_path / "store", tmp_path / "out", *more)
    assert not (tmp_path / "out" / PAGE).exists()


def test_a_store_is_never_written_to(tmp_path):
    write(tmp_path / "store")
    before = contents(tmp_path / "store")
    for out in ("store", "store/reports"):
        with pytest.raises(UserError, match=f"OUT={re.escape(str(tmp_path / out))} lies in a store"):
            report(tmp_path / "store", tmp_path / out)
    assert contents(tmp_path / "store") == before


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        main(["report", "--store", str(tmp_path / "none"), "--out", str(tmp_path), "--k", "0", "--limit", "1"])
    assert [part in str(error.value) for part in ("K=0", "LIMIT=1", "none")] == [True] * 3


def test_states_that_have_no_direction_are_named(tmp_path, monkeypatch):
    import tests.stores

    planted = tests.stores.planted_states

    def with_zeros(spec, rows, seed=0):
        states = planted(spec, rows, seed)
        states[:, 4, 0] = 0
        return states

    monkeypatch.setattr(tests.stores, "planted_states", with_zeros)
    write(tmp_path / "store")
    with pytest.raises(UserError, match="no direction: layer 4: 21 of 21 rows"):
        report(tmp_path / "store", tmp_path / "out")


@pytest.mark.s3
def test_a_store_on_s3_is_reported_with_credentials_that_may_only_read(tmp_path, rclone, monkeypatch, undrawn):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    bucket = rclone.make_bucket()
    with monkeypatch.context() as patch:
        for name, value in rclone.environment.items():
            patch.setenv(name, value)
        write(f"s3://{bucket}/store")
    for name, value in read_only_environment(rclone, bucket).items():
        monkeypatch.setenv(name, value)
    began = len(rclone.log)
    page = report(f"s3://{bucket}/store", tmp_path / "out")
    mine = [entry for entry in rclone.log[began:] if entry.bucket == bucket]
    assert mine
    assert {entry.method for entry in mine} <= {"GET", "HEAD", "LIST"}
    write(tmp_path / "store")
    report(tmp_path / "store", tmp_path / "local")
    tables = sorted(path.name for path in (tmp_path / "local/tables").iterdir())
    for name in tables:
        assert (tmp_path / "out/tables" / name).read_bytes() == (tmp_path / "local/tables" / name).read_bytes(), name
    assert f"s3://{bucket}/store" in page
    with pytest.raises(UserError, match=f"OUT=s3://{bucket}/store/x lies in a store"):
        main(["report", "--store", f"s3://{bucket}/store", "--out", f"s3://{bucket}/store/x", "--k", "2"])
    with pytest.raises(UserError, match=f"OUT=s3://{bucket}/out: .*"):
        main(["report", "--store", f"s3://{bucket}/store", "--out", f"s3://{bucket}/out", "--k", "2"])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A store of 48 digits with its teacher."""
    from pipeline.__main__ import main as extract

    place = tmp_path_factory.mktemp("digits")
    assert extract(["extract", "--store", str(place), "--no-ray", "--limit", "48"]) in (0, None)
    return place


@pytest.mark.slow
def test_a_store_with_its_teacher_shows_what_the_teacher_does(digits, tmp_path):
    page = report(digits, tmp_path / "out", "--model-limit", "8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        *SECTIONS,
        "Dynamics after the final norm",
        "Attention and branches",
        *VISION,
        "Positions of patches",
        "Self-correction",
        "Layer swap",
    ]
    with (tmp_path / "out/tables/layer_swap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["where"] for row in rows} == {"none", "intra", "inter"}
    assert float(rows[0]["accuracy"]) > 0.9
    assert len(load_teacher("digits_vit").model.blocks) == 12
    assert json.loads((digits / "train/store.json").read_text())

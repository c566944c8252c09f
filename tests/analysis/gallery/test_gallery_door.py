"""`make gallery` end to end, and what it refuses."""

import csv
import re

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.gallery.gallery_command import PAGE
from infra.console import UserError
from infra.objects import open_objects
from storage_schemas import open_store
from tests.stores import make_spec, write_planted


def write(place, **changes):
    write_planted(open_objects(str(place)), make_spec(**{"layers": tuple(range(7))} | changes))


def gallery(out, *stores, more: tuple[str, ...] = ()) -> str:
    places = [str(store) for store in stores]
    assert main(["gallery", "--stores", *places, "--out", str(out), "--k", "2", *more]) == 0
    return (out / PAGE).read_text()


def test_encoders_of_any_build_share_a_page(tmp_path, capsys):
    write(tmp_path / "a/train")
    write(tmp_path / "b", layers=(0, 1, 2), has_cls=False, dim=5)
    write(tmp_path / "other/b", layers=(2, 4), n_registers=0)
    page = gallery(tmp_path / "out", tmp_path / "a", tmp_path / "b", tmp_path / "other/b")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Encoders", "Layers of each encoder", "Encoders against each other"]
    assert "tables, also as" in capsys.readouterr().out
    with (tmp_path / "out/tables/encoders.csv").open() as file:
        rows = {row["encoder"]: row for row in csv.DictReader(file)}
    assert {name: (row["layers"], row["dim"], row["phases"]) for name, row in rows.items()} == {
        "a": ("7", "8", rows["a"]["phases"]),
        "b-1": ("3", "5", ""),  # two layers are not cut into two phases
        "b-2": ("2", "8", ""),  # nor are layers with gaps
    }
    assert "a and b-1: mean CKA" in page
    assert re.fullmatch(r"0-\d,\d-6", rows["a"]["phases"])
    with (tmp_path / "out/tables/cka_a_b-1.csv").open() as file:
        table = list(csv.reader(file))
    assert [len(table), *{len(row) for row in table}] == [8, 4]
    states = open_store(tmp_path / "b").read(None, None, "registers").astype(np.float64)
    units = states / np.linalg.norm(states, axis=-1, keepdims=True)
    with (tmp_path / "out/tables/cosine_registers_b-1.csv").open() as file:
        found = [[float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
    np.testing.assert_allclose(found, np.einsum("rltd,rmtd->lm", units, units) / (21 * 2), rtol=1e-6)


def test_one_encoder_is_a_gallery_without_others(tmp_path, undrawn):
    write(tmp_path / "a")
    page = gallery(tmp_path / "out", tmp_path / "a")
    assert "Encoders against each other" not in page
    assert f"make gallery STORES={tmp_path / 'a'} OUT={tmp_path / 'out'} K=2" in page


def test_what_cannot_be_compared_is_said(tmp_path, undrawn):
    write(tmp_path / "a")
    from tests import stores

    samples = stores.make_samples(21)[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "make_samples", lambda n: samples)
        write(tmp_path / "c")
    page = gallery(tmp_path / "out", tmp_path / "a", tmp_path / "c")
    assert "a and c are not compared" in page
    assert "mean CKA" not in page
    assert "have 0 images and cls, patch_mean in common" in page


def test_all_problems_come_at_once(tmp_path):
    write(tmp_path / "a", layers=(3,))
    write(tmp_path / "b", n_samples=3)
    with pytest.raises(UserError) as error:
        gallery(tmp_path / "a/out", tmp_path / "a", tmp_path / "b", tmp_path / "none", more=("--limit", "2"))
    for part in (
        "LIMIT=2: expected 4 or more",
        "lies in a store",
        "holds 1 layer; similarity over depth needs 2 or more",
        "has 3 valid images, expected 4 or more",
        f"STORE={tmp_path / 'none'}",
    ):
        assert part in str(error.value)

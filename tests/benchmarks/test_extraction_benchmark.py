"""The extraction benchmark measures the real road on images like ImageNet's."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as door
from benchmarks import extraction
from benchmarks.images import jpeg, write_images
from infra.console import UserError


def test_images_have_imagenets_size_and_a_natural_spectrum():
    data = jpeg(3, 500, 375)
    assert 90_000 < len(data) < 130_000
    assert jpeg(3, 500, 375) == data
    grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"), float)
    spectrum = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.rfftfreq(500)[None], np.fft.fftfreq(375)[:, None])

    def power(low: float, high: float) -> float:
        return spectrum[(frequency >= low) & (frequency < high)].mean()

    slope = np.log2(power(0.02, 0.03) / power(0.08, 0.12)) / 2  # two octaves apart
    assert 1.8 < slope < 2.6  # power ~ 1 / f^2.2


def test_images_lie_in_class_folders(tmp_path: Path):
    paths = write_images(tmp_path, 5, scale=0.1)
    assert [path.parent.name for path in paths] == ["class_0", "class_1", "class_2", "class_3", "class_0"]
    assert Image.open(io.BytesIO(paths[0].read_bytes())).size == (50, 38)


def test_bound_is_one_over_the_sum():
    one = extraction.Round(forward_s=0.1, decode_s=0.02, extract_per_s=8.0, worker_nbytes=0)
    assert one.bound_per_s(2) == pytest.approx(1 / 0.11)


def test_run_extracts_all_and_reports_the_ratio(tmp_path: Path, capsys):
    n_threads = torch.get_num_threads()
    result = extraction.run(extraction.QUICK, tmp_path)
    assert not any(tmp_path.iterdir())
    assert torch.get_num_threads() == n_threads
    by_name = {row["what"]: row for row in result.rows}
    bound, whole = by_name["bound: both, no overlap lost"], by_name["extraction, everything on"]
    (found,) = result.details["rounds"]
    assert bound["images/s"] == pytest.approx(1 / (found["forward_s"] + found["decode_s"] / extraction.n_cores()))
    assert whole["of the bound"] == pytest.approx(whole["images/s"] / bound["images/s"])


def test_the_door_prints_and_saves(tmp_path: Path, capsys):
    options = door.Options(what="codecs", quick=True, out=tmp_path / "results")
    assert door.main(options) == 0
    printed = capsys.readouterr().out
    assert "zstd-1" in printed
    names = sorted(path.suffix for path in (tmp_path / "results").iterdir())
    assert names == [".json", ".md"]


def test_a_missing_place_for_data_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is no folder; make it"):
        door.main(door.Options(what="stream", quick=True, dir=tmp_path / "nowhere", out=tmp_path))
    assert not any(tmp_path.iterdir())

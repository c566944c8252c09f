"""make curves and make study: what they refuse, their parts, stochastic depth as it is trained, a small study whole."""

import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from analysis.training.curves_command import curves_command
from analysis.training.study_command import _parts, _trainings, kept_epochs, study_command
from infra.console import ExitCode, UserError
from pipeline.digits import make_digits_vit
from tests.analysis.training.test_records import GOLDEN
from trainer.digits_teacher import _set_drop_path

REPOSITORY = Path(__file__).parents[3]


def test_no_stochastic_depth_is_the_model_without_it():
    torch.manual_seed(0)
    model, pixels = make_digits_vit(), torch.randn(2, 3, 32, 32)
    expected = model.eval().forward_features(pixels)
    _set_drop_path(model, 0.0)
    assert torch.equal(model.train().forward_features(pixels), expected)
    _set_drop_path(model, 0.5)
    assert torch.equal(model.eval().forward_features(pixels), expected)
    assert not torch.equal(model.train().forward_features(pixels), expected)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_branches_are_kept_as_often_as_asked_alike_at_every_depth_and_keep_their_mean(chance):
    torch.manual_seed(0)
    model = make_digits_vit().train()
    _set_drop_path(model, chance)
    n = 5_000
    for block in model.blocks:
        for drop in (block.drop_path1, block.drop_path2):
            out = drop(torch.ones(n, 1, 1)).flatten()
            kept = (out != 0).double().mean().item()
            assert abs(kept - (1 - chance)) < 5 * (chance * (1 - chance) / n) ** 0.5
            torch.testing.assert_close(out[out != 0], torch.full((round(kept * n),), 1 / (1 - chance)))


def test_the_authors_file_becomes_a_page(tmp_path):
    records = tmp_path / "epoch_summaries.jsonl"
    lines = gzip.decompress(GOLDEN.read_bytes()).splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:3]))
    assert curves_command(records=str(records), out=str(tmp_path / "out")) == ExitCode.OK
    page = (tmp_path / "out/report.html").read_text()
    assert f"make curves RECORDS={records} OUT={tmp_path / 'out'}" in page
    assert "says the paper" in page
    assert f">the training that {records.name} records; nothing random; make curves" in page
    assert (tmp_path / "out/tables/trends.csv").read_text().count("\n") == 1 + 6 * 15
    assert len((tmp_path / "out/epoch_summaries.jsonl").read_text().splitlines()) == 3


def test_what_make_curves_cannot_do_is_refused_all_at_once(tmp_path):
    with pytest.raises(
        UserError, match=r"cannot start:\n  K=7: expected 1 to 6 phases.*\n  RAPTOR_STEPS=-1: expected 0"
    ):
        curves_command(checkpoints=str(tmp_path), out=str(tmp_path / "out"), k=7, raptor_steps=-1)
    with pytest.raises(UserError, match="has no checkpoints: make teacher KEEP="):
        curves_command(checkpoints=str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"RECORDS=.*none\.jsonl"):
        curves_command(records=str(tmp_path / "none.jsonl"), out=str(tmp_path / "out"))
    (tmp_path / "one.jsonl").write_bytes(gzip.decompress(GOLDEN.read_bytes()).splitlines()[0])
    with pytest.raises(UserError, match="has 1 epoch; curves need 2 or more"):
        curves_command(records=str(tmp_path / "one.jsonl"), out=str(tmp_path / "out"))


def test_what_make_study_cannot_do_is_refused_before_anything_is_made(tmp_path):
    place = tmp_path / "study"
    with pytest.raises(UserError) as error:
        study_command(study=str(place), drop_paths="0,1", epochs=0, seeds=0, k=9, raptor_steps=-1, limit=5)
    for expected in ("DROP_PATHS=0,1", "EPOCHS=0", "SEEDS=0", "K=9", "RAPTOR_STEPS=-1", "LIMIT=5"):
        assert expected in str(error.value)
    for paths in ("0", "none", "0.2,0.2"):
        with pytest.raises(UserError, match="expected two or more chances"):
            study_command(study=str(place), drop_paths=paths)
    with pytest.raises(UserError, match="expected a folder of this machine"):
        study_command(study="s3://bucket/study")
    assert not place.exists()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"make study did not begin it, but it holds thesis\.tex\. Give an empty"):
        study_command(study=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_each_training_of_a_study_keeps_the_untrained_teacher_and_is_then_measured(tmp_path):
    assert [kept_epochs(n) for n in (1, 10, 30)] == [[0, 1], [0, 1, 3, 10], [0, 3, 9, 30]]
    trainings = _trainings([0.0, 0.3], 2, 10, None)
    assert [one.name for one in trainings] == ["p0-seed0", "p0-seed1", "p0.3-seed0", "p0.3-seed1", "overfit-seed0"]
    teacher, curves = _parts(tmp_path, trainings[3], 3, 50)
    given = dict(zip(teacher.arguments[2::2], teacher.arguments[3::2]))
    assert (given["--drop-path"], given["--seed"], given["--keep"]) == ("0.3", "1", "0,1,3,10")
    assert given["--out"] == curves.arguments[curves.arguments.index("--checkpoints") + 1]
    assert list(curves.needs) == [teacher.name]
    assert "ARGS='--epochs 10 --batch-size 32 --drop-path 0.3 --no-bfloat16'" in teacher.command
    overfit = _parts(tmp_path, trainings[4], 3, 50)[0].arguments
    assert {"--no-augment", "--n-train", "128", "80"} <= set(overfit)


def study(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "analysis", "study", "--study", str(folder), "--drop-paths", "0,0.5", *more]


@pytest.mark.slow
def test_a_small_study_interrupted_and_repeated(tmp_path):
    """Stopped by a signal once a teacher is there, it goes on with the rest, and a third time it trains nothing."""
    command = study(tmp_path / "study", "--epochs", "1", "--limit", "64", "--raptor-steps", "2", "--k", "2")
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    first = tmp_path / "study/done/teacher-p0-seed0.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) == ExitCode.INTERRUPTED
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == ExitCode.OK
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.safetensors")}
    page = (tmp_path / "study/report.html").read_text()
    assert page.count("says the Raptor paper") == 9
    assert "overfitted" in page
    rows = (tmp_path / "study/tables/training.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 + 2 + 3  # epochs 0 and 1 of two trainings; 0, 2 and 8 of the overfitted one
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == ExitCode.OK
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

"""Images made anew: equal where nothing changed, and drift is told where something did."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from infra.console import ExitCode, UserError
from infra.objects import FolderObjects
from pipeline.__main__ import main
from pipeline.recompute import Drift, drift_lines, drift_problems, recompute
from pipeline.sources import ImageFolderSource
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import open_store
from storage_schemas.commit import Commit, Fidelity
from storage_schemas.keys import commit_key
from storage_schemas.reader import Store, load_commits
from tests.pipeline_jobs import BAD_IMAGES, THREADS, fake_arguments, fake_config, make_tree, run_job


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 22, odd=True)


def make_store(images: Path, place: Path, **changes: object) -> Store:
    return open_store(run_job(fake_config(images, place, **changes), THREADS).planned.location)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_nothing_has_drifted_and_kinds_in_float32_are_equal(precision: str, images: Path, tmp_path: Path) -> None:
    store = make_store(images, tmp_path / "store", precision=precision)
    drifts = recompute(store, ImageFolderSource(str(images)), 20)
    assert [drift.path for drift in drifts] == [
        f"layer_{layer:02d}/{kind}" for layer in store.layers for kind in store.spec.token_kinds
    ] + ["head_input"]
    for drift in drifts:
        if drift.path.endswith("/patches") and precision != "float32":
            assert 0 < drift.found.relative_mse < 4 * drift.recorded
            assert drift.found.r2 > 0.999
        else:
            assert (drift.found.worst, drift.found.relative_mse, drift.found.r2) == (0, 0, 1), drift
    assert drift_problems(drifts) == []
    assert "20 images made anew: " in drift_lines(drifts, 20)[0]


def test_whichever_images_are_drawn_the_arithmetic_is_the_same(images: Path, tmp_path: Path) -> None:
    """A teacher whose arithmetic depends on the place in the batch would show; so do all rows but the bad ones."""
    store = make_store(images, tmp_path / "store", precision="float32", micro_batch=5)
    for n, seed in ((1, 0), (3, 1), (1000, 2)):
        assert {drift.found.worst for drift in recompute(store, ImageFolderSource(str(images)), n, seed=seed)} == {0.0}
    assert store.n_valid == 28 - len(BAD_IMAGES)


def other_teacher(device: str) -> Teacher:
    teacher = load_teacher("fake_vit", "random:0", device=device)
    with torch.no_grad():
        teacher.model.patch_embed.proj.weight[0] *= 1.001
    return teacher


def test_states_of_another_teacher_are_reported(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One output channel of eight off by a thousandth in the pixels' weights, as another library might have it."""
    make_store(images, tmp_path / "store")
    monkeypatch.setattr("pipeline.recompute.teacher_from_files", lambda files, device, compute: other_teacher(device))
    arguments = ["verify", "--store", str(tmp_path / "store"), "--images", str(images), "--device", "cpu"]
    assert main([*arguments, "--recompute", "6"]) == ExitCode.PROBLEMS
    said = capsys.readouterr().out
    assert re.search(r"layer_00/patch_mean +\d\.\d\de-0\d +0\.00e\+00 .* more than 1\.0e-09", said)
    assert not re.search(r"layer_00/cls .* more than", said)
    assert re.search(r"the states of \d+ arrays have drifted", said)
    assert "sound" in said  # what is stored is what was committed
    monkeypatch.undo()
    assert main([*arguments, "--recompute", "6"]) == ExitCode.OK
    assert main([*arguments, "--recompute", "0"]) == ExitCode.BAD_INPUT


def test_head_inputs_are_made_anew_too(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another final norm changes what heads read, and no state."""
    make_store(images, tmp_path / "store", precision="float32")

    def other_norm(files: object, device: str, compute: str) -> Teacher:
        teacher = load_teacher("fake_vit", "random:0", device=device)
        with torch.no_grad():
            teacher.model.norm.weight[0] *= 1.001
        return teacher

    monkeypatch.setattr("pipeline.recompute.teacher_from_files", other_norm)
    arguments = ["verify", "--store", str(tmp_path / "store"), "--images", str(images), "--device", "cpu"]
    assert main([*arguments, "--recompute", "6"]) == ExitCode.PROBLEMS
    said = capsys.readouterr().out
    assert re.findall(r"(\S+) .* more than", said) == ["head_input"]
    assert "the states of 1 array have drifted" in said


def test_sums_over_micro_batches_are_those_of_all_at_once(images: Path, tmp_path: Path) -> None:
    store = make_store(images, tmp_path / "store", precision="bfloat16", micro_batch=5)
    exact = make_store(images, tmp_path / "exact", precision="float32", micro_batch=5)
    n_said: list[str] = []
    rows = np.flatnonzero(store.valid)
    for drift in recompute(store, ImageFolderSource(str(images)), 1000):
        if not drift.path.endswith("patches"):
            continue
        layer, kind = int(drift.path[6:8]), "patches"
        stored, made = (s.read([layer], rows, kind).astype(np.float64).reshape(-1, 8) for s in (store, exact))
        squared = ((stored - made) ** 2).sum()
        assert drift.found.relative_mse == pytest.approx(squared / (made**2).sum(), rel=1e-9)
        assert drift.found.r2 == pytest.approx(1 - squared / ((made - made.mean(0)) ** 2).sum(), rel=1e-12)
        assert drift.found.worst == np.abs(stored - made).max()
        n_said.append(drift.path)
    assert len(n_said) == 4


def test_a_damaged_store_is_not_made_anew_and_the_other_is(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        make_tree(tmp_path / "splits" / split, 9)
    arguments = fake_arguments(tmp_path / "splits", tmp_path / "stores")
    assert main(["extract", *arguments]) == ExitCode.OK
    victim = tmp_path / "stores/train/commits/000000.json"
    victim.write_bytes(b"{}")
    capsys.readouterr()
    assert main(["verify", *arguments, "--recompute", "3"]) == ExitCode.PROBLEMS
    said = capsys.readouterr().out
    order = ["train has 1 problem in 1 shard:", "val: sound", "1 problem. Mend it: make verify STORE=",
             "train: no images are made anew, for the store has problems", "3 images made anew: "]  # fmt: skip
    places = [said.index(text) for text in order]
    assert places == sorted(places)
    assert said.count("made anew: ") == 1


def test_what_a_commit_states_of_its_error_is_not_believed_blindly(images: Path, tmp_path: Path) -> None:
    """A record that is too good makes honest rounding stand out."""
    store = make_store(images, tmp_path / "store", precision="bfloat16", limit=8)
    ((_, commit),) = load_commits(store.objects, store.document, [0])
    assert isinstance(commit, Commit)
    better = {path: Fidelity(relative_mse=1e-12, r2=1.0, worst=0.0) for path in commit.fidelity}
    store.objects.put(commit_key(0), dataclasses.replace(commit, fidelity=better).to_bytes())
    FolderObjects(store.location).delete("index.parquet")
    drifts = recompute(open_store(store.location), ImageFolderSource(str(images)), 8)
    assert {problem.key for problem in drift_problems(drifts)} == {f"layer_{layer:02d}/patches" for layer in range(4)}


def test_other_images_are_refused(images: Path, tmp_path: Path) -> None:
    store = make_store(images, tmp_path / "store", limit=9)
    others = make_tree(tmp_path / "others", 22, odd=True)
    victim = others / store.samples["sample_id"][int(np.flatnonzero(store.valid)[0])].as_py()
    data = victim.read_bytes()
    victim.write_bytes(data + b"x")
    with pytest.raises(UserError, match=r"bytes here, and had .* IMAGES are not those of this store"):
        recompute(store, ImageFolderSource(str(others)), 9)
    victim.write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match=r"does not decode .* and did when it was extracted"):
        recompute(store, ImageFolderSource(str(others)), 9)


def test_images_of_splits_for_a_store_of_none_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(images, tmp_path / "store", limit=9)
    make_tree(tmp_path / "splits/val", 5)
    arguments = ["verify", "--store", store.location, "--images", str(tmp_path / "splits"), "--recompute", "2"]
    assert main(arguments) == ExitCode.BAD_INPUT
    assert "IMAGES has no split" in capsys.readouterr().err


def test_small_is_what_precision_and_arithmetic_explain() -> None:
    def drift(found: float, allowed: float) -> Drift:
        fidelity = Fidelity(relative_mse=found, r2=1.0, worst=1.0)
        return Drift(path="layer_00/cls", found=fidelity, recorded=0.0, allowed=allowed)

    assert drift_problems([drift(1e-9, 1e-9)]) == []
    (problem,) = drift_problems([drift(2e-9, 1e-9)])
    assert str(problem).startswith("layer_00/cls: the stored states are not those that the stored teacher makes")
    assert len(drift_problems([drift(float("nan"), 1e-9)])) == 1

"""Each line of the table of bad input in docs/analyses.md, as it says."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis.__main__ import main
from analysis.accumulate import MomentsAccumulator
from analysis.attention import look
from analysis.dynamics import BasinAccumulator, DynamicsAccumulator, angular_updates, update_ranks
from analysis.linear_depth import linear_windows
from analysis.measure import measure_store
from analysis.pass_over import Analysis, pass_over
from analysis.paths import project_paths
from analysis.paths_report import WINDOW
from analysis.similarity import CkaAccumulator
from analysis.spectra import CovarianceAccumulator, spectrum
from infra.console import UserError
from infra.objects import FolderObjects
from storage_schemas import open_store
from storage_schemas.keys import INDEX_KEY, commit_key
from tests.stores import make_spec, write_planted

PAGE = Path(__file__).parents[2] / "docs" / "analyses.md"
STATES = np.random.default_rng(0).standard_normal((8, 5, 2, 6)).astype(np.float32)

Check = Callable[[Path], None]


def store(folder: Path, **changes):
    write_planted(FolderObjects(folder), make_spec(**{"layers": tuple(range(7))} | changes))
    return open_store(str(folder))


def refused(folder: Path, match: str, *more: str, **changes: object) -> None:
    """The door says so, and saves nothing."""
    store(folder / "store", **changes)
    typed = ["report", "--store", str(folder / "store"), "--out", str(folder / "out"), "--k", "2", *more]
    with pytest.raises(UserError, match=match):
        main(typed)
    assert not list((folder / "out").rglob("*"))


def one_layer(folder: Path) -> None:
    with pytest.raises(ValueError, match="dynamics of 1 layers; expected 2 or more"):
        DynamicsAccumulator([3])
    refused(folder, "holds layers 0; a report needs layers 0 to 2 or more", layers=(0,))


def two_layers(folder: Path) -> None:
    refused(folder, "holds layers 0, 1; a report needs layers 0 to 2 or more, none left out", "--k", "1", layers=(0, 1))


def gaps_in_layers(folder: Path) -> None:
    refused(folder, "holds layers 0, 2, 3; a report needs layers 0 to 2 or more, none left out", layers=(0, 2, 3))


def few_images(folder: Path) -> None:
    refused(folder / "a", "has 3 valid images, expected 4 or more", n_samples=3)
    refused(folder / "b", "LIMIT=3: expected 4 or more images", "--limit", "3")


def short_batch(_: Path) -> None:
    sums = CkaAccumulator(5)
    sums.update(STATES[:5, :, 0])
    sums.update(STATES[5:, :, 0])
    found = sums.result()
    assert (found.n_rows, found.n_batches, found.n_dropped) == (5, 1, 3)


def one_image(_: Path) -> None:
    sums = MomentsAccumulator(5)
    sums.update(STATES[:1, :, 0, 0])
    found = sums.result()
    np.testing.assert_allclose(found.mean, STATES[0, :, 0, 0], rtol=1e-6)
    assert np.isnan(found.std).all()


def constant_features(_: Path) -> None:
    states = STATES[:, :, 0].copy()
    states[:, 0] = states[0, 0]
    cka, covariances = CkaAccumulator(5), CovarianceAccumulator(5, 6)
    cka.update(states)
    covariances.update(states)
    values = cka.result().values
    assert np.isnan(values[0]).all()
    assert np.isfinite(values[1:, 1:]).all()
    found = covariances.result()
    first, second = found.scalars()[:2]
    assert all(np.isnan(list(vars(first).values())))
    assert all(np.isfinite(list(vars(second).values())))
    assert np.isnan(spectrum(found.eigenvalues()[0]).decay).all()


def zeros(_: Path) -> None:
    states = STATES.copy()
    states[2:4, 3, 1] = 0
    with pytest.raises(ValueError, match="no direction: layer 3: 2 of 8 rows"):
        DynamicsAccumulator(range(5)).update(states)


def not_finite(_: Path) -> None:
    for value in (np.nan, np.inf):
        states = STATES[:, :, 0].copy()
        states[5, 1, 2] = value
        for sums in (CkaAccumulator(5), CovarianceAccumulator(5, 6)):
            with pytest.raises(ValueError, match="NaN or infinite values: layer 1: 1 of 8 rows"):
                sums.update(states)
        with pytest.raises(ValueError, match="NaN or infinite values: layer 1: 1 of 8 rows"):
            DynamicsAccumulator(range(5)).update(states[:, :, None])


def no_movement(_: Path) -> None:
    states = STATES.copy()
    states[:, 1:] = states[:, :1]  # nothing moves at all
    states[:, 2:, 1] = STATES[:, 2:, 1]  # but from layer 1 on one of the two tokens
    sums = DynamicsAccumulator(range(5))
    sums.update(states)
    np.testing.assert_allclose(sums.result().update_coherence.mean, [0, 0.5, 0.5, 0.5], atol=1e-6)
    still = angular_updates(states[:, :2])
    ranks = update_ranks(np.linalg.eigvalsh(still.reshape(-1, 6).T @ still.reshape(-1, 6)))
    assert np.isnan([ranks.stable, ranks.effective, ranks.effective_squared]).all()


def missing_kind(folder: Path) -> None:
    found = store(folder, has_cls=False, n_registers=0)
    assert list(measure_store(found, limit=8, wide_limit=4).dynamics) == ["patches", "patch_mean"]
    with pytest.raises(UserError, match="reads cls, which fake has not; the store has patches, patch_mean"):
        pass_over(found, [Analysis(name="mine", kinds=("cls",), update=lambda states, rows: None)])


def one_class(_: Path) -> None:
    with pytest.raises(ValueError, match="1 classes have images; expected 2 or more"):
        BasinAccumulator(np.ones((1, 5, 6)))
    assert project_paths(STATES[:, :, 0], np.array([0, 0, -1, -1, -1, -1, -1, -1])).labels.tolist() == [0, 0]


def few_layers(_: Path) -> None:
    length = min(WINDOW, 2)
    [only] = linear_windows(STATES[:4, :3, 0], STATES[4:, :3, 0], length)
    assert (only.start, only.stop) == (0, 2)


def many_phases(folder: Path) -> None:
    refused(folder, "K=5: layers 1 to 6 are cut into at most 3 phases of 2", "--k", "5")


def damaged_commit(folder: Path) -> None:
    store(folder / "store")
    (folder / "store" / commit_key(1)).write_bytes(b"torn")
    (folder / "store" / INDEX_KEY).unlink()  # which would stand in for it
    with pytest.raises(UserError, match="has 1 damaged commits: make verify says which"):
        main(["report", "--store", str(folder / "store"), "--out", str(folder / "out"), "--k", "2"])


def bad_place(folder: Path) -> None:
    refused(folder, "lies in a store, which is never written to", "--out", str(folder / "store" / "x"))
    (folder / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"OUT={re.escape(str(folder / 'file' / 'x'))}"):
        main(["report", "--store", str(folder / "store"), "--out", str(folder / "file" / "x"), "--k", "2"])


def no_teacher(folder: Path) -> None:
    from analysis.report_models import load_models

    problems: list[str] = []
    found = store(folder)
    assert load_models(found, "", "cpu", problems) == {}
    assert problems == []
    assert load_models(found, str(folder / "none"), "cpu", problems) == {}
    assert len(problems) == 1


def no_device(folder: Path) -> None:
    refused(folder, "DEVICE=banana is not a device: expected cpu, cuda or cuda:0", "--device", "banana")
    refused(folder, "DEVICE=cuda:99: this machine has . usable GPUs", "--device", "cuda:99")


def other_depth(folder: Path) -> None:
    """A Raptor of 12 blocks beside a store of the first layers."""
    from analysis import report_models

    class Ends(SimpleNamespace):
        """What is asked of a Raptor before anything runs."""

    problems: list[str] = []
    found = store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_models, "RaptorTeacher", Ends)
        patch.setattr(report_models, "raptor_teacher", lambda *_, **__: Ends(taught_by="7" * 64, n_layers=13))
        patch.setattr(report_models, "teacher_from_files", lambda *_, **__: Ends(core_digest="7" * 64))
        patch.setattr(type(found), "read_teacher_files", lambda _: {"weights": b""})
        report_models.load_models(found, "run", "cpu", problems)
    assert problems == [f"RUN=run has states 0 to 12, {found.location} holds 7 layers: give a store of all layers"]


def other_attention(_: Path) -> None:
    from pipeline.teacher import load_teacher

    teacher = load_teacher("digits_vit")
    teacher.model.blocks[2].attn = torch.nn.Identity()
    with pytest.raises(UserError, match="attention cannot be read of a block of Identity"):
        look(teacher, torch.zeros(4, 69, 64), {"cls": slice(0, 1), "patches": slice(5, 69)})


CHECKS: dict[str, Check] = {
    "one layer": one_layer,
    "layers 0 and 1 alone": two_layers,
    "layers that are not all from 0 on": gaps_in_layers,
    "fewer than 4 images": few_images,
    "a last batch of fewer than 4": short_batch,
    "one image in an accumulator": one_image,
    "features that are the same for all images (CLS at layer 0)": constant_features,
    "a state of zeros": zeros,
    "NaN or infinity in a state": not_finite,
    "a token that does not move": no_movement,
    "a token kind that the teacher lacks": missing_kind,
    "fewer than two classes": one_class,
    "fewer layers than a window of 4 steps": few_layers,
    "more phases than there are layers for": many_phases,
    "a damaged commit": damaged_commit,
    "a place to save to that lies in a store, or cannot be written": bad_place,
    "a store without its teacher": no_teacher,
    "a DEVICE that is none, or not there": no_device,
    "a RUN of another depth than the store's": other_depth,
    "blocks whose attention is not softmax(q k')": other_attention,
}


ELSEWHERE = {
    "a patch whose pixels are the same in all images": "vision/test_localisation.py::test_a_patch_that_never_changes",
    "a norm between patch embedding and first block (CLIP)": "vision/test_embedding.py::test_a_norm_before_the_first",
    "fewer than two labelled classes, or no image left to test on": "vision/test_probes.py::test_too_few_labels_are",
    "encoders on different images, or in another order": "gallery/test_encoders.py::test_encoders_with_nothing_in",
}


def test_every_line_of_the_table_has_its_check() -> None:
    text = PAGE.read_text().partition("## What has no value")[2].partition("\n## ")[0]
    lines = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert sorted(lines) == sorted(["input", *CHECKS, *ELSEWHERE])
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"def {test}" in (Path(__file__).parent / file).read_text(), place


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_bad_input_does_what_the_table_says(check: Check, tmp_path: Path) -> None:
    check(tmp_path)

"""TASK=digits on stores: what it reads, what it refuses, and what the shipped teacher reaches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra.console import UserError
from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from tests.trainer.probes.tiny_probes import backbone
from tests.trainer.tiny import tiny_teacher, write_tiny, write_tiny_pair
from trainer.probes.backbone import Backbone
from trainer.probes.classification import Top1
from trainer.probes.digits import label_problems, open_digits
from trainer.probes.features import Features
from trainer.probes.probe_files import ProbeFiles
from trainer.probes.results import read_result
from trainer.probes.task import Asked
from trainer.probes.train_probe import Probe, train_probe

REPOSITORY = Path(__file__).parents[3]


def asked(store: str | Path, images: str | None = None) -> Asked:
    return Asked(
        images=images,
        store=str(store),
        head=None,
        compat=False,
        seed=0,
        changes={"n_epochs": 2, "batch_size": 8, "learning_rate": None},
        device=torch.device("cpu"),
    )


def test_train_and_val_of_a_folder(tmp_path: Path) -> None:
    task = open_digits(asked(write_tiny_pair(tmp_path)), backbone())
    assert (task.train.n_valid, task.evaluation.n_valid) == (41, 18)
    assert task.make_head().out_features == 3


def test_a_single_store_gives_a_hold_out_that_nothing_is_trained_on(tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 41, seed=0)
    task = open_digits(asked(tmp_path), backbone())
    trained_on, held = task.train.valid, task.evaluation.valid
    assert not (trained_on & held).any()
    assert (trained_on | held).all()
    assert held.sum() == 4  # one chunk


@pytest.mark.parametrize("raptor", [False, True])
def test_the_teachers_own_head_on_stored_features_is_the_teacher(tmp_path: Path, raptor: bool) -> None:
    """Exactly the accuracy of teacher.logits on the stored last state."""
    place = write_tiny_pair(tmp_path)
    frozen = backbone(raptor=raptor)
    task = open_digits(asked(place), frozen)
    features = Features(task.evaluation, task, frozen, seed=0, augmented=False)
    metric = Top1()
    assert frozen.teacher.head is not None
    for x, y in features.batches(range(18), 5, 0):
        metric.add(frozen.teacher.head(x), y)
    val = open_store(f"{place}/val")
    named = frozen.teacher.logits(torch.from_numpy(val.read(layers=[3])[:, 0])).argmax(-1)
    right = (named == torch.tensor(val.samples["label"].to_pylist())).sum()
    assert metric.values()["top-1"] == int(right) / 18


def test_one_store_of_the_probe_is_its_identity(tmp_path: Path) -> None:
    places = [write_tiny_pair(tmp_path / name) for name in ("a", "b")]
    probes = [Probe(task=open_digits(asked(place), backbone()), backbone=backbone(), seed=0) for place in places]
    assert probes[0].identity() == probes[1].identity()  # the same content elsewhere is the same
    results = []
    for probe in probes:
        files = ProbeFiles(MemoryObjects())
        files.claim(probe.identity())
        results.append(train_probe(probe, files))
    assert results[0] == results[1]


# ---------------------------------------------------------------- wrong input


def problems_of(what: Asked, frozen: Backbone | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_digits(what, frozen or backbone())
    return str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    write_tiny(FolderObjects(tmp_path / "train"), teacher, 41, 0, layers=(0, 1))
    write_tiny(FolderObjects(tmp_path / "val"), teacher, 18, 1, layers=(0, 2))
    said = problems_of(asked(tmp_path, images="/photos"))
    for part in ("IMAGES=/photos: this task reads a store", "train lacks layer 3", "val lacks layer 3"):
        assert part in said, part


def test_val_alone(tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path / "val"), tiny_teacher(), 18, 1)
    assert f"STORE={tmp_path} has a store val but none called train" in problems_of(asked(tmp_path))


def test_labels_that_make_no_classification(tmp_path: Path) -> None:
    from trainer.data import with_samples

    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 41, seed=0)
    store = open_store(str(tmp_path))
    labels = store.samples["label"].to_numpy()
    some, rest = (with_samples(store, chosen) for chosen in (labels == labels[0], labels != labels[0]))
    problems = label_problems(some, rest)
    assert "has samples of 1 class; a probe needs at least 2" in problems[0]
    assert "has none of" in problems[1]


# ---------------------------------------------------------------- the shipped teacher


@pytest.mark.slow
def test_the_shipped_teacher_reaches_what_its_own_head_reaches(tmp_path: Path) -> None:
    """99.4 % top-1, give or take one of the 359 held-out digits, by the doors that the Makefile calls."""
    for command in (
        ["pipeline", "extract", "--no-ray", "--store", str(tmp_path / "digits")],
        ["trainer", "probe", "--task", "digits", "--store", str(tmp_path / "digits"), "--out", str(tmp_path / "probe")],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, check=True, timeout=900)
    result = read_result(FolderObjects(tmp_path / "probe"))
    assert result.teacher_head == pytest.approx(0.9944, abs=1e-4)
    assert result.last >= result.teacher_head - 1.5 / 359

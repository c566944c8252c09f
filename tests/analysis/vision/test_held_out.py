"""Accuracies of a teacher's head: on images beside its training set where there are some, and said so where not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.model_report import swap_section
from analysis.model_runs import swap_accuracies
from analysis.page import Origin
from analysis.vision.held_out import head_images, sibling_val
from infra.objects import FolderObjects
from pipeline.teacher import load_teacher
from storage_schemas import Store, open_store
from storage_schemas.from_arrays import write_store
from storage_schemas.samples import Sample
from tests.stores import make_spec, planted_states


def stored(place: Path, labels: list[int], seed: int = 0, **changes) -> Store:
    spec = make_spec(n_samples=len(labels), **changes)
    samples = [
        Sample(sample_id=f"{i:04d}.png", label=label, class_name="x", nbytes=9) for i, label in enumerate(labels)
    ]
    write_store(FolderObjects(place), spec, samples, lambda rows: planted_states(spec, rows, seed))
    return open_store(str(place))


def test_held_out_images_with_labels_are_taken_first(tmp_path):
    train = stored(tmp_path / "train", [0, 1, 0, 1])
    val = stored(tmp_path / "val", [-1, 1, -1, 0, 2], seed=1)
    beside = sibling_val(train)
    assert beside is not None
    found = head_images(train, beside, 2)
    assert found.place == val.location
    np.testing.assert_array_equal(found.labels, [1, 0])
    np.testing.assert_array_equal(found.x.numpy(), val.read([0], [1, 3], "all")[:, 0])
    assert found.text == f"Accuracy on held-out images, of {val.location}."


def test_without_held_out_images_the_text_says_training_images(tmp_path):
    train = stored(tmp_path / "train", [-1, 1, 0])
    assert sibling_val(train) is None
    found = head_images(train, None, 8)
    np.testing.assert_array_equal(found.labels, [1, 0])
    assert "on training images" in found.text
    unlabelled = stored(tmp_path / "val", [-1, -1])
    assert head_images(train, unlabelled, 8).place == train.location


def test_a_store_without_labels_gives_its_first_images(tmp_path):
    found = head_images(stored(tmp_path / "train", [-1] * 5), None, 3)
    np.testing.assert_array_equal(found.labels, [-1] * 3)
    assert len(found.x) == 3


def test_val_of_another_teacher_is_left_aside(tmp_path, capsys):
    train = stored(tmp_path / "train", [0, 1])
    stored(tmp_path / "val", [0, 1], teacher_weights_digest="7" * 64)
    assert sibling_val(train) is None
    assert "it holds states of another teacher" in capsys.readouterr().err


def test_images_without_label_count_in_no_accuracy(monkeypatch):
    monkeypatch.setattr("analysis.model_runs.N_DRAWS", 1)
    teacher = load_teacher("digits_vit")
    pixels = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    x = teacher.embed(torch.from_numpy(pixels))
    with torch.no_grad():
        labels = teacher.logits(teacher.run_blocks(x, 0, 12)).argmax(dim=1).numpy()
    labels[0] = (labels[0] + 1) % 10  # wrong on one
    labels[1:3] = -1
    groups = [list(range(6)), list(range(6, 12))]
    found = swap_accuracies(teacher, x, labels, groups, seed=0)
    assert found.clean == pytest.approx(3 / 4)
    drawn = swap_accuracies(teacher, x[[0, 3, 4, 5]], labels[[0, 3, 4, 5]], groups, seed=0)
    assert found.by_kind == drawn.by_kind
    origin = Origin(data="here", n_images=4, seed=0, command="make report")
    assert swap_section(found, "Accuracy on training images.", origin).text[0] == "Accuracy on training images."
    with pytest.raises(ValueError, match="none of 6 images has a label"):
        swap_accuracies(teacher, x, np.full(6, -1), groups, seed=0)


def test_blocks_beyond_the_phases_run_in_their_own_places(monkeypatch):
    """A store of the first layers alone: its phases end before the teacher does."""
    monkeypatch.setattr("analysis.model_runs.swapped_orders", lambda groups, n, where, **_: iter([(0, 1)]))
    teacher = load_teacher("digits_vit")
    x = teacher.embed(torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)))
    with torch.no_grad():
        labels = teacher.logits(teacher.run_blocks(x, 0, 12)).argmax(dim=1).numpy()
    found = swap_accuracies(teacher, x, labels, [[0, 1]], seed=0)
    assert {one for draws in found.by_kind.values() for one in draws} == {found.clean} == {1.0}

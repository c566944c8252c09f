"""The fit of a Raptor by closed forms, everything measured of one checkpoint, and that nothing is measured twice."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis.interventions import token_kinds
from analysis.phase_report import find_phases
from analysis.training import runs
from analysis.training.measure import (
    MeasureSettings,
    from_json,
    mean_similarity,
    measure_checkpoint,
    phase_clarity,
    to_json,
)
from analysis.training.raptor_fit import fit_raptor, measure_fit
from analysis.training.runs import measure_run, measured_key
from infra.console import UserError
from infra.objects import MemoryObjects
from pipeline.preprocess import normalise
from tests.analysis.training.planted import checkpoint, measured

SETTINGS = MeasureSettings(k=2, raptor_steps=0)


@pytest.fixture(scope="module")
def teacher():
    from timm.models.vision_transformer import VisionTransformer

    from pipeline.fake import FAKE_PREPROCESSING
    from pipeline.teacher import Loaded, assemble

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        side = FAKE_PREPROCESSING.image_size
        model = VisionTransformer(
            img_size=side, patch_size=side // 2, embed_dim=8, depth=4, num_heads=2, reg_tokens=2, num_classes=0
        )
        head = torch.nn.Linear(16, 3)
    loaded = Loaded(model=model, preprocessing=FAKE_PREPROCESSING, pixel_size=(side, side))
    return assemble("small", loaded, head, "cpu", "float32")


@pytest.fixture(scope="module")
def images(teacher):
    side = teacher.image_size
    return torch.randint(0, 256, (12, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def states(teacher, images):
    return teacher.layer_states(normalise(images, teacher.preprocessing))


def test_a_raptor_that_is_the_teacher_fits_it_exactly(teacher, images, states):
    labels = teacher.logits(states[:, -1]).argmax(-1)
    exact = SimpleNamespace(spans=["0-4"], rollout=lambda x, start, stop: states)
    found = measure_fit(exact, teacher, images, labels)
    np.testing.assert_allclose(np.stack([*found.r2.values(), *found.r2_one_mean.values()])[:, 1:], 1)
    assert found.accuracy == 1
    assert set(found.r2) == {"cls", "registers", "patches"}


def test_predicting_the_mean_has_r2_zero_and_that_of_one_mean_counts_what_images_share(teacher, images, states):
    kinds = token_kinds(has_cls=True, n_registers=2, n_patches=4)
    predicted = torch.empty_like(states)
    for tokens in kinds.values():
        predicted[:, :, tokens] = states[:, :, tokens].mean(dim=(0, 2), keepdim=True)
    mean = SimpleNamespace(spans=[], rollout=lambda x, start, stop: predicted)
    found = measure_fit(mean, teacher, images, torch.zeros(12, dtype=torch.int64))
    for kind, tokens in kinds.items():
        np.testing.assert_allclose(found.r2[kind], 0, atol=1e-4)
        true = states[:, 1:, tokens].double().numpy()
        total = ((true - true.mean(axis=(0, 2, 3), keepdims=True)) ** 2).sum(axis=(0, 2, 3))
        error = ((true - true.mean(axis=(0, 2), keepdims=True)) ** 2).sum(axis=(0, 2, 3))
        np.testing.assert_allclose(found.r2_one_mean[kind], 1 - error / total, atol=1e-4)


def test_training_fits_better_and_its_seed_is_all_that_counts(teacher, images):
    segments, labels = [(0, 2), (2, 4)], torch.zeros(12, dtype=torch.int64)
    before, after = (fit_raptor(teacher, images, segments, n_steps=n, seed=3) for n in (0, 20))
    errors = [1 - np.mean(list(measure_fit(one, teacher, images, labels).r2.values())) for one in (before, after)]
    assert errors[1] < 0.9 * errors[0]
    assert list(map(str, after.spans)) == ["0-2", "2-4"]
    one, again, other = (fit_raptor(teacher, images, segments, n_steps=2, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_clarity_of_planted_phases():
    distance = np.full((6, 6), 0.6)
    distance[:3, :3] = distance[3:, 3:] = 0.1
    np.fill_diagonal(distance, 0)
    found = phase_clarity(find_phases(distance, 2, None, "normalised_association"))
    assert found.blocks == "0-3,3-6"
    assert (found.within, found.across) == (pytest.approx(0.9), pytest.approx(0.4))
    assert found.contrast == pytest.approx(0.5)
    assert found.score > found.random_mean
    one = phase_clarity(find_phases(distance, 1, None, "normalised_association"))
    assert np.isnan([one.across, one.contrast, one.random_mean]).all()


def test_similarity_is_of_different_layers_that_blocks_have_made():
    cosines = np.array([[1, 9, 9, 9], [9, 1, 0.2, 0.4], [9, 0.2, 1, 0.6], [9, 0.4, 0.6, 1]])
    assert mean_similarity(cosines) == pytest.approx(0.4)


def test_everything_of_a_checkpoint_survives_its_document(teacher, images):
    settings = dataclasses.replace(SETTINGS, raptor_steps=1)
    labels = torch.zeros(12, dtype=torch.int64)
    found = measure_checkpoint(teacher, 7, train=images, held_out=images, labels=labels, settings=settings)
    assert to_json(from_json(to_json(found))) == to_json(found)
    assert found.record.epoch == 7
    assert found.raptor is not None
    assert found.raptor.blocks == tuple(found.phases.blocks.split(","))
    assert found.n_vectors["Layer_05_CLS_Final"] == 12
    assert found.cls_path.shape == (6, 8)  # positions, four blocks, final norm: no patch embedding
    np.testing.assert_allclose(np.diagonal(found.cosines["patches"]), 1)
    other = measure_checkpoint(teacher, 7, train=images, held_out=images[:11], labels=labels[:11], settings=SETTINGS)
    assert other.images_digest != found.images_digest
    assert other.raptor is None


@pytest.fixture
def calls(monkeypatch):
    """Epochs that are really measured."""
    seen: list[int] = []

    def measure(one, settings, device, progress):
        seen.append(one.epoch)
        return measured(one.epoch, 0.5, None)

    monkeypatch.setattr(runs, "_measure", measure)
    return seen


def test_what_is_measured_is_not_measured_again(calls):
    place, checkpoints = MemoryObjects(), [checkpoint(epoch, 1.0) for epoch in (0, 1, 5)]
    first = measure_run("run", checkpoints[:2], place, SETTINGS)
    passed: list[int] = []
    second = measure_run("run", checkpoints, place, SETTINGS, kept=lambda one: passed.append(one.epoch))
    assert calls == [0, 1, 5]
    assert passed == [0, 1]
    assert [to_json(point.measured) for point in second.points[:2]] == [to_json(p.measured) for p in first.points]
    assert [one.epoch for one in second.records] == [0, 1, 5]


def test_other_weights_other_settings_and_torn_documents_are_measured_anew(calls):
    place, one = MemoryObjects(), checkpoint(2, 1.0)
    measure_run("run", [one], place, SETTINGS)
    measure_run("run", [dataclasses.replace(one, digest="other")], place, SETTINGS)
    measure_run("run", [one], place, dataclasses.replace(SETTINGS, raptor_steps=4))
    place.put(measured_key(one), place.get(measured_key(one))[:-9])
    measure_run("run", [one], place, SETTINGS)
    document = json.loads(place.get(measured_key(one)))
    document["measured"] = document["measured"].replace('"format": 1', '"format": 0')
    place.put(measured_key(one), json.dumps(document).encode())
    measure_run("run", [one], place, SETTINGS)
    assert calls == [2] * 5


def test_checkpoints_are_compared_on_the_same_images_only(monkeypatch):
    monkeypatch.setattr(runs, "_measure", lambda one, *_: measured(one.epoch, 0.5, None, images=f"{one.epoch // 2}"))
    same = [checkpoint(epoch, 1.0) for epoch in (0, 1)]
    assert len(measure_run("run", same, MemoryObjects(), SETTINGS).points) == 2
    with pytest.raises(UserError, match="were measured on different images"):
        measure_run("run", [*same, checkpoint(2, 1.0)], MemoryObjects(), SETTINGS)

"""Paths of images over the sphere: planted ones are found in their plane, and norms come before directions."""

import numpy as np
import pytest
import torch

from analysis.dynamics import DynamicsAccumulator
from analysis.page import Origin, Table
from analysis.paths import normed_dynamics, project_paths, read_tokens, rises_as_s, shown_patches, token_paths
from analysis.paths_report import final_direction_text, normed_section, paths_section
from infra.objects import MemoryObjects
from pipeline.teacher import load_teacher
from storage_schemas import open_store
from tests.stores import make_spec, write_planted

ORIGIN = Origin(data="here", n_images=6, seed=None, command="make report")


def turned(angles: np.ndarray, dim: int = 6) -> np.ndarray:
    """Directions at these angles in one plane, turned into a larger space."""
    flat = np.zeros((*angles.shape, dim))
    flat[..., 0], flat[..., 1] = np.cos(angles), np.sin(angles)
    return flat @ np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0].T


def test_planted_paths_are_found_up_to_rotation_and_their_lengths_do_not_count() -> None:
    ends = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    angles = ends[:, None] * np.linspace(0, 1, 5)
    lengths = np.random.default_rng(1).uniform(0.5, 9, (12, 5, 1))
    found = project_paths(turned(angles) * lengths, np.arange(12) % 2, n_each=12)
    np.testing.assert_allclose(found.explained.sum(), 1, atol=1e-12)
    order = np.argsort(np.arange(12) % 2, kind="stable")
    planted = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[order]
    np.testing.assert_array_equal(found.labels, np.sort(np.arange(12) % 2))
    distances = [np.linalg.norm(x[:, :, None] - x[:, None], axis=-1) for x in (planted, found.points)]
    np.testing.assert_allclose(distances[1], distances[0], atol=1e-9)


def test_classes_with_most_images_are_shown_and_so_many_of_each() -> None:
    labels = np.array([3, 3, 3, 1, 1, 2, -1, -1, -1, -1])
    states = np.random.default_rng(0).standard_normal((10, 3, 5))
    assert project_paths(states, labels, n_classes=2, n_each=2).labels.tolist() == [3, 3, 1, 1]
    assert project_paths(states, np.full(10, -1)).points.shape == (0, 3, 2)


def test_a_store_without_classes_has_a_line_and_no_empty_figure() -> None:
    states = np.random.default_rng(0).standard_normal((6, 3, 5))
    sums = DynamicsAccumulator(range(3))
    sums.update(states[:, :, None])
    paths = project_paths(states, np.full(6, -1))
    found = paths_section("cls", paths, {"cls": sums.result()}, None, range(3), ORIGIN)
    assert found.parts == []
    assert found.text[-1] == "No image has a class: no paths of cls are drawn."


def test_a_plane_needs_three_images() -> None:
    with pytest.raises(ValueError, match="needs 3 rows and 2 channels"):
        project_paths(np.ones((2, 3, 4)), np.zeros(2, np.int64))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.1, 0.5, 0.9, 1.0], True),
        ([0.0, 0.5, 0.7, 0.9, 1.0], False),  # steepest at the beginning
        ([0.0, 0.1, 0.2, 0.3, 1.0], False),  # steepest at the end
        ([0.0, 0.2, 0.1, 0.9, 1.0], False),  # falls once
    ],
)
def test_the_shape_of_an_s(values: list[float], expected: bool) -> None:
    assert rises_as_s(values) is expected


def test_the_final_norm_comes_before_directions() -> None:
    teacher = load_teacher("digits_vit")
    spec = make_spec(layers=tuple(range(3)), dim=64, n_registers=4, grid=(8, 8), n_samples=5, precision="float32")
    objects = MemoryObjects()
    write_planted(objects, spec)
    store = open_store(objects)
    both = normed_dynamics(teacher, store, np.array([0, 1, 3]))
    found = both.normed
    assert list(found) == list(both.raw) == ["cls", "registers", "patches"]
    x = torch.from_numpy(store.read(None, [0, 1, 3], "all"))
    with torch.no_grad():
        normed = torch.stack([teacher.final_norm(one).double() for one in x])
    normed = torch.nn.functional.normalize(normed, dim=-1)
    cosines = (normed * normed[:, -1:]).sum(-1)
    raw = torch.nn.functional.normalize(x.double(), dim=-1)
    raw_cosines = (raw * raw[:, -1:]).sum(-1)
    for kind, tokens in (("cls", slice(0, 1)), ("registers", slice(1, 5)), ("patches", slice(5, None))):
        of_images = cosines[:, :, tokens].mean(2).numpy()
        np.testing.assert_allclose(found[kind].to_final.mean, of_images.mean(0), atol=1e-6)
        np.testing.assert_allclose(found[kind].to_final.std, of_images.std(0, ddof=1), atol=1e-6)
        of_raw = raw_cosines[:, :, tokens].mean(2).numpy().mean(0)
        np.testing.assert_allclose(both.raw[kind].to_final.mean, of_raw, atol=1e-6)
    assert found["cls"].to_final.mean[-1] == pytest.approx(1)
    text = final_direction_text("after the final norm", found, store.layers)
    assert "Not judged here: of two steps or one" in text
    assert "of 2 steps" in text
    section = normed_section(both, store.layers, [], ORIGIN)
    table = next(part for part in section.parts if isinstance(part, Table))
    assert table.rows[1][:3] == ["cls", 1, found_raw := both.raw["cls"].to_final.mean[1]]
    assert table.rows[1][4] == found["cls"].to_final.mean[1] != found_raw


def test_planted_ways_of_tokens_are_found_in_their_plane() -> None:
    """Two tokens move on two circles of one plane; images scatter about them along a third direction, less."""
    turns = np.linspace(0, 2 * np.pi, 9)
    means = np.stack([turned(turns) * 3, turned(turns + 1)])
    aside = np.linalg.svd(means.reshape(-1, 6))[2][2]
    scatter = np.array([-0.1, 0.1, 0.0, 0.0])
    states = means[:, None] + scatter[None, :, None, None] * aside
    found = token_paths({"CLS": states[0], "patch 1": states[1]})
    assert found.n_images == 4
    assert 0.99 < found.explained.sum() < 1
    points = np.stack([found.points["CLS"], found.points["patch 1"]]).reshape(-1, 2)
    flat = means.reshape(-1, 6)
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (flat, points)]
    np.testing.assert_allclose(distances[1], distances[0], atol=1e-9)


def test_tokens_lie_where_the_published_ones_do() -> None:
    assert shown_patches(196) == [9, 49, 99]
    assert shown_patches(256) == [11, 64, 129]
    assert shown_patches(1) == [0]
    objects = MemoryObjects()
    write_planted(objects, make_spec(layers=tuple(range(3))))
    store = open_store(objects)
    rows = np.array([0, 5, 20])
    found = read_tokens(store, rows)
    assert list(found) == ["CLS", "patch 1", "patch 2", "patch 4"]
    everything = store.read(None, rows, "all")
    for name, token in (("CLS", 0), ("patch 1", 3), ("patch 2", 4), ("patch 4", 6)):
        np.testing.assert_array_equal(found[name], everything[:, :, token])

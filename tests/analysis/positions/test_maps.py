"""Association scores of planted partitions, discs of sinusoids, and none where encodings are random."""

import os

import numpy as np
import pytest
import torch
from timm.layers import build_sincos2d_pos_embed

from analysis.page import Origin
from analysis.positions.map_section import map_section, position_maps, similarity_by_distance
from analysis.positions.maps import association, encoding_similarity, locality, mosaic
from pipeline.positions import positions_of
from pipeline.teacher import load_teacher, teacher_from_files
from storage_schemas import open_store

SETS = np.repeat(np.arange(4), 4)
SAME = SETS[:, None] == SETS[None, :]
GRID = (6, 9)


def sinusoids(grid: tuple[int, int] = GRID) -> np.ndarray:
    return build_sincos2d_pos_embed(grid, 64, temperature=10.0).numpy()


def random(n: int = 54, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 64))


def shuffle(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(54)


def test_a_block_gram_matrix_is_associated():
    encodings = np.eye(4)[SETS] + 0.1 * np.random.default_rng(0).standard_normal((16, 4))
    found = association(encoding_similarity(encodings), SETS)
    assert (found.rows, found.overlap) == (1, 1)
    assert found.chance == pytest.approx(3 / 15)


def test_which_patches_make_a_set_does_not_matter():
    order = np.random.default_rng(1).permutation(16)
    found = association(SAME[order][:, order] + 0.0, SETS[order])
    assert (found.rows, found.overlap) == (1, 1)


def test_orthogonal_encodings_are_tied_and_associate_nothing():
    found = association(encoding_similarity(np.eye(16)), SETS)
    assert found.rows == 0
    assert found.overlap == pytest.approx(found.chance)


def test_similarity_to_all_other_sets_is_the_opposite_of_association():
    found = association(np.eye(16) - SAME, SETS)
    assert (found.rows, found.overlap) == (0, 0)


def test_a_tie_across_the_edge_is_no_association_and_counts_half():
    """Patch 0 is as similar to patch 4, of another set, as to its companion 3: two share the last place."""
    similarity = 2 * np.eye(16) + SAME
    similarity[0, 3] = similarity[0, 4] = 0.5
    found = association(similarity, SETS)
    assert found.rows == pytest.approx(15 / 16)
    assert found.overlap == pytest.approx(1 - (1 - 2.5 / 3) / 16)


def test_unrelated_similarities_are_at_chance():
    scores = [association(encoding_similarity(random(16, seed)), SETS) for seed in range(200)]
    overlap = np.array([one.overlap for one in scores])
    assert abs(overlap.mean() - 0.2) < 3 * overlap.std() / np.sqrt(200) + 0.005
    assert max(one.rows for one in scores) < 0.2


def test_lengths_of_encodings_change_nothing_and_a_common_part_is_taken_off():
    encodings, rng = random(), np.random.default_rng(3)
    scaled = encodings * rng.uniform(0.1, 10, (54, 1))
    np.testing.assert_allclose(encoding_similarity(scaled), encoding_similarity(encodings), atol=1e-12)
    moved = encodings + 50 * rng.standard_normal(64)
    assert encoding_similarity(moved).min() > 0.9
    np.testing.assert_allclose(
        encoding_similarity(moved, centred=True), encoding_similarity(encodings, centred=True), atol=1e-9
    )


@pytest.mark.parametrize("centred", [False, True])
def test_sinusoids_of_a_grid_are_local_discs(centred):
    found = locality(encoding_similarity(sinusoids(), centred=centred), GRID)
    assert found.neighbours == 1
    assert found.discs > 0.99
    assert found.correlation < -0.75
    assert 0.1 < found.above < 0.5


def test_random_encodings_have_no_discs_and_are_at_chance():
    found = locality(encoding_similarity(random()), GRID)
    assert found.above == 0
    assert np.isnan(found.discs)
    assert abs(found.neighbours - found.chance) < 0.05
    assert abs(found.correlation) < 0.1


def test_permuted_sinusoids_are_local_once_they_are_put_back():
    order = shuffle(4)
    permuted = encoding_similarity(sinusoids()[order])
    scattered, back = locality(permuted, GRID), locality(permuted[np.argsort(order)][:, np.argsort(order)], GRID)
    assert back == locality(encoding_similarity(sinusoids()), GRID)
    assert scattered.neighbours < 0.3
    assert abs(scattered.discs) < 0.2


def test_the_chance_of_neighbours_counts_edges_and_corners():
    """Of a 3 x 3 grid, one patch has 8 neighbours, four have 5 and four have 3."""
    found = locality(encoding_similarity(random(9)), (3, 3))
    assert found.chance == pytest.approx((8 + 4 * 5 + 4 * 3) / 9 / 8)


def test_patches_that_are_alike_and_far_are_less_than_no_disc():
    similarity = np.eye(5) + np.fliplr(np.eye(5))  # on a line, each like its mirror image
    assert locality(similarity, (1, 5)).discs < 0


def test_similarity_by_distance_is_its_mean_over_pairs():
    x, mean, spread = similarity_by_distance(np.arange(9.0).reshape(3, 3), (1, 3))
    np.testing.assert_allclose(x, [0, 1, 2])
    np.testing.assert_allclose(mean, [4, 4, 4])
    np.testing.assert_allclose(spread, [np.std([0, 4, 8]), np.std([1, 3, 5, 7]), np.std([2, 6])])


def test_a_mosaic_has_each_patchs_map_at_its_place():
    similarity = np.arange(36.0).reshape(6, 6)
    picture = mosaic(similarity, (2, 3))
    assert picture.shape == (5, 11)
    np.testing.assert_array_equal(picture[3:5, 4:7], similarity[4].reshape(2, 3))
    assert np.isnan(picture[2]).all()
    assert mosaic(np.zeros((100, 100)), (10, 10), most=3).shape == (32, 32)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: encoding_similarity(np.zeros((4, 3))), "4 of 4 encodings have no length"),
        (lambda: encoding_similarity(np.ones((4, 3)), centred=True), "no length, about their mean"),
        (lambda: encoding_similarity(np.array([[1.0, np.nan], [1, 2]])), "1 encodings are not finite"),
        (lambda: encoding_similarity(np.ones((1, 3))), "expected 2 or more rows"),
        (lambda: association(np.eye(3), np.array([0, 0, 1])), "two or more patches each"),
        (lambda: association(np.eye(4), np.array([0, 0, 0, 0])), "two or more sets"),
        (lambda: association(np.eye(4), np.array([0, 0, 1])), "sets name 3 patches, similarity has 4"),
        (lambda: locality(np.eye(4), (2, 3)), "4 patches for a grid of 2 x 3"),
        (lambda: locality(np.full((4, 4), np.nan), (2, 2)), "expected finite values"),
    ],
)
def test_what_has_no_similarity_is_refused(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


def test_positions_of_the_digits_teacher_are_local_and_the_page_says_so():
    found = position_maps(positions_of(load_teacher("digits_vit").model).numpy(), seed=0)
    own, _, drawn = found.locality.values()
    assert own.neighbours > 0.5
    assert own.discs > 0.6
    assert abs(drawn.neighbours - drawn.chance) < 0.05
    section = map_section(found, Origin(data="digits_vit", n_images=0, seed=0, command="make report"))
    assert "Here that holds: 52% of a patch's neighbours" in section.text[0]
    assert section.parts[-1].rows[0][1] == own.neighbours
    untrained = position_maps(random().reshape(*GRID, 64), seed=1)
    assert "that does not hold" in map_section(untrained, section.parts[0].origin).text[0]


def test_an_embedding_of_dinov2s_grid_is_measured():
    """37 x 37 patches, as the weights have them; sinusoids in the place of what is learned."""
    found = position_maps(sinusoids((37, 37)).reshape(37, 37, 64), seed=0)
    own = next(iter(found.locality.values()))
    assert own.neighbours == pytest.approx(1)
    assert own.discs > 0.99
    assert map_section(found, Origin(data="d", n_images=0, seed=0, command="c")).text


@pytest.mark.skipif("IMAGENET_STORE" not in os.environ, reason="give IMAGENET_STORE=, a store of DINOv2 ViT-B/14 reg")
def test_positions_of_the_real_teacher_are_local_discs():
    """Needs weights that nobody has here; a store holds those of its teacher, positions as for 518 px."""
    teacher = teacher_from_files(open_store(os.environ["IMAGENET_STORE"]).read_teacher_files())
    assert teacher.positions is not None
    assert teacher.positions.shape == (37, 37, 768)
    found = position_maps(teacher.positions.numpy(), seed=0).locality["about their mean"]
    assert found.neighbours > 0.8
    assert found.discs > 0.8


def test_a_report_leaves_out_what_a_teacher_lacks(capsys):
    from analysis import report_models

    teacher = load_teacher("digits_vit")
    with torch.no_grad():
        teacher.model.pos_embed.zero_()
    assert report_models._positions(teacher, "store", 0, "c") == []
    assert "64 of 64 encodings have no length" in capsys.readouterr().err
    teacher.model.pos_embed = None
    assert report_models._positions(teacher, "store", 0, "c") == []
    assert "adds no position embeddings" in capsys.readouterr().err

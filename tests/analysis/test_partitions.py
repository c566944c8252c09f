"""Random partitions to compare with: valid, distinct, evenly drawn, never the tested one, worse on planted blocks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.partitions import (
    groups_of,
    n_contiguous,
    random_contiguous,
    random_permuted,
    segments_of,
    spans_text,
)
from analysis.phases import OBJECTIVES, contiguous_segments, epsilon_recursion, partition_score
from tests.analysis.matrices import all_contiguous, block_distances
from tests.analysis.published import DISTANCE

CUTS = st.lists(st.integers(2, 5), min_size=1, max_size=5).map(lambda sizes: np.cumsum([0, *sizes]).tolist())


@given(CUTS, st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_contiguous_ones_are_valid_distinct_and_others(cuts, n, seed):
    tested = groups_of(list(itertools.pairwise(cuts)))
    found = random_contiguous(tested, n, seed=seed)
    assert found == random_contiguous(tested, n, seed=seed)
    every = [groups_of(segments) for segments in all_contiguous(cuts[-1], len(tested), 2)]
    assert len(found) == min(n, len(every) - 1)
    assert len({spans_text(groups) for groups in found}) == len(found)
    assert all(groups in every and groups != tested for groups in found)


@given(CUTS, st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_permuted_ones_are_valid_distinct_and_others(cuts, n, seed):
    tested = groups_of(list(itertools.pairwise(cuts)))
    found = random_permuted(tested, n, seed=seed)
    assert found == random_permuted(tested, n, seed=seed)
    assert len({spans_text(groups) for groups in found}) == len(found)
    for groups in found:
        assert groups != tested
        assert sorted(map(len, groups)) == sorted(map(len, tested))
        assert sorted(itertools.chain(*groups)) == list(range(cuts[-1]))
        assert groups == sorted(map(sorted, groups))
    if len(tested) > 1 and cuts[-1] >= 8:
        assert len(found) == n


def test_where_there_are_no_others_there_are_fewer():
    assert random_contiguous([[0, 1], [2, 3]], 10) == []
    assert random_contiguous([[0, 1, 2, 3]], 10) == []
    assert random_permuted([[0, 1, 2, 3]], 10) == []
    assert random_permuted([[0], [1]], 10) == []
    assert sorted(random_permuted([[0, 1], [2, 3]], 10)) == [[[0, 2], [1, 3]], [[0, 3], [1, 2]]]
    assert sorted(random_contiguous([[0, 1], [2, 3, 4, 5]], 10)) == [[[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3], [4, 5]]]


def test_tested_groups_that_no_draw_could_give():
    """The recursion may leave a single layer, or groups that are not contiguous."""
    assert len(random_contiguous([[0], [1, 2, 3, 4]], 10)) == n_contiguous(5, 2) == 2
    assert len(random_contiguous([[0, 2, 4], [1, 3, 5]], 10)) == n_contiguous(6, 2) == 3


@pytest.mark.parametrize(("n_layers", "k", "min_size"), [(12, 3, 2), (12, 6, 2), (12, 7, 2), (5, 5, 1), (9, 2, 3)])
def test_count_of_contiguous_ones(n_layers, k, min_size):
    assert n_contiguous(n_layers, k, min_size) == len(all_contiguous(n_layers, k, min_size))


def test_draws_are_even():
    """28 - 1 others of 12 layers in 3; each of 2,700 draws is of one, so 100 of each, give or take 5 deviations."""
    tested = groups_of(contiguous_segments(DISTANCE, 3))
    drawn = Counter(spans_text(random_contiguous(tested, 1, seed=seed)[0]) for seed in range(2700))
    assert len(drawn) == 27
    assert all(50 < n < 150 for n in drawn.values())


def test_other_seeds_draw_others():
    tested = groups_of(contiguous_segments(DISTANCE, 3))
    assert random_contiguous(tested, 10, seed=0) != random_contiguous(tested, 10, seed=1)
    assert random_permuted(tested, 10, seed=0) != random_permuted(tested, 10, seed=1)


@pytest.mark.parametrize("sizes", [(6, 6), (7, 3, 2), (4, 3, 3, 2)])
@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_found_partitions_beat_random_ones_on_planted_blocks(sizes, noise):
    """By normalised association and by the weight of the cut, and permuted ones are worse still."""
    distance = block_distances(sizes, noise)
    found = groups_of(contiguous_segments(distance, len(sizes)))
    contiguous = random_contiguous(found, 10)
    permuted = random_permuted(found, 10)
    for objective in ("normalised_association", "cut_per_layer"):
        scores = [[partition_score(distance, one, objective) for one in some] for some in (contiguous, permuted)]
        best = partition_score(distance, found, objective)
        assert best > max(map(max, scores))
        assert best > np.mean(scores[0]) + np.std(scores[0])
        assert np.mean(scores[0]) > np.mean(scores[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_no_random_contiguous_one_beats_the_best_on_the_published_matrix(objective, k):
    found = groups_of(contiguous_segments(DISTANCE, k, objective))
    best = partition_score(DISTANCE, found, objective)
    for seed in range(10):
        others = [partition_score(DISTANCE, one, objective) for one in random_contiguous(found, 10, seed=seed)]
        assert max(others) <= best


@pytest.mark.parametrize("share", [0.2, 0.1, 0.09])
def test_the_recursion_beats_random_ones_on_the_published_matrix(share):
    found = epsilon_recursion(DISTANCE, share * DISTANCE.sum() / 2)
    best = partition_score(DISTANCE, found)
    for draw in (random_contiguous, random_permuted):
        others = [partition_score(DISTANCE, one) for one in draw(found, 10)]
        assert best >= max(others)
        assert best > np.mean(others) + np.std(others)


def test_groups_and_segments_are_one_another():
    segments = [(0, 7), (7, 10), (10, 12)]
    assert segments_of(groups_of(segments)) == segments
    assert segments_of([[0, 2], [1, 3]]) is None
    assert spans_text(groups_of(segments)) == "0-7,7-10,10-12"
    assert spans_text([[0, 2], [1, 3]]) == "1+3 | 2+4"

"""Cutting matrices of distances: the published splits, exhaustive searches, planted blocks, closed forms."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.distances import layer_distances
from analysis.partitions import groups_of
from analysis.phases import (
    MAX_CUT_LAYERS,
    OBJECTIVES,
    contiguous_segments,
    epsilon_ranges,
    epsilon_recursion,
    max_cut,
    partition_score,
    total_distance,
)
from infra.objects import MemoryObjects
from storage_schemas import open_store
from storage_schemas.from_arrays import write_store
from tests.analysis.matrices import (
    all_contiguous,
    block_distances,
    cut_weight,
    random_distances,
    reference_recursion,
    score_by_definition,
    searched_max_cut,
)
from tests.analysis.published import CONTIGUOUS, DISTANCE, RECURSION, SCORES
from tests.stores import make_samples, make_spec
from trainer.block import Block

SEEDS = st.integers(0, 2**32 - 1)


def layers_of(groups: list[list[int]]) -> list[list[int]]:
    return [[row + 1 for row in group] for group in groups]


class TestPublished:
    TOTAL = total_distance(DISTANCE)

    def test_the_total_is_the_known_one(self):
        assert pytest.approx(33.88, abs=1e-9) == self.TOTAL

    @pytest.mark.parametrize(("epsilon", "k"), [(0.20, 2), (0.10, 3), (0.09, 4)])
    def test_the_three_published_splits(self, epsilon, k):
        expected = {
            2: [range(1, 8), range(8, 13)],
            3: [range(1, 8), range(8, 11), range(11, 13)],
            4: [range(1, 5), range(5, 8), range(8, 11), range(11, 13)],
        }
        found = epsilon_recursion(DISTANCE, epsilon * self.TOTAL)
        assert layers_of(found) == [list(group) for group in expected[k]]
        assert groups_of(contiguous_segments(DISTANCE, k)) == found

    @pytest.mark.parametrize(("start", "stop", "groups"), RECURSION)
    def test_blocks_at_every_epsilon(self, start, stop, groups):
        inside = np.linspace(start + 6e-5, stop - 6e-5, 7)  # the ends are known to four decimals
        for epsilon in inside:
            assert layers_of(epsilon_recursion(DISTANCE, epsilon * self.TOTAL)) == [list(group) for group in groups]

    def test_ranges_are_the_known_ones(self):
        ranges = epsilon_ranges(DISTANCE)
        assert [round(found.start / self.TOTAL, 4) for found in ranges] == [start for start, _, _ in RECURSION]
        assert [found.start for found in ranges[:-1]] == [found.stop for found in ranges[1:]]
        assert ranges[0].stop == math.inf
        assert [layers_of(found.groups) for found in ranges] == [
            [list(group) for group in groups] for _, _, groups in RECURSION
        ]

    @pytest.mark.parametrize(("objective", "min_size", "k"), CONTIGUOUS)
    def test_contiguous_splits_of_every_objective(self, objective, min_size, k):
        found = contiguous_segments(DISTANCE, k, objective, min_size)
        assert [stop for _, stop in found[:-1]] == CONTIGUOUS[objective, min_size, k]
        if (objective, min_size, k) in SCORES:
            score = partition_score(DISTANCE, groups_of(found), objective)
            assert score == pytest.approx(SCORES[objective, min_size, k], abs=6e-5)


class TestMaxCut:
    @given(st.integers(1, 10), SEEDS)
    @settings(max_examples=60)
    def test_equals_exhaustive_search(self, n, seed):
        distance = random_distances(n, seed)
        weight, side = max_cut(distance)
        assert weight == pytest.approx(searched_max_cut(distance), abs=1e-12)
        assert weight == pytest.approx(cut_weight(distance, side), abs=1e-12)
        assert 0 not in side

    @given(st.integers(2, 10), SEEDS)
    @settings(max_examples=40)
    def test_renamed_layers_are_cut_alike(self, n, seed):
        """The layer that is held fixed is one of two sides that swap: complements are one cut."""
        distance = random_distances(n, seed)
        order = np.random.default_rng(seed).permutation(n)
        weight, side = max_cut(distance)
        renamed_weight, renamed = max_cut(distance[np.ix_(order, order)])
        assert renamed_weight == pytest.approx(weight, abs=1e-12)
        back = {int(order[i]) for i in renamed}
        assert back in ({*side}, {*range(n)} - {*side})

    @pytest.mark.parametrize("n", range(2, 23))
    def test_equal_distances_are_halved(self, n):
        """Of n vertices at distance 1, floor(n/2) ceil(n/2) pairs are cut; of equal cuts the first in binary order."""
        weight, side = max_cut(1 - np.eye(n))
        assert weight == (n // 2) * (n - n // 2)
        assert side == list(range(1, n // 2 + 1))

    @pytest.mark.parametrize(("left", "right"), [(9, 8), (11, 11), (3, 21), (1, 22)])
    def test_complete_bipartite_graphs_are_cut_whole(self, left, right):
        """Also with more layers than one table holds, and with the sides interleaved."""
        order = np.random.default_rng(left).permutation(left + right)
        on_left = order < left
        weight, side = max_cut((on_left[:, None] != on_left).astype(float))
        assert weight == left * right
        assert {*side} in ({*np.flatnonzero(on_left)}, {*np.flatnonzero(~on_left)})

    @pytest.mark.parametrize("n_layers", [4, 18])
    def test_of_equal_cuts_the_first_in_binary_order_is_taken(self, n_layers):
        """All layers equally far apart: any half will do, also one of a later table."""
        weight, side = max_cut(np.ones((n_layers, n_layers)) - np.eye(n_layers))
        assert (weight, side) == ((n_layers // 2) ** 2, list(range(1, n_layers // 2 + 1)))

    def test_tables_beyond_the_first_are_searched_exactly(self, monkeypatch):
        distance = random_distances(16, 3)
        whole = max_cut(distance)
        for low_bits in (1, 4, 9):
            monkeypatch.setattr("analysis.phases._LOW_BITS", low_bits)
            weight, side = max_cut(distance)
            assert side == whole[1]
            assert weight == pytest.approx(whole[0], abs=1e-12)

    def test_nothing_to_cut(self):
        assert max_cut(np.zeros((1, 1))) == (0.0, [])
        assert max_cut(np.zeros((5, 5))) == (0.0, [])

    def test_24_layers_take_seconds_at_most(self):
        began = time.process_time()
        max_cut(random_distances(24, 0))
        assert time.process_time() - began < 3

    def test_too_many_layers_are_refused_before_the_search(self):
        with pytest.raises(ValueError, match=r"31 layers is not searched; expected at most 30\. Contiguous"):
            max_cut(random_distances(MAX_CUT_LAYERS + 1, 0))


class TestEpsilonRecursion:
    @given(st.integers(1, 8), SEEDS, st.floats(0, 1), st.integers(1, 3))
    @settings(max_examples=60)
    def test_equals_the_published_steps(self, n, seed, share, min_size):
        distance = random_distances(n, seed)
        epsilon = share * total_distance(distance)
        assert epsilon_recursion(distance, epsilon, min_size) == reference_recursion(distance, epsilon, min_size)

    @given(st.integers(1, 9), SEEDS, st.integers(1, 3))
    @settings(max_examples=40)
    def test_ranges_say_what_every_epsilon_gives(self, n, seed, min_size):
        distance = random_distances(n, seed)
        ranges = epsilon_ranges(distance, min_size)
        assert ranges[0].groups == [list(range(n))]
        assert ranges[-1].start == 0
        assert [len(found.groups) for found in ranges] == sorted(len(found.groups) for found in ranges)
        for found in ranges:
            stop = min(found.stop, 2 * found.start + 1)
            for epsilon in (found.start, (found.start + stop) / 2, np.nextafter(stop, 0)):
                assert epsilon_recursion(distance, epsilon, min_size) == found.groups

    def test_a_cut_of_epsilon_is_not_made(self):
        pair = np.array([[0.0, 1.0], [1.0, 0.0]])
        distance = np.kron(pair, np.full((2, 2), 0.25))  # two and two layers: the cut weighs 1
        assert epsilon_recursion(distance, 1.0) == [[0, 1, 2, 3]]
        assert epsilon_recursion(distance, np.nextafter(1.0, 0)) == [[0, 1], [2, 3]]

    def test_clusters_need_not_be_contiguous(self):
        odd = np.arange(6) % 2
        assert epsilon_recursion((odd[:, None] != odd).astype(float), 0.5) == [[0, 2, 4], [1, 3, 5]]

    @pytest.mark.parametrize("min_size", [1, 2, 3])
    def test_small_clusters_are_not_cut(self, min_size):
        found = epsilon_recursion(1 - np.eye(8), 0.0, min_size)
        assert max(map(len, found)) < 2 * min_size

    def test_zero_distances_are_one_block(self):
        assert epsilon_recursion(np.zeros((6, 6)), 0.0) == [list(range(6))]
        assert len(epsilon_ranges(np.zeros((6, 6)))) == 1

    def test_every_problem_is_listed(self):
        with pytest.raises(ValueError, match=r"(?s)epsilon is -0.1, expected 0 or more.*min_size is 0.*shape \(2, 3\)"):
            epsilon_recursion(np.zeros((2, 3)), -0.1, 0)
        for epsilon in (math.nan, math.inf):
            with pytest.raises(ValueError, match="epsilon is"):
                epsilon_recursion(DISTANCE, epsilon)


class TestContiguousSegments:
    @given(st.data(), st.integers(1, 10), SEEDS, st.sampled_from(sorted(OBJECTIVES)), st.integers(1, 2))
    @settings(max_examples=120)
    def test_equals_enumeration(self, data, n, seed, objective, min_size):
        k = data.draw(st.integers(1, max(1, n // min_size)))
        distance = random_distances(n, seed)
        every = all_contiguous(n, k, min_size)
        if not every:
            return
        scores = [score_by_definition(distance, one, objective) for one in every]
        found = contiguous_segments(distance, k, objective, min_size)
        assert found == every[int(np.argmax(scores))]
        assert partition_score(distance, groups_of(found), objective) == pytest.approx(max(scores), abs=1e-12)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_enumeration_at_12_layers_for_every_k(self, objective):
        distance = random_distances(12, 7)
        for k in range(1, 7):
            scores = {tuple(s): score_by_definition(distance, s, objective) for s in all_contiguous(12, k, 2)}
            assert tuple(contiguous_segments(distance, k, objective)) == max(scores, key=scores.__getitem__)

    def test_one_segment_is_all_and_most_segments_are_pairs(self):
        assert contiguous_segments(DISTANCE, 1) == [(0, 12)]
        assert contiguous_segments(DISTANCE, 6) == [(i, i + 2) for i in range(0, 12, 2)]
        assert contiguous_segments(DISTANCE, 12, min_size=1) == [(i, i + 1) for i in range(12)]

    def test_of_equal_ones_the_earliest_cuts(self):
        assert contiguous_segments(1 - np.eye(6), 2, "cut", 1) == [(0, 3), (3, 6)]
        assert contiguous_segments(np.zeros((6, 6)), 3) == [(0, 2), (2, 4), (4, 6)]

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_as_many_segments_as_40_layers_hold(self, objective):
        planted = [5, 9, 7, 12, 7]
        found = contiguous_segments(block_distances(planted), 5, objective)
        assert all(stop - start >= 2 for start, stop in found)
        if objective != "mean_distance":
            assert found == list(itertools.pairwise(np.cumsum([0, *planted]).tolist()))

    def test_every_problem_is_listed(self):
        message = r"(?s)objective is 'best', expected one of normalised_association, cut.*k is 0, expected.*differ by"
        with pytest.raises(ValueError, match=message):
            contiguous_segments(np.array([[0, 1], [2, 0.0]]), 0, "best")
        with pytest.raises(ValueError, match=r"12 layers cannot be cut into 7 segments of at least 2.*k is at most 6"):
            contiguous_segments(DISTANCE, 7)

    @pytest.mark.parametrize(
        ("matrix", "message"),
        [
            (1 - DISTANCE.clip(0, 1), "the diagonal holds 1, expected 0: give 1 - similarity"),
            (-DISTANCE, "hold -1.11, expected 0 or more"),
            (np.where(DISTANCE > 1, np.nan, DISTANCE), "NaN or infinity"),
            (DISTANCE[0], r"shape \(12,\)"),
            (np.zeros((0, 0)), r"shape \(0, 0\)"),
        ],
    )
    def test_no_matrix_of_distances(self, matrix, message):
        for cut in (lambda: contiguous_segments(matrix, 1), lambda: epsilon_recursion(matrix, 1.0)):
            with pytest.raises(ValueError, match=message):
                cut()

    def test_association_that_is_not_defined_says_where(self):
        opposed = 2 * (1 - np.eye(4))  # every layer points away from every other
        with pytest.raises(ValueError, match=r"normalised_association is not defined: layers 1, 2 .*such as cut"):
            contiguous_segments(opposed, 2)
        assert contiguous_segments(opposed, 2, "cut") == [(0, 2), (2, 4)]

    def test_matrices_of_other_types(self):
        assert contiguous_segments(DISTANCE.astype(np.float32), 3) == contiguous_segments(DISTANCE, 3)
        assert epsilon_recursion((1 - np.eye(4)).astype(int), 3) == [[0, 3], [1, 2]]
        before = DISTANCE.copy()
        contiguous_segments(DISTANCE, 3)
        np.testing.assert_array_equal(DISTANCE, before)


class TestPlantedBlocks:
    SIZES = ((7, 3, 2), (6, 6), (2, 2, 2, 2), (4, 3, 3, 2), (2, 8, 2), (10, 14))

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("noise", [0.0, 0.04])
    def test_contiguous_segments_are_the_blocks(self, sizes, noise):
        bounds = list(itertools.pairwise(np.cumsum([0, *sizes]).tolist()))
        for seed in range(1 if noise == 0 else 10):
            found = contiguous_segments(block_distances(sizes, noise, seed), len(sizes))
            assert found == bounds

    @pytest.mark.parametrize("sizes", SIZES)
    def test_the_recursion_finds_the_blocks(self, sizes):
        """Between what a cut of a block weighs and what one between two blocks does."""
        distance = block_distances(sizes, 0.02)
        bounds = list(itertools.pairwise(np.cumsum([0, *sizes]).tolist()))
        assert groups_of(bounds) in [found.groups for found in epsilon_ranges(distance)]

    def test_permuted_layers_are_found_by_the_recursion(self):
        order = np.random.default_rng(1).permutation(12)
        found = epsilon_recursion(block_distances((7, 3, 2))[np.ix_(order, order)], 3.0)
        block = np.repeat([0, 1, 2], (7, 3, 2))[order]
        assert found == sorted(np.flatnonzero(block == b).tolist() for b in range(3))


@pytest.mark.parametrize("seed", range(3))
def test_a_teacher_of_three_tied_blocks_is_cut_where_they_change(seed):
    """Repeated 7, 3 and 2 times, with random weights, noise of 1 % after each, and steps that grow with the blocks."""
    torch.manual_seed(seed)
    blocks = [Block(32, 4, layer_scale_init=scale, depth_scaling=False) for scale in (2.0, 8.0, 32.0)]
    for parameter in (parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2):
        torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    states = [torch.randn(64, 8, 32)]
    with torch.no_grad():
        for layer, block in enumerate([blocks[0]] * 7 + [blocks[1]] * 3 + [blocks[2]] * 2, start=1):
            made = block(states[-1], layer)
            states.append(made + 0.01 * made.std() * torch.randn_like(made))
    spec = make_spec(layers=tuple(range(13)), dim=32, n_registers=3, grid=(2, 2), n_samples=64, samples_per_shard=64)
    objects = MemoryObjects()
    write_store(objects, spec, make_samples(64), lambda rows: torch.stack(states, dim=1)[list(rows)].numpy())
    distance = layer_distances(open_store(objects)).distance
    assert [stop for _, stop in contiguous_segments(distance, 3)[:-1]] == [7, 10]

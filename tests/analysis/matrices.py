"""Matrices of distances between layers, random and with planted blocks, and the plainest ways to cut them."""

import itertools
from collections.abc import Sequence

import numpy as np


def random_distances(n: int, seed: int, most: float = 1.0) -> np.ndarray:
    """Symmetric, zero diagonal, uniform up to `most`."""
    upper = np.triu(np.random.default_rng(seed).random((n, n)) * most, 1)
    return upper + upper.T


def block_distances(sizes: Sequence[int], noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """0.1 within a block, 0.8 between blocks, noise of the given standard deviation on each pair."""
    block = np.repeat(np.arange(len(sizes)), sizes)
    planted = np.where(block[:, None] == block, 0.1, 0.8)
    noisy = np.triu(planted + noise * np.random.default_rng(seed).standard_normal(planted.shape), 1)
    return np.clip(noisy + noisy.T, 0, 2) * (1 - np.eye(len(block)))


def cut_weight(distance: np.ndarray, side: Sequence[int]) -> float:
    others = [row for row in range(len(distance)) if row not in side]
    return float(sum(distance[i, j] for i in side for j in others))


def searched_max_cut(distance: np.ndarray) -> float:
    """Over all subsets, one by one."""
    n = len(distance)
    return max(cut_weight(distance, side) for size in range(n) for side in itertools.combinations(range(1, n), size))


def reference_recursion(distance: np.ndarray, epsilon: float, min_size: int = 2) -> list[list[int]]:
    """The published recursion, step by step: the cluster of the largest stored gain first, gains inherited."""
    clusters = [(float("inf"), list(range(len(distance))))]
    final: list[list[int]] = []
    while clusters:
        gain, members = clusters.pop(max(range(len(clusters)), key=lambda i: clusters[i][0]))
        if gain <= epsilon:
            final += [members, *(others for _, others in clusters)]
            break
        if len(members) < 2 * min_size:
            final.append(members)
            continue
        sub = distance[np.ix_(members, members)]
        best, best_side = 0.0, ()
        for mask in range(1, 2 ** (len(members) - 1)):
            side = [i + 1 for i in range(len(members) - 1) if mask >> i & 1]
            found = cut_weight(sub, side)
            if found > best + 1e-12:
                best, best_side = found, side
        if best <= epsilon:
            final.append(members)
            continue
        taken = [members[i] for i in best_side]
        clusters += [(best, [m for m in members if m not in taken]), (best, taken)]
    return sorted(final)


def all_contiguous(n: int, k: int, min_size: int) -> list[list[tuple[int, int]]]:
    cuts = [[0, *inner, n] for inner in itertools.combinations(range(1, n), k - 1)]
    found = [list(itertools.pairwise(one)) for one in cuts]
    return [one for one in found if all(stop - start >= min_size for start, stop in one)]


def score_by_definition(distance: np.ndarray, segments: Sequence[tuple[int, int]], objective: str) -> float:
    total = 0.0
    for start, stop in segments:
        members = range(start, stop)
        pairs = [distance[i, j] for i, j in itertools.combinations(members, 2)]
        if objective == "cut":
            total -= sum(pairs)
        elif objective == "cut_per_layer":
            total -= sum(pairs) / len(members)
        elif objective == "mean_distance":
            total -= sum(pairs) / len(pairs) if pairs else 0.0
        else:
            similarity = 1 - distance
            total += sum(similarity[i, j] for i in members for j in members) / sum(
                similarity[i, j] for i in members for j in range(len(distance))
            )
    return total

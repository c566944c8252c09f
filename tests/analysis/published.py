"""Distances between the layers of DINOv2 ViT-B/14 with registers, and what the published notebook found on them.

Read off the heat map of KempnerInstitute/raptor's max-cut notebook: two decimals, rows are layers 1 to 12, the mean
over 10,016 ImageNet training images and over CLS and patch mean of 1 - cosine (seeds.md 1.12).
"""

import numpy as np

_UPPER = """
.08 .20 .26 .32 .37 .45 .63 .70 .81 .82 1.08
.11 .16 .21 .27 .36 .54 .64 .75 .75 1.09
.05 .15 .19 .32 .56 .70 .81 .79 1.11
.09 .15 .28 .52 .67 .78 .76 1.11
.09 .20 .39 .53 .65 .69 1.07
.10 .30 .45 .58 .62 1.06
.17 .30 .45 .54 1.04
.14 .30 .45 .94
.16 .35 .86
.25 .81
.75
"""


def _matrix() -> np.ndarray:
    upper = np.zeros((12, 12))
    upper[np.triu_indices(12, 1)] = [float(value) for value in _UPPER.split()]
    return upper + upper.T


DISTANCE = _matrix()

#: Groups of layers that the recursion gives on it, with the epsilons that give them, as shares of the total distance,
#: from the first on and below the second; computed from the rounded matrix, and at 0.20, 0.10 and 0.09 as published.
RECURSION = [
    (0.7220, 1.0, [range(1, 13)]),
    (0.1080, 0.7220, [range(1, 8), range(8, 13)]),
    (0.0933, 0.1080, [range(1, 8), range(8, 11), range(11, 13)]),
    (0.0215, 0.0933, [range(1, 5), range(5, 8), range(8, 11), range(11, 13)]),
    (0.0, 0.0215, [range(1, 3), range(3, 5), range(5, 8), range(8, 11), range(11, 13)]),
]

#: (objective, least size, k) -> last layers of all blocks but the last.
CONTIGUOUS = {
    ("cut", 1, 2): [7],
    ("cut", 1, 3): [5, 9],
    ("cut", 1, 4): [4, 7, 10],
    ("cut_per_layer", 1, 2): [7],
    ("cut_per_layer", 1, 3): [7, 11],
    ("cut_per_layer", 1, 4): [4, 7, 11],
    ("mean_distance", 1, 2): [11],
    ("mean_distance", 1, 3): [10, 11],
    ("mean_distance", 1, 4): [9, 10, 11],
    ("normalised_association", 2, 2): [7],
    ("normalised_association", 2, 3): [7, 10],
    ("normalised_association", 2, 4): [4, 7, 10],
    ("normalised_association", 1, 2): [11],
    ("normalised_association", 1, 3): [7, 11],
    ("normalised_association", 1, 4): [6, 9, 11],
}

#: What those score whose score is known.
SCORES = {
    ("cut", 1, 2): -9.42,
    ("cut", 1, 3): -4.90,
    ("cut", 1, 4): -2.60,
    ("normalised_association", 2, 2): 1.3792,
    ("normalised_association", 2, 3): 1.5944,
    ("normalised_association", 2, 4): 1.6755,
}

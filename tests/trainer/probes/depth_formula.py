"""Tokens, a readout and depths from formulas, so that the published code and ours can be given the same anywhere."""

import torch
from torch import Tensor

DIM = 6
GRID = (35, 46)
N_PREFIX = 5  # CLS and four registers


def tokens() -> Tensor:
    """Two images, (batch, token, dim): waves, and in the first channel of patches a plane from 1 to 9."""
    count = torch.arange(2 * (N_PREFIX + GRID[0] * GRID[1]) * DIM, dtype=torch.float64)
    made = torch.sin(0.37 * count).view(2, -1, DIM)
    row, column = torch.meshgrid(torch.arange(35.0), torch.arange(46.0), indexing="ij")
    made[:, N_PREFIX:, 0] = (1 + 8 * (2 * row / 34 + column / 45) / 3).flatten()
    return made.float()


def weight() -> Tensor:
    """Of the 1x1 convolution, (bin, 2 dim, 1, 1): small waves; bins score highest where channel 0 is their depth."""
    made = 0.05 * torch.cos(1.3 * torch.arange(256 * 2 * DIM, dtype=torch.float64)).view(256, 2 * DIM)
    made[:, 0] = torch.arange(256) * 2 * 10 / 256
    return made.float()[..., None, None]


def bias() -> Tensor:
    """Of the 1x1 convolution, (bin,)."""
    return -((torch.arange(256, dtype=torch.float64) * 10 / 256) ** 2).float()


def depths() -> Tensor:
    """(batch, 480, 640) in m: a tilted plane and a wave, whole millimetres, with a corner of unknown ones."""
    row, column = torch.meshgrid(torch.arange(480.0), torch.arange(640.0), indexing="ij")
    plane = 1 + row / 100 + column / 200
    wave = 5 + 4 * torch.sin(row / 50) * torch.cos(column / 70)
    depth = (torch.stack([plane, wave]) * 1000).round() / 1000
    depth[:, :100, :120] = 0
    return depth

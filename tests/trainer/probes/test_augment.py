"""Augmentation draws what torchvision draws, from a generator of its own."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from trainer.probes.augment import draw_crop, draw_flip


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((480, 640), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((480, 640), (0.5, 2.0), (4 / 3, 4 / 3)),  # as published for depth: often no box fits
        ((30, 900), (0.9, 1.0), (3 / 4, 4 / 3)),  # none ever fits: too wide
        ((900, 30), (0.9, 1.0), (3 / 4, 4 / 3)),  # too high
        ((7, 5), (0.08, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_a_crop_is_torchvisions(size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    theirs = v2.RandomResizedCrop(224, scale=scale, ratio=ratio)
    image = Image.fromarray(np.zeros((*size, 3), np.uint8))
    for seed in range(50):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = theirs.make_params([image])
        box = draw_crop(*size, scale=scale, ratio=ratio, draw=torch.Generator().manual_seed(seed))
        assert dict(zip(("top", "left", "height", "width"), box)) == expected


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    draw_crop(40, 50, scale=(0.1, 1.0), ratio=(0.75, 1.33), draw=torch.Generator().manual_seed(0))
    draw_flip(torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_half_are_flipped() -> None:
    draw = torch.Generator().manual_seed(0)
    n_flipped = sum(draw_flip(draw) for _ in range(2000))
    assert abs(n_flipped - 1000) < 4 * 500**0.5
    assert not any(draw_flip(draw, chance=0.0) for _ in range(100))

"""What happens to image and map together equals torchvision's transforms, and keeps both in step."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as published

from trainer.probes.augment import draw_crop
from trainer.probes.dense_transforms import (
    random_colours,
    random_crop_pair,
    random_flip_pair,
    resize_pair,
    to_tensors,
)


def scene(height: int = 61, width: int = 83, seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), random.integers(0, 256, (height, width), dtype=np.uint8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(12))
def test_a_crop_is_torchvisions_of_both(seed: int):
    """The same box and the same resampling, bit for bit."""
    image, values = scene(seed=seed)
    size, scale, ratio = (37, 41), (0.5, 1.0), (0.75, 1.33)
    found, found_values = random_crop_pair(image, values, size, scale=scale, ratio=ratio, draw=generator(seed))
    box = draw_crop(image.height, image.width, scale=scale, ratio=ratio, draw=generator(seed))
    bilinear, nearest = published.InterpolationMode.BILINEAR, published.InterpolationMode.NEAREST
    expected = published.resized_crop(image, *box, list(size), bilinear)
    expected_values = published.resized_crop(Image.fromarray(values), *box, list(size), nearest)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    assert np.array_equal(found_values, np.asarray(expected_values))


def test_a_resize_is_torchvisions_of_both():
    image, values = scene()
    found, found_values = resize_pair(image, values, (50, 40))
    assert np.array_equal(np.asarray(found), np.asarray(image.resize((40, 50), Image.Resampling.BILINEAR)))
    expected = published.resize(Image.fromarray(values), [50, 40], published.InterpolationMode.NEAREST)
    assert np.array_equal(found_values, np.asarray(expected))


@pytest.mark.parametrize("seed", range(8))
def test_image_and_map_stay_in_step(seed: int):
    """The map is the image's red channel in large even squares: after crop and flip it still is, away from edges."""
    random = np.random.default_rng(seed)
    squares = random.integers(0, 6, (3, 4), dtype=np.uint8).repeat(40, axis=0).repeat(40, axis=1) * 40
    image = Image.fromarray(squares[..., None].repeat(3, axis=2))
    draw = generator(seed)
    cropped = random_crop_pair(image, squares, (120, 160), scale=(0.5, 1.0), ratio=(4 / 3, 4 / 3), draw=draw)
    pixels, values = to_tensors(*random_flip_pair(*cropped, draw))
    same = (pixels[0].int() - values.int()).abs() <= 2
    assert same.float().mean() > 0.93


def test_flips_are_of_both_and_half_of_all():
    image, values = scene()
    flipped = 0
    for seed in range(400):
        new_image, new_values = random_flip_pair(image, values, generator(seed))
        mirrored = not np.array_equal(new_values, values)
        assert np.array_equal(np.asarray(new_image), np.asarray(image)[:, ::-1] if mirrored else np.asarray(image))
        assert np.array_equal(new_values, values[:, ::-1] if mirrored else values)
        flipped += mirrored
    assert 150 < flipped < 250


@pytest.mark.parametrize("seed", range(6))
def test_colours_are_torchvisions_from_the_same_numbers(seed: int):
    image, _ = scene(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = ColorJitter(0.2, 0.2, 0.2, 0.1)(image)
    found = random_colours(image, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, draw=generator(seed))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_what_is_drawn_is_all_that_differs():
    image, values = scene()

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        draw = generator(3)
        cropped = random_crop_pair(image, values, (30, 30), scale=(0.5, 1.0), ratio=(0.75, 1.33), draw=draw)
        return to_tensors(*random_flip_pair(*cropped, draw))

    torch.manual_seed(1)
    first = once()
    torch.manual_seed(2)
    second = once()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_tensors_have_memory_of_their_own():
    image, values = scene()
    pixels, map_ = to_tensors(image, values[:, ::-1])
    assert pixels.shape == (3, 61, 83)
    before = np.asarray(image).copy()
    pixels.zero_()
    map_.zero_()
    assert np.array_equal(np.asarray(image), before)
    assert values.any()

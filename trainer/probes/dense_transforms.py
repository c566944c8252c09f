"""Changes to an image and its map of labels or depths together, each equal to torchvision's on PIL images.

What is random is drawn from the generator that is given (see `trainer.probes.augment`).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from trainer.probes.augment import draw_crop, draw_flip

_BILINEAR, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST

Map = UInt8[np.ndarray, "height width"]
NewMap = UInt8[np.ndarray, "new_height new_width"]


def random_crop_pair(
    image: Image.Image,
    values: Map,
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: torch.Generator,
) -> tuple[Image.Image, NewMap]:
    """The same random box of both, resized: the image bilinearly, the map to the nearest.

    Args:
        image: RGB.
        values: Of the same size.
        size: Height and width of what comes out, px.
        scale: Share of the area, least and most.
        ratio: Width over height of the box, least and most.
        draw: Where the numbers come from.
    """
    top, left, height, width = draw_crop(image.height, image.width, scale=scale, ratio=ratio, draw=draw)
    box = (left, top, left + width, top + height)
    return resize_pair(image.crop(box), values[top : top + height, left : left + width], size)


def resize_pair(image: Image.Image, values: Map, size: tuple[int, int]) -> tuple[Image.Image, NewMap]:
    """Both at another size, height and width in px, their shape not kept."""
    height, width = size
    nearest = Image.fromarray(values).resize((width, height), _NEAREST)
    return image.resize((width, height), _BILINEAR), np.asarray(nearest)


def random_flip_pair(image: Image.Image, values: Map, draw: torch.Generator) -> tuple[Image.Image, Map]:
    """Both mirrored left to right, or neither."""
    if draw_flip(draw):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), values[:, ::-1]
    return image, values


def random_colours(
    image: Image.Image, *, brightness: float, contrast: float, saturation: float, hue: float, draw: torch.Generator
) -> Image.Image:
    """torchvision's ColorJitter: factors up to so far from 1, a hue up to so far from 0 (in turns), in random order."""
    order = torch.randperm(4, generator=draw).tolist()
    ranges = [(1 - brightness, 1 + brightness), (1 - contrast, 1 + contrast), (1 - saturation, 1 + saturation)]
    factors = [float(torch.empty(1).uniform_(*limits, generator=draw)) for limits in [*ranges, (-hue, hue)]]
    changes: list[Callable[[Image.Image, float], Image.Image]] = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    for place in order:
        image = changes[place](image, factors[place])
    return image


def to_tensors(image: Image.Image, values: np.ndarray) -> tuple[UInt8[Tensor, "3 height width"], Tensor]:
    """Copies of both, in memory of their own."""
    pixels = np.array(np.asarray(image).transpose(2, 0, 1), order="C")
    return torch.from_numpy(pixels), torch.from_numpy(np.array(values, order="C"))

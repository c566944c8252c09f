"""Random choices of augmentation, drawn from a generator of their own, so that threads cannot change them.

torchvision's transforms draw from torch's global generator. Here the same numbers are drawn, in the same order, from a
generator that the probe seeds by (seed, epoch, index); a test holds both equal. What was drawn is applied by
`torchvision.transforms.v2.functional`, to an image alone or to an image and its map of labels.
"""

import math

import torch


def draw_crop(
    height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float], draw: torch.Generator
) -> tuple[int, int, int, int]:
    """The box of torchvision's RandomResizedCrop: (top, left, height, width), px.

    Ten times an area and a shape are drawn; if none of these boxes fits into the image, the largest centred one within
    `ratio` is taken, as torchvision does. With a scale above 1 that is what often happens.

    Args:
        height: Of the image, px.
        width: Of the image, px.
        scale: Share of the image's area, least and most.
        ratio: Width over height, least and most; drawn uniformly in its logarithm.
        draw: Where the numbers come from.
    """
    area = height * width
    least, most = torch.log(torch.tensor(ratio)).tolist()  # in float32, as torchvision has it
    for _ in range(10):
        target = area * _uniform(*scale, draw)
        shape = float(torch.exp(torch.empty(1).uniform_(least, most, generator=draw)))
        box_width, box_height = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(torch.randint(0, height - box_height + 1, (1,), generator=draw))
            left = int(torch.randint(0, width - box_width + 1, (1,), generator=draw))
            return top, left, box_height, box_width
    if width / height < ratio[0]:
        box_width, box_height = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width, box_height = round(height * ratio[1]), height
    else:
        box_width, box_height = width, height
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def draw_flip(draw: torch.Generator, chance: float = 0.5) -> bool:
    """Whether to flip."""
    return bool(torch.rand(1, generator=draw) < chance)


def _uniform(low: float, high: float, draw: torch.Generator) -> float:
    return float(torch.empty(1).uniform_(low, high, generator=draw))

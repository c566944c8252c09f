"""The built-in images and the built-in teacher: scikit-learn's handwritten digits and the architecture of digits_vit.

No network and no GPU. The digits are 1,797 grey images of 8 x 8 pixels with 17 levels, 0 to 16; here each becomes the
bytes of a small PGM file, so that it travels the same road as any other image: read, decoded by PIL, resized, cropped,
normalised. PGM is not compressed, so the bytes depend on no library version.
"""

import functools
import gzip
import importlib.util
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from pipeline.preprocessing import Preprocessing, resize_size_for

if TYPE_CHECKING:
    from pipeline.light_timm import VisionTransformer

N_DIGITS = 1797
N_CLASSES = 10
SPLITS = ("train", "val")
IMAGE_SIZE = 32  # px: 8 x 8 patches of 4 px

_SIDE = 8  # px of one digit in scikit-learn
_LEVELS = 16  # the brightest grey level there
_SPLIT_SEED = 0

# Mean and standard deviation of the digits' grey levels over [0, 1], rounded: 0.3053 and 0.3760.
DIGITS_PREPROCESSING = Preprocessing(
    image_size=IMAGE_SIZE, resize_size=resize_size_for(IMAGE_SIZE), mean=(0.305,) * 3, std=(0.376,) * 3
)


def digits_split(split: str) -> list[int]:
    """Places in `load_digits` order that belong to a split, ascending.

    A fixed, pure function: the 1,797 places are shuffled by `random.Random(0).shuffle`, the first 359 (20 %) are val,
    the others train. No regular stride would do: in long stretches the digits of `load_digits` run 0, 1, ..., 9.

    Args:
        split: "train" (1,438 images) or "val" (359 images).

    Raises:
        ValueError: Another split was named.
    """
    if split not in SPLITS:
        raise ValueError(f"the digits have no split {split!r}; there are {' and '.join(SPLITS)}")
    places = list(range(N_DIGITS))
    random.Random(_SPLIT_SEED).shuffle(places)
    n_val = N_DIGITS // 5
    return sorted(places[:n_val] if split == "val" else places[n_val:])


@functools.cache
def load_digit_arrays() -> tuple[UInt8[np.ndarray, "image 8 8"], UInt8[np.ndarray, "image"]]:
    """All digits as (levels 0 to 16, labels), in `load_digits` order; read once per process, from the package."""
    # The file of `sklearn.datasets.load_digits`; importing that takes seconds, which every worker would pay.
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations, "scikit-learn is installed with its data"
    folder = Path(package.submodule_search_locations[0])
    with gzip.open(folder / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float64)
    levels, labels = table[:, :-1], table[:, -1]
    assert levels.shape == (N_DIGITS, _SIDE * _SIDE)
    assert levels.min() >= 0
    assert levels.max() <= _LEVELS
    return levels.reshape(-1, _SIDE, _SIDE).astype(np.uint8), labels.astype(np.uint8)


def encode_pgm(levels: UInt8[np.ndarray, "row column"]) -> bytes:
    """A binary PGM (P5) file of one digit, its levels 0 to 16 spread over 0 to 255 by rounding to nearest."""
    grey = (levels.astype(np.int64) * 255 + _LEVELS // 2) // _LEVELS
    return b"P5\n%d %d\n255\n" % (levels.shape[1], levels.shape[0]) + grey.astype(np.uint8).tobytes()


def make_digits_vit() -> "VisionTransformer":
    """digits_vit without trained weights: a timm ViT of 12 blocks, 64 channels, 2 heads, CLS, 4 registers, 64 patches.

    Positions are added to patches only, as in DINOv2 with registers. No LayerScale: with it (0.1) training was far
    slower. Stochastic depth belongs to training and is added there (trainer/digits_teacher.py). 0.6 million parameters.
    """
    from pipeline.light_timm import VisionTransformer  # seconds of import that reading digits need not pay

    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=4,
        embed_dim=64,
        depth=12,
        num_heads=2,
        reg_tokens=4,
        no_embed_class=True,
        num_classes=0,
    )

"""ADE20K and NYUv2 in miniature, in exactly the on-disk formats that the real ones have."""

import csv
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def write_jpg(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, format="JPEG", quality=95)


def write_png(path: Path, values: np.ndarray) -> None:
    """uint8 (height, width[, 3]) or uint16 (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, format="PNG", compress_level=1)


def png_that_declares(width: int, height: int) -> bytes:
    """A small grey PNG with a sound header that names another size."""
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, format="PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def ade_scene(seed: int, height: int = 60, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask: a dark and a bright half are classes 3 and 120; a band on top has none."""
    random = np.random.default_rng(seed)
    cut = int(random.integers(width // 4, 3 * width // 4))
    mask = np.full((height, width), 3, np.uint8)
    mask[:, cut:] = 120
    mask[: height // 8] = 0
    image = np.where(mask[..., None] == 120, 220, 30).astype(np.uint8).repeat(3, axis=2)
    return image, mask


def write_ade20k(root: Path, n_training: int = 6, n_validation: int = 4) -> Path:
    """ADEChallengeData2016 below a folder."""
    tree = root / "ADEChallengeData2016"
    seed = 0
    for split, short, n_images in (("training", "train", n_training), ("validation", "val", n_validation)):
        for number in range(1, n_images + 1):
            image, mask = ade_scene(seed, 60 + number, 80)
            name = f"ADE_{short}_{number:08d}"
            write_jpg(tree / "images" / split / f"{name}.jpg", image)
            write_png(tree / "annotations" / split / f"{name}.png", mask)
            seed += 1
    return tree


def nyu_scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A 480 x 640 image and its depth in m, brighter where farther; a corner without depth."""
    random = np.random.default_rng(seed)
    near, far = sorted(random.uniform(1.0, 9.0, 2))
    depth = np.linspace(near, far, 640, dtype=np.float32)[None].repeat(480, axis=0)
    image = (depth[..., None] * 25).astype(np.uint8).repeat(3, axis=2)
    depth[:60, :60] = 0
    return image, depth


def write_nyuv2(
    root: Path,
    n_train: int = 4,
    n_test: int = 2,
    scene: Callable[[int], tuple[np.ndarray, np.ndarray]] = nyu_scene,
) -> Path:
    """Kaggle's nyu-depth-v2: two tables, 8-bit depth for training, 16-bit mm for the test."""
    train, test = [], []
    for number in range(1, n_train + 1):
        image, depth = scene(number)
        names = [f"data/nyu2_train/living_room_0038_out/{number}.{suffix}" for suffix in ("jpg", "png")]
        write_jpg(root / names[0], image)
        write_png(root / names[1], np.round(depth / 10 * 255).astype(np.uint8))
        train.append(names)
    for number in range(n_test):
        image, depth = scene(1000 + number)
        names = [f"data/nyu2_test/{number:05d}_{what}.png" for what in ("colors", "depth")]
        write_png(root / names[0], image)
        write_png(root / names[1], np.round(depth * 1000).astype(np.uint16))
        test.append(names)
    write_table(root / "data/nyu2_train.csv", train)
    write_table(root / "data/nyu2_test.csv", test)
    return root


def write_table(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)

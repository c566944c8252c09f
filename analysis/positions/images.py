"""Labelled images for the small ViTs: scikit-learn's digits, or CIFAR-10 and CIFAR-100 in their binary format."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from infra.console import UserError
from pipeline.digits import digits_split, load_digit_arrays

_SIDE = 32  # px of CIFAR
_PIXELS = 3 * _SIDE * _SIDE
#: Files of each format for training and test, the bytes before a picture, and the number of classes. The label that
#: counts is the last of these bytes: CIFAR-100 has a coarse one before it.
_FORMATS = {
    "CIFAR-10": (tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), 1, 10),
    "CIFAR-100": (("train.bin",), ("test.bin",), 2, 100),
}


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images to train on, and others.

    Attributes:
        name: Of the data.
        train: Values about 0, of standard deviation about 1.
        train_labels: Classes from 0 on.
        test: Others, scaled as those.
        test_labels: Of these.
        n_classes: Number of classes.
        patch_side: px; how a ViT is to cut them.
    """

    name: str
    train: Float32[np.ndarray, "image channel height width"]
    train_labels: Int64[np.ndarray, " image"]
    test: Float32[np.ndarray, "other channel height width"]
    test_labels: Int64[np.ndarray, " other"]
    n_classes: int
    patch_side: int

    @property
    def digest(self) -> str:
        """sha256, in hex, of all images and labels: the same data, whatever folder they came from."""
        hashed = hashlib.sha256()
        for array in (self.train, self.train_labels, self.test, self.test_labels):
            hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.train.shape[2:]
        return height // self.patch_side, width // self.patch_side


def load_images(place: str) -> LabelledImages:
    """The built-in digits, or a folder with CIFAR's binary files.

    The digits are scikit-learn's 8 x 8, one patch for each pixel: the finest places there are. CIFAR is cut into 8 x 8
    patches of 4 px; it takes 0.8 GB, and twice that while it is read.

    Args:
        place: "digits", or a folder.

    Raises:
        UserError: No such folder, none of the two formats in it, or files that are not as the format says; all
            problems at once.
    """
    return _load_digits() if place == "digits" else _load_cifar(Path(place))


def _load_digits() -> LabelledImages:
    levels, labels = load_digit_arrays()
    train, test = (np.array(digits_split(split)) for split in ("train", "val"))
    mean, std = levels[train].mean(), levels[train].std()
    scaled = ((levels.astype(np.float32) - mean) / std).astype(np.float32)[:, None]
    return LabelledImages(
        name="scikit-learn's digits, 8 x 8 px",
        train=scaled[train],
        train_labels=labels[train].astype(np.int64),
        test=scaled[test],
        test_labels=labels[test].astype(np.int64),
        n_classes=10,
        patch_side=1,
    )


def _load_cifar(folder: Path) -> LabelledImages:
    found = [name for name, (train, *_) in _FORMATS.items() if (folder / train[0]).is_file()]
    if len(found) != 1:
        expected = " or ".join(f"{name} ({train[0]}, ... {test[-1]})" for name, (train, test, *_) in _FORMATS.items())
        raise UserError(
            f"IMAGES={folder}: expected digits, or a folder with the binary version of {expected}, unpacked; the "
            f"Python version is pickles, which are not read. Found {'both' if found else 'neither'}"
        )
    train_files, test_files, n_labels, n_classes = _FORMATS[found[0]]
    problems: list[str] = []
    train, train_labels = _read_binary(folder, train_files, n_labels, n_classes, problems)
    test, test_labels = _read_binary(folder, test_files, n_labels, n_classes, problems)
    if problems:
        raise UserError("\n  ".join([f"IMAGES={folder} is not as {found[0]}'s binary version is:", *problems]))
    mean, std = (
        of_channels(train, axis=(0, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
        for of_channels in (np.mean, np.std)
    )
    return LabelledImages(
        name=found[0],
        train=(train - mean) / std,
        train_labels=train_labels,
        test=(test - mean) / std,
        test_labels=test_labels,
        n_classes=n_classes,
        patch_side=4,
    )


def _read_binary(
    folder: Path, names: tuple[str, ...], n_labels: int, n_classes: int, problems: list[str]
) -> tuple[UInt8[np.ndarray, "image 3 32 32"], Int64[np.ndarray, " image"]]:
    """Records of label bytes and then 3,072 pixels: red, green and blue planes, each row by row."""
    nbytes = n_labels + _PIXELS
    read = []
    for name in names:
        try:
            values = np.frombuffer((folder / name).read_bytes(), np.uint8)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if not len(values) or len(values) % nbytes:
            problems.append(f"{name}: {len(values):,} bytes, expected whole records of {nbytes:,}")
            continue
        records = values.reshape(-1, nbytes)
        if records[:, n_labels - 1].max() >= n_classes:
            problems.append(f"{name}: label {records[:, n_labels - 1].max()}, expected 0 to {n_classes - 1}")
            continue
        read.append(records)
    records = np.concatenate(read) if read else np.zeros((0, nbytes), np.uint8)
    return records[:, n_labels:].reshape(-1, 3, _SIDE, _SIDE), records[:, n_labels - 1].astype(np.int64)

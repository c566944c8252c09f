"""NYU Depth v2 as Kaggle's "nyu-depth-v2" has it: two tables of paths, 8-bit depth for training, 16-bit for the test.

    ROOT/data/nyu2_train.csv     data/nyu2_train/living_room_0038_out/37.jpg,data/nyu2_train/living_room_0038_out/37.png
    ROOT/data/nyu2_test.csv      data/nyu2_test/00000_colors.png,data/nyu2_test/00000_depth.png

Paths in the tables begin at ROOT; the tables have no header. Depth for training is 8 bits: value / 255 * 10 m. Depth of
the test is 16 bits: mm. 0 is where the sensor saw nothing.
"""

import csv
import os
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from jaxtyping import Float32, Integer, UInt8
from torch import Tensor

from trainer.probes.dense_files import MapKind, OfPairs, Pair, check_pairs, refuse
from trainer.probes.dense_transforms import random_colours, random_crop_pair, random_flip_pair, to_tensors
from trainer.probes.depth_metrics import NYU_SIZE

TRAIN_CSV, TEST_CSV = "data/nyu2_train.csv", "data/nyu2_test.csv"

_TRAIN_MAP = MapKind(what="depth map", bits=8)
_TEST_MAP = MapKind(what="depth map", bits=16, size=NYU_SIZE)
_SCALE, _PUBLISHED_SCALE, _RATIO = (0.5, 1.0), (0.5, 2.0), (4 / 3, 4 / 3)


def depth_of_train(values: Integer[Tensor, "*pixels"]) -> Float32[Tensor, "*pixels"]:
    """Depth in m from the 8 bits of the training images."""
    return values.float() / 255 * 10


def depth_of_test(values: Integer[Tensor, "*pixels"]) -> Float32[Tensor, "*pixels"]:
    """Depth in m from the 16 bits of the test images."""
    return values.float() / 1000


@dataclass(frozen=True, kw_only=True)
class NyuTrain(OfPairs):
    """Training images and depths, augmented; `trainer.probes.task.LabelledImages`.

    RandomResizedCrop to 480 x 640 px of half to all of the area in the shape 4:3, a flip, and changed colours. The
    published code asks for up to twice the area: such boxes are drawn again up to ten times, so that most crops are as
    here, and one in about sixty is the whole image. Depth is not rescaled with the crop, as it is not there.

    Attributes:
        compat: Draw boxes as the published code does.
    """

    compat: bool = False

    def load(
        self, index: int, draw: torch.Generator | None
    ) -> tuple[UInt8[Tensor, "3 height width"], Float32[Tensor, "height width"]]:
        """One image and its depth in m.

        Raises:
            UserError: A file cannot be used; names it.
        """
        assert draw is not None, "these images are for training alone, which augments them"
        image, values = self.files.read(index)
        scale = _PUBLISHED_SCALE if self.compat else _SCALE
        image, values = random_crop_pair(image, values, NYU_SIZE, scale=scale, ratio=_RATIO, draw=draw)
        image, values = random_flip_pair(image, values, draw)
        image = random_colours(image, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, draw=draw)
        pixels, map_ = to_tensors(image, values)
        return pixels, depth_of_train(map_)


@dataclass(frozen=True, kw_only=True)
class NyuTest(OfPairs):
    """Test images and depths as they are; `trainer.probes.task.LabelledImages`."""

    def load(
        self, index: int, draw: torch.Generator | None
    ) -> tuple[UInt8[Tensor, "3 480 640"], Float32[Tensor, "480 640"]]:
        """One image and its depth in m; nothing is drawn.

        Raises:
            UserError: A file cannot be used; names it.
        """
        pixels, values = to_tensors(*self.files.read(index))
        return pixels, depth_of_test(values)


def open_nyuv2(root: str, *, compat: bool = False) -> tuple[NyuTrain, NyuTest]:
    """Training and test images.

    Args:
        root: The folder that holds data/ with the two tables.
        compat: Draw training crops as the published code does.

    Raises:
        UserError: Lists everything that is missing or does not fit, by file.
    """
    problems: list[str] = []
    train_pairs, test_pairs = (_read_table(root, name, problems) for name in (TRAIN_CSV, TEST_CSV))
    train, train_problems = check_pairs(root, train_pairs, _TRAIN_MAP, label="nyu2_train")
    test, test_problems = check_pairs(root, test_pairs, _TEST_MAP, label="nyu2_test")
    refuse(
        root,
        [*problems, *train_problems, *test_problems],
        f"Expected Kaggle's nyu-depth-v2: {TRAIN_CSV} and {TEST_CSV}, which name images and 8-bit (train) or 16-bit "
        "(test) depth maps by their paths from there",
    )
    return NyuTrain(files=train, compat=compat), NyuTest(files=test)


def _read_table(root: str, name: str, problems: list[str]) -> list[Pair]:
    """Pairs in the order of the table; lines that name none are added to the problems."""
    try:
        # Spreadsheets put a mark before the text, blanks after commas and empty lines at the end: none of it is a path.
        with open(os.path.join(root, name), newline="", encoding="utf-8-sig") as file:
            rows = {number: row for number, row in enumerate(csv.reader(file, skipinitialspace=True), 1) if row}
    except FileNotFoundError:
        problems.append(f"{name}: missing")
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{name}: {error}")
        return []
    wrong = {number: why for number, row in rows.items() if (why := _why_no_pair(row))}
    problems += [f"{name}, line {number}: {why}" for number, why in wrong.items()]
    pairs = [Pair(image=row[0], map=row[1]) for number, row in rows.items() if number not in wrong]
    if not rows:
        problems.append(f"{name}: empty")
    return pairs


def _why_no_pair(row: list[str]) -> str | None:
    if len(row) != 2:
        return f"{len(row)} columns, expected two: image and depth map"
    for path in row:
        if not path or "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            return f"{path!r} is no path below the folder of the data set"
    return None

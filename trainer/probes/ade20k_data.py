"""ADE20K's scene parsing benchmark as it is published: the tree ADEChallengeData2016.

    ADEChallengeData2016/
      images/training/ADE_train_00000001.jpg ...        annotations/training/ADE_train_00000001.png ...
      images/validation/ADE_val_00000001.jpg ...        annotations/validation/ADE_val_00000001.png ...

A mask has 8 bits a pixel: 0 is what has no class, 1 to 150 are the classes.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from infra.console import UserError
from trainer.probes.dense_files import MapKind, OfPairs, Pair, check_pairs, names_in, refuse
from trainer.probes.dense_transforms import random_crop_pair, random_flip_pair, resize_pair, to_tensors

N_CLASSES = 150
SPLITS = ("training", "validation")
FOLDER = "ADEChallengeData2016"

_SCALE, _RATIO = (0.5, 1.0), (0.75, 1.33)
_MASK = MapKind(what="mask", bits=8)


def class_labels(mask: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Classes 0 to 149 from a mask's 1 to 150; segmentation_head.IGNORED (255) from its 0: where 0 - 1 ends in a byte.

    Raises:
        ValueError: The mask holds a value above 150; names the largest.
    """
    if mask.max(initial=0) > N_CLASSES:
        raise ValueError(f"it holds the value {mask.max()}; expected 0 (no class) and 1 to {N_CLASSES}")
    return mask - np.uint8(1)


@dataclass(frozen=True, kw_only=True)
class Ade20k(OfPairs):
    """Images and labels of one split; `trainer.probes.task.LabelledImages`.

    While training: RandomResizedCrop (half to all of the area, shapes 0.75 to 1.33) and a flip. In an evaluation: the
    whole image and its labels squeezed to the size of the crop, as the published protocol has it; mIoU at the images'
    own sizes, as mmsegmentation has it, is another number.

    Attributes:
        size: Height and width of what comes out, px.
    """

    size: tuple[int, int]

    def load(
        self, index: int, draw: torch.Generator | None
    ) -> tuple[UInt8[Tensor, "3 height width"], UInt8[Tensor, "height width"]]:
        """One image and its labels, 0 to 149, or segmentation_head.IGNORED.

        Raises:
            UserError: A file cannot be used; names it.
        """
        image, mask = self.files.read(index)
        try:
            labels = class_labels(mask)
        except ValueError as error:
            raise UserError(f"{self.files.path(self.files.pairs[index].map)} is no mask of ADE20K: {error}") from error
        if draw is None:
            return to_tensors(*resize_pair(image, labels, self.size))
        image, labels = random_crop_pair(image, labels, self.size, scale=_SCALE, ratio=_RATIO, draw=draw)
        return to_tensors(*random_flip_pair(image, labels, draw))


def open_ade20k(root: str, size: tuple[int, int]) -> tuple[Ade20k, Ade20k]:
    """Training and validation images.

    Args:
        root: The folder ADEChallengeData2016, or the one that it lies in.
        size: Height and width of what comes out, px.

    Raises:
        UserError: Lists everything that is missing or does not fit, by file.
    """
    inner = os.path.join(root, FOLDER)
    root = inner if os.path.isdir(inner) else root
    listed = [_list_split(root, split) for split in SPLITS]
    problems = [problem for _, wrong in listed for problem in wrong]
    checked = [check_pairs(root, pairs, _MASK, label=split) for split, (pairs, _) in zip(SPLITS, listed)]
    problems += [problem for _, wrong in checked for problem in wrong]
    refuse(
        root, problems, f"Expected {FOLDER} as published: images/ and annotations/, each with training/ and validation/"
    )
    training, validation = (Ade20k(files=files, size=size) for files, _ in checked)
    return training, validation


def _list_split(root: str, split: str) -> tuple[list[Pair], list[str]]:
    """Pairs in the order of their names, and what has no partner."""
    images = {os.path.splitext(name)[0]: name for name in names_in(os.path.join(root, "images", split), ".jpg")}
    masks = {os.path.splitext(name)[0]: name for name in names_in(os.path.join(root, "annotations", split), ".png")}
    if not images:
        return [], [f"images/{split}: no .jpg in it, or no such folder"]
    problems = [
        f"images/{split}/{images[stem]}: annotations/{split}/{stem}.png is missing" for stem in images.keys() - masks
    ] + [f"annotations/{split}/{masks[stem]}: images/{split}/{stem}.jpg is missing" for stem in masks.keys() - images]
    pairs = [
        Pair(image=f"images/{split}/{images[stem]}", map=f"annotations/{split}/{masks[stem]}")
        for stem in images
        if stem in masks
    ]
    return pairs, sorted(problems)

"""How well a map of classes fits: intersection over union and pixel accuracy, counted over many images."""

import torch
from jaxtyping import Float64, Int64, Integer
from torch import Tensor


class Confusion:
    """Pixels by their label and by what was predicted; fed batch by batch, and merged over processes by adding.

    Ignored pixels are in no cell, so they change no intersection over union. A class that is neither among the labels
    nor among the predictions has no intersection over union, and the mean leaves it out. A class that was predicted and
    is nowhere among the labels counts with 0.

    Attributes:
        counts: (label, predicted), exact.
        n_ignored: Pixels that had no class.
    """

    def __init__(self, n_classes: int, *, ignore: int, device: torch.device | str = "cpu") -> None:
        self.counts: Int64[Tensor, "label predicted"] = torch.zeros(
            n_classes, n_classes, dtype=torch.int64, device=device
        )
        self.n_ignored: Int64[Tensor, ""] = torch.zeros((), dtype=torch.int64, device=device)
        self._ignore = ignore

    def add(self, predicted: Integer[Tensor, "*pixels"], labels: Integer[Tensor, "*pixels"]) -> None:
        """Count a batch of maps; does not wait for the device.

        Args:
            predicted: Classes in [0, n_classes).
            labels: Classes in [0, n_classes), or the ignored value.
        """
        n_classes = len(self.counts)
        ignored = labels == self._ignore
        # The ignored go into one cell behind all others: picking the rest out would wait for a GPU to count them.
        cells = torch.where(ignored, n_classes * n_classes, labels.long() * n_classes + predicted.long())
        counted = torch.bincount(cells.flatten(), minlength=n_classes * n_classes + 1)
        self.counts += counted[:-1].view(n_classes, n_classes)
        self.n_ignored += counted[-1]

    def merge(self, other: "Confusion") -> None:
        """Add what another one counted."""
        self.counts += other.counts.to(self.counts.device)
        self.n_ignored += other.n_ignored.to(self.n_ignored.device)

    def iou(self) -> Float64[Tensor, " label"]:
        """Intersection over union by class, in [0, 1]; NaN for a class that is nowhere."""
        counts = self.counts.double()
        both = counts.diagonal()
        return both / (counts.sum(0) + counts.sum(1) - both)

    def mean_iou(self, *, compat: bool = False) -> float:
        """Mean of the classes' intersection over union, in [0, 1]; NaN if no pixel was counted.

        Args:
            compat: Count a class that is nowhere with 0, as the published code does; on all of ADE20K's validation
                images every class is there, and both are the same.

        Source: seeds.md 1.11; pytorch/ignite:ignite/metrics/confusion_matrix.py.
        """
        iou = self.iou()
        return float(iou.nan_to_num(0.0).mean() if compat else iou.nanmean())

    def pixel_accuracy(self, *, compat: bool = False) -> float:
        """Share of the pixels that are predicted right, in [0, 1]; NaN if none was counted.

        Args:
            compat: Count ignored pixels as wrong, as the published code does.
        """
        n_pixels = self.counts.sum() + (self.n_ignored if compat else 0)
        return float(self.counts.diagonal().sum().double() / n_pixels.double())

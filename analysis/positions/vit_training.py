"""Train a small ViT on labelled images, their patches in order or permuted, and keep what its positions have become."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch.nn import functional

from analysis.positions.images import LabelledImages
from analysis.positions.vits import SmallVit, VitSize, cut_patches
from infra.console import UserError
from trainer.digits_teacher import DigitsTeacherConfig, augment


@dataclass(frozen=True, kw_only=True)
class VitTraining:
    """How a small ViT is trained: AdamW, one cycle, the digits teacher's small rotations, scalings and shifts.

    Attributes:
        attention: "ordinary" or "positional".
        n_epochs: Passes over the training images.
        batch_size: Images a step.
        peak_rate: Highest learning rate.
        weight_decay: AdamW's.
        dim: Channels.
        depth: Blocks.
        heads: Of attention.
        permuted: Patches in one random order, the same for all images; after the augmentation, which needs places.
        seed: Of first weights, the order of images, augmentation and the permutation.
    """

    attention: str = "ordinary"
    n_epochs: int = 30
    batch_size: int = 64
    peak_rate: float = 2e-3
    weight_decay: float = 0.05
    dim: int = 48
    depth: int = 2
    heads: int = 3
    permuted: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainedVit:
    """What a training gave.

    Attributes:
        accuracy: On the test images, after the last epoch: none is chosen by it.
        losses: Mean of each epoch.
        before: Position embeddings of the patches before training, in the order that the model saw them.
        after: After it.
        order: Which patch of the picture stands at each place of the sequence.
    """

    accuracy: float
    losses: Float64[np.ndarray, " epoch"]
    before: Float64[np.ndarray, "patch dim"]
    after: Float64[np.ndarray, "patch dim"]
    order: Int64[np.ndarray, " patch"]

    @property
    def back(self) -> Int64[np.ndarray, " patch"]:
        """Place in the sequence of each patch of the picture: what puts `after` in the picture's order again."""
        return np.argsort(self.order)


def train_vit(
    images: LabelledImages, training: VitTraining, *, progress: Callable[[int], None] | None = None
) -> TrainedVit:
    """Train on one CPU thread or as many as torch has been given.

    Args:
        images: Training and test.
        training: How.
        progress: Told 1 after each epoch.

    Raises:
        UserError: The loss became NaN.
        ValueError: As SmallVit.
    """
    generator = torch.Generator().manual_seed(training.seed)
    size = VitSize(
        grid=images.grid,
        patch_dim=images.train.shape[1] * images.patch_side**2,
        n_classes=images.n_classes,
        dim=training.dim,
        depth=training.depth,
        heads=training.heads,
    )
    model = SmallVit(size, training.attention, training.seed)
    before = model.patch_positions.double().numpy()
    order = torch.arange(size.n_patches)
    if training.permuted:
        order = torch.from_numpy(np.random.default_rng([training.seed, 1]).permutation(size.n_patches))
    pixels, labels = torch.from_numpy(images.train), torch.from_numpy(images.train_labels)
    batch = min(training.batch_size, len(pixels))
    n_steps = training.n_epochs * (len(pixels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.peak_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=training.peak_rate, total_steps=n_steps)
    losses = []
    for epoch in range(training.n_epochs):
        of_epoch = []
        shuffled = torch.randperm(len(pixels), generator=generator)
        for chosen in shuffled[: len(pixels) // batch * batch].split(batch):
            seen = augment(pixels[chosen], DigitsTeacherConfig(), generator)
            logits = model(cut_patches(seen, images.patch_side)[:, order])
            loss = functional.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            of_epoch.append(loss.item())
        losses.append(float(np.mean(of_epoch)))
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss became {losses[-1]} in epoch {epoch + 1}: give a lower --rate")
        if progress is not None:
            progress(1)
    return TrainedVit(
        accuracy=_accuracy(model, images, order),
        losses=np.array(losses),
        before=before,
        after=model.patch_positions.double().numpy(),
        order=order.numpy(),
    )


@torch.no_grad()
def _accuracy(model: SmallVit, images: LabelledImages, order: torch.Tensor) -> float:
    right = 0
    for start in range(0, len(images.test), 256):
        pixels = torch.from_numpy(images.test[start : start + 256])
        named = model(cut_patches(pixels, images.patch_side)[:, order]).argmax(dim=1).numpy()
        right += int((named == images.test_labels[start : start + 256]).sum())
    return right / len(images.test)


def linear_accuracy(images: LabelledImages) -> float:
    """Test accuracy of logistic regression on pixels: a baseline without convolutions or attention."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=0.1, max_iter=1000).fit(
        images.train.reshape(len(images.train), -1), images.train_labels
    )
    return float((fitted.predict(images.test.reshape(len(images.test), -1)) == images.test_labels).mean())

"""How well a Raptor fits a teacher: one trained for a short while on its images, rolled out on others. No store needed.

In one stage: teacher forcing falls to nothing over the first quarter of the steps, then the whole depth is rolled out.
The values are those of `trainer.recipes.digits_stage2` but for that; a fit of a few hundred steps is a measure to
compare teachers with, not the best Raptor of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8

from analysis.accumulate import MomentsAccumulator
from analysis.interventions import token_kinds
from analysis.partitions import Segment
from pipeline.preprocess import normalise
from pipeline.teacher import Teacher
from storage_schemas import Span
from trainer.block import Block
from trainer.losses import token_weighted
from trainer.objectives import annealed_loss
from trainer.optimizer import clip_and_step, make_optimizer, set_learning_rate
from trainer.raptor import Raptor
from trainer.schedules import learning_rate, teacher_forcing_ratio

Images = UInt8[torch.Tensor, "image 3 height width"]

_PEAK, _FINAL, _BATCH = 4e-3, 1e-6, 16


@dataclass(frozen=True, kw_only=True)
class RaptorFit:
    """A Raptor rolled out from the teacher's state 0 on images that it was not trained on.

    Attributes:
        blocks: Spans of its blocks.
        n_steps: Steps of 16 images that it was trained for.
        n_images: That it was measured on.
        r2: By token kind, for layers 1 to L: 1 - squared error / squared deviation of the teacher's states from their
            mean per channel. 1 is perfect, 0 what the mean alone would reach; NaN for states that do not vary.
        r2_one_mean: The same with deviations from one mean over all channels, as the Raptor paper's code measures (it
            takes the prediction's where this takes the teacher's). What all images share counts as explained.
        accuracy: Of the rolled-out last state under the teacher's head; None without a head.
    """

    blocks: tuple[str, ...]
    n_steps: int
    n_images: int
    r2: Mapping[str, Float64[np.ndarray, " layer"]]
    r2_one_mean: Mapping[str, Float64[np.ndarray, " layer"]]
    accuracy: float | None


def fit_raptor(
    teacher: Teacher,
    images: Images,
    segments: Sequence[Segment],
    *,
    n_steps: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Raptor:
    """Train one block for each segment, all together, on the states of these images, 16 at a time.

    Args:
        teacher: Whose states are fitted; they are made as they are needed, so no more than a batch's are held.
        images: Of its size, not normalised.
        segments: Half-open runs of layers 1 to L, from 0, as `contiguous_segments` gives them.
        n_steps: Steps.
        seed: Of the first weights and of the order of images.
        progress: Told of each step.
    """
    spans = [Span(start, stop) for start, stop in segments]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        raptor = Raptor([Block(teacher.dim, teacher.n_heads) for _ in spans], spans).to(teacher.device)
    optimizer = make_optimizer(raptor, learning_rate=_PEAK)
    loss = token_weighted(
        cls=0.45, registers=0.10, patches=0.45, n_registers=teacher.n_registers, has_cls=teacher.has_cls
    )
    for step in range(n_steps):
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        states = teacher.layer_states(normalise(images[chosen], teacher.preprocessing))
        rate = learning_rate(step, peak=_PEAK, final=_FINAL, warmup_steps=n_steps // 30, total_steps=n_steps)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        annealed_loss(raptor, states, 0, loss, teacher_forcing_ratio(step, anneal_steps=n_steps // 4)).backward()
        clip_and_step(optimizer)
        if progress is not None:
            progress(1)
    return raptor.eval()


def measure_fit(
    raptor: Raptor, teacher: Teacher, images: Images, labels: Int64[torch.Tensor, " image"], n_steps: int = 0
) -> RaptorFit:
    """Roll the Raptor out on these images, 64 at a time, and compare every state with the teacher's."""
    kinds = token_kinds(has_cls=teacher.has_cls, n_registers=teacher.n_registers, n_patches=teacher.n_patches)
    n_layers = teacher.n_layers - 1
    truth = {kind: MomentsAccumulator(n_layers, teacher.dim) for kind in kinds}
    errors = {kind: np.zeros(n_layers) for kind in kinds}
    right = 0.0
    for part, names in zip(images.split(64), labels.split(64)):
        with torch.no_grad():
            states = teacher.layer_states(normalise(part, teacher.preprocessing))
            rolled = raptor.rollout(states[:, 0], 0, n_layers)
            if teacher.head is not None:
                right += (teacher.logits(rolled[:, -1]).argmax(-1).cpu() == names).sum().item()
        for kind, tokens in kinds.items():
            ours, theirs = (one[:, 1:, tokens].double().cpu().numpy() for one in (rolled, states))
            errors[kind] += np.square(ours - theirs).sum(axis=(0, 2, 3))
            truth[kind].update(np.moveaxis(theirs, 2, 1).reshape(-1, n_layers, teacher.dim))
    r2, r2_one_mean = {}, {}
    for kind, sums in truth.items():
        moments = sums.result()
        deviation = (moments.std**2).sum(axis=-1) * (moments.n - 1)
        from_one_mean = deviation + moments.n * moments.mean.var(axis=-1) * teacher.dim
        r2[kind] = 1 - errors[kind] / np.where(deviation > 0, deviation, np.nan)
        r2_one_mean[kind] = 1 - errors[kind] / np.where(from_one_mean > 0, from_one_mean, np.nan)
    return RaptorFit(
        blocks=tuple(map(str, raptor.spans)),
        n_steps=n_steps,
        n_images=len(images),
        r2=r2,
        r2_one_mean=r2_one_mean,
        accuracy=right / len(images) if teacher.head is not None else None,
    )

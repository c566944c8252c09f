"""Models that run, measured: self-correction at every layer, accuracy after layer swaps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Int64

from analysis.interventions import Tracked, run_order, swapped_orders, token_kinds, track_perturbation
from analysis.partitions import Groups
from pipeline.teacher import Teacher

EPSILONS = (0.01, 0.05, 0.1, 0.2)
N_DRAWS = 4
N_SWAPPED = (1, 2, 3)
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """Accuracy with blocks in the place of others: one number for each draw; NaN draws where there is no such swap."""

    clean: float
    by_kind: Mapping[tuple[str, int], Sequence[float]]


def self_correction(
    model: Teacher,
    x: Float32[torch.Tensor, "row token dim"],
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Tracked]:
    """Pushes of every size at every state of one model's own path from x, which is state 0.

    A few images at a time, whose states of all layers are held. `progress` is told their number.
    """
    parts = x.split(_ROWS_AT_ONCE)
    by_part = []
    for i, part in enumerate(parts):
        by_part.append(_corrections(model, part, seed + i))
        if progress is not None:
            progress(len(part))
    shares = np.array([len(part) for part in parts]) / len(x)
    found = []
    for same in zip(*by_part):  # one push of all parts; their angles are means over images
        angles = {kind: shares @ np.stack([one.angles[kind] for one in same]) for kind in same[0].angles}
        found.append(replace(same[0], angles=angles))
    return found


def _corrections(model: Teacher, x: Float32[torch.Tensor, "row token dim"], seed: int) -> list[Tracked]:
    kinds = token_kinds(has_cls=model.has_cls, n_registers=model.n_registers, n_patches=model.n_patches)
    path = [x]
    with torch.no_grad():
        for layer in range(model.n_layers - 1):
            path.append(model.run_blocks(path[-1], layer, layer + 1))
        return [
            track_perturbation(model, path[start], start, epsilon=epsilon, kinds=kinds, seed=seed, clean=path[start:])
            for start in range(model.n_layers - 1)
            for epsilon in EPSILONS
        ]


def swap_accuracies(
    model: Teacher,
    x: Float32[torch.Tensor, "row token dim"],
    labels: Int64[np.ndarray, " row"],
    groups: Groups,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Swaps:
    """Accuracy of the model's own head after swaps within and across the phases.

    Args:
        model: With a head.
        x: State 0.
        labels: -1 for none: such images are left out.
        groups: Blocks of each phase, from the first on; blocks beyond them run in their own places.
        seed: Of the swaps.
        progress: Told 1 after each order of blocks.

    Raises:
        ValueError: The model has no head, or no image has a label.
    """
    known = labels >= 0
    if not known.any():
        raise ValueError(f"none of {len(labels)} images has a label; expected one or more")
    x, labels = x[torch.from_numpy(known).to(x.device)], labels[known]

    def accuracy(order: tuple[int, ...]) -> float:
        order = (*order, *range(len(order), model.n_layers - 1))
        with torch.no_grad():
            parts = [model.logits(run_order(model, part, order)).argmax(dim=1).cpu() for part in x.split(_ROWS_AT_ONCE)]
            named = torch.cat(parts).numpy()
        if progress is not None:
            progress(1)
        return float((named == labels).mean())

    by_kind = {}
    for where in ("intra", "inter"):
        for n in N_SWAPPED:
            orders = _orders(groups, n, where, seed)
            by_kind[where, n] = [accuracy(order) for order in orders]
    return Swaps(clean=accuracy(tuple(range(model.n_layers - 1))), by_kind=by_kind)


def _orders(groups: Groups, n: int, where: str, seed: int) -> list[tuple[int, ...]]:
    try:
        return list(swapped_orders(groups, n, "intra" if where == "intra" else "inter", n_draws=N_DRAWS, seed=seed))
    except ValueError:  # one phase has no other, phases of one block have no second block
        return []

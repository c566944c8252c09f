"""What a model does when it is disturbed: states pushed aside at one layer, blocks put in the place of others.

Both work on anything with `run_blocks`: a teacher, or a Raptor as a teacher (trainer.raptor_teacher). Source: the
Raptor paper, self-correction (its law of perturbation is not published) and the causal layer swap.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from analysis.dynamics import angles_between
from analysis.partitions import Groups

States = Float[Tensor, "row token dim"]


class Blocks(Protocol):
    """A model whose blocks run one by one."""

    @property
    def n_layers(self) -> int:
        """States, one more than blocks."""

    def run_blocks(self, x: States, start: int, stop: int) -> States:
        """State `stop` from state `start`."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """How far a disturbed path stays from the clean one.

    Attributes:
        start: State that was disturbed.
        epsilon: Size of the push, as a share of each token's length.
        angles: Mean angle between the two paths' directions, radians, by token kind: states start to last.
    """

    start: int
    epsilon: float
    angles: Mapping[str, Float64[np.ndarray, " state"]]

    def ratio(self, kind: str) -> float:
        """Angle at the last state over that at the start: below 1 the model bends back. NaN without a push."""
        first, last = self.angles[kind][[0, -1]]
        return float(last / first) if first > 0 else float("nan")


@torch.no_grad()
def track_perturbation(
    model: Blocks,
    x: States,
    start: int,
    *,
    epsilon: float,
    kinds: Mapping[str, slice],
    tangential: bool = False,
    seed: int = 0,
    clean: Sequence[States] | None = None,
) -> Tracked:
    """Push every token of state `start` at random and follow both paths to the last state.

    The push is Gaussian, scaled to epsilon |x| for each token.

    Args:
        model: Teacher or Raptor.
        x: State `start`.
        start: Its number.
        epsilon: 0 or more.
        kinds: Tokens whose angles are averaged, by name.
        tangential: Only the part of the push at right angles to x, which turns it and keeps its length to first order.
        seed: Of the push.
        clean: States start to last of the clean path, for whoever tracks many pushes; None runs it beside the other.

    Raises:
        ValueError: epsilon below 0, or a start from which there is no way.
    """
    if epsilon < 0 or not 0 <= start < model.n_layers - 1:
        raise ValueError(
            f"epsilon {epsilon} and start {start}; expected 0 or more, and a state from 0 to {model.n_layers - 2}"
        )
    push = torch.from_numpy(np.random.default_rng(seed).standard_normal(x.shape)).to(x)
    if tangential:
        push -= x * ((push * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True))
    push *= epsilon * x.norm(dim=-1, keepdim=True) / push.norm(dim=-1, keepdim=True)
    beside, pushed = x, x + push
    angles = [_angles(beside, pushed, kinds)]
    for i, layer in enumerate(range(start, model.n_layers - 1)):
        beside = model.run_blocks(beside, layer, layer + 1) if clean is None else clean[i + 1]
        pushed = model.run_blocks(pushed, layer, layer + 1)
        angles.append(_angles(beside, pushed, kinds))
    by_kind = {name: np.array([one[name] for one in angles]) for name in kinds}
    return Tracked(start=start, epsilon=epsilon, angles=by_kind)


def _angles(a: States, b: States, kinds: Mapping[str, slice]) -> dict[str, float]:
    u, v = (one.double().cpu().numpy() for one in (a, b))
    u, v = (one / np.linalg.norm(one, axis=-1, keepdims=True) for one in (u, v))
    return {name: float(angles_between(u[:, tokens], v[:, tokens]).mean()) for name, tokens in kinds.items()}


def token_kinds(*, has_cls: bool, n_registers: int, n_patches: int) -> dict[str, slice]:
    """Where the tokens of each kind lie in the teacher's order; together they are all tokens."""
    n_cls = int(has_cls)
    ends = {"cls": (0, n_cls), "registers": (n_cls, n_cls + n_registers), "patches": (n_cls + n_registers, None)}
    counts = {"cls": n_cls, "registers": n_registers, "patches": n_patches}
    last = n_cls + n_registers + n_patches
    return {kind: slice(a, last if b is None else b) for kind, (a, b) in ends.items() if counts[kind]}


Order = tuple[int, ...]
"""Blocks from 0, as they run one after the other; (0, 1, ..., L - 1) is the model itself."""


@torch.no_grad()
def run_order(model: Blocks, x: States, order: Order) -> States:
    """The last state when the blocks run in another order, some in the place of others.

    Raises:
        ValueError: A block that the model has not.
    """
    if not all(0 <= block < model.n_layers - 1 for block in order):
        raise ValueError(f"blocks {order}; the model has 0 to {model.n_layers - 2}")
    for block in order:
        x = model.run_blocks(x, block, block + 1)
    return x


def swapped_orders(
    groups: Groups, n_swapped: int, where: Literal["intra", "inter"], *, n_draws: int, seed: int = 0
) -> Iterator[Order]:
    """Orders in which some layers are replaced by another of the same group, or by one of another group.

    Args:
        groups: Blocks from 0 of each phase; all blocks.
        n_swapped: How many layers, drawn without replacement; each is given another block, drawn too.
        where: Whether the other block is of the same phase.
        n_draws: How many orders; some may be the same.
        seed: Of the draws.

    Raises:
        ValueError: Fewer layers than that have such another block.
    """
    group_of = {block: i for i, group in enumerate(groups) for block in group}
    others = {
        block: [o for o in group_of if o != block and (group_of[o] == group_of[block]) == (where == "intra")]
        for block in sorted(group_of)
    }
    possible = [block for block, found in others.items() if found]
    if not 1 <= n_swapped <= len(possible):
        raise ValueError(f"{n_swapped} layers to swap; {len(possible)} have another block for a swap {where}")
    random = np.random.default_rng(seed)
    for _ in range(n_draws):
        order = list(range(len(group_of)))
        for block in random.choice(possible, n_swapped, replace=False).tolist():
            order[block] = int(random.choice(others[block]))
        yield tuple(order)

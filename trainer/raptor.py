"""A Raptor: a few weight-tied blocks that together stand for the whole depth of a teacher."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Integer, Num
from torch import Tensor, nn

from storage_schemas.spec import Span

LayerModel = Callable[..., Tensor]
"""model(x, layer): state `layer` from state `layer - 1`. A Block, a Raptor, or either one compiled or wrapped."""


class Raptor(nn.Module):
    """Routes each target layer to the block of its span.

    Args:
        blocks: One per span, in order; each maps (x, layer) to the state `layer`.
        spans: States of the depth, both ends included; each begins at the state where the one before it stops. The
            block of Span(a, b) produces a + 1 to b.

    Raises:
        ValueError: Lists every gap, overlap and count that does not fit.

    Source: seeds.md 1.6. The published thresholds [7, 10] are the spans 0-7, 7-10, 10-12; a layer outside the spans,
    which the published code hands to the first or last block, is refused here.
    """

    def __init__(self, blocks: Iterable[nn.Module], spans: Sequence[Span]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.spans = tuple(spans)
        problems = [*_count_problems(len(self.blocks), len(self.spans)), *span_problems(self.spans)]
        if problems:
            raise ValueError("\n  ".join(["these blocks and spans make no Raptor:", *problems]))
        self._stops = [span.stop for span in self.spans]

    @property
    def span(self) -> Span:
        """The whole depth, from the first state taken to the last one produced."""
        return Span(self.spans[0].start, self.spans[-1].stop)

    def block_index(self, layer: int) -> int:
        """Which block produces state `layer`.

        Raises:
            ValueError: No block does; names the valid range.
        """
        if not self.span.start < layer <= self.span.stop:
            raise ValueError(
                f"no block of this Raptor produces layer {layer}: "
                f"its spans {', '.join(map(str, self.spans))} produce layers {self.span.start + 1} to {self.span.stop}"
            )
        return bisect_left(self._stops, layer)

    def forward(
        self, x: Float[Tensor, "batch token dim"], layer: int | Num[Tensor, " batch"]
    ) -> Float[Tensor, "batch token dim"]:
        """Predict state `layer` from state `layer - 1` with the block of its span.

        Args:
            x: State layer - 1.
            layer: Target layer: one for the batch, or one per sample. A tensor on a GPU is read back once, which waits
                for the device; the objectives therefore pass integers.

        Raises:
            ValueError: A layer lies outside the spans, or layer has the wrong shape.
        """
        if not isinstance(layer, Tensor):
            return self.blocks[self.block_index(layer)](x, layer)
        if layer.shape != x.shape[:1]:
            raise ValueError(
                f"layer has shape {tuple(layer.shape)} for a batch of {x.shape[0]}: "
                f"give one integer, or a tensor of shape ({x.shape[0]},)"
            )
        return self._forward_mixed(x, layer)

    def rollout(
        self, x: Float[Tensor, "batch token dim"], start: int, stop: int
    ) -> Float[Tensor, "batch state token dim"]:
        """States start..stop, each predicted from the prediction before it, beginning at x.

        Args:
            x: State `start`, as the teacher made it; it is the first of the returned states.
            start: Any state of the spans, at a border of two or within one.
            stop: Last state to produce; stop = start gives x alone.

        Returns:
            stop - start + 1 states.

        Raises:
            ValueError: start..stop leaves the spans or runs backwards.
        """
        if not self.span.start <= start <= stop <= self.span.stop:
            raise ValueError(f"cannot roll out from state {start} to {stop}: choose them in {self.span}, start first")
        return rollout(self, x, start, stop)

    def _forward_mixed(
        self, x: Float[Tensor, "batch token dim"], layer: Num[Tensor, " batch"]
    ) -> Float[Tensor, "batch token dim"]:
        """Each sample by the block of its own layer; every sample is computed once."""
        routes = [self.block_index(int(target)) for target in layer.tolist()]
        if len(set(routes)) == 1:
            return self.blocks[routes[0]](x, layer)
        rows = _rows_by_route(routes, len(self.blocks), x.device)
        layer = layer.to(x.device)
        parts = [block(x[r], layer[r]) for block, r in zip(self.blocks, rows) if len(r)]
        return torch.cat(parts)[torch.argsort(torch.cat(rows))]


def rollout(
    model: LayerModel, x: Float[Tensor, "batch token dim"], start: int, stop: int
) -> Float[Tensor, "batch state token dim"]:
    """States start..stop of any model, each predicted from the prediction before it; x is the first of them."""
    states = [x]
    for layer in range(start + 1, stop + 1):
        states.append(model(states[-1], layer))
    states[0] = x.to(states[-1].dtype)  # under autocast a half-precision input comes out in float32
    return torch.stack(states, dim=1)


def _rows_by_route(routes: Sequence[int], n_routes: int, device: torch.device) -> list[Integer[Tensor, " row"]]:
    rows: list[list[int]] = [[] for _ in range(n_routes)]
    for row, route in enumerate(routes):
        rows[route].append(row)
    return [torch.tensor(r, dtype=torch.int64, device=device) for r in rows]


def span_problems(spans: Sequence[Span]) -> Iterator[str]:
    """Why these spans do not cover one stretch of the depth, each state once."""
    if not spans:
        yield "there is no span: give at least one"
    for left, right in pairwise(spans):
        if left.stop != right.start:
            yield f"span {left} is followed by {right}: the next one must begin at state {left.stop}"


def _count_problems(n_blocks: int, n_spans: int) -> Iterator[str]:
    if n_spans and n_blocks != n_spans:
        yield f"{n_blocks} blocks for {n_spans} spans: give one block per span"

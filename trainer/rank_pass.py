"""One rank's part of a pass: what it reads and when, and which rows of memory its batches take."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from trainer.order import PassOrder, ReadPlan, make_read_plan


@dataclass(frozen=True, kw_only=True, eq=False)
class RankPass:
    """What one rank does in one pass, or in its remainder. Made by `make_rank_pass`.

    Attributes:
        epoch: Number of the pass.
        batch_size: Samples of a batch over all ranks.
        order: Of the samples, the same for every rank.
        plan: Of this rank's reads.
        lanes: Which lanes are this rank's.
        starts: How many of this rank's samples come before each batch; one more entry at the end.
    """

    epoch: int
    batch_size: int
    order: PassOrder
    plan: ReadPlan
    lanes: Bool[np.ndarray, " lane"]
    starts: Int64[np.ndarray, " bound"]

    @property
    def n_batches(self) -> int:
        return len(self.starts) - 1

    @property
    def most_rows(self) -> int:
        """This rank's samples in the batch where it has most."""
        return int(np.diff(self.starts).max())

    def n_rows(self, batch: int) -> int:
        """This rank's samples in a batch."""
        return int(self.starts[batch + 1] - self.starts[batch])

    def fits(self, n_buffers: int, n_buffer_rows: int) -> bool:
        """Whether every chunk finds room in so many buffers with so many rows each."""
        n_batches = self.plan.last_batch - self.plan.first_batch + 1
        return int(n_batches.max(initial=0)) <= n_buffers and self.most_rows <= n_buffer_rows


def make_rank_pass(
    order: PassOrder,
    epoch: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    stop_batch: int | None = None,
    readahead: float = 1.0,
    n_buffers: int | None = None,
) -> RankPass:
    """Plan a rank's part of a pass; arguments as for `make_read_plan`."""
    plan = make_read_plan(
        order,
        batch_size,
        rank=rank,
        world_size=world_size,
        start_batch=start_batch,
        stop_batch=stop_batch,
        readahead=readahead,
        n_buffers=n_buffers,
    )
    return RankPass(
        epoch=epoch,
        batch_size=batch_size,
        order=order,
        plan=plan,
        lanes=order.rank_lanes(rank, world_size),
        starts=order.rank_starts(batch_size, rank, world_size),
    )

"""What limits a run: the stage whose threads have the least time to spare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ADVICE: Mapping[str, str] = {
    "read": "a source of images that is nearer or faster, or more workers, would help",
    "decode": "give each worker more cores",
    "device": "a faster device or more workers would help",
    "copy": "fewer LAYERS, or fewer bytes a value (PRECISION), would help",
    "encode": "more cores, or a lighter CODEC, would help",
    "write": "a faster store, fewer LAYERS, or fewer bytes a value (PRECISION, CODEC) would help",
    "commit": "the store answers small writes slowly; larger shards need fewer",
    "loader": "a store that is nearer or faster, or more cores to read with, would help",
    "step": "a faster device, or more WORKERS, would help",
    "validation": "fewer validations would help",
    "checkpoint": "fewer checkpoints, or a faster place for the RUN, would help",
}
BUSY = 0.6
"""Threads that work for less than this share of the time can wait for each other; then no stage limits by itself."""

WAITING = 0.15
"""A loop that waits for its data for more than this share of the time would go faster if the data did."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Threads of one worker, and the stages that they work at, one thread at one stage at a time.

    Attributes:
        stages: No stage is in two pools.
        lanes: How many threads, or how many may be at work at once; a mean where workers differ.
    """

    stages: tuple[str, ...]
    lanes: int | float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What limits a run.

    Attributes:
        limit: A stage; "" if nothing was done.
        pool_busy: Share of the time that the threads which do it were at work, at any of their stages; 0 to 1.
        busy: By stage, the share of the time of its threads that it took, 0 to 1.
    """

    limit: str = ""
    pool_busy: float = 0.0
    busy: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.limit:
            return "nothing was done yet"
        rest = ", ".join(f"{s} {100 * share:.0f} %" for s, share in self.busy.items() if s != self.limit)
        others = f" ({rest})" if rest else ""
        percent = f"{100 * self.busy[self.limit]:.0f} %"
        if self.limit == "loader":
            return f"limited by the loader, waited for {percent} of the time{others}; {ADVICE['loader']}"
        if self.pool_busy >= BUSY:
            return f"limited by {self.limit}, busy {percent} of the time{others}; {ADVICE[self.limit]}"
        return (
            f"mostly {self.limit}, busy {percent} of the time{others}, but no threads were busy all the time: a short "
            "run, or stages that waited for each other, which a larger DEPTH would help"
        )


def verdict(stage_seconds: Mapping[str, float], *, worker_s: float, pools: Sequence[Pool]) -> Verdict:
    """Say which stage limits an extraction.

    The threads of one pool do the one stage or the other, so a pool is as busy as its stages are together; the busiest
    pool sets the pace of all, and the stage that takes most of its time is what to mend. To compare single stages would
    be wrong: two that share threads and take 45 % each limit more than a third that has its own and takes 60 %.

    Args:
        stage_seconds: Summed over threads and workers; what is in no pool, as waiting, is nobody's work and left out.
        worker_s: Seconds during which workers were ready for shards, summed over workers.
        pools: Of each worker.
    """
    shares = {
        pool: {
            stage: min(stage_seconds[stage] / (max(worker_s, 1e-9) * pool.lanes), 1.0)
            for stage in pool.stages
            if stage_seconds.get(stage, 0.0) > 0
        }
        for pool in pools
    }
    used = {pool: min(sum(found.values()), 1.0) for pool, found in shares.items()}
    busiest = max(used, key=lambda pool: used[pool], default=None)
    if busiest is None or not used[busiest]:
        return Verdict()
    limit = max(shares[busiest], key=lambda stage: shares[busiest][stage])
    busy = {stage: share for found in shares.values() for stage, share in found.items()}
    return Verdict(limit=limit, pool_busy=used[busiest], busy=busy)


def loop_verdict(seconds: Mapping[str, float]) -> Verdict:
    """Say what limits a loop that takes one thing after another, while its loader works beside it.

    A loader that is faster than the steps is never waited for, however busy it is; one that is slower shows only the
    difference. So it is the limit wherever it is waited for at all, but for a trifle.

    Args:
        seconds: Of the loop, by what they were spent on; "loader" are those spent waiting.
    """
    total = sum(seconds.values())
    if total <= 0:
        return Verdict()
    busy = {stage: spent / total for stage, spent in seconds.items() if spent > 0}
    work = {stage: share for stage, share in busy.items() if stage != "loader"}
    limit = "loader" if busy.get("loader", 0.0) > WAITING or not work else max(work, key=lambda stage: work[stage])
    return Verdict(limit=limit, pool_busy=1.0, busy=busy)

"""Which sample comes next, as arithmetic: a pure function of (seed, epoch, position). Opens nothing.

Chunks are dealt to lanes in an order drawn per epoch. A lane serves its chunks one after another, the valid samples of
each in a mixed order. With n_l valid samples in lane l, the pass sorts all (l, k) by ((2k + 1) / (2 n_l), l): each lane
is spread evenly over the pass. All comparisons are between integers, so the order is the same on every machine.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt64

MAX_LANE_SAMPLES = 2**30  # above this the 62-bit sort key of `PassOrder.lane_entries` could no longer tell keys apart
_ENTRIES = 4096  # whose positions are worked out at a time
_BLOCK = 65_536  # positions sorted at a time: bounds the memory of a whole pass, costs nothing

_CHUNKS, _SAMPLES = 0, 1  # what a random stream is for

_GAMMA = 0x9E3779B97F4A7C15


def random64(key: int, counters: Int64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Random 64-bit words of a stream, any of them at once: output number `counter` of SplitMix64 seeded with `key`.

    We do not use numpy's `Generator` here: its shuffles may change between versions, and this never does.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014), constants of SplitMix64.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def n_lanes_for(lanes: int, n_chunks: int) -> int:
    """The largest power of two that is at most `lanes` and half the chunks; at least 1."""
    most = max(1, min(lanes, n_chunks // 2))
    return 1 << (most.bit_length() - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PassOrder:
    """The order of one pass. Made by `make_pass_order`; arrays are per dealt chunk, lane after lane.

    Attributes:
        valid: Which samples of the store take part.
        samples_per_chunk: Of the store.
        sample_key: Random stream that mixes the samples within a chunk.
        chunk: Chunk index in the store.
        chunk_lane: The lane that serves it.
        chunk_start: Valid samples in the lanes and chunks before it; one more entry at the end.
        lane_n: Valid samples of each lane, the n_l of the rule.
    """

    valid: Bool[np.ndarray, " sample"]
    samples_per_chunk: int
    sample_key: int
    chunk: Int64[np.ndarray, " chunk"]
    chunk_lane: Int64[np.ndarray, " chunk"]
    chunk_start: Int64[np.ndarray, " bound"]
    lane_n: Int64[np.ndarray, " lane"]

    @property
    def n_samples(self) -> int:
        """Samples of the pass."""
        return int(self.chunk_start[-1])

    @property
    def n_lanes(self) -> int:
        return len(self.lane_n)

    @property
    def lane_start(self) -> Int64[np.ndarray, " lane"]:
        """Valid samples in the lanes before each lane."""
        return np.cumsum(self.lane_n) - self.lane_n

    @property
    def planning_nbytes(self) -> int:
        """The most memory that drawing this order and planning its reads takes, which is soon given back."""
        drawing = 16 * len(self.valid) + 200 * len(self.chunk)
        placing = 32 * min(_ENTRIES, len(self.chunk)) * self.n_lanes
        return drawing + placing + 200 * min(2 * _BLOCK, self.n_samples)

    def kept_nbytes(self, batch_size: int) -> int:
        """Memory of the order and of a rank's plan of it, while they are in use; the valid samples are the store's."""
        return 56 * len(self.chunk) + 16 * self.n_lanes + 8 * (self.n_batches(batch_size) + 1)

    def n_batches(self, batch_size: int) -> int:
        return -(-self.n_samples // batch_size)

    def lane_entries(
        self, start: int, stop: int
    ) -> tuple[Int64[np.ndarray, " position"], Int64[np.ndarray, " position"]]:
        """The (lane, k) at positions start to stop - 1 of the pass, in memory for so many and one block."""
        n_blocks = max(1, self.n_samples // _BLOCK)
        bounds = np.arange(n_blocks + 1)
        # keys below bound / n_blocks: (2k + 1) n_blocks < 2 n_l bound; a tie never straddles a bound
        below = (2 * self.lane_n * bounds[:, None] + n_blocks - 1) // (2 * n_blocks)
        starts = below.sum(axis=1)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        k_first, n_k = below[first], below[last] - below[first]
        lane = np.repeat(np.arange(self.n_lanes), n_k)
        k = np.arange(len(lane)) - np.repeat(np.cumsum(n_k) - n_k - k_first, n_k)
        # 62 bits of (2k + 1) / (2 n_l), by long division: equal fractions give equal keys, and two different ones are
        # at least 1 / (2 n_l n_m) apart, which 62 bits resolve up to MAX_LANE_SAMPLES
        twice_n = 2 * self.lane_n[lane]
        high, rest = np.divmod((2 * k + 1) << 31, twice_n)
        key = (high << 31) + (rest << 31) // twice_n
        by_key = np.argsort(key, kind="stable")[start - starts[first] : stop - starts[first]]  # ties stay in lane order
        return lane[by_key], k[by_key]

    def positions(
        self,
        lane: Int64[np.ndarray, " entry"],
        k: Int64[np.ndarray, " entry"],
        among: Bool[np.ndarray, " lane"] | None = None,
    ) -> Int64[np.ndarray, " entry"]:
        """Where (lane, k) stands in the pass: the inverse of `lane_entries`, in closed form.

        Args:
            lane: Lanes.
            k: Numbers within those lanes.
            among: Count only the entries of these lanes; gives a rank its own numbering.
        """
        others = np.arange(self.n_lanes) if among is None else np.flatnonzero(among)
        n, later = self.lane_n[lane][:, None], others > lane[:, None]
        # entries (m, j) of another lane up to (l, k): (2j + 1) n_l <= (2k + 1) n_m, and strictly less if m > l
        up_to = ((2 * k[:, None] + 1) * self.lane_n[others] + n - later) // (2 * n)
        return up_to.sum(axis=1) - 1

    def mixed(self, chunk: Int64[np.ndarray, " chunk"]) -> Int64[np.ndarray, "chunk slot"]:
        """The samples of each chunk in the order they are served, then -1 for those that take no part."""
        sample = chunk[:, None] * self.samples_per_chunk + np.arange(self.samples_per_chunk)
        valid = np.zeros(sample.shape, bool)
        inside = sample < len(self.valid)
        valid[inside] = self.valid[sample[inside]]
        draw = random64(self.sample_key, sample) >> np.uint64(1)
        by_draw = np.argsort(np.where(valid, draw, np.uint64(2**63)), axis=1, kind="stable")
        return np.take_along_axis(np.where(valid, sample, -1), by_draw, axis=1)

    def chunk_entries(
        self, dealt: Int64[np.ndarray, " chunk"]
    ) -> tuple[Int64[np.ndarray, " entry"], Int64[np.ndarray, " entry"], Int64[np.ndarray, " entry"]]:
        """All entries of some dealt chunks, chunk by chunk: (sample, lane, k)."""
        n = self.chunk_start[dealt + 1] - self.chunk_start[dealt]
        mixed = self.mixed(self.chunk[dealt])
        lane = np.repeat(self.chunk_lane[dealt], n)
        nth = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)  # of the chunk's own valid samples
        return mixed[mixed >= 0], lane, np.repeat(self.chunk_start[dealt], n) + nth - self.lane_start[lane]

    def samples(self, start: int, stop: int) -> Int64[np.ndarray, " position"]:
        """The sample indices at positions start to stop - 1 of the pass."""
        if not 0 <= start <= stop <= self.n_samples:
            raise IndexError(f"positions {start} to {stop} are not in the pass; it has {self.n_samples} samples")
        if start == stop:
            return np.empty(0, np.int64)
        return self.lane_samples(*self.lane_entries(start, stop))

    def lane_samples(
        self, lane: Int64[np.ndarray, " entry"], k: Int64[np.ndarray, " entry"]
    ) -> Int64[np.ndarray, " entry"]:
        """The sample that lane `lane` serves as its number `k`."""
        served = self.lane_start[lane] + k
        dealt = np.searchsorted(self.chunk_start, served, side="right") - 1
        needed, which = np.unique(dealt, return_inverse=True)
        return self.mixed(self.chunk[needed])[which, served - self.chunk_start[dealt]]

    def rank_lanes(self, rank: int, world_size: int) -> Bool[np.ndarray, " lane"]:
        """The lanes that a rank owns: l mod world_size = rank."""
        return np.arange(self.n_lanes) % world_size == rank

    def rank_starts(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Int64[np.ndarray, " bound"]:
        """How many of a rank's samples come before each batch; the differences are its shares, some may be 0."""
        n_batches = self.n_batches(batch_size)
        if world_size == 1:
            return np.minimum(np.arange(n_batches + 1) * batch_size, self.n_samples)
        mine, share = self.rank_lanes(rank, world_size), np.zeros(n_batches, np.int64)
        for start in range(0, self.n_samples, _BLOCK):
            lane, _ = self.lane_entries(start, min(start + _BLOCK, self.n_samples))
            batch = (start + np.flatnonzero(mine[lane])) // batch_size
            share += np.bincount(batch, minlength=n_batches)
        return np.concatenate([[0], np.cumsum(share)])


def make_pass_order(
    valid: Bool[np.ndarray, " sample"], samples_per_chunk: int, *, seed: int = 0, epoch: int = 0, lanes: int = 64
) -> PassOrder:
    """Draw the order of one pass.

    Args:
        valid: Which samples take part; a chunk without any is left out.
        samples_per_chunk: Of the store.
        seed: 0 to 2**63 - 1.
        epoch: 0 to 2**63 - 1; each epoch deals and mixes anew.
        lanes: Most chunks to be mixed with each other at a time.

    Returns:
        The order, with `n_lanes_for(lanes, chunks that take part)` lanes.

    Raises:
        ValueError: No sample is valid, or a number is out of range.

    Source: design.md, section 6.
    """
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value}; expected 0 to 2**63 - 1")
    for name, value in (("lanes", lanes), ("samples_per_chunk", samples_per_chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    n_chunks = -(-len(valid) // samples_per_chunk)
    in_chunk = np.bincount(np.flatnonzero(valid) // samples_per_chunk, minlength=n_chunks)
    used = np.flatnonzero(in_chunk)
    if not len(used):
        raise ValueError(f"none of {len(valid)} samples is valid, so there is nothing to stream; see `make inspect`")

    def stream_key(purpose: int) -> int:
        key = 0
        for word in (seed, epoch, purpose):
            key = int(random64(key, np.array([word]))[0])
        return key

    n_lanes = n_lanes_for(lanes, len(used))
    shuffled = used[np.argsort(random64(stream_key(_CHUNKS), used), kind="stable")]
    lane = np.arange(len(used)) % n_lanes
    by_lane = np.argsort(lane, kind="stable")
    chunk = shuffled[by_lane]
    lane_n = np.zeros(n_lanes, np.int64)
    np.add.at(lane_n, lane, in_chunk[shuffled])
    if lane_n.max() >= MAX_LANE_SAMPLES:
        raise ValueError(f"{lane_n.max()} samples in one lane; use more lanes (at most {MAX_LANE_SAMPLES} each)")
    return PassOrder(
        valid=valid,
        samples_per_chunk=samples_per_chunk,
        sample_key=stream_key(_SAMPLES),
        chunk=chunk,
        chunk_lane=lane[by_lane],
        chunk_start=np.concatenate([[0], np.cumsum(in_chunk[chunk])]),
        lane_n=lane_n,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadPlan:
    """In which order a rank reads its chunks, and how early it may read each.

    Attributes:
        dealt: Indices into `PassOrder.chunk`, by first use.
        first_batch: The batch that first uses the chunk.
        last_batch: The batch that uses it last.
        opens_at: The chunk may be read once the oldest batch in use is this one; never later than `first_batch`. Below
            0 it is a batch of the pass before, counted from that one's end.
        n_buffers: Batches held in memory at a time: while batch s is in use, those up to s + n_buffers - 1 are filled.
    """

    dealt: Int64[np.ndarray, " read"]
    first_batch: Int64[np.ndarray, " read"]
    last_batch: Int64[np.ndarray, " read"]
    opens_at: Int64[np.ndarray, " read"]
    n_buffers: int


def make_read_plan(
    order: PassOrder,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    stop_batch: int | None = None,
    readahead: float = 1.0,
    n_buffers: int | None = None,
) -> ReadPlan:
    """Plan a rank's reads of a pass, or of its remainder.

    A chunk is read once and whole, and each sample goes straight to its place in its future batch. All lanes hold
    nearly the same number of samples, so by the order's rule they move to their next chunk at nearly the same time. The
    plan spreads those reads: with `readahead` 1 a lane's next chunk has a whole chunk's time to arrive, and the lanes
    begin theirs one after another over three quarters of it.

    Args:
        order: Of the pass.
        batch_size: Samples of a batch over all ranks.
        rank: Whose lanes.
        world_size: Ranks.
        start_batch: Chunks that are used up before this batch are left out.
        stop_batch: Chunks that are used from this batch on only are left out; None: none are.
        readahead: Buffers beyond those that one chunk of each lane needs, as a fraction of them; with 0 each refill
            of the lanes stalls the consumer.
        n_buffers: Buffers that there are, whatever `readahead` asks for; None: what it asks for.
    """
    mine = order.rank_lanes(rank, world_size)
    dealt = np.flatnonzero(mine[order.chunk_lane])
    lane = order.chunk_lane[dealt]
    lane_start = order.lane_start[lane]
    first = np.concatenate([np.empty(0, np.int64), *_in_blocks(order, lane, order.chunk_start[dealt] - lane_start)])
    last = np.concatenate(
        [np.empty(0, np.int64), *_in_blocks(order, lane, order.chunk_start[dealt + 1] - 1 - lane_start)]
    )
    first_batch, last_batch = first // batch_size, last // batch_size
    n_batches = last_batch - first_batch + 1
    most = int(n_batches.max(initial=1))
    if n_buffers is None:
        n_buffers = min(order.n_batches(batch_size), most + math.ceil(readahead * max(1, most - 1)))
    stagger = (n_buffers - n_batches) * 3 * (lane // world_size) // (4 * mine.sum())
    opens_at = last_batch - n_buffers + 1 + np.maximum(stagger, 0)
    by_use = np.argsort(first, kind="stable")
    by_use = by_use[last_batch[by_use] >= start_batch]
    if stop_batch is not None:
        by_use = by_use[first_batch[by_use] < stop_batch]
    return ReadPlan(
        dealt=dealt[by_use],
        first_batch=first_batch[by_use],
        last_batch=last_batch[by_use],
        opens_at=opens_at[by_use],
        n_buffers=n_buffers,
    )


def _in_blocks(
    order: PassOrder, lane: Int64[np.ndarray, " entry"], k: Int64[np.ndarray, " entry"]
) -> list[Int64[np.ndarray, " block"]]:
    """Positions of many entries, some thousand at a time: `positions` needs memory for entries x lanes."""
    return [order.positions(lane[i : i + _ENTRIES], k[i : i + _ENTRIES]) for i in range(0, len(lane), _ENTRIES)]

"""The runs behind the published numbers: 18 of stage 1 and 9 of stage 2, with their seeds and what is made of what.

Source: KempnerInstitute/raptor:raptor/runs (seeds.md 1.9).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infra.console import UserError
from storage_schemas import Span

REPLICAS = (1, 2, 3)
STAGE1_SPANS = (Span(0, 7), Span(7, 10), Span(0, 4), Span(4, 7), Span(10, 12), Span(7, 12))
"""In the order of their seeds."""
RAPTORS = {
    "raptor2": (Span(0, 7), Span(7, 12)),
    "raptor3": (Span(0, 7), Span(7, 10), Span(10, 12)),
    "raptor4": (Span(0, 4), Span(4, 7), Span(7, 10), Span(10, 12)),
}
_FIRST_STAGE1_SEED = 100
_FIRST_RAPTOR2_SEED = 1001


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One published run.

    Attributes:
        name: "block" for stage 1, else raptor2, raptor3 or raptor4.
        stage: 1 or 2.
        replica: 1, 2 or 3: which of the three repetitions.
        spans: One for stage 1, else those of the blocks.
        seed: Of the run.
        block_seeds: Of the stage-1 runs that a Raptor was made of, one for each span; empty for stage 1.
    """

    name: str
    stage: int
    replica: int
    spans: tuple[Span, ...]
    seed: int
    block_seeds: tuple[int, ...] = ()


def published_runs() -> Iterator[PublishedRun]:
    """All 27 runs: stage 1 by replica and span, then stage 2 by number of blocks and replica."""
    for replica in REPLICAS:
        for span in STAGE1_SPANS:
            yield PublishedRun(name="block", stage=1, replica=replica, spans=(span,), seed=_block_seed(span, replica))
    for index, (name, spans) in enumerate(RAPTORS.items()):
        for replica in REPLICAS:
            yield PublishedRun(
                name=name,
                stage=2,
                replica=replica,
                spans=spans,
                seed=_FIRST_RAPTOR2_SEED + 100 * index + replica - 1,
                block_seeds=tuple(_block_seed(span, replica) for span in spans),
            )


def published_run(spans: Sequence[Span], replica: int, stage: int) -> PublishedRun:
    """The published run of these spans.

    Raises:
        UserError: There is none; names those that there are.
    """
    runs = [run for run in published_runs() if run.stage == stage]
    for run in runs:
        if (run.spans, run.replica) == (tuple(spans), replica):
            return run
    if replica not in REPLICAS:
        raise UserError(f"REPLICA={replica}: expected 1, 2 or 3, as published")
    known = sorted({",".join(map(str, run.spans)) for run in runs})
    raise UserError(
        f"REPLICA={replica}: there are published seeds for {'; '.join(known)}, not for {','.join(map(str, spans))}. "
        "Give SEED instead"
    )


def _block_seed(span: Span, replica: int) -> int:
    return _FIRST_STAGE1_SEED + len(STAGE1_SPANS) * (replica - 1) + STAGE1_SPANS.index(span)

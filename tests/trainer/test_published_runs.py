"""D5: the generator gives the published runs, every one and no other."""

import pytest

from infra.console import UserError
from storage_schemas import Span
from tests.trainer.tiny import tiny_teacher, write_tiny
from trainer.config import TokenWeights
from trainer.published_runs import published_run, published_runs

STAGE1 = """
0-7   mse       100,106,112
7-10  mse       101,107,113
0-4   mse       102,108,114
4-7   mse       103,109,115
10-12 weighted  104,110,116
7-12  weighted  105,111,117
"""
STAGE2 = """
raptor2  0-7,7-12           1001 100,105
raptor2  0-7,7-12           1002 106,111
raptor2  0-7,7-12           1003 112,117
raptor3  0-7,7-10,10-12     1101 100,101,104
raptor3  0-7,7-10,10-12     1102 106,107,110
raptor3  0-7,7-10,10-12     1103 112,113,116
raptor4  0-4,4-7,7-10,10-12 1201 102,103,101,104
raptor4  0-4,4-7,7-10,10-12 1202 108,109,107,110
raptor4  0-4,4-7,7-10,10-12 1203 114,115,113,116
"""


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def spans_of(text: str) -> tuple[Span, ...]:
    return tuple(map(Span.parse, text.split(",")))


def test_stage_1_is_the_table_of_18_runs() -> None:
    rows = [line.split() for line in STAGE1.strip().splitlines()]
    expected = {
        ((Span.parse(span),), replica, seed)
        for span, _, seeds in rows
        for replica, seed in enumerate(numbers(seeds), start=1)
    }
    found = [run for run in published_runs() if run.stage == 1]
    assert len(found) == len(expected) == 18
    assert {(run.spans, run.replica, run.seed) for run in found} == expected
    assert all(run.name == "block" and run.block_seeds == () for run in found)


def test_stage_2_is_the_table_of_9_runs() -> None:
    rows = [line.split() for line in STAGE2.strip().splitlines()]
    expected = [(name, spans_of(spans), int(seed), numbers(blocks)) for name, spans, seed, blocks in rows]
    found = [run for run in published_runs() if run.stage == 2]
    assert [(run.name, run.spans, run.seed, run.block_seeds) for run in found] == expected
    assert [run.replica for run in found] == [1, 2, 3] * 3


def test_recipes_give_each_published_run_its_loss_and_schedule() -> None:
    """Stage 1 by span, stage 2 with 0.45, 0.10, 0.45, roll-out alone and the whole schedule once more."""
    from infra.objects import MemoryObjects
    from storage_schemas import open_store
    from trainer.recipes import imagenet_stage1, imagenet_stage2

    objects = MemoryObjects()
    write_tiny(objects, tiny_teacher(), 9, seed=0)
    spec = open_store(objects).spec
    losses = {spans_of(row.split()[0])[0]: row.split()[1] for row in STAGE1.strip().splitlines()}
    for run in published_runs():
        if run.stage == 1:
            config = imagenet_stage1(run.spans[0], spec, 12, seed=run.seed)
            weighted = TokenWeights(cls=0.34, registers=0.33, patches=0.33)
            assert config.loss == (weighted if losses[run.spans[0]] == "weighted" else "mse")
            assert config.teacher_forcing_steps == 78_125
        else:
            config = imagenet_stage2(run.spans, spec, 12, seed=run.seed)
            assert config.loss == TokenWeights(cls=0.45, registers=0.10, patches=0.45)
            assert config.teacher_forcing_steps == 0
        assert (config.spans, config.seed, config.noise) == (run.spans, run.seed, 0.0)
        assert (config.n_steps, config.warmup_steps, config.peak_learning_rate) == (312_500, 10_000, 3e-4)
        assert (config.batch_size, config.weight_decay, config.clip_norm) == (64, 1e-4, 1.0)


def test_a_run_is_found_by_spans_and_replica_or_those_there_are_are_named() -> None:
    assert published_run([Span(10, 12)], 3, stage=1).seed == 116
    assert published_run(spans_of("0-7,7-10,10-12"), 2, stage=2).block_seeds == (106, 107, 110)
    with pytest.raises(UserError, match=r"for 0-4; 0-7; 10-12; 4-7; 7-10; 7-12, not for 0-6. Give SEED"):
        published_run([Span(0, 6)], 1, stage=1)
    with pytest.raises(UserError, match=r"REPLICA=4: expected 1, 2 or 3"):
        published_run([Span(0, 7)], 4, stage=1)

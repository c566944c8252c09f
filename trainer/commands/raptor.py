"""`make raptor`: stage 2."""

import os
import time
from collections.abc import Sequence

from infra.s3_settings import use_endpoint
from storage_schemas import Span
from trainer.commands.blocks import find_blocks, parse_spans
from trainer.commands.options import Options
from trainer.commands.run_training import train_and_report
from trainer.commands.start import (
    DEFAULT_STORE,
    Training,
    default_run,
    make_command,
    make_config,
    open_for_training,
    or_problem,
    raptor_name,
)
from trainer.joint import Source, blocks_identity, joint_weights, read_blocks
from trainer.published_runs import published_run


def raptor_command(
    options: Options,
    *,
    blocks: str = "",
    block_seeds: str = "",
    runs: str = "",
    other_store: bool = False,
) -> int:
    """Train blocks of stage 1 together, rolled out over the whole depth (stage 2). The same command again resumes.

    It begins with the weights of the finished runs of its blocks, which lie beside its own, and a fresh optimizer.

    Args:
        options: As make train takes them.
        blocks: Spans, each beginning where the one before it stops, such as 0-7,7-10,10-12; or a JSON of make phases;
            empty: the saved phases of the store.
        block_seeds: Seeds of the blocks' runs, one for all or one for each, such as 100,101,104; empty: this run's own.
        runs: The blocks' runs themselves, one for each, separated by commas; empty: <span>-seed<seed> beside RUN.
        other_store: Take blocks that were trained on another store too, such as a copy of some layers of this one.
    """
    use_endpoint(options.endpoint_url)
    began = time.monotonic()
    problems = options.problems(stage=2)
    place = options.place(problems)
    chosen = or_problem(lambda: find_blocks(blocks, options.store), problems)
    published = None
    if options.replica is not None and (options.seed is not None or block_seeds or runs):
        problems.append("REPLICA stands for the seeds: give it without SEED, BLOCK_SEEDS and RUNS")
    elif options.replica is not None and chosen is not None:
        spans, replica = chosen, options.replica
        published = or_problem(lambda: published_run(parse_spans(spans), replica, stage=2), problems)
    own_seed = published.seed if published else options.seed or 0
    seeds = ",".join(map(str, published.block_seeds)) if published else block_seeds
    if not seeds:
        seeds = str(max(own_seed, 0))  # a negative SEED is a problem once, not twice
    if chosen is not None:
        problems += source_problems(len(chosen.split(",")), seeds, runs)
    location = options.run or default_run(options.store, raptor_name(chosen or ""), own_seed)
    typed = {"variable": "BLOCKS", "head": options.head, "partial": options.partial}
    run_files, data, open_again = open_for_training(location, place, options.store, chosen, typed, problems)
    config = make_config(data, 2, options.recipe, options.steps, own_seed)
    sources = find_sources(config.spans, location, seeds, runs, options.store, own_place=bool(options.run))
    found = read_blocks(sources, config, data, other_store=other_store)
    training = Training(
        config=config,
        data=data,
        open_data=open_again,
        run=run_files,
        initial=joint_weights(found),
        blocks=blocks_identity(found),
    )
    variables = options.typed("STORE", "HEAD", "DEVICE", "ENDPOINT_URL")
    return train_and_report(training, place, variables, began=began)


def source_problems(n_blocks: int, block_seeds: str, runs: str) -> list[str]:
    """What is wrong with BLOCK_SEEDS and RUNS for so many blocks."""
    problems = []
    seeds, places = _listed(block_seeds), _listed(runs)
    if len(seeds) not in (1, n_blocks) or not all(text.isdecimal() for text in seeds):
        problems.append(f"BLOCK_SEEDS={block_seeds}: expected one number for all blocks, or {n_blocks}")
    if runs and len(places) != n_blocks:
        problems.append(f"RUNS names {len(places)} runs, expected one for each of the {n_blocks} blocks")
    return problems


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def find_sources(
    spans: Sequence[Span], run: str, block_seeds: str, runs: str, store: str, *, own_place: bool
) -> list[Source]:
    """Where the blocks of a Raptor are.

    Args:
        spans: Of the blocks.
        run: The Raptor's RUN; theirs are beside it.
        block_seeds: One for all, or one for each.
        runs: Their RUNs, instead.
        store: As typed.
        own_place: Whether RUN was typed, so that its neighbours are no defaults.
    """
    assert not source_problems(len(spans), block_seeds, runs)
    seeds, places = _listed(block_seeds), _listed(runs)
    if len(seeds) == 1:
        seeds *= len(spans)
    beside = run.rstrip("/").rpartition("/")[0] or os.curdir
    sources = []
    for index, (span, seed) in enumerate(zip(spans, seeds)):
        location = places[index] if places else f"{beside}/{span}-seed{seed}"
        variables = {
            "BLOCK": span,
            "STORE": store if store != DEFAULT_STORE else None,
            "SEED": seed if seed != "0" else None,
            "RUN": location if places or own_place else None,
        }
        sources.append(Source(span=span, location=location, command=make_command("train", variables)))
    return sources

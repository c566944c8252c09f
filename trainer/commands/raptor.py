"""`make raptor`: stage 2."""

import os
import time
from collections.abc import Sequence

from infra.s3_settings import use_endpoint
from storage_schemas import Span
from trainer.commands.blocks import find_blocks, parse_spans
from trainer.commands.run_training import train_and_report
from trainer.commands.start import (
    DEFAULT_STORE,
    Place,
    Training,
    default_run,
    make_command,
    make_config,
    open_for_training,
    or_problem,
    raptor_name,
    typed_problems,
    typed_variables,
)
from trainer.joint import Source, blocks_identity, joint_weights, read_blocks
from trainer.published_runs import published_run


def raptor_command(
    *,
    blocks: str = "",
    store: str = DEFAULT_STORE,
    run: str = "",
    block_seeds: str = "",
    runs: str = "",
    other_store: bool = False,
    replica: int | None = None,
    recipe: str = "",
    steps: int | None = None,
    seed: int | None = None,
    head: str | None = None,
    partial: bool = False,
    device: str | None = None,
    threads: int | None = None,
    micro_batch: int | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Train blocks of stage 1 together, rolled out over the whole depth (stage 2). The same command again resumes.

    It begins with the weights of the finished runs of its blocks, which lie beside its own, and a fresh optimizer.

    Args:
        blocks: Spans, each beginning where the one before it stops, such as 0-7,7-10,10-12; or a JSON of make phases;
            empty: the saved phases of the store.
        store: A store, or a folder with the stores train and val; local or s3://bucket/prefix.
        run: Folder or s3://bucket/prefix for checkpoints, metrics and weights; empty:
            data/runs/<store>/raptor-<borders of the spans>-seed<seed>, such as raptor-0-7-10-12-seed0.
        block_seeds: Seeds of the blocks' runs, one for all or one for each, such as 100,101,104; empty: this run's own.
        runs: The blocks' runs themselves, one for each, separated by commas; empty: <span>-seed<seed> beside RUN.
        other_store: Take blocks that were trained on another store too, such as a copy of some layers of this one.
        replica: 1, 2 or 3: seeds of this run and its blocks as published, for the published spans.
        recipe: digits_stage2 or imagenet_stage2; empty: the one that fits the store's teacher.
        steps: Optimizer steps; the warm-up scales with them. None: the recipe's own number.
        seed: Of the order of samples; None: 0.
        head: File with a linear classifier of 2 dim values, in the place of the teacher's own, for accuracy.
        partial: Train on an unfinished store, with the shards that it has now.
        device: For example cpu or cuda:0. None: the GPU if there is one.
        threads: Of torch on a CPU; a run is repeated bit for bit with the same number. None: one for blocks of fewer
            than 256 channels, else one per core.
        micro_batch: Most samples of one forward and backward pass; less memory, the same result but for rounding.
        workers: Processes that train it together through Ray Train; None: this one alone, without Ray, unless a
            cluster is given.
        ray_address: A Ray cluster to train on; None is RAY_ADDRESS, else none.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    began = time.monotonic()
    place = Place.typed(device, threads, micro_batch, workers, ray_address)
    chosen = find_blocks(blocks, store)
    problems = typed_problems(2, recipe, steps, seed)
    published = None
    if replica is not None and (seed is not None or block_seeds or runs):
        problems.append("REPLICA stands for the seeds: give it without SEED, BLOCK_SEEDS and RUNS")
    elif replica is not None:
        published = or_problem(lambda: published_run(parse_spans(chosen), replica, stage=2), problems)
    own_seed = published.seed if published else seed or 0
    seeds = ",".join(map(str, published.block_seeds)) if published else block_seeds
    if not seeds:
        seeds = str(max(own_seed, 0))  # a negative SEED is a problem once, not twice
    problems += source_problems(len(chosen.split(",")), seeds, runs)
    location = run or default_run(store, raptor_name(chosen), own_seed)
    typed = {"variable": "BLOCKS", "head": head, "partial": partial}
    run_files, data, open_again = open_for_training(location, place, store, chosen, typed, problems)
    config = make_config(data, 2, recipe, steps, own_seed)
    sources = find_sources(config.spans, location, seeds, runs, store, own_place=bool(run))
    found = read_blocks(sources, config, data, other_store=other_store)
    training = Training(
        config=config,
        data=data,
        open_data=open_again,
        run=run_files,
        initial=joint_weights(found),
        blocks=blocks_identity(found),
    )
    variables = typed_variables(
        STORE=store if store != DEFAULT_STORE else None,
        HEAD=head,
        DEVICE=device,
        ENDPOINT_URL=endpoint_url,
    )
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

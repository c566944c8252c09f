"""`make train`: stage 1."""

import dataclasses
import time

from infra.console import UserError
from infra.s3_settings import use_endpoint
from storage_schemas import Span
from storage_schemas.errors import SchemaError
from trainer.commands.run_training import stdin_ended, train_and_report
from trainer.commands.start import (
    DEFAULT_STORE,
    Place,
    Training,
    default_run,
    make_config,
    open_for_training,
    or_problem,
    typed_problems,
    typed_variables,
)
from trainer.commands.train_all import AllSpans, train_all
from trainer.published_runs import published_run
from trainer.workers import Workers


def train_command(
    *,
    block: str = "",
    blocks: str = "",
    store: str = DEFAULT_STORE,
    run: str = "",
    recipe: str = "",
    steps: int | None = None,
    seed: int | None = None,
    replica: int | None = None,
    head: str | None = None,
    partial: bool = False,
    device: str | None = None,
    threads: int | None = None,
    micro_batch: int | None = None,
    workers: int | None = None,
    ray_address: str | None = None,
    at_once: int | None = None,
    endpoint_url: str | None = None,
    stop_with_stdin: bool = False,
) -> int:
    """Train one block of a Raptor on the states of a span, or all blocks (stage 1). The same command again resumes.

    With block=all every span is trained side by side, as processes of this machine or, with ray_address, as tasks of
    a cluster. One that fails goes on from its last checkpoint, until three attempts in a row have saved nothing new.

    Args:
        block: Span a-b: the block takes state a and produces states a+1 to b. For example 0-7. Or all.
        blocks: With block=all: the spans, such as 0-7,7-10,10-12, or a JSON of make phases; empty: the saved phases of
            the store.
        store: A store, or a folder with the stores train and val; local or s3://bucket/prefix.
        run: Folder or s3://bucket/prefix for checkpoints, metrics and weights; empty:
            data/runs/<store>/<block>-seed<seed>. With block=all the folder of the runs <block>-seed<seed>.
        recipe: digits_stage1 or imagenet_stage1; empty: the one that fits the store's teacher.
        steps: Optimizer steps; warm-up and teacher forcing scale with them. None: the recipe's own number.
        seed: Of initial weights, order of samples and noise; None: 0.
        replica: 1, 2 or 3: the seed as published, for the published spans.
        head: File with a linear classifier of 2 dim values, in the place of the teacher's own, for accuracy.
        partial: Train on an unfinished store, with the shards that it has now.
        device: For example cpu or cuda:0. None: the GPU if there is one.
        threads: Of torch on a CPU; a run is repeated bit for bit with the same number. None: one for blocks of fewer
            than 256 channels, else one per core.
        micro_batch: Most samples of one forward and backward pass; less memory, the same result but for rounding.
        workers: Processes that train it together through Ray Train; None: this one alone, without Ray, unless a
            cluster is given.
        ray_address: A Ray cluster to train on; None is RAY_ADDRESS, else none.
        at_once: With block=all: most blocks at a time. None: as GPUs, cores and memory allow.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
        stop_with_stdin: Save all and stop when standard input ends: for a program that starts this one and may die.
    """
    use_endpoint(endpoint_url)
    began = time.monotonic()
    place = Place.typed(device, threads, micro_batch, workers, ray_address)
    problems = typed_problems(1, recipe, steps, seed)
    if replica is not None and seed is not None:
        problems.append("REPLICA stands for the seed: give one of them")
    if block == "all":
        if not Workers.found().is_alone:
            raise UserError("BLOCK=all starts a process for each block; under torchrun give one block: BLOCK=0-7")
        return train_all(
            AllSpans(
                blocks=blocks,
                store=store,
                run=run,
                recipe=recipe,
                steps=steps,
                seed=seed,
                replica=replica,
                head=head,
                partial=partial,
                at_once=at_once,
                # Without WORKERS each is one process of one task: Ray Train is for a training of several.
                place=dataclasses.replace(place, workers=workers),
                endpoint_url=endpoint_url,
                known_problems=tuple(problems),
            )
        )
    for name, value in (("BLOCKS", blocks), ("AT_ONCE", at_once)):
        if value not in ("", None):
            problems.append(f"{name}={value} is for BLOCK=all, which trains several: give that, or leave {name} out")
    if replica is not None and seed is None:
        seed = _published_seed(block, replica, problems)
    location = run or default_run(store, block, seed or 0)
    typed = {"variable": "BLOCK", "head": head, "partial": partial}
    run_files, data, open_again = open_for_training(location, place, store, block, typed, problems)
    config = make_config(data, 1, recipe, steps, seed or 0)
    variables = typed_variables(
        STORE=store if store != DEFAULT_STORE else None,
        HEAD=head,
        RECIPE=recipe,
        SEED=seed,
        PARTIAL="1" if partial else None,
        DEVICE=device,
        ENDPOINT_URL=endpoint_url,
    )
    training = Training(config=config, data=data, open_data=open_again, run=run_files)
    stop = stdin_ended() if stop_with_stdin else lambda: False
    return train_and_report(training, place, variables, began=began, stop=stop)


def _published_seed(block: str, replica: int, problems: list[str]) -> int | None:
    """The seed of a published block; None where BLOCK is none, which is a problem of its own."""
    try:
        span = Span.parse(block.strip())
    except SchemaError:  # is listed with the range that the store allows
        return None
    return or_problem(lambda: published_run([span], replica, stage=1).seed, problems)

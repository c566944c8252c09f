"""`make train`: stage 1."""

import dataclasses
import time

from infra.console import UserError
from infra.s3_settings import use_endpoint
from storage_schemas import Span
from storage_schemas.errors import SchemaError
from trainer.commands.options import Options
from trainer.commands.run_training import stdin_ended, train_and_report
from trainer.commands.start import Training, default_run, make_config, open_for_training, or_problem
from trainer.commands.train_all import AllSpans, train_all
from trainer.published_runs import published_run
from trainer.workers import Workers


def train_command(
    options: Options,
    *,
    block: str = "",
    blocks: str = "",
    at_once: int | None = None,
    stop_with_stdin: bool = False,
) -> int:
    """Train one block of a Raptor on the states of a span, or all blocks (stage 1). The same command again resumes.

    With block=all every span is trained side by side, as processes of this machine or, with ray_address, as tasks of
    a cluster. One that fails goes on from its last checkpoint, until three attempts in a row have saved nothing new.

    Args:
        options: As make raptor takes them.
        block: Span a-b: the block takes state a and produces states a+1 to b. For example 0-7. Or all.
        blocks: With block=all: the spans, such as 0-7,7-10,10-12, or a JSON of make phases; empty: the saved phases of
            the store.
        at_once: With block=all: most blocks at a time. None: as GPUs, cores and memory allow.
        stop_with_stdin: Save all and stop when standard input ends: for a program that starts this one and may die.
    """
    use_endpoint(options.endpoint_url)
    began = time.monotonic()
    problems = options.problems(stage=1)
    place = options.place(problems)
    if options.replica is not None and options.seed is not None:
        problems.append("REPLICA stands for the seed: give one of them")
    if block == "all":
        if not Workers.found().is_alone:
            raise UserError("BLOCK=all starts a process for each block; under torchrun give one block: BLOCK=0-7")
        # Without WORKERS each is one process of one task: Ray Train is for a training of several.
        place = dataclasses.replace(place, workers=None if options.workers is None else place.workers)
        return train_all(AllSpans(options=options, blocks=blocks, at_once=at_once, place=place), problems)
    for name, value in (("BLOCKS", blocks), ("AT_ONCE", at_once)):
        if value not in ("", None):
            problems.append(f"{name}={value} is for BLOCK=all, which trains several: give that, or leave {name} out")
    if options.replica is not None and options.seed is None:
        options = dataclasses.replace(options, seed=_published_seed(block, options.replica, problems))
    seed = options.seed or 0
    location = options.run or default_run(options.store, block, seed)
    typed = {"variable": "BLOCK", "head": options.head, "partial": options.partial}
    run_files, data, open_again = open_for_training(location, place, options.store, block, typed, problems)
    config = make_config(data, 1, options.recipe, options.steps, seed)
    variables = options.typed("STORE", "HEAD", "RECIPE", "SEED", "PARTIAL", "DEVICE", "ENDPOINT_URL")
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

"""`python -m pipeline verify`: whether every object of a store is as its commits say, and its repair."""

import shlex
import time
from collections.abc import Mapping, Set
from typing import Annotated

import tyro

from infra.console import ExitCode, JobError, Progress, UserError, counted, human_bytes, human_duration
from infra.objects import ObjectError, open_objects
from infra.s3_settings import use_endpoint
from pipeline.config import ExtractConfig, of_one_split, store_root
from pipeline.extract import exit_code
from pipeline.repair import repair as repair_stores
from pipeline.run_config import RunConfig
from pipeline.sources import Source, open_sources
from pipeline.summary import summarise
from storage_schemas.errors import Problem
from storage_schemas.find import find_stores
from storage_schemas.reader import open_store
from storage_schemas.verify import verify_store

_Config = Annotated[ExtractConfig, tyro.conf.arg(name="")]
_Run = Annotated[RunConfig, tyro.conf.arg(name="")]


def run_verify(
    config: _Config,
    run: _Run,
    repair: bool = False,
    recompute: int | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Re-read and check every object of a store, or of stores train and val; with --repair, mend what is wrong.

    Args:
        config: The store; to repair or recompute also the images, and to repair what the extraction was given where it
            was not the default.
        run: How to extract again.
        repair: Rewrite damaged documents and extract bad shards again.
        recompute: Run so many random images through the stored teacher again, and compare with the stored states.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    root = store_root(config)
    if recompute is not None and recompute < 1:
        raise UserError(f"RECOMPUTE={recompute}: expected a number of images, at least 1")
    if repair:
        results = repair_stores(config, run)
        print(summarise(results, root))
        if recompute is None or exit_code(results) != ExitCode.OK:
            return exit_code(results)
    sources = open_sources(config.images) if recompute else {}
    try:
        only = of_one_split(config, sources)[1]
        sources = {"": sources[only]} if only else sources
        stores = find_stores(root)
        problems = {split: [] if repair else _verify(location, split) for split, location in stores.items()}
        n_problems = sum(map(len, problems.values()))
        if n_problems:
            mend = f"make verify STORE={shlex.quote(root)} IMAGES=<as extracted> REPAIR=1"
            print(f"{counted(n_problems, 'problem')}. Mend {'it' if n_problems == 1 else 'them'}: {mend}")
        drifted = _drifted(stores, {split for split in stores if problems[split]}, sources, run, recompute)
    except ObjectError as error:
        raise JobError(str(error)) from error
    if drifted:
        print(
            f"the states of {counted(len(drifted), 'array')} have drifted: images, libraries or device are not the "
            "extraction's, or they were changed. log/*/provenance.json in the store names what it was made with"
        )
    return ExitCode.PROBLEMS if n_problems or drifted else ExitCode.OK


def _drifted(
    stores: Mapping[str, str], damaged: Set[str], sources: Mapping[str, Source], run: RunConfig, n_images: int | None
) -> list[Problem]:
    if n_images is None:
        return []
    for location in [location for split, location in stores.items() if split in damaged]:
        print(f"{location}: no images are made anew, for the store has problems; mend it first")
    sound = [(split, location) for split, location in stores.items() if split not in damaged]
    return [problem for split, location in sound for problem in _drift(location, sources, split, run, n_images)]


def _drift(location: str, sources: Mapping[str, Source], split: str, run: RunConfig, n_images: int) -> list[Problem]:
    from pipeline.recompute import drift_lines, drift_problems, recompute

    if split not in sources:
        raise UserError(
            f"IMAGES has no split {split or 'of its own'}, and {location} is of one; give the images extracted"
        )
    store = open_store(location)
    drifts = recompute(store, sources[split], n_images, device=run.device)
    print("\n".join([f"{location}:", *drift_lines(drifts, min(n_images, store.n_valid))]))
    return drift_problems(drifts)


def _verify(location: str, split: str) -> list[Problem]:
    began, checked = time.monotonic(), 0
    with Progress(total=100, unit="%", label=f"verify {split}".strip()) as progress:

        def on_object(done: int, total: int) -> None:
            nonlocal checked
            progress.advance(100 * done // total - 100 * checked // total, n_bytes=0)
            checked = done

        problems = verify_store(open_objects(location), progress=on_object)
    if not problems:
        seconds = human_duration(time.monotonic() - began)
        store = open_store(location)
        n_committed, n_shards = int(store.committed.sum()), store.spec.n_shards
        sound = "sound" if store.is_complete else f"sound so far, {n_committed:,} of {n_shards:,} shards are committed"
        print(f"{location}: {sound}; {human_bytes(checked)} re-read and checked in {seconds}")
        if not store.is_complete:
            print("  The make extract that began it goes on with the missing ones.")
        return []
    shards = {problem.shard for problem in problems if problem.shard is not None}
    print(
        f"{location} has {counted(len(problems), 'problem')}"
        + (f" in {counted(len(shards), 'shard')}:" if shards else ":")
    )
    for problem in problems:
        print(f"  {problem}")
    return problems

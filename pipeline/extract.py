"""Images to a committed store: plan, prepare, run the shards that have no commit, index, sum up.

Doing it again is the normal way to go on after anything: shards that are committed are left alone.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from infra.cluster import check_fits, connected
from infra.console import ExitCode, JobError, Progress, StopFlag, UserError, human_bytes, stop_on_signals
from infra.metrics import STAGES, Metrics, sum_stages, verdict
from infra.objects import ObjectError, ObjectMissingError, Objects, open_objects
from infra.status import Beat
from pipeline.dispatch import (
    DispatchError,
    Event,
    FatalError,
    Outcome,
    ShardQuarantined,
    ShardRetried,
    WorkersReady,
    run_plain,
)
from pipeline.plan import StorePlan, describe, plan_store
from pipeline.run_log import HEARTBEAT_KEY, RunLog, claimed
from pipeline.settings import ExtractConfig, PlannedStore, check_inputs, make_teacher, plan_stores
from pipeline.shard import RunnerConfig, ShardReport, resolve_device
from pipeline.sources import ImageFolderSource, Source
from pipeline.teacher import Teacher
from storage_schemas.create import (
    StoreDocument,
    create_store,
    identity_differences,
    plan_documents,
    read_store_document,
)
from storage_schemas.errors import NotAStoreError, SchemaError
from storage_schemas.index import index_to_bytes
from storage_schemas.keys import INDEX_KEY, LOG_PREFIX, STORE_KEY, is_owned
from storage_schemas.reader import Store, has_index, list_commits, open_store, read_commits

MIN_BAD_IMAGES = 10
BAD_IMAGE_SHARE = 0.001
_N_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the work is done; nothing of it changes a byte of the store.

    Attributes:
        ray_address: Cluster to join; None is RAY_ADDRESS, or a private Ray in this machine.
        no_ray: Do everything in this process.
        workers: Teacher actors; None is one per GPU, or one per machine without GPUs.
        cpus_per_worker: Cores of each; None shares out what there is.
        depth: Shards in flight per worker; bounds its memory. None is 3 on a GPU, else 2.
        shard_timeout_s: A shard that takes longer loses its worker, seconds.
        device: cpu, cuda or auto.
        dashboard: Whether a private Ray has its dashboard.
        verbose: Show what workers print.
    """

    ray_address: str | None = None
    no_ray: bool = False
    workers: int | None = None
    cpus_per_worker: int | None = None
    depth: int | None = None
    shard_timeout_s: float = 3600.0
    device: str = "auto"
    dashboard: bool = True
    verbose: bool = False


@dataclass(kw_only=True)
class ExtractResult:
    """What became of one store.

    Attributes:
        planned: What was asked for.
        plan: Its numbers.
        n_done: Samples committed by this run.
        n_before: Samples that were committed before it.
        nbytes: Bytes written by this run.
        wall_s: Of the dispatch.
        reports: Of the shards done by this run.
        quarantined: Shards given up, with causes.
        bad_images: (sample_index, sample_id, code), of all shards committed.
        interrupted: Whether a stop request ended it early.
        verdict: What limited the run, one line; empty if nothing ran.
    """

    planned: PlannedStore
    plan: StorePlan
    n_done: int = 0
    n_before: int = 0
    nbytes: int = 0
    wall_s: float = 0.0
    reports: list[ShardReport] = field(default_factory=list)
    quarantined: list[Outcome] = field(default_factory=list)
    bad_images: list[tuple[int, str, str]] = field(default_factory=list)
    interrupted: bool = False
    verdict: str = ""

    @property
    def complete(self) -> bool:
        return self.n_before + self.n_done == self.planned.spec.n_samples


def check_run(run: RunConfig) -> None:
    """Refuse ways of working that cannot be, all at once.

    Raises:
        UserError: Lists every setting that is wrong, with what it may be.
    """
    problems = [
        f"{name.upper()}={value}: expected a number of at least 1"
        for name in ("workers", "cpus_per_worker", "depth", "shard_timeout_s")
        if (value := getattr(run, name)) is not None and value < 1
    ]
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", run.device) is None:
        problems.append(f"DEVICE={run.device}: expected cpu, cuda or auto")
    elif run.no_ray and run.device.startswith("cuda") and not torch.cuda.is_available():
        problems.append(f"DEVICE={run.device}: there is no CUDA device here; expected cpu or auto")
    if problems:
        raise UserError("\n  ".join(["these settings cannot be:", *problems]))


def say(message: str) -> None:
    """One line to the person, on standard error, in order with progress."""
    print(message, file=sys.stderr, flush=True)


def extract(
    config: ExtractConfig,
    run: RunConfig | None = None,
    *,
    teacher_factory: Callable[[str], Teacher] | None = None,
) -> list[ExtractResult]:
    """Extract every split that a config names, or the shards of them that are missing.

    Args:
        config: What to extract.
        run: How; None is the defaults.
        teacher_factory: Makes the teacher on a device, in any process (picklable); None loads the one that the config
            names, and workers then read it from the store.

    Returns:
        One result per store.

    Raises:
        UserError: Refused before work started; nothing was damaged.
        JobError: Stopped or finished with problems; what is committed stays valid.
    """
    check_run(run or RunConfig())
    check_inputs(config)
    teacher = teacher_factory("cpu") if teacher_factory else make_teacher(config)
    planned = plan_stores(config, teacher, say)
    del teacher  # workers make their own
    return extract_planned(planned, run or RunConfig(), overwrite=config.overwrite, teacher_factory=teacher_factory)


def extract_planned(
    planned: Sequence[PlannedStore],
    run: RunConfig,
    *,
    overwrite: bool = False,
    teacher_factory: Callable[[str], Teacher] | None = None,
) -> list[ExtractResult]:
    """`extract` for stores that are planned already."""
    try:
        jobs = [_prepare(store, overwrite, run) for store in planned]
        _check_disk(jobs)
        missing = any(job.shards for job in jobs)
        with _ray(run) if missing and not run.no_ray else nullcontext(), stop_on_signals() as stop:
            return [_extract_store(job, run, stop, teacher_factory) for job in jobs]
    except ObjectError as error:
        raise JobError(f"{error}. What is committed stays valid; the same command goes on from there") from error


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A store with its work laid out."""

    planned: PlannedStore
    plan: StorePlan
    objects: Objects
    document: StoreDocument | None  # None: still to be created
    overwrite: bool
    shards: list[int]
    bad_images: list[tuple[int, str]]
    depth: int


def _prepare(planned: PlannedStore, overwrite: bool, run: RunConfig) -> _Job:
    objects = open_objects(planned.location)
    document, overwrite = check_place(objects, planned, overwrite)
    weights_nbytes = sum(len(data) for data in planned.teacher_files.values())
    depth = run.depth or (3 if resolve_device(run.device) == "cuda" else 2)
    plan = plan_store(
        planned.spec,
        weights_nbytes=weights_nbytes,
        n_states=planned.n_states,
        depth=depth,
        n_threads=n_threads(run),
    )
    for line in [*describe(plan, planned.spec, planned.location), *(f"  note: {note}" for note in planned.notes)]:
        say(line)
    shards = list(range(planned.spec.n_shards))
    bad_images: list[tuple[int, str]] = []
    if document is not None:
        commits, damaged = read_commits(objects, document)
        done = {commit.shard for commit in commits}
        shards = [shard for shard in shards if shard not in done]
        bad_images = [bad for commit in commits for bad in commit.bad_images]
        for key, what in damaged.items():
            say(f"  {key} is damaged and its shard will be done again: {what}")
    return _Job(
        planned=planned,
        plan=plan,
        objects=objects,
        document=document,
        overwrite=overwrite,
        shards=shards,
        bad_images=bad_images,
        depth=depth,
    )


def n_threads(run: RunConfig) -> int:
    """Micro-batches in flight per worker on this machine."""
    return run.cpus_per_worker or len(os.sched_getaffinity(0))


def check_place(objects: Objects, planned: PlannedStore, overwrite: bool) -> tuple[StoreDocument | None, bool]:
    """What is where the store should go: its identity if it can be resumed, None if it has to be created.

    Returns:
        The document of the store to go on with or None, and whether a store of another identity is to be deleted.

    Raises:
        UserError: Something else is there; says what, and what to do.
    """
    if "://" not in objects.location and Path(objects.location).is_file():
        raise UserError(f"{objects.location} is a file; a store is a folder. Choose another STORE")
    try:
        found = read_store_document(objects, objects.location)
    except NotAStoreError:
        strangers = [info.key for info in objects.list() if not is_owned(info.key)][:_N_NAMED]
        if strangers:
            raise UserError(
                f"{objects.location} is not empty and is no store: it holds {', '.join(strangers)}. "
                "Choose another STORE, or empty that folder"
            ) from None
        if list_commits(objects):
            raise UserError(
                f"{objects.location} holds committed shards but no {STORE_KEY}, so nobody can say what they are. "
                f"Write it anew: make verify STORE={objects.location} REPAIR=1 and the variables of the extraction"
            ) from None
        return None, False
    except SchemaError as error:
        raise UserError(
            f"{error}\nMend it with: make verify STORE={objects.location} REPAIR=1 and the variables of the extraction"
        ) from error
    expected, _ = plan_documents(planned.spec, planned.samples, planned.teacher_files)
    different = identity_differences(objects, found, expected, planned.samples)
    if not different:
        return found, False
    if overwrite:
        return None, True
    raise UserError(
        "\n  ".join(
            [
                f"{objects.location} is a store of another identity:",
                *different,
                "Choose another STORE, set the variables as they were, or delete it first with --overwrite",
            ]
        )
    )


def delete_store(objects: Objects, *, keep_run: str) -> None:
    """Delete the keys that this format owns, store.json last, but for the log of one run; says how many."""
    kept = (HEARTBEAT_KEY, f"{LOG_PREFIX}{keep_run}/")
    owned = [info for info in objects.list() if is_owned(info.key) and not info.key.startswith(kept)]
    if not owned:
        return
    say(f"  deleting {len(owned):,} objects, {human_bytes(sum(info.nbytes for info in owned))}, of {objects.location}")
    for info in sorted(owned, key=lambda info: info.key == STORE_KEY):
        objects.delete(info.key)


def _check_disk(jobs: list[_Job]) -> None:
    needed: dict[int, tuple[Path, int]] = {}
    for job in jobs:
        place = Path(job.planned.location).absolute()
        while not place.exists():
            place = place.parent
        device = place.stat().st_dev
        nbytes = min(len(job.shards) * job.plan.shard_nbytes, job.plan.data_nbytes)
        if job.document is None:
            nbytes += sum(len(data) for data in job.planned.teacher_files.values())
        needed[device] = (place, needed.get(device, (place, 0))[1] + nbytes)
    for place, nbytes in needed.values():
        free = shutil.disk_usage(place).free
        if nbytes > free:
            raise UserError(
                f"{place} has {human_bytes(free)} free and up to {human_bytes(nbytes)} are needed. "
                "Free some, choose another STORE, or take fewer images with LIMIT=n"
            )


@contextmanager
def _ray(run: RunConfig) -> Iterator[None]:
    with connected(run.ray_address, dashboard=run.dashboard, verbose=run.verbose, say=say) as connection:
        say(str(connection))
        cpus, gpus = _actor_resources(run)
        check_fits(num_cpus=cpus, num_gpus=gpus, connection=connection)
        yield


def _actor_resources(run: RunConfig) -> tuple[int, float]:
    import ray

    total = ray.cluster_resources()
    n_gpus = 0 if run.device == "cpu" else int(total.get("GPU", 0))
    if n_gpus:
        return run.cpus_per_worker or max(1, min(16, int(total["CPU"]) // n_gpus)), 1.0
    n_nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1)
    workers = run.workers or max(1, n_nodes)
    return run.cpus_per_worker or max(1, int(total.get("CPU", 1)) // workers), 0.0


def _n_actors(run: RunConfig) -> int:
    import ray

    total = ray.cluster_resources()
    n_gpus = 0 if run.device == "cpu" else int(total.get("GPU", 0))
    n_nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1)
    return run.workers or n_gpus or max(1, n_nodes)


def _extract_store(
    job: _Job, run: RunConfig, stop: StopFlag, teacher_factory: Callable[[str], Teacher] | None
) -> ExtractResult:
    planned, objects = job.planned, job.objects
    result = ExtractResult(planned=planned, plan=job.plan)
    result.bad_images = [(index, planned.samples[index].sample_id, code) for index, code in job.bad_images]
    n_missing = sum(len(planned.spec.shard_samples(shard)) for shard in job.shards)
    result.n_before = planned.spec.n_samples - n_missing
    limit = max(MIN_BAD_IMAGES, int(BAD_IMAGE_SHARE * planned.spec.n_samples))
    if len(result.bad_images) > limit:
        raise JobError(_too_many_bad(planned, result.bad_images, limit))
    if not job.shards and _was_left_in_order(objects):
        return result
    if stop():
        result.interrupted = True
        return result
    with claimed(objects, say) as (log, beat):
        _check_unchanged(job)
        n_swept = objects.sweep()
        if n_swept:
            say(f"  swept {n_swept} half-written files of an interrupted run")
        if job.document is None:
            # another identity that is to go, or the documents of a run that was killed before it wrote store.json
            delete_store(objects, keep_run=log.run_id)
            create_store(objects, planned.spec, planned.samples, planned.teacher_files)
        log.write_provenance({"spec": planned.spec.to_json(), "run": asdict(run)})
        if job.shards:
            _run_shards(job, run, stop, teacher_factory, result, limit, log, beat)
        store = open_store(objects)
        if store.is_complete:
            write_index(objects, store)
            objects.sweep()  # of workers that outlived the driver of an interrupted run for some seconds
        log.status(state="complete" if store.is_complete else "incomplete", verdict=result.verdict)
    return result


def _check_unchanged(job: _Job) -> None:
    """Between planning and claiming, while Ray started for instance, another job may have come and gone."""
    document, _ = check_place(job.objects, job.planned, job.overwrite)
    if (document and document.digest) != (job.document and job.document.digest):
        raise UserError(f"another job has just written {job.objects.location}. Run the same command again")


def _run_shards(
    job: _Job,
    run: RunConfig,
    stop: StopFlag,
    teacher_factory: Callable[[str], Teacher] | None,
    result: ExtractResult,
    limit: int,
    log: RunLog,
    beat: Beat,
) -> None:
    planned, spec = job.planned, job.planned.spec
    label = f"extract {planned.split}".strip()
    began = time.monotonic()
    metrics = Metrics({"store": "/".join(planned.location.rsplit("/", 2)[-2:])})
    log.status(state="running", images_total=spec.n_samples, images_done=result.n_before)
    with Progress(total=spec.n_samples, unit="images", label=label, done=result.n_before) as progress:

        def on_event(event: Event) -> None:
            nonlocal began
            log.event(event)
            if isinstance(event, WorkersReady):
                if not result.reports:
                    began = time.monotonic()  # the time that workers take to start is not the stages'
                progress.status(str(event) if event.ready < event.total else "")
                metrics.set("workers_ready", event.ready)
            else:
                progress.say(f"  {event}")
                if isinstance(event, ShardRetried | ShardQuarantined):
                    metrics.add("shards", result="retried" if isinstance(event, ShardRetried) else "quarantined")

        try:
            with closing(_dispatch(job, run, stop, teacher_factory, on_event)) as outcomes:
                for outcome in outcomes:
                    beat.check()
                    if not outcome.ok:
                        result.quarantined.append(outcome)
                        continue
                    report: ShardReport = outcome.report
                    result.reports.append(report)
                    result.n_done += report.n_samples
                    result.nbytes += report.nbytes
                    result.bad_images += report.bad_images
                    progress.advance(report.n_samples, n_bytes=report.nbytes)
                    log.shard(report, outcome.attempts)
                    log.status(images_done=result.n_before + result.n_done, bad_images=len(result.bad_images))
                    if len(result.bad_images) > limit:
                        raise JobError(_too_many_bad(planned, result.bad_images, limit))
        except (FatalError, DispatchError) as error:
            raise JobError(str(error)) from error
        finally:
            result.wall_s = time.monotonic() - began
    result.interrupted = stop()
    result.bad_images.sort()
    if result.reports:
        n_workers = len({report.worker for report in result.reports})
        lanes = n_threads(run)
        by_stage = dict.fromkeys(STAGES, lanes)
        if resolve_device(run.device) == "cuda":
            by_stage["device"] = 1
        stage_seconds = sum_stages([report.seconds for report in result.reports])
        result.verdict = str(verdict(stage_seconds, wall_s=result.wall_s, n_workers=n_workers, lanes=by_stage))


def _dispatch(
    job: _Job,
    run: RunConfig,
    stop: StopFlag,
    teacher_factory: Callable[[str], Teacher] | None,
    on_event: Callable[[Event], None],
) -> Generator[Outcome, None, None]:
    def runner_config(n_threads: int | None) -> RunnerConfig:
        return RunnerConfig(
            store=str(Path(job.planned.location).absolute()),
            source=_anywhere(job.planned.source),
            device=run.device,
            n_threads=n_threads,
            n_buffers=job.depth,
            make_teacher=teacher_factory,
        )

    if run.no_ray:
        config = runner_config(run.cpus_per_worker)
        n_torch_threads = torch.get_num_threads()
        try:
            yield from run_plain(job.shards, config, depth=job.depth, stop=stop, on_event=on_event)
        finally:
            torch.set_num_threads(n_torch_threads)  # the runner sets it, and this process is not its own
        return
    from pipeline.dispatch_ray import run_on_ray

    num_cpus, num_gpus = _actor_resources(run)
    yield from run_on_ray(
        job.shards,
        runner_config(num_cpus),
        n_actors=_n_actors(run),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        depth=job.depth,
        shard_timeout_s=run.shard_timeout_s,
        stop=stop,
        on_event=on_event,
    )


def _anywhere(source: Source) -> Source:
    """The source by its full path: a worker may have another working folder."""
    return replace(source, root=os.path.abspath(source.root)) if isinstance(source, ImageFolderSource) else source


def write_index(objects: Objects, store: Store) -> None:
    """Put index.parquet of a complete store, unless it is there already."""
    commits, _ = read_commits(objects, store.document, use_index=False)  # the index there may be an earlier one
    data = index_to_bytes(store.spec, store.document.digest, commits)
    try:
        if objects.get(INDEX_KEY) == data:
            return
    except ObjectMissingError:
        pass  # the usual case: the last shard has just been committed
    objects.put(INDEX_KEY, data)


def _was_left_in_order(objects: Objects) -> bool:
    """Whether there is an index, and the last run took its heartbeat away: it was not killed, and is not at work."""
    return has_index(objects) and not any(True for _ in objects.list(HEARTBEAT_KEY))


def _too_many_bad(planned: PlannedStore, bad: list[tuple[int, str, str]], limit: int) -> str:
    shown = [f"{name}: {code}" for _, name, code in bad[: 2 * _N_NAMED]]
    more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
    return "\n  ".join(
        [
            f"{len(bad)} images did not decode, more than the {limit} that {planned.spec.n_samples:,} images may have:",
            *shown,
            *more,
            "Mend or remove them, or check that IMAGES is the right folder; then run the same command again",
        ]
    )


def exit_code(results: list[ExtractResult]) -> int:
    """The code of `ExitCode` that sums up these results."""
    if any(result.quarantined for result in results):
        return ExitCode.PROBLEMS
    if any(result.interrupted and not result.complete for result in results):
        return ExitCode.INTERRUPTED
    return ExitCode.OK

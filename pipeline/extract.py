"""Images to a committed store: plan, prepare, run the shards that have no commit, index, sum up.

Doing it again is the normal way to go on after anything: shards that are committed are left alone.
"""

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from infra.console import ExitCode, JobError, Progress, StopFlag, UserError, say, stop_on_signals
from infra.metrics import STAGES, Metrics, sum_stages, verdict
from infra.objects import ObjectError, Objects, open_objects
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
from pipeline.place import check_disk, check_place, delete_store, was_left_in_order, write_index
from pipeline.plan import StorePlan, describe, plan_store
from pipeline.run_log import RunLog, claimed
from pipeline.settings import ExtractConfig, PlannedStore, check_inputs, make_teacher, plan_stores
from pipeline.shard import RunnerConfig, ShardReport, resolve_device
from pipeline.sources import ImageFolderSource, Source
from pipeline.teacher import Teacher
from pipeline.workers import RunConfig, actor_resources, check_run, n_actors, n_threads, ray_for
from storage_schemas.create import (
    StoreDocument,
    create_store,
)
from storage_schemas.reader import open_store, read_commits

MIN_BAD_IMAGES = 10
BAD_IMAGE_SHARE = 0.001
_N_NAMED = 10


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
        check_disk((job.planned.location, job.nbytes_left) for job in jobs)
        missing = any(job.shards for job in jobs)
        with ray_for(run) if missing and not run.no_ray else nullcontext(), stop_on_signals() as stop:
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

    @property
    def nbytes_left(self) -> int:
        """What will be written at most."""
        data = min(len(self.shards) * self.plan.shard_nbytes, self.plan.data_nbytes)
        return data + (sum(map(len, self.planned.teacher_files.values())) if self.document is None else 0)


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
    if not job.shards and was_left_in_order(objects):
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

    num_cpus, num_gpus = actor_resources(run)
    yield from run_on_ray(
        job.shards,
        runner_config(num_cpus),
        n_actors=n_actors(run),
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

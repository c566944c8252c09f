"""Images to a committed store: plan, prepare, run the shards that have no commit, index, sum up.

Doing it again is the normal way to go on after anything: shards that are committed are left alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from infra.console import ExitCode, JobError, StopFlag, UserError, say, stop_on_signals
from infra.objects import ObjectError
from infra.ray_ahead import RayAhead
from pipeline.claims import delete_claims
from pipeline.config import ExtractConfig, check_inputs, split_location, store_root
from pipeline.job import ExtractResult, Job, bad_image_limit, lay_out, prepare, too_many_bad
from pipeline.place import (
    begin_store,
    check_disk,
    check_place,
    check_writable,
    delete_store,
    finish_store,
    was_left_in_order,
)
from pipeline.rounds import Rounds
from pipeline.run_config import RunConfig, check_run
from pipeline.run_log import AtWork, at_work
from pipeline.settings import PlannedStore, make_teacher, plan_stores
from pipeline.shard_writer import counted_requests
from pipeline.sources import open_sources
from pipeline.summary import summarise
from pipeline.teacher import Teacher
from pipeline.workers import Demand, ray_for


def extract(
    config: ExtractConfig,
    run: RunConfig | None = None,
    *,
    teacher_factory: Callable[[str], Teacher] | None = None,
    ahead: RayAhead | None = None,
) -> list[ExtractResult]:
    """Extract every split that a config names, or the shards of them that are missing.

    Args:
        config: What to extract.
        run: How; None is the defaults.
        teacher_factory: Makes the teacher on a device, in any process (picklable); None loads the one that the config
            names, and workers then read it from the store.
        ahead: Ray that is on its way already, for the caller to end; None starts or joins one if there is work.

    Returns:
        One result per store.

    Raises:
        UserError: Refused before work started; nothing was damaged.
        JobError: Stopped or finished with problems; what is committed stays valid.
    """
    check_run(run or RunConfig(), overwrite=config.overwrite)
    check_inputs(config)
    try:
        probes = check_writable(split_location(config, split) for split in open_sources(config.images))
    except ObjectError as error:
        raise JobError(str(error)) from error
    teacher = teacher_factory("cpu") if teacher_factory else make_teacher(config)
    planned = plan_stores(config, teacher, say)
    del teacher  # workers make their own
    run = run or RunConfig()
    results = extract_planned(planned, run, overwrite=config.overwrite, teacher_factory=teacher_factory, ahead=ahead)
    results[0].requests.update(probes)
    return results


def extract_and_tell(
    config: ExtractConfig,
    run: RunConfig,
    *,
    teacher_factory: Callable[[str], Teacher] | None = None,
    ahead: RayAhead | None = None,
) -> int:
    """`extract`, its summary printed; returns the exit code."""
    results = extract(config, run, teacher_factory=teacher_factory, ahead=ahead)
    print(summarise(results, store_root(config)))
    return exit_code(results)


def extract_planned(
    planned: Sequence[PlannedStore],
    run: RunConfig,
    *,
    overwrite: bool = False,
    teacher_factory: Callable[[str], Teacher] | None = None,
    ahead: RayAhead | None = None,
) -> list[ExtractResult]:
    """`extract` for stores that are planned already."""
    try:
        jobs = [prepare(store, overwrite, run) for store in planned]
        check_disk((job.planned.location, job.nbytes_left) for job in jobs)
        missing = any(job.shards for job in jobs)
        on_ray = missing and not run.no_ray
        with (
            ray_for(run, ahead) if on_ray else nullcontext() as demand,
            _spares(on_ray) as spares,
            stop_on_signals() as stop,
        ):
            results = []
            for n_done, job in enumerate(jobs, start=1):
                if spares is not None:
                    spares.keeps = any(later.shards for later in jobs[n_done:])
                results.append(_extract_store(job, run, stop, teacher_factory, demand, spares))
            return results
    except ObjectError as error:
        raise JobError(f"{error}. What is committed stays valid; the same command goes on from there") from error


@contextmanager
def _spares(on_ray: bool) -> Iterator[Any]:
    """Where the workers of one store wait for the next; nothing without Ray."""
    if not on_ray:
        yield None
        return
    from pipeline.workers_ray import Spares

    with closing(Spares()) as spares:
        yield spares


def _extract_store(
    job: Job,
    run: RunConfig,
    stop: StopFlag,
    teacher_factory: Callable[[str], Teacher] | None,
    demand: Demand | None = None,
    spares: Any = None,
) -> ExtractResult:
    result = _result_of(job)
    if (job.shards or not was_left_in_order(job.objects)) and not stop():
        with at_work(job.objects, say, join=run.join) as working:
            job = _still_so(job, run)
            result = _result_of(job)
            job = _begin(job, working)
            working.log.write_provenance({"spec": job.planned.spec.to_json(), "run": asdict(run)})
            if job.shards:
                Rounds(job, run, stop, teacher_factory, result, working, demand, spares).run()
            _end(job, result, working)
    result.interrupted = result.interrupted or (stop() and not result.complete)
    result.requests.update(counted_requests(job.objects))
    return result


def _result_of(job: Job) -> ExtractResult:
    """What is known before anything is done.

    Raises:
        JobError: Too many images are bad already.
    """
    samples = job.planned.samples
    result = ExtractResult(planned=job.planned, plan=job.plan, n_before=job.planned.spec.n_samples - job.n_missing)
    result.bad_images = [(index, samples[index].sample_id, code) for index, code in job.bad_images]
    if len(result.bad_images) > bad_image_limit(job.planned):
        raise JobError(too_many_bad(job.planned, result.bad_images))
    return result


def _still_so(job: Job, run: RunConfig) -> Job:
    """The job as it is now: between planning and this, while Ray started for instance, others may have been at work.

    Raises:
        UserError: Another job has made or changed the store meanwhile, and we are not to share its work.
    """
    if run.join:
        return lay_out(job.planned, job.plan, job.objects, job.overwrite, run)
    document, _ = check_place(job.objects, job.planned, job.overwrite)
    if (document and document.digest) != (job.document and job.document.digest):
        raise UserError(f"another job has just written {job.objects.location}. Run the same command again")
    return job


def _begin(job: Job, working: AtWork) -> Job:
    """Clear away what a killed run left, and create the store, if that is for us to do; then others may join.

    Raises:
        UserError: The store would have to be created, or go first, and another job is at work on it.
    """
    others = working.presence.others()
    if job.document is None and others:
        raise UserError(
            f"{job.objects.location} cannot be created anew: run {' and run '.join(sorted(others))} is at work on it. "
            "Wait for it, or stop it, and run the same command again"
        )
    if not working.presence.leads:
        return job
    if not others:
        n_swept = job.objects.sweep()
        if n_swept:
            say(f"  swept {n_swept} half-written files of an interrupted run")
        delete_claims(job.objects, job.shards)
    if job.document is None:
        # another identity that is to go, or the documents of a run that was killed before it wrote store.json
        delete_store(job.objects, keep_run=working.log.run_id)
        job = replace(job, document=begin_store(job.objects, job.planned))
    working.presence.set_ready(True)
    return job


def _end(job: Job, result: ExtractResult, working: AtWork) -> None:
    """The index, if every shard is committed, whoever did them; and nothing left lying about."""
    assert job.document is not None
    complete = finish_store(job.objects, job.document)
    if complete:
        delete_claims(job.objects)
        if not working.presence.others():
            working.presence.set_ready(False)  # nobody joins while files may vanish
            job.objects.sweep()  # of workers that outlived the driver of an interrupted run for some seconds
    working.log.status(state="complete" if complete else "incomplete", verdict=result.verdict)


def exit_code(results: list[ExtractResult]) -> int:
    """The code of `ExitCode` that sums up these results."""
    if any(result.quarantined for result in results):
        return ExitCode.PROBLEMS
    if any(result.interrupted and not result.complete for result in results):
        return ExitCode.INTERRUPTED
    return ExitCode.OK

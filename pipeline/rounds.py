"""The shards of one store, done by this job and by those that share its work, until none is missing.

This job does what nobody claims. Then it waits for what others claim, and does the shards of those that have died. A
shard that a living job has given up is given up here too.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from infra.console import JobError, Progress, StopFlag
from pipeline.claims import Claim, Claims
from pipeline.dispatch import (
    DispatchError,
    Event,
    FatalError,
    Outcome,
    WorkersReady,
    run_plain,
)
from pipeline.job import DEPTH_ON_CPU, DEPTH_ON_GPU, ExtractResult, Job, bad_image_limit, too_many_bad
from pipeline.locations import full_location, is_remote
from pipeline.run_config import RunConfig
from pipeline.run_log import AtWork
from pipeline.run_metrics import RunMetrics, told
from pipeline.shard import RunnerConfig, ShardElsewhere, ShardReport, commit_nbytes
from pipeline.sources import DigitsSource, Source
from pipeline.teacher import Teacher
from pipeline.workers import Demand, MakeRunner
from storage_schemas.commit import Commit
from storage_schemas.reader import list_commits, load_commits

LOOK_EVERY_S = 2.0  # for the commits of others, once there is nothing else to do
_SAY_EVERY_S = 20.0

MakeTeacher = Callable[[str], Teacher] | None


class Rounds:
    """One store's shards on their way.

    Args:
        job: What is missing.
        run: How it is done.
        stop: Asked before anything new is started.
        make_teacher: Makes the teacher in a worker; None takes the one in the store.
        result: Brought up to date.
        at_work: Of this job.
        demand: Which workers this extraction wants; None without Ray.
        spares: Workers of other stores of this extraction, a `workers_ray.Spares`; None shares none.
    """

    def __init__(
        self,
        job: Job,
        run: RunConfig,
        stop: StopFlag,
        make_teacher: MakeTeacher,
        result: ExtractResult,
        at_work: AtWork,
        demand: Demand | None = None,
        spares: Any = None,
    ) -> None:
        self._demand, self._spares = demand, spares
        self._job, self._run, self._stop, self._make_teacher = job, run, stop, make_teacher
        self._result, self._at_work, self._log = result, at_work, at_work.log
        self._claims = Claims(job.objects, at_work.presence.run_id)
        self._elsewhere: dict[int, str] = {}  # shards that another run has
        self._metrics = RunMetrics(
            job.planned.location,
            n_planned=job.planned.spec.n_samples,
            n_committed=result.n_before,
            faults_here=not run.no_ray,
        )
        self._began = self._looked = time.monotonic()

    def run(self) -> None:
        """Do or await every shard.

        Raises:
            JobError: No shard can pass, or too many images are bad.
        """
        result, planned = self._result, self._job.planned
        label = f"extract {planned.split}".strip()
        self._log.status(state="running", images_total=planned.spec.n_samples, images_done=result.n_before)
        with (
            self._metrics.begun(),
            self._log.following(self._metrics.status),
            Progress(total=planned.spec.n_samples, unit="images", label=label, done=result.n_before) as progress,
        ):
            self._progress = progress
            shards = self._job.shards if self._at_work.presence.leads else self._job.shards[::-1]  # meet in the middle
            try:
                while shards and not self._stop():
                    self._round(shards)
                    shards = self._await_others()
            except (FatalError, DispatchError) as error:
                raise JobError(str(error)) from error
            finally:
                result.wall_s = time.monotonic() - self._began
        result.interrupted = self._stop()
        result.bad_images.sort()
        result.faults = self._metrics.faults()
        if result.reports:
            limit = self._metrics.verdict()
            result.verdict = str(limit)
            self._log.status(**told(limit))

    def _round(self, shards: Sequence[int]) -> None:
        with closing(self._dispatch(shards)) as outcomes:
            for outcome in outcomes:
                self._at_work.beat.check()
                self._tell_of_others()
                if not outcome.ok:
                    self._result.quarantined.append(outcome)
                    self._claims.give_up(outcome.shard, outcome.cause)
                elif isinstance(outcome.report, ShardReport):
                    self._done(outcome.report, outcome.attempts)
                else:
                    self._left(outcome.report)
        self._metrics.idle()

    def _tell_of_others(self) -> None:
        """Now and then, how far all jobs are together; the bar counts what this one knows to be done."""
        if time.monotonic() - self._looked < _SAY_EVERY_S:
            return
        self._looked = time.monotonic()
        others, spec = self._at_work.presence.others(), self._job.planned.spec
        if others:
            n_committed = len(self._committed())
            jobs = f"{len(others) + 1} jobs share {spec.n_shards:,} shards"
            self._progress.status(f"{jobs}, {n_committed:,} are done")

    def _committed(self) -> set[int]:
        """Shards that the store has, by whichever job."""
        spec = self._job.planned.spec
        found = {s for s in list_commits(self._job.objects).values() if s is not None and s < spec.n_shards}
        self._metrics.there(sum(len(spec.shard_samples(shard)) for shard in found))
        return found

    def _done(self, report: ShardReport, attempts: int) -> None:
        result = self._result
        result.reports.append(report)
        result.n_done += report.n_samples
        result.nbytes += report.nbytes
        result.requests.update(report.requests)
        self._log.shard(report, attempts)
        self._metrics.shard(report)
        self._count(report.n_samples, report.nbytes, report.bad_images)

    def _left(self, report: ShardElsewhere) -> None:
        """Another job has this shard; or we have done it ourselves, and our worker died before it could say so."""
        self._result.requests.update(report.requests)
        if not report.committed:
            self._elsewhere[report.shard] = report.run_id
            return
        n_samples = len(self._job.planned.spec.shard_samples(report.shard))
        ours = report.run_id == self._at_work.presence.run_id
        self._metrics.elsewhere(report, n_samples, ours=ours)
        if ours:
            self._result.n_done += n_samples
            self._result.nbytes += report.nbytes
        else:
            self._result.n_by_others += n_samples
            self._result.n_shards_by_others += 1
        self._count(n_samples, report.nbytes if ours else 0, report.bad_images)

    def _count(self, n_samples: int, nbytes: int, bad_images: Sequence[tuple[int, str, str]]) -> None:
        result = self._result
        result.bad_images += bad_images
        self._progress.advance(n_samples, n_bytes=nbytes)
        n_finished = result.n_before + result.n_done + result.n_by_others
        self._log.status(images_done=n_finished, bad_images=len(result.bad_images))
        if len(result.bad_images) > bad_image_limit(self._job.planned):
            raise JobError(too_many_bad(self._job.planned, result.bad_images))

    def _await_others(self) -> list[int]:
        """Wait for the shards of others; returns those that are ours to do now, because their job is dead."""
        last_said = float("-inf")
        self._progress.estimate(not self._elsewhere)
        while self._elsewhere and not self._stop():
            self._at_work.beat.check()
            living = self._at_work.presence.others()  # before the commits: who ends in between has committed
            self._note_commits()
            ours = [shard for shard in list(self._elsewhere) if self._take_over(shard, living)]
            if ours:
                self._progress.estimate(True)
                self._progress.say(f"  the job that had {_few(ours)} has ended without; doing that here")
                return ours
            if self._elsewhere and time.monotonic() - last_said > _SAY_EVERY_S:
                runs = " and ".join(sorted(set(self._elsewhere.values())))
                self._progress.say(f"  waiting for {_few(list(self._elsewhere))} of run {runs}")
                last_said = time.monotonic()
            if self._elsewhere:
                time.sleep(LOOK_EVERY_S)
        return []

    def _take_over(self, shard: int, living: set[str]) -> bool:
        """Claim a shard of a dead job, unless a living one has done so already; a living one may have given it up."""
        claim = self._claims.find(shard)
        if claim is not None and claim.run_id in living:
            self._elsewhere[shard] = claim.run_id
            if claim.given_up:
                self._given_up(shard, claim)
            return False
        if self._elsewhere[shard] in living:
            return False
        self._claims.take_over(shard)
        del self._elsewhere[shard]
        return True

    def _given_up(self, shard: int, claim: Claim) -> None:
        """Another job has quarantined a shard; it would fail here too, or the same command tries it again later."""
        del self._elsewhere[shard]
        cause = f"run {claim.run_id} has quarantined it: {claim.given_up}"
        self._progress.say(f"  shard {shard} is given up: {cause}")
        self._result.quarantined.append(Outcome(shard=shard, ok=False, report=None, cause=cause, attempts=0))

    def _note_commits(self) -> None:
        """See which shards of others are done by now."""
        job = self._job
        there = sorted(self._elsewhere.keys() & self._committed())
        assert job.document is not None
        for shard, (_, commit) in zip(there, load_commits(job.objects, job.document, there)):
            if isinstance(commit, Commit):  # a damaged one is done again when its job has ended
                run_id, samples = self._elsewhere.pop(shard), job.planned.samples
                bad = tuple((index, samples[index].sample_id, code) for index, code in commit.bad_images)
                self._left(
                    ShardElsewhere(
                        shard=shard,
                        run_id=run_id,
                        committed=True,
                        bad_images=bad,
                        nbytes=commit_nbytes(commit),
                        requests={},
                        faults={},
                    )
                )

    def _on_event(self, event: Event) -> None:
        self._log.event(event)
        self._metrics.event(event)
        if isinstance(event, WorkersReady):
            if not self._result.reports:
                self._began = time.monotonic()  # the time that workers take to start is not the stages'
            self._progress.status(str(event) if event.ready < event.total else "")
            return
        self._progress.say(f"  {event}")

    def _dispatch(self, shards: Sequence[int]) -> Generator[Outcome, None, None]:
        run, depth = self._run, self._job.depth
        if run.no_ray:
            n_torch_threads = torch.get_num_threads()
            config = self._runner_config(run.cpus_per_worker)
            try:
                yield from run_plain(shards, config, depth=depth, stop=self._stop, on_event=self._on_event)
            finally:
                torch.set_num_threads(n_torch_threads)  # the runner sets it, and this process is not its own
            return
        from pipeline.dispatch_ray import run_on_ray

        assert self._demand is not None
        if run.depth is None:
            depth = DEPTH_ON_GPU if self._demand().num_gpus else DEPTH_ON_CPU  # the GPUs are the workers', not ours
        config = replace(self._runner_config(run.cpus_per_worker), n_buffers=depth)
        yield from run_on_ray(
            shards,
            MakeRunner(config=config),
            wanted=self._demand,
            depth=depth,
            shard_timeout_s=run.shard_timeout_s,
            environment=worker_environment(self._job.planned.location, str(getattr(config.source, "root", ""))),
            stop=self._stop,
            on_event=self._on_event,
            spares=self._spares,
        )

    def _runner_config(self, n_threads: int | None) -> RunnerConfig:
        return RunnerConfig(
            store=full_location(self._job.planned.location),
            source=_anywhere(self._job.planned.source),
            device=self._run.device,
            n_threads=n_threads,
            n_buffers=self._job.depth,
            make_teacher=self._make_teacher,
            run_id=self._at_work.presence.run_id,
            max_error=self._run.max_error,
        )


def worker_environment(*locations: str) -> dict[str, str]:
    """Settings that worker processes on other machines need to reach these places; never keys."""
    if not any(is_remote(location) for location in locations):
        return {}
    from infra.s3_settings import shared_environment

    return shared_environment()


def _anywhere(source: Source) -> Source:
    """The source by its full path: a worker may have another working folder."""
    if isinstance(source, DigitsSource):
        return source
    return replace(source, root=full_location(str(source.root)))


def _few(shards: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(shards)[:5])) + (f" and {len(shards) - 5:,} more" if len(shards) > 5 else "")
    return f"shard{'s' if len(shards) > 1 else ''} {shown}"

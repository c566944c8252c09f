"""One store with its work laid out, and what became of it."""

from collections import Counter
from dataclasses import dataclass, field

from infra.console import UserError, say
from infra.objects import Objects, open_objects
from pipeline.dispatch import Outcome
from pipeline.place import check_place
from pipeline.plan import StorePlan, describe, plan_store
from pipeline.run_config import RunConfig
from pipeline.settings import PlannedStore
from pipeline.shard import ShardReport, resolve_device
from pipeline.shard_writer import too_inexact
from pipeline.workers import n_threads
from storage_schemas.commit import Commit
from storage_schemas.create import StoreDocument
from storage_schemas.reader import read_commits

#: Shards in flight per worker where DEPTH is not given: one is read, one is on the device, one is written.
DEPTH_ON_GPU = 3
DEPTH_ON_CPU = 2
MIN_BAD_IMAGES = 10
BAD_IMAGE_SHARE = 0.001
_N_NAMED = 20


@dataclass(kw_only=True)
class ExtractResult:
    """What became of one store.

    Attributes:
        planned: What was asked for.
        plan: Its numbers.
        n_done: Samples committed by this run.
        n_before: Samples that were committed before it.
        n_by_others: Samples that other jobs committed meanwhile.
        n_shards_by_others: Their shards.
        nbytes: Bytes written by this run.
        wall_s: Of the dispatch.
        reports: Of the shards done by this run.
        quarantined: Shards given up, with causes.
        bad_images: (sample_index, sample_id, code), of all shards committed.
        interrupted: Whether a stop request ended it early.
        verdict: What limited the run, one line; empty if nothing ran.
        requests: To a remote store, by verb, of all processes of this run; also bytes_out and bytes_in.
        faults: Requests that failed and were made again, of all processes of this run, by "where kind".
    """

    planned: PlannedStore
    plan: StorePlan
    n_done: int = 0
    n_before: int = 0
    n_by_others: int = 0
    n_shards_by_others: int = 0
    nbytes: int = 0
    wall_s: float = 0.0
    reports: list[ShardReport] = field(default_factory=list)
    quarantined: list[Outcome] = field(default_factory=list)
    bad_images: list[tuple[int, str, str]] = field(default_factory=list)
    interrupted: bool = False
    verdict: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        return self.n_before + self.n_done + self.n_by_others == self.planned.spec.n_samples


@dataclass(frozen=True, kw_only=True)
class Job:
    """A store with its work laid out.

    Attributes:
        planned: What is asked for.
        plan: Its numbers.
        objects: Of the store.
        document: Its identity; None if it is still to be created.
        overwrite: Whether a store of another identity goes first.
        shards: Those without a sound commit.
        bad_images: Of those with one.
        depth: Shards in flight per worker.
    """

    planned: PlannedStore
    plan: StorePlan
    objects: Objects
    document: StoreDocument | None
    overwrite: bool
    shards: list[int]
    bad_images: list[tuple[int, str]]
    depth: int

    @property
    def nbytes_left(self) -> int:
        """What will be written at most."""
        data = min(len(self.shards) * self.plan.shard_nbytes, self.plan.data_nbytes)
        return data + (sum(map(len, self.planned.teacher_files.values())) if self.document is None else 0)

    @property
    def n_missing(self) -> int:
        """Samples without a commit."""
        return sum(len(self.planned.spec.shard_samples(shard)) for shard in self.shards)


def depth_of(run: RunConfig) -> int:
    """Shards in flight per worker."""
    return run.depth or (DEPTH_ON_GPU if resolve_device(run.device) == "cuda" else DEPTH_ON_CPU)


def plan_of(planned: PlannedStore, run: RunConfig) -> StorePlan:
    """The numbers of a store, done in this way."""
    return plan_store(
        planned.spec,
        location=planned.location,
        teacher_files=planned.teacher_nbytes,
        samples_nbytes=planned.samples_nbytes,
        n_states=planned.n_states,
        depth=depth_of(run),
        n_threads=n_threads(run),
        n_workers=1 if run.no_ray else run.workers or 1,
    )


def prepare(planned: PlannedStore, overwrite: bool, run: RunConfig) -> Job:
    """Look at the place and say what will be done.

    Raises:
        UserError: The store cannot go there; or what is there exceeds MAX_ERROR.
    """
    plan = plan_of(planned, run)
    for line in [*describe(plan, planned.spec, planned.location), *(f"  note: {note}" for note in planned.notes)]:
        say(line)
    return lay_out(planned, plan, open_objects(planned.location), overwrite, run)


def lay_out(planned: PlannedStore, plan: StorePlan, objects: Objects, overwrite: bool, run: RunConfig) -> Job:
    """What there is to do now.

    Raises:
        UserError: As `prepare`.
    """
    document, overwrite = check_place(objects, planned, overwrite)
    commits, damaged = read_commits(objects, document) if document is not None else ([], {})
    for key, what in damaged.items():
        say(f"  {key} is damaged and its shard will be done again: {what}")
    _check_error(commits, planned, run.max_error)
    done = {commit.shard for commit in commits}
    return Job(
        planned=planned,
        plan=plan,
        objects=objects,
        document=document,
        overwrite=overwrite,
        shards=[shard for shard in range(planned.spec.n_shards) if shard not in done],
        bad_images=[bad for commit in commits for bad in commit.bad_images],
        depth=depth_of(run),
    )


def bad_image_limit(planned: PlannedStore) -> int:
    """How many images may be bad."""
    return max(MIN_BAD_IMAGES, int(BAD_IMAGE_SHARE * planned.spec.n_samples))


def too_many_bad(planned: PlannedStore, bad: list[tuple[int, str, str]]) -> str:
    """The message about more bad images than that, with their names."""
    shown = [f"{name}: {code}" for _, name, code in bad[:_N_NAMED]]
    more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
    return "\n  ".join(
        [
            f"{len(bad)} images did not decode, more than the {bad_image_limit(planned)} that "
            f"{planned.spec.n_samples:,} images may have:",
            *shown,
            *more,
            "Mend or remove them, or check that IMAGES is the right folder; then run the same command again",
        ]
    )


def _check_error(commits: list[Commit], planned: PlannedStore, max_error: float | None) -> None:
    for commit in commits:
        for path, fidelity in commit.fidelity.items():
            if max_error is not None and not fidelity.relative_mse <= max_error:
                raise UserError(
                    f"{planned.location}, shard {commit.shard}, is committed already: "
                    + too_inexact(path, fidelity.relative_mse, planned.spec.precision, max_error)
                )

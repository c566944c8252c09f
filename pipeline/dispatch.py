"""Run every shard exactly once to an end, whatever happens to the workers: the book-keeping and the plain loop.

The `Ledger` holds the whole blame rule and knows neither threads nor Ray, so it is tested by itself. Two thin loops
drive it: `run_plain` here, `run_on_ray` in `dispatch_ray.py`. None of them knows what a shard is made of.
"""

import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

DEFAULT_DEPTH = 3  # shards in flight per worker: one reads, one is on the device, one writes
DEFAULT_TRIES = 3


class Runner(Protocol):
    """Does one shard from beginning to commit. `run` is called from several threads at once."""

    def run(self, shard: int) -> Any:
        """Do this shard and return a small picklable report."""


class FatalError(Exception):
    """Raised by a runner when no other shard can pass either (disk full, access refused): the whole job stops."""


class FinalError(Exception):
    """Raised by a runner when this shard, and maybe only this one, can never pass: it is quarantined at once."""


class DispatchError(Exception):
    """The job cannot go on for a reason that is no shard's fault, for instance no worker can be started."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one shard ended. Each shard has exactly one outcome, unless the job was stopped before its turn.

    Attributes:
        ok: True when the runner returned; False when the shard was quarantined.
        report: What the runner returned, None when quarantined.
        cause: Empty when ok, else one line: the last error.
        attempts: How often the shard was handed to a worker, the last time included.
        trace: The last traceback, where there was one.
    """

    shard: int
    ok: bool
    report: Any
    cause: str
    attempts: int
    trace: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkersReady:
    """The number of workers that take shards has changed; `total` is what was asked for."""

    ready: int
    total: int

    def __str__(self) -> str:
        return f"{self.ready} of {self.total} workers ready"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The workers that there should be.

    Attributes:
        n: How many.
        num_cpus: Cores that each one asks for; no more than the machines that it is meant for have.
        num_gpus: The same of GPUs.
        n_fit: How many of them the machines that are there now can hold; None if nobody has looked.
        have: What the largest machine has, in words.
    """

    n: int
    num_cpus: int | float
    num_gpus: int | float = 0
    n_fit: int | None = None
    have: str = ""


@dataclass(frozen=True, kw_only=True)
class NoRoom:
    """No machine that is there now can hold a worker; one that can may still come."""

    needs: str
    have: str

    def __str__(self) -> str:
        return f"no machine has room for a worker, which needs {self.needs}; {self.have}. Waiting for one that has"


@dataclass(frozen=True, kw_only=True)
class NodeLeftOut:
    """Workers cannot start on a machine while others have some: it is given no more for a while."""

    node: str
    cause: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.node} is left out for {self.seconds / 60:g} min, as workers cannot start there: {self.cause}"


@dataclass(frozen=True, kw_only=True)
class StartsSuspended:
    """Too many workers in a row could not start: for a while those that are there are all."""

    n_failed: int
    cause: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"no more workers are started for {self.seconds / 60:g} min, unless one that is on its way gets ready, as "
            f"{self.n_failed} in a row could not: {self.cause}"
        )


@dataclass(frozen=True, kw_only=True)
class WorkerLost:
    """A worker died, was killed past a deadline, or could not start. `preempted`: its node was taken away on notice."""

    worker: str
    cause: str
    preempted: bool = False

    def __str__(self) -> str:
        return f"{self.worker} {'was pre-empted' if self.preempted else 'was lost'}: {self.cause}"


@dataclass(frozen=True, kw_only=True)
class ShardRetried:
    """A shard goes back into the queue: it raised, died alone, or was on a pre-empted worker."""

    shard: int
    cause: str
    trace: str = ""

    def __str__(self) -> str:
        return f"shard {self.shard} will be tried again: {self.cause}"


@dataclass(frozen=True, kw_only=True)
class ShardSuspected:
    """A shard was in company when its worker died. It runs again alone, and is not blamed yet."""

    shard: int
    cause: str

    def __str__(self) -> str:
        return f"shard {self.shard} is a suspect and will run alone: {self.cause}"


@dataclass(frozen=True, kw_only=True)
class ShardQuarantined:
    """A shard is given up."""

    shard: int
    cause: str
    attempts: int

    def __str__(self) -> str:
        return f"shard {self.shard} is quarantined after {self.attempts} attempts: {self.cause}"


PoolEvent = WorkersReady | NoRoom | NodeLeftOut | StartsSuspended | WorkerLost
Event = PoolEvent | ShardRetried | ShardSuspected | ShardQuarantined
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The event listener that does not listen."""


def never() -> bool:
    """The stop request that never comes."""
    return False


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What came of running a shard once: a report, or a cause. Plain text, so that it always crosses processes.

    `fatal`: no shard can pass. `final`: this shard will fail again in the same way, so it is not tried again.
    """

    report: Any = None
    cause: str = ""
    trace: str = ""
    fatal: bool = False
    final: bool = False


def attempt(work: Callable[[], Any]) -> Attempt:
    """Do the work once and turn whatever it raises into words.

    Exceptions themselves do not travel: many of them cannot be unpickled on the other side.
    """
    try:
        return Attempt(report=work())
    except FatalError as error:
        return Attempt(cause=str(error), trace=traceback.format_exc(), fatal=True)
    except Exception as error:  # noqa: BLE001 - nothing is swallowed: the caller books, retries and reports each cause
        final = isinstance(error, FinalError)
        return Attempt(cause=f"{type(error).__name__}: {error}", trace=traceback.format_exc(), final=final)


class Ledger:
    """Which shard is waiting, suspected, in flight or ended: the blame rule as a state machine.

    A shard that raises is blamed at once. When a worker dies, what it had in flight is judged by company: a shard that
    shared the worker with others becomes a suspect, which from then on only ever runs alone; a shard that was alone on
    the worker all the time gets a strike. `tries` raises or `tries` strikes put it into quarantine. Pre-emption costs
    nothing. So a shard that does no harm is never quarantined, however its neighbours behave, and every shard ends.

    Workers are any hashable names; the ledger never calls them.
    """

    def __init__(
        self,
        shards: Iterable[int],
        *,
        tries: int = DEFAULT_TRIES,
        depth: int = DEFAULT_DEPTH,
        on_event: OnEvent = ignore,
    ) -> None:
        self._todo = deque(shards)
        if len(set(self._todo)) != len(self._todo):
            raise ValueError("the same shard was listed twice; every shard may be listed once")
        if tries < 1 or depth < 1:
            raise ValueError(f"tries and depth must be at least 1, found tries={tries}, depth={depth}")
        self._tries, self._depth, self._tell = tries, depth, on_event
        self._suspects: deque[int] = deque()
        self._suspected: set[int] = set()
        self._in_flight: dict[Hashable, dict[int, bool]] = {}  # worker -> shard -> has it been alone all the time
        self._attempts: Counter[int] = Counter()
        self._raises: Counter[int] = Counter()
        self._strikes: Counter[int] = Counter()

    @property
    def n_waiting(self) -> int:
        """Shards that are neither ended nor in flight."""
        return len(self._todo) + len(self._suspects)

    @property
    def n_in_flight(self) -> int:
        """Shards that some worker has now."""
        return sum(len(shards) for shards in self._in_flight.values())

    def load(self, worker: Hashable) -> int:
        """How many shards this worker has in flight."""
        return len(self._in_flight.get(worker, ()))

    def feed(self, worker: Hashable) -> int | None:
        """Hand out the next shard that this worker should start now, or None; call it until it says None.

        An idle worker takes a suspect before anything else, and gets no company until that suspect has ended.
        """
        mine = self._in_flight.setdefault(worker, {})
        if len(mine) >= self._depth or self._suspected.intersection(mine):
            return None
        queue = self._suspects if self._suspects and not mine else self._todo
        if not queue:
            return None
        shard = queue.popleft()
        self._attempts[shard] += 1
        mine[shard] = True
        if len(mine) > 1:
            mine.update(dict.fromkeys(mine, False))
        return shard

    def finished(self, worker: Hashable, shard: int, report: Any) -> Outcome:
        """Book that the shard was done."""
        del self._in_flight[worker][shard]
        return Outcome(shard=shard, ok=True, report=report, cause="", attempts=self._attempts[shard])

    def raised(
        self, worker: Hashable, shard: int, cause: str, trace: str = "", *, final: bool = False
    ) -> Outcome | None:
        """Book that the shard raised while its worker lived on. Returns its outcome if that was once too often."""
        del self._in_flight[worker][shard]
        self._raises[shard] += 1
        if final or self._raises[shard] >= self._tries:
            return self._quarantine(shard, cause, trace)
        self._tell(ShardRetried(shard=shard, cause=cause, trace=trace))
        self._queue_again(shard)
        return None

    def lost(self, worker: Hashable, cause: str, *, preempted: bool = False) -> list[Outcome]:
        """Book that the worker is gone, and judge what it had in flight. Returns the outcomes that follow."""
        outcomes = []
        for shard, alone in self._in_flight.pop(worker, {}).items():
            self._strikes[shard] += alone and not preempted
            if self._strikes[shard] >= self._tries:
                outcomes.append(self._quarantine(shard, f"running alone it ended its worker: {cause}"))
                continue
            if alone or preempted:
                self._tell(ShardRetried(shard=shard, cause=cause))
            else:
                self._tell(ShardSuspected(shard=shard, cause=cause))
            if not preempted:
                self._suspected.add(shard)
            self._queue_again(shard)
        return outcomes

    def _queue_again(self, shard: int) -> None:
        (self._suspects if shard in self._suspected else self._todo).append(shard)

    def _quarantine(self, shard: int, cause: str, trace: str = "") -> Outcome:
        attempts = self._attempts[shard]
        self._tell(ShardQuarantined(shard=shard, cause=cause, attempts=attempts))
        return Outcome(shard=shard, ok=False, report=None, cause=cause, attempts=attempts, trace=trace)


def settle(ledger: Ledger, worker: Hashable, shard: int, result: Attempt) -> Outcome | None:
    """Book the result of one attempt; None means the shard will run again.

    Raises:
        FatalError: The runner said that no shard can pass.
    """
    if result.fatal:
        raise FatalError(result.cause)
    if result.cause:
        return ledger.raised(worker, shard, result.cause, result.trace, final=result.final)
    return ledger.finished(worker, shard, result.report)


def run_plain(
    shards: Iterable[int],
    make_runner: Callable[[], Runner],
    *,
    tries: int = DEFAULT_TRIES,
    depth: int = DEFAULT_DEPTH,
    stop: Callable[[], bool] = never,
    on_event: OnEvent = ignore,
) -> Iterator[Outcome]:
    """Run all shards in this process, `depth` of them at a time in threads over one runner.

    Threads overlap the stages: reading, the device (behind the runner's own lock), encoding and writing. A shard that
    kills or hangs this process cannot be helped here; that is what the Ray dispatcher is for.

    Args:
        make_runner: Called once, and not at all when there is nothing to do.
        tries: A shard that raises this often is quarantined; the others go on.
        stop: Asked before anything new is started; once it says True, what is in flight is finished and the rest left.

    Yields:
        Outcomes as they come.

    Raises:
        FatalError: As raised by the runner. What was in flight is finished first.
    """
    ledger = Ledger(shards, tries=tries, depth=depth, on_event=on_event)
    if not ledger.n_waiting or stop():
        return
    runner, here = make_runner(), "this process"
    on_event(WorkersReady(ready=1, total=1))
    with ThreadPoolExecutor(depth, thread_name_prefix="shard") as pool:
        in_flight: dict[Future[Attempt], int] = {}
        while True:
            while not stop() and (shard := ledger.feed(here)) is not None:
                in_flight[pool.submit(attempt, partial(runner.run, shard))] = shard
            if not in_flight:
                return
            for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                outcome = settle(ledger, here, in_flight.pop(future), future.result())
                if outcome is not None:
                    yield outcome

"""`make watch`: a run as it is now, in the terminal, from its status.json and from Ray's /metrics.

It only reads: a store or run in a folder or on S3 needs nothing but the right to list and get. Without a terminal it
prints a line every few seconds, so that it can be kept in a log.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live

from infra.console import ExitCode, StopFlag, UserError
from infra.metrics import NAMESPACE
from infra.retry import pointless_once
from infra.running_ray import Value, metrics_addresses, read_metrics
from infra.watch_source import Place, Scrape, Status, machines, read_all
from infra.watch_view import line, picture, short_names

HERE = ("data/stores", "data/runs")
_OUR_PREFIX = f"ray_{NAMESPACE}_"
_LINE_EVERY_S = 5.0
_PAINT_EVERY_S = 2.0
_PAUSE_S = 20.0
_BLINK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One look.

    Attributes:
        statuses: The jobs.
        nodes: A line for each machine of Ray.
        troubles: What could not be read.
    """

    statuses: list[Status]
    nodes: list[str]
    troubles: list[str]


@dataclass(kw_only=True)
class Watch:
    """What is looked at.

    Attributes:
        places: Where status.json documents are.
        ray_address: A cluster's dashboard; None looks at the Rays of this machine.
        needs_ray: Nothing else was asked for, so that a Ray that does not answer is an error and no note.
        only_places: Certain stores or runs were asked for; what else Ray runs is not shown in their place.
    """

    places: Sequence[Place] = ()
    ray_address: str | None = None
    needs_ray: bool = False
    only_places: bool = False
    _scrape: Scrape = field(default_factory=Scrape)

    def look(self) -> Seen:
        """What there is now.

        Raises:
            UserError: Only Ray was asked for, and it does not answer.
        """
        statuses, troubles = read_all(self.places)
        # A run that is over says nothing about the Rays that run here now.
        if statuses and not any(status.living for status in statuses) and not self.ray_address:
            return Seen(statuses=statuses, nodes=[], troubles=troubles)
        try:
            addresses = metrics_addresses(self.ray_address)
        except UserError as error:
            if self.needs_ray:
                raise
            return Seen(statuses=statuses, nodes=[], troubles=[*troubles, str(error)])
        values, silent = read_metrics(addresses, "ray_")
        if silent and len(silent) == len(addresses):
            troubles.append(f"no node of {self.ray_address or 'this machine'} lets us read its metrics from here")
        ours = [value for value in values if value.name.startswith(_OUR_PREFIX)]
        here = bool(self.ray_address) or not statuses or any(_is_of(value, statuses) for value in ours)
        if not statuses and not self.only_places:
            statuses = self._scrape.statuses(ours)
        return Seen(statuses=statuses, nodes=machines(values) if here else [], troubles=troubles)


def watch(
    store: str | None = None,
    run: str | None = None,
    ray_address: str | None = None,
    endpoint_url: str | None = None,
    once: bool = False,
) -> int:
    """Watch extractions and trainings in the terminal until Ctrl-C, or until they are over.

    Args:
        store: A store, or a folder or prefix of stores: data/stores/digits, s3://bucket/digits. Reading is enough.
        run: A training's folder or prefix, or one of several.
        ray_address: A cluster's dashboard, http://HOST:8265; else RAY_ADDRESS, else the Rays of this machine.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000.
        once: Show one picture and end.

    Raises:
        UserError: The only thing asked for is a Ray that does not answer.

    Returns:
        The exit code: for one picture BAD_INPUT if what was asked for is not there, or cannot be read; else OK.
    """
    if endpoint_url:
        from infra.s3_settings import use_endpoint  # imported late: botocore is slow to load

        use_endpoint(endpoint_url)
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    given = [location for location in (store, run) if location]
    wanted = given or ([] if address else [place for place in HERE if os.path.isdir(place)])
    watched = Watch(
        places=[Place(location) for location in wanted],
        ray_address=address,
        needs_ray=bool(address and not given),
        only_places=bool(given),
    )
    console = Console()
    with _ended_by_signals() as ended, pointless_once(ended):
        if once:
            return _once(watched, console)
        if console.is_terminal:
            _live(watched, console, ended)
        else:
            _lines(watched, ended)
    return ExitCode.OK


def _once(watched: Watch, console: Console) -> ExitCode:
    """One picture on a terminal, else a line for each job and machine."""
    seen = watched.look()
    names, notes = short_names(seen.statuses), _notes(watched, seen)
    if console.is_terminal:
        console.print(picture(seen.statuses, names, seen.nodes, notes))
    else:
        texts = [line(status, name) for status, name in zip(seen.statuses, names)]
        print("\n".join([*texts, *(f"Ray {node}" for node in seen.nodes), *notes]), flush=True)
    missed = not seen.statuses and (seen.troubles or watched.only_places)
    return ExitCode.BAD_INPUT if missed else ExitCode.OK


def _lines(watched: Watch, ended: StopFlag) -> None:
    """Print a line for each job every few seconds."""
    over = Over()
    while True:
        seen = watched.look()
        texts = [line(status, name) for status, name in zip(seen.statuses, short_names(seen.statuses))]
        print("\n".join([*texts, *_notes(watched, seen)]), flush=True)
        if over(seen) or _wait(ended, _LINE_EVERY_S):
            return


def _live(watched: Watch, console: Console, ended: StopFlag) -> None:
    """Repaint one picture until all is over, or somebody has seen enough; the last one stays."""
    over = Over()
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            seen = watched.look()
            shown = picture(seen.statuses, short_names(seen.statuses), seen.nodes, _notes(watched, seen))
            live.update(shown, refresh=True)
            if over(seen) or _wait(ended, _PAINT_EVERY_S):
                return


def _notes(watched: Watch, seen: Seen) -> list[str]:
    return seen.troubles if seen.statuses else [*seen.troubles, _nothing(watched)]


def _is_of(value: Value, statuses: Sequence[Status]) -> bool:
    """Whether a number is of one of these jobs; others may run on this machine."""
    label = value.labels.get("store") or value.labels.get("run")
    return bool(label) and any(f"/{status.place}".endswith(f"/{label}") for status in statuses)


def _nothing(watched: Watch) -> str:
    where = " and ".join(place.location for place in watched.places) or "Ray"
    return f"nothing to be seen in {where} yet: no status.json, and no Ray that runs an extraction or training"


class Over:
    """Tells when all is over: at once if nothing lived when we came, else after a pause in which nothing new began.

    An extraction of several splits, and a training of several blocks, have pauses between their parts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lived: float | None = None

    def __call__(self, seen: Seen) -> bool:
        if any(status.living for status in seen.statuses):
            self._lived = self._clock()
            return False
        if not seen.statuses and (self._lived is None or seen.troubles):
            return False  # nothing has begun yet; or it may live on where we cannot see it now
        return self._lived is None or self._clock() - self._lived > _PAUSE_S


@contextmanager
def _ended_by_signals() -> Iterator[StopFlag]:
    """Ctrl-C and SIGTERM end the watching in good order."""
    ended = StopFlag()
    former = {number: signal.signal(number, lambda *_: ended.request()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _wait(ended: StopFlag, seconds: float) -> bool:
    """Wait so long, or until somebody has seen enough; true if so."""
    until = time.monotonic() + seconds
    while not ended() and (left := until - time.monotonic()) > 0:
        time.sleep(min(_BLINK_S, left))
    return ended()

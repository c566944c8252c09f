"""`make watch`: a run as it is now, in the terminal, from its status.json and from Ray's /metrics.

It only reads: a store or run in a folder or on S3 needs nothing but the right to list and get. Without a terminal it
prints a line every few seconds, so that it can be kept in a log.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live

from infra.console import ExitCode, UserError
from infra.metrics import NAMESPACE
from infra.running_ray import Value, metrics_addresses, read_metrics
from infra.watch_source import Place, Scrape, Status, machines, read_all
from infra.watch_view import line, picture, short_names

HERE = ("data/stores", "data/runs")
_OUR_PREFIX = f"ray_{NAMESPACE}_"
_LINE_EVERY_S = 5.0
_PAINT_EVERY_S = 2.0
_PAUSE_S = 20.0


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

    def look(self) -> tuple[list[Status], list[str], list[str]]:
        """The jobs, the machines of Ray, and what went wrong.

        Raises:
            UserError: Only Ray was asked for, and it does not answer.
        """
        statuses, notes = read_all(self.places)
        # A run that is over says nothing about the Rays that run here now.
        if statuses and not any(status.living for status in statuses) and not self.ray_address:
            return statuses, [], notes
        try:
            addresses = metrics_addresses(self.ray_address)
        except UserError as error:
            if self.needs_ray:
                raise
            return statuses, [], [*notes, str(error)]
        values, silent = read_metrics(addresses, "ray_")
        if silent and len(silent) == len(addresses):
            notes.append(f"no node of {self.ray_address or 'this machine'} lets us read its metrics from here")
        ours = [value for value in values if value.name.startswith(_OUR_PREFIX)]
        here = bool(self.ray_address) or not statuses or any(_is_of(value, statuses) for value in ours)
        if not statuses and not self.only_places:
            statuses = self._scrape.statuses(ours)
        return statuses, machines(values) if here else [], notes


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
    with _ended_by_signals() as ended:
        if once or not console.is_terminal:
            _lines(watched, console, once=once, wait=ended)
        else:
            _live(watched, console, wait=ended)
    return ExitCode.OK


def _lines(watched: Watch, console: Console, *, once: bool, wait: Callable[[float], bool]) -> None:
    """Print a line for each job every few seconds; on a terminal, ONCE=1 prints the whole picture."""
    over = Over()
    while True:
        statuses, nodes, notes = watched.look()
        if not statuses:
            notes.append(_nothing(watched))
        names = short_names(statuses)
        if once and console.is_terminal:
            console.print(picture(statuses, names, nodes, notes))
        else:
            texts = [line(status, name) for status, name in zip(statuses, names)]
            print("\n".join([*texts, *(f"Ray {node}" for node in nodes if once), *notes]), flush=True)
        if once or over(statuses) or wait(_LINE_EVERY_S):
            return


def _live(watched: Watch, console: Console, *, wait: Callable[[float], bool]) -> None:
    """Repaint one picture until all is over, or somebody has seen enough; the last one stays."""
    over = Over()
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            statuses, nodes, notes = watched.look()
            if not statuses:
                notes.append(_nothing(watched))
            live.update(picture(statuses, short_names(statuses), nodes, notes), refresh=True)
            if over(statuses) or wait(_PAINT_EVERY_S):
                return


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

    def __call__(self, statuses: Sequence[Status]) -> bool:
        if any(status.living for status in statuses):
            self._lived = self._clock()
            return False
        if not statuses:
            return False
        return self._lived is None or self._clock() - self._lived > _PAUSE_S


class _ended_by_signals:
    """Ctrl-C and SIGTERM end the watching in good order; waiting is what they interrupt."""

    def __enter__(self) -> Callable[[float], bool]:
        ended = threading.Event()
        self._former = {
            number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return ended.wait

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

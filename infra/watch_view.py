"""How a run looks in the terminal: one panel for each job, and the same in one line for a log."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from infra.console import human_bytes, human_duration, human_rate
from infra.metrics import STAGES
from infra.status import BEAT_EVERY_S
from infra.watch_source import Status

_BAR_WIDTH = 40
_LATE_S = 3 * BEAT_EVERY_S  # a busy machine may miss one beat
_N_MESSAGES = 5
_MESSAGE_LENGTH = 300


def number(document: Mapping[str, Any], name: str) -> float | None:
    """A field that is a number; None if it is absent or something else, as in a document of another version."""
    value = document.get(name)
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def numbers(document: Mapping[str, Any], name: str) -> dict[str, float]:
    """A field that is numbers by name; what is none is left out."""
    value = document.get(name)
    if not isinstance(value, dict):
        return {}
    found = {plain(str(key)): number(value, key) for key in value}
    return {key: one for key, one in found.items() if one is not None}


def plain(text: object) -> str:
    """Text of a document without what moves the cursor or colours the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:_MESSAGE_LENGTH]


def is_training(document: Mapping[str, Any]) -> bool:
    """Whether a document is of a training."""
    return "images_done" not in document and any(name in document for name in ("step", "samples_done", "loss"))


def life(status: Status) -> tuple[str, str]:
    """What state a job is in, in words, and in which colour."""
    document, ago = status.document, human_duration(status.age_s)
    state = plain(document.get("state", "unknown"))
    seconds = number(document, "seconds")
    took = f" after {human_duration(seconds)}" if seconds is not None else ""
    if status.lost:
        return f"no longer alive: last sign of life {ago} ago. The same command goes on where it was", "red"
    if status.living:
        late = status.age_s > _LATE_S
        return f"{state}, last sign of life {ago} ago", "yellow" if late else "green"
    cause = document.get("cause")
    if state == "stopped":
        return f"over: stopped{took}, {ago} ago" + (f": {plain(cause)}" if cause else ""), "red"
    if state == "incomplete":
        return f"over: incomplete{took}, {ago} ago. The same command goes on", "yellow"
    return f"over: {state}{took}, {ago} ago", "green"


def progress(document: Mapping[str, Any]) -> tuple[float, float, str] | None:
    """How many of how many, and of what."""
    choices = (("images_done", "images_total", "images"), ("samples_done", "samples_total", "samples"))
    for done, total, unit in (*choices, ("step", "n_steps", "steps")):
        n_done, n_total = number(document, done), number(document, total)
        if n_done is not None and n_total:
            return n_done, n_total, unit
    return None


def figures(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of what a document tells, in the order of their worth."""
    left = number(document, "seconds_left")
    if left is not None:
        yield "time left", human_duration(left)
    yield from _training(document) if is_training(document) else _extraction(document)
    errors = {name: n for name, n in numbers(document, "errors").items() if n}
    yield "errors", ", ".join(f"{name} {n:,.0f}" for name, n in errors.items()) or "none"


def _extraction(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    images, nbytes = number(document, "images_per_s"), number(document, "bytes_per_s")
    if images is not None:
        yield "speed", f"{human_rate(images)} images/s"
    if nbytes is not None:
        yield "written", f"{human_bytes(nbytes)}/s"
    ready, wanted = number(document, "workers_ready"), number(document, "workers_wanted")
    if ready is not None and wanted is not None:
        yield "workers", f"{ready:.0f} of {wanted:.0f} ready"
    elif isinstance(document.get("workers"), str):
        yield "workers", plain(document["workers"])
    shards = numbers(document, "shards")
    if shards:
        yield "shards", ", ".join(f"{n:,.0f} {result}" for result, n in shards.items())
    bad = number(document, "bad_images")
    if bad:
        yield "bad images", f"{bad:,.0f}"


def _training(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    step, n_steps = number(document, "step"), number(document, "n_steps")
    if step is not None:
        yield "step", f"{step:,.0f}" + (f" of {n_steps:,.0f}" if n_steps else "")
    loss, samples = number(document, "loss"), number(document, "samples_per_s")
    if loss is not None:
        yield "loss", f"{loss:.4g}"
    if samples is not None:
        yield "speed", f"{human_rate(samples)} samples/s"
    wait, step_s = number(document, "loader_wait"), number(document, "step_s")
    if wait is not None:
        yield "loader wait", f"{100 * wait:.1f} % of the time"
    if step_s is not None:
        yield "step time", f"{1000 * step_s:.3g} ms"
    amplification, mfu = number(document, "amplification"), number(document, "mfu")
    if amplification is not None:
        yield "amplification", f"{amplification:.2f}"
    if mfu is not None:
        yield "MFU", f"{100 * mfu:.1f} %"


def line(status: Status, name: str) -> str:
    """A job in one line."""
    parts = []
    found = progress(status.document)
    if found:
        done, total, unit = found
        parts.append(f"{100 * done / total:.0f} %, {done:,.0f}/{total:,.0f} {unit}")
    parts += [f"{what} {value}" for what, value in figures(status.document) if (what, value) != ("errors", "none")]
    busy = sorted(numbers(status.document, "busy").items(), key=lambda one: -one[1])
    if busy:
        parts.append("busy: " + ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in busy))
    return f"{name}: {life(status)[0]}; {', '.join(parts)}"


def panel(status: Status, name: str) -> Panel:
    """A job as a panel."""
    document = status.document
    words, colour = life(status)
    parts: list[RenderableType] = []
    found = progress(document)
    if found:
        done, total, unit = found
        row = Table.grid(padding=(0, 2))
        row.add_row(
            ProgressBar(total=total, completed=min(done, total), width=_BAR_WIDTH),
            Text(f"{100 * done / total:.0f} %", style="bold"),
            Text(f"{done:,.0f} of {total:,.0f} {unit}"),
        )
        parts += [row, Text("")]
    told = Table.grid(padding=(0, 2))
    for what, value in figures(document):
        troubled = (what == "errors" and value != "none") or what == "bad images"
        told.add_row(Text(what, style="dim"), Text(value, style="yellow" if troubled else ""))
    busy = _busy(numbers(document, "busy"))
    sides = Table.grid(padding=(0, 6))
    sides.add_row(told, busy) if busy else sides.add_row(told)
    parts.append(sides)
    if document.get("verdict"):
        parts += [Text(""), Text(plain(document["verdict"]), style="bold")]
    messages = document.get("messages")
    if isinstance(messages, list) and messages:
        parts += [Text(""), *(Text(f"· {plain(message)}", style="dim") for message in messages[-_N_MESSAGES:])]
    kind = "training" if is_training(document) else "extraction"
    return Panel(
        Group(*parts),
        title=Text(f"{kind} {name}", style="bold"),
        title_align="left",
        subtitle=Text(words, style=colour),
        subtitle_align="left",
        border_style=colour,
        padding=(1, 2),
    )


def _busy(shares: Mapping[str, float]) -> Table | None:
    """How busy the threads of each stage are; the busiest stands out."""
    if not shares:
        return None
    order = {stage: i for i, stage in enumerate(STAGES)}
    most = max(shares, key=lambda stage: shares[stage])
    table = Table.grid(padding=(0, 2))
    for stage, share in sorted(shares.items(), key=lambda one: order.get(one[0], len(order))):
        style = "bold yellow" if stage == most else "cyan"
        bar = ProgressBar(total=1.0, completed=min(max(share, 0.0), 1.0), width=24, complete_style=style)
        table.add_row(Text(stage, style="bold" if stage == most else "dim"), bar, Text(f"{100 * share:.0f} %"))
    return table


def picture(statuses: Sequence[Status], names: Sequence[str], machines: Sequence[str], notes: Sequence[str]) -> Group:
    """All there is to see."""
    parts: list[RenderableType] = [panel(status, name) for status, name in zip(statuses, names)]
    parts += [Text(f"Ray {plain(machine)}", style="dim") for machine in machines]
    parts += [Text(plain(note), style="yellow") for note in notes]
    return Group(*parts)


def short_names(statuses: Sequence[Status]) -> list[str]:
    """The last two parts of each place, such as digits/train; the whole where two would be the same."""
    short = ["/".join(status.place.rsplit("/", 2)[-2:]) for status in statuses]
    return [name if short.count(name) == 1 else status.place for name, status in zip(short, statuses)]

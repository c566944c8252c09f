"""What a benchmark found: as a table on the terminal, and as JSON and Markdown below benchmarks/results/."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import MachineFacts

RESULTS = Path(__file__).parent / "results"

Cell = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A number that was promised, and what it came to."""

    what: str
    found: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        low = self.at_least is None or self.found >= self.at_least
        return low and (self.at_most is None or self.found <= self.at_most)

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{'met ' if self.met else 'MISSED'}  {self.what}: {_cell(self.found)} (goal {bound})"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark, run once.

    Attributes:
        name: Of the benchmark; part of the file name.
        title: What was measured, one line.
        machine: Where.
        settings: Sizes and choices, enough to run it again.
        rows: The table; all rows have the same columns.
        goals: What was promised.
        notes: How it was counted, what to know when reading it.
        details: Everything measured, for later questions; only in the JSON.
    """

    name: str
    title: str
    machine: MachineFacts
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Cell]]
    goals: Sequence[Goal] = ()
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_text(self) -> str:
        """For a terminal."""
        parts = [self.title, f"{self.machine}", "", *_text_table(self.rows), "", *map(str, self.goals), ""]
        parts += [textwrap.fill(note, 118) for note in self.notes]
        return "\n".join(parts).rstrip() + "\n"

    def to_markdown(self, date: str) -> str:
        """For people who look through results/."""
        versions = ", ".join(f"{name} {number}" for name, number in self.machine.versions.items())
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [f"# {self.title}", "", f"{date}. {self.machine}. {versions}.", "", f"Settings: {settings}.", ""]
        lines += [*_markdown_table(self.rows), ""]
        lines += [f"- {goal}" for goal in self.goals]
        lines += ["", *(f"{note}\n" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def save(self, folder: Path = RESULTS) -> Path:
        """Write `<name>-<machine>-<date>.json` and `.md`; returns the path of the latter."""
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{self.machine.slug}-{date}.md"
        document = {"date": date, **asdict(self)}
        for goal, record in zip(self.goals, document["goals"]):
            record["met"] = goal.met
        path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        path.write_text(self.to_markdown(date))
        return path


def _text_table(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    lines = ["  ".join(cells).rstrip() for cells in _padded(rows)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _markdown_table(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    padded = _padded(rows)
    rule = ["-" * (len(cell) - 1) + (":" if _is_number(rows, name) else "-") for cell, name in zip(padded[0], rows[0])]
    return [f"| {' | '.join(cells)} |" for cells in [padded[0], rule, *padded[1:]]]


def _padded(rows: Sequence[Mapping[str, Cell]]) -> list[list[str]]:
    """Header and rows as text of equal width per column, numbers to the right."""
    columns = []
    for name in rows[0]:
        cells = [name, *(_cell(row[name]) for row in rows)]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if _is_number(rows, name) else cell.ljust(width) for cell in cells])
    return [list(line) for line in zip(*columns)]


def _is_number(rows: Sequence[Mapping[str, Cell]], column: str) -> bool:
    return not any(isinstance(row[column], str) for row in rows)


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"

"""An HTML page that needs nothing but itself: figures as inline SVG, tables with their CSV, no script, no network."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from infra.objects import Put

PAGE = "report.html"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: #22272e;
  background: #ffffff; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .4rem; border-top: 1px solid #d0d7de; padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; min-width: 30rem; height: auto; }
figcaption, .source { font-size: .85rem; color: #57606a; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #eaeef2; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; margin: 0; }
dt { color: #57606a; } dd { margin: 0; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
nav a { margin-right: 1rem; }
details > summary { cursor: pointer; font-size: .9rem; margin: .6rem 0; }
"""

Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the numbers of a figure or table come from.

    Attributes:
        data: Stores and runs.
        n_images: How many images; 0 where the source does not say.
        seed: Of everything random, "0 to 2" of several; None where nothing is.
        command: What made it.
    """

    data: str
    n_images: int
    seed: int | str | None
    command: str

    def __str__(self) -> str:
        seed = "nothing random" if self.seed is None else f"seed {self.seed}"
        images = f"{self.n_images:,} images of " if self.n_images else ""
        return f"{images}{self.data}; {seed}; {self.command}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing: SVG whose axes have names and units, and what it shows in words."""

    title: str
    svg: bytes
    caption: str
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers of one kind; `name` is that of its CSV file. Each row has a cell for every column."""

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures and tables under one heading, with statements before them."""

    title: str
    text: Sequence[str]
    parts: Sequence[Figure | Table]


def table_csv(table: Table) -> str:
    """Header and rows; numbers with all digits, an undefined one as nan, an absent one empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return out.getvalue()


def page_html(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The whole page."""
    links = "".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(sections))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    body = "\n".join(_section(i, section) for i, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser asks its server for one
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n<nav><p>{links}</p></nav>\n{body}\n</body>\n</html>\n"
    )


def save_page(out: Put, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """Put the page, report.html, and each table as tables/<name>.csv; how many of both there are, in words."""
    parts = [part for section in sections for part in section.parts]
    tables = [part for part in parts if isinstance(part, Table)]
    for table in tables:
        out.put(f"tables/{table.name}.csv", table_csv(table).encode())
    out.put(PAGE, page_html(title, facts, sections).encode())
    return f"{len(parts) - len(tables)} figures; {len(tables)} tables"


def _section(number: int, section: Section) -> str:
    text = "".join(f"<p>{escape(line)}</p>" for line in section.text)
    parts = "\n".join(_figure(part) if isinstance(part, Figure) else _table(part) for part in section.parts)
    return f'<section id="s{number}">\n<h2>{escape(section.title)}</h2>\n{text}\n{parts}\n</section>'


def _figure(figure: Figure) -> str:
    # As an image, so that identifiers within one SVG cannot meet those of another.
    data = base64.b64encode(figure.svg).decode()
    return (
        f'<figure>\n<h3>{escape(figure.title)}</h3>\n<div class="scroll"><img alt="{escape(figure.title)}" '
        f'src="data:image/svg+xml;base64,{data}"></div>\n<figcaption>{escape(figure.caption)}'
        f'<br><span class="source">{escape(str(figure.origin))}</span></figcaption>\n</figure>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(_cell(cell))}</td>" for cell in row) + "</tr>" for row in table.rows)
    data = base64.b64encode(table_csv(table).encode()).decode()
    link = f'<a download="{escape(table.name)}.csv" href="data:text/csv;base64,{data}">CSV</a>'
    return (
        f"<details><summary>{escape(table.title)} ({len(table.rows)} rows)</summary>\n"
        f"<p>{escape(table.caption)} {link}<br>"
        f'<span class="source">{escape(str(table.origin))}</span></p>\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

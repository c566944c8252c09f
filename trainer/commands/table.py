"""`make table`: what finished runs and probes found, side by side."""

from collections.abc import Sequence

from infra.console import ExitCode, UserError, say
from infra.objects import ObjectError, Objects, open_objects
from infra.s3_settings import use_endpoint
from trainer.commands.start import DEFAULT_RUNS
from trainer.probes.results import DEFAULT_PROBES
from trainer.table import make_table
from trainer.table_csv import write_csv
from trainer.table_figures import make_figures
from trainer.table_sources import find_results
from trainer.table_text import as_markdown, as_text

DEFAULT_OUT = "data/table"


def table_command(
    *,
    runs: str = DEFAULT_RUNS,
    probes: str = DEFAULT_PROBES,
    out: str = DEFAULT_OUT,
    figures: bool = True,
    endpoint_url: str | None = None,
) -> int:
    """Average finished runs and probes over their seeds and set them beside the teacher and the published numbers.

    Prints the table; saves it as Markdown and CSV, with figures. Refuses what is there twice, and what was measured on
    different data.

    Args:
        runs: Runs, or folders or s3://bucket/prefix with runs at any depth; several with commas between.
        probes: The same for probes.
        out: Folder or s3://bucket/prefix for table.md, table.csv and figures.
        figures: Whether to draw them.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    places = [place.strip() for part in (runs, probes) for place in part.split(",") if place.strip()]
    if not places:
        raise UserError("RUNS and PROBES are empty: give places, such as RUNS=data/runs/digits")
    saved = _open_out(out)
    found = find_results(places)
    table = make_table(found.runs, found.probes)
    files = {"table.md": as_markdown(table).encode(), "table.csv": write_csv(table.rows).encode()}
    if figures:
        files |= make_figures(table, found.runs)
    for name, data in files.items():
        saved.put(name, data)
    print(as_text(table))
    if found.unfinished:
        say(f"\nnot finished, and left out: {', '.join(found.unfinished)}")
    print(f"\nsaved  {saved.location}/: {_listed(files)}")
    return ExitCode.OK


def _open_out(out: str) -> Objects:
    try:
        objects = open_objects(out)
        objects.check_writable()
    except (ObjectError, UserError) as error:
        raise UserError(f"OUT={out}: {error}") from error
    return objects


def _listed(names: Sequence[str] | dict[str, bytes]) -> str:
    return ", ".join(names)

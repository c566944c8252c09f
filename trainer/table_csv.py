"""The results table as CSV: one number a line, every digit of it; read back it is the same table."""

import csv
import dataclasses
import io
import types
import typing
from collections.abc import Sequence
from typing import Any

from infra.console import UserError
from trainer.table import Row

COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_TYPES = typing.get_type_hints(Row)


def write_csv(rows: Sequence[Row]) -> str:
    """The rows, a header before them; what is not known is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_text(getattr(row, name)) for name in COLUMNS] for row in rows)
    return out.getvalue()


def read_csv(text: str) -> list[Row]:
    """The inverse of write_csv.

    Raises:
        UserError: It is no such file; names the first line that is not.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if tuple(header) != COLUMNS:
        raise UserError(f"this is no results table: its columns are {', '.join(header)}; expected {', '.join(COLUMNS)}")
    rows = []
    for line in reader:
        try:
            values: dict[str, Any] = {name: _value(name, text) for name, text in zip(COLUMNS, line, strict=True)}
            rows.append(Row(**values))
        except (ValueError, KeyError) as error:
            raise UserError(f"line {reader.line_num} is no line of a results table: {error}") from error
    return rows


def _text(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> object:
    kinds = typing.get_args(_TYPES[name]) if isinstance(_TYPES[name], types.UnionType) else (_TYPES[name],)
    if not text and types.NoneType in kinds:
        return None
    if kinds[0] is bool:
        return {"True": True, "False": False}[text]
    return kinds[0](text)

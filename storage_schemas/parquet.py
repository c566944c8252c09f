"""Parquet from others, read within bounds: a file of kilobytes may claim, and unpack to, terabytes.

Sizes in a file's footer are what its writer says. Those that readers make room for stand before each page, so all page
headers are looked at first. Text is then read as numbers of a dictionary, and spelled out only if it is not too much.
"""

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_MAX_DEPTH = 8
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12
# Fields of a page's header, and of what it says of its data (parquet.thrift, PageHeader).
_UNCOMPRESSED, _COMPRESSED, _DATA, _N_VALUES = 2, 3, (5, 8), 1
# Fields of the footer, of its row groups, their columns, and what is said of those (FileMetaData).
_ROW_GROUPS, _COLUMNS, _META, _TOTAL_COMPRESSED, _DATA_OFFSET, _DICTIONARY_OFFSET = 4, 1, 3, 7, 9, 11


def read_parquet(data: bytes, schema: list[pa.Schema], *, most_nbytes: int, most_values: int) -> pa.Table:
    """A whole Parquet file of a known form.

    Args:
        data: The file.
        schema: The schemas that it may have, names, types and nulls compared, metadata not.
        most_nbytes: Bytes of its pages, and of all its text, at most.
        most_values: Values of one column at most.

    Raises:
        ValueError: It has other columns, or is larger; nothing of it was unpacked.
        pyarrow.ArrowException, OSError: It is no Parquet file, or a damaged one.
    """
    texts = {field.name for one in schema for field in one if pa.types.is_string(field.type)}
    found = pq.ParquetFile(io.BytesIO(data)).schema_arrow
    if not any(found.equals(one) for one in schema):
        raise ValueError(
            f"columns are {describe_columns(found)}; expected {' or '.join(map(describe_columns, schema))}"
        )
    _check_pages(data, most_nbytes, most_values)
    table = pq.ParquetFile(io.BytesIO(data), read_dictionary=sorted(texts & set(found.names))).read()
    table.validate(full=True)
    n_text = sum(_n_text(chunk) for name in found.names if name in texts for chunk in table[name].chunks)
    if n_text > most_nbytes:
        raise ValueError(f"its text has {n_text:,} bytes when it is spelled out; at most {most_nbytes:,} are read")
    return table.cast(found)


def describe_columns(schema: pa.Schema) -> str:
    """Names and types, for messages."""
    return ", ".join(f"{f.name} {f.type}{'' if f.nullable else ' not null'}" for f in schema)


def _n_text(column: pa.DictionaryArray) -> int:
    return pc.sum(pc.take(pc.binary_length(column.dictionary), column.indices)).as_py() or 0


def _check_pages(data: bytes, most_nbytes: int, most_values: int) -> None:
    """Look at the footer and at all page headers; Arrow's own view of a hostile footer can end the process."""
    footer, _ = _struct(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"), 0)
    held, nbytes, n_values = 0, 0, dict[int, int]()
    for group in _list(footer, _ROW_GROUPS):
        for place, column in enumerate(_list(group, _COLUMNS)):
            meta = column.get(_META) if isinstance(column, dict) else None
            held += _count(meta, _TOTAL_COMPRESSED)
            if held > len(data):  # thousands of columns may name the same pages
                raise ValueError(f"columns of {held:,} bytes and more in a file of {len(data):,}")
            for header in _pages(data, meta):
                nbytes += _count(header, _UNCOMPRESSED)
                here = sum(_count(header[kind], _N_VALUES) for kind in _DATA if kind in header)
                n_values[place] = n_values.get(place, 0) + here
            _check_sums(nbytes, n_values.get(place, 0), most_nbytes, most_values)


def _check_sums(nbytes: int, n_values: int, most_nbytes: int, most_values: int) -> None:
    if n_values > most_values:
        raise ValueError(f"a column of {n_values:,} values; at most {most_values:,} are read")
    if nbytes > most_nbytes:
        raise ValueError(f"its pages unpack to {nbytes:,} bytes; at most {most_nbytes:,} are read")


def _pages(data: bytes, column: Any) -> Iterator[dict[int, Any]]:
    """Headers of the pages of a column chunk, found one after another as readers find them."""
    offsets = [_count(column, _DATA_OFFSET), _count(column, _DICTIONARY_OFFSET) if _DICTIONARY_OFFSET in column else 0]
    place, nbytes = min(filter(None, offsets), default=0), _count(column, _TOTAL_COMPRESSED)
    end = place + nbytes
    if not 0 < place < end <= len(data):
        raise ValueError(f"a column from byte {place:,} to {end:,} of {len(data):,}")
    while place < end:
        header, place = _struct(data, place, 0)
        place += _count(header, _COMPRESSED)
        yield header


def _list(fields: object, field: int) -> list:
    value = fields.get(field) if isinstance(fields, dict) else None
    if not isinstance(value, list):
        raise ValueError(f"a footer with {value!r:.40} in the place of a list")  # noqa: TRY004 - of the file
    return value


def _count(header: object, field: int) -> int:
    """A count in a header, which must be one."""
    value = header.get(field) if isinstance(header, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a page header with {value!r:.40} in the place of a count")
    return value


def _struct(data: bytes, place: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol: integers and structs by field number, and where it ends."""
    if depth > _MAX_DEPTH:
        raise ValueError("a page header that is nested too deeply")
    fields: dict[int, Any] = {}
    field = 0
    while True:
        head, place = _byte(data, place)
        if head == 0:
            return fields, place
        if head >> 4:
            field += head >> 4
        else:
            field, place = _integer(data, place)
        fields[field], place = _value(data, place, head & 15, depth)


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, place
    if kind == _BYTE:
        return _byte(data, place)
    if kind in (_I16, _I32, _I64):
        return _integer(data, place)
    if kind == _DOUBLE:
        return None, place + 8
    if kind == _BINARY:
        nbytes, place = _varint(data, place)
        return None, place + nbytes
    if kind == _STRUCT:
        return _struct(data, place, depth + 1)
    if kind == _LIST:
        return _elements(data, place, depth)
    raise ValueError("a page header with fields that Parquet does not have")


def _elements(data: bytes, place: int, depth: int) -> tuple[list, int]:
    head, place = _byte(data, place)
    n, kind = head >> 4, head & 15
    if n == 15:
        n, place = _varint(data, place)
    values = []
    for _ in range(n):
        value, next_place = _value(data, place, _BYTE if kind in (_TRUE, _FALSE) else kind, depth + 1)
        if next_place <= place or next_place > len(data):
            raise ValueError("a list that is longer than the file")
        place = next_place
        values.append(value)
    return values, place


def _integer(data: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(data, place)
    return (value >> 1) ^ -(value & 1), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, place = _byte(data, place)
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a page header with a number that does not end")


def _byte(data: bytes, place: int) -> tuple[int, int]:
    if not 0 <= place < len(data):
        raise ValueError("a header that is cut off")
    return data[place], place + 1

"""samples.parquet: which image is which row, written once before the first shard."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.errors import SchemaError
from storage_schemas.keys import SAMPLES_KEY

SCHEMA = pa.schema(
    [
        pa.field("sample_index", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a source.

    Attributes:
        sample_id: Its name for ever: path relative to the source, with forward slashes.
        label: Class number.
        class_name: Class folder or name.
        nbytes: Size of the encoded image.
    """

    sample_id: str
    label: int
    class_name: str
    nbytes: int


def samples_to_bytes(samples: Sequence[Sample]) -> bytes:
    """The table as Parquet, rows in store order.

    Raises:
        SchemaError: A name is there twice, or is not text that UTF-8 can hold.
    """
    problems = [f"sample_id {name!r} is there {n} times" for name, n in _repeated(s.sample_id for s in samples)]
    problems += [
        f"sample_id {s.sample_id!r} has bytes that are no UTF-8; rename that file"
        for s in samples
        if not _is_utf8(s.sample_id + s.class_name)
    ]
    if problems:
        raise SchemaError(SAMPLES_KEY, problems)
    table = pa.table(
        [
            pa.array(range(len(samples)), pa.int64()),
            pa.array([s.sample_id for s in samples], pa.string()),
            pa.array([s.label for s in samples], pa.int64()),
            pa.array([s.class_name for s in samples], pa.string()),
            pa.array([s.nbytes for s in samples], pa.int64()),
        ],
        schema=SCHEMA,
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def samples_from_bytes(data: bytes, n_samples: int) -> pa.Table:
    """Parse and check.

    Raises:
        SchemaError: Not Parquet, other columns, other length, or indices that are not 0, 1, 2 ...
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        schema, n_rows = file.schema_arrow, file.metadata.num_rows
        if not schema.equals(SCHEMA):
            raise SchemaError(SAMPLES_KEY, [f"columns are {_columns(schema)}; expected {_columns(SCHEMA)}"])
        if n_rows != n_samples:
            raise SchemaError(SAMPLES_KEY, [f"{n_rows} rows, store.json says {n_samples}"])
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(SAMPLES_KEY, [f"not a Parquet file: {error}"]) from error
    if not np.array_equal(table["sample_index"].to_numpy(), np.arange(n_samples)):
        raise SchemaError(SAMPLES_KEY, ["sample_index is not 0, 1, 2 ..."])
    return table


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name} {f.type}{'' if f.nullable else ' not null'}" for f in schema)


def _repeated(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, n) for name, n in Counter(names).items() if n > 1]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""samples.parquet: which image is which row, written once before the first shard."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

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
    """The table as Parquet, rows in store order."""
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
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(SAMPLES_KEY, [f"not a Parquet file: {error}"]) from error
    if not table.schema.equals(SCHEMA):
        expected = ", ".join(f"{f.name} {f.type}" for f in SCHEMA)
        raise SchemaError(SAMPLES_KEY, [f"columns are {table.schema.names}, expected {expected}"])
    if table.num_rows != n_samples:
        raise SchemaError(SAMPLES_KEY, [f"{table.num_rows} rows, store.json says {n_samples}"])
    if table["sample_index"].to_numpy().tolist() != list(range(n_samples)):
        raise SchemaError(SAMPLES_KEY, ["sample_index is not 0, 1, 2 ..."])
    return table

"""samples.parquet: which image is which row, written once before the first shard."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage_schemas.errors import SchemaError
from storage_schemas.keys import SAMPLES_KEY
from storage_schemas.limits import most_samples_nbytes
from storage_schemas.parquet import read_parquet

SCHEMA = pa.schema(
    [
        pa.field("sample_index", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
    ]
)
#: The same for images that lie in tars.
TAR_SCHEMA = pa.schema(
    [*SCHEMA, pa.field("tar", pa.string(), nullable=False), pa.field("offset", pa.int64(), nullable=False)]
)

_BATCH = 2**14  # samples that are Python objects at any one time


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a source.

    Attributes:
        sample_id: Its name for ever: path relative to the source, with forward slashes.
        label: Class number.
        class_name: Class folder or name.
        nbytes: Size of the encoded image.
        tar: The tar that holds it, relative to the source; None if it is an object of its own.
        offset: First byte of the image in that tar; None likewise.
    """

    sample_id: str
    label: int
    class_name: str
    nbytes: int
    tar: str | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """Samples as columns: a sequence of `Sample` in about 80 bytes each, where a list takes 350.

    Attributes:
        table: The columns of samples.parquet without `sample_index`.
    """

    table: pa.Table

    @staticmethod
    def of(samples: Iterable[Sample]) -> "Samples":
        """Columns of samples that may come one by one: few of them are there as objects at any time.

        Raises:
            SchemaError: A name is not text that UTF-8 can hold, or only some of the samples lie in tars.
        """
        if isinstance(samples, Samples):
            return samples
        rows = iter(samples)
        first = list(islice(rows, _BATCH))
        schema = (TAR_SCHEMA if first and first[0].tar is not None else SCHEMA).remove(0)
        batches = [_to_batch(first, schema)]
        while batch := list(islice(rows, _BATCH)):
            batches.append(_to_batch(batch, schema))
        return Samples(pa.Table.from_batches(batches))

    @staticmethod
    def join(parts: Sequence["Samples"]) -> "Samples":
        """Parts one after another; parts without samples say nothing."""
        filled = [part.table for part in parts if len(part)] or [part.table for part in parts[:1]]
        return Samples(pa.concat_tables(filled)) if filled else Samples.of([])

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> "Samples": ...

    def __getitem__(self, place: int | slice) -> "Sample | Samples":
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        index = range(len(self))[place]  # counts negative ones from the end, and raises IndexError
        return Sample(**{name: self.table[name][index].as_py() for name in self.table.column_names})

    def __iter__(self) -> Iterator[Sample]:
        for batch in self.table.to_batches(max_chunksize=_BATCH):
            for row in batch.to_pylist():
                yield Sample(**row)

    def take(self, places: Sequence[int] | np.ndarray) -> "Samples":
        """The samples at some places, in the order of the places."""
        return Samples(self.table.take(pa.array(places, pa.int64())))

    def sorted_by(self, *columns: pa.ChunkedArray) -> "Samples":
        """In ascending order of the first column, then of the next; text in the order of its code points."""
        return Samples(_sorted(self.table, *columns))


def source_digest(listing: Sequence[Sample]) -> str:
    """What `source_digest` of a spec is: over the sorted names and sizes of a whole source, whatever their order there.

    The sha256 of the canonical JSON of {"samples": [[sample_id, nbytes], ...]}, spelled piece by piece.
    """
    pairs = Samples.of(listing).table.select(["sample_id", "nbytes"])
    pairs = _sorted(pairs, pairs["sample_id"], pairs["nbytes"])
    digest, comma = hashlib.sha256(b'{"samples":['), b""
    for batch in pairs.to_batches(max_chunksize=_BATCH):
        rows = list(zip(batch["sample_id"].to_pylist(), batch["nbytes"].to_pylist()))
        digest.update(comma + json.dumps(rows, separators=(",", ":")).encode()[1:-1])
        comma = b","
    digest.update(b"]}\n")
    return digest.hexdigest()


def repeated_ids(samples: Samples) -> list[tuple[str, int]]:
    """Names that are there more than once, in their order, and how often."""
    names = samples.table["sample_id"]
    if pc.count_distinct(names).as_py() == len(names):
        return []
    counts = pc.value_counts(names)
    return [(count["values"].as_py(), n) for count in counts if (n := count["counts"].as_py()) > 1]


def samples_to_bytes(samples: Sequence[Sample]) -> bytes:
    """The table as Parquet, rows in store order.

    Raises:
        SchemaError: A name is there twice, or is not text that UTF-8 can hold.
    """
    samples = Samples.of(samples)
    repeated = repeated_ids(samples)
    if repeated:
        raise SchemaError(SAMPLES_KEY, [f"sample_id {name!r} is there {n} times" for name, n in repeated])
    table, most = samples.table, most_samples_nbytes(len(samples))
    if table.nbytes > most:
        raise SchemaError(SAMPLES_KEY, [f"{SAMPLES_KEY} has {table.nbytes:,} bytes; at most {most:,} are supported"])
    table = _in_one_piece(table).add_column(0, SCHEMA.field(0), pa.array(np.arange(len(table))))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def samples_from_bytes(data: bytes, n_samples: int) -> pa.Table:
    """Parse and check.

    Raises:
        SchemaError: Not Parquet, other columns, other length, far more than such a table holds, indices that are not
            0, 1, 2 ..., or a name twice.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        schema, n_rows = file.schema_arrow, file.metadata.num_rows
        if not (schema.equals(SCHEMA) or schema.equals(TAR_SCHEMA)):
            expected = f"{_columns(SCHEMA)}, and of images in tars {_columns(list(TAR_SCHEMA)[len(SCHEMA) :])}"
            raise SchemaError(SAMPLES_KEY, [f"columns are {_columns(schema)}; expected {expected}"])
        if n_rows != n_samples:
            raise SchemaError(SAMPLES_KEY, [f"{n_rows} rows, store.json says {n_samples}"])
        most = most_samples_nbytes(n_samples)
        table = read_parquet(data, [schema], most_nbytes=most, most_values=n_samples)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(SAMPLES_KEY, [f"not a Parquet file: {error}"]) from error
    except ValueError as error:
        raise SchemaError(SAMPLES_KEY, [str(error)]) from error
    if not np.array_equal(table["sample_index"].to_numpy(), np.arange(n_samples)):
        raise SchemaError(SAMPLES_KEY, ["sample_index is not 0, 1, 2 ..."])
    if repeated := repeated_ids(samples_of_table(table)):
        raise SchemaError(SAMPLES_KEY, [f"sample_id {name!r:.200} is there {n} times" for name, n in repeated[:10]])
    return table


def samples_of_table(table: pa.Table) -> Samples:
    """The samples of a table as `samples_from_bytes` returns it, or of `store.samples`; other columns are left out."""
    names = (TAR_SCHEMA if "tar" in table.column_names else SCHEMA).names[1:]
    return Samples(table.select(names))


def _sorted(table: pa.Table, *columns: pa.ChunkedArray) -> pa.Table:
    keys = pa.table(list(columns), [str(i) for i in range(len(columns))])
    return table.take(pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names]))


def _in_one_piece(table: pa.Table) -> pa.Table:
    """So that the bytes of its Parquet file do not depend on how it was put together."""
    return table if all(column.num_chunks == 1 for column in table.columns) else table.combine_chunks()


def _to_batch(samples: list[Sample], schema: pa.Schema) -> pa.RecordBatch:
    in_tars = "tar" in schema.names
    mixed = [sample.sample_id for sample in samples if (sample.tar is None) is in_tars]
    if mixed:
        raise SchemaError(SAMPLES_KEY, [f"sample_id {mixed[0]!r}: all samples lie in tars, or none does"])
    try:
        columns = [pa.array(map(attrgetter(field.name), samples), field.type, size=len(samples)) for field in schema]
    except UnicodeEncodeError as error:
        odd = [s.sample_id for s in samples if not _is_utf8(f"{s.sample_id}{s.class_name}{s.tar}")]
        problems = [f"sample_id {name!r} has bytes that are no UTF-8; rename that file" for name in odd]
        raise SchemaError(SAMPLES_KEY, problems) from error
    return pa.record_batch(columns, schema=schema)


def _columns(schema: Iterable[pa.Field]) -> str:
    return ", ".join(f"{f.name} {f.type}{'' if f.nullable else ' not null'}" for f in schema)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

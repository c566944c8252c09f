"""The samples table: round trips, tables that are refused, and a million samples in bounded memory."""

import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_schemas.documents import canonical_json, sha256
from storage_schemas.errors import SchemaError
from storage_schemas.samples import (
    SCHEMA,
    TAR_SCHEMA,
    Sample,
    Samples,
    samples_from_bytes,
    samples_of_table,
    samples_to_bytes,
    source_digest,
)
from tests.storage_schemas.test_format_page import tables
from tests.stores import make_samples
from tests.strategies import names


def in_tars(n: int) -> list[Sample]:
    return [
        Sample(sample_id=f"a{i // 3}.tar/{i}.jpg", label=i % 7, class_name=str(i % 7), nbytes=9 + i, **place)
        for i in range(n)
        for place in [{"tar": f"a{i // 3}.tar", "offset": 1024 * i + 512}]
    ]


@given(st.lists(st.tuples(names, st.integers(-1, 2**40), names, st.integers(0, 2**40)), max_size=20), st.booleans())
def test_samples_round_trip(rows, tars):
    unique = {name: row for name, *row in rows}
    samples = [
        Sample(sample_id=name, label=label, class_name=class_name, nbytes=nbytes, **place)
        for i, (name, (label, class_name, nbytes)) in enumerate(unique.items())
        for place in [{"tar": f"é{i % 2}.tar", "offset": i * 512} if tars else {}]
    ]
    data = samples_to_bytes(samples)
    assert data == samples_to_bytes(Samples.of(samples))
    table = samples_from_bytes(data, len(samples))
    assert table["sample_index"].to_pylist() == list(range(len(samples)))
    assert table.schema.equals(TAR_SCHEMA if tars and samples else SCHEMA)
    assert list(samples_of_table(table)) == samples


@pytest.mark.parametrize("samples", [make_samples(11), in_tars(11)], ids=["objects", "tars"])
def test_columns_are_a_sequence_like_a_list_of_samples(samples):
    columns = Samples.of(iter(samples))
    assert len(columns) == 11
    assert list(columns) == samples
    assert [columns[i] for i in range(-11, 11)] == samples + samples
    assert list(columns[2:9:3]) == samples[2:9:3]
    assert list(columns.take([5, 0, 5])) == [samples[5], samples[0], samples[5]]
    assert list(columns.take(np.array([], int))) == []
    assert columns == Samples.join([columns[:4], columns[:0], columns[4:]])
    assert samples[3] in columns
    for place in (11, -12):
        with pytest.raises(IndexError):
            columns[place]


def test_fields_and_columns_are_those_of_the_page():
    assert list(Sample.__dataclass_fields__) == TAR_SCHEMA.names[1:]
    for rows, fields in zip(tables("Columns of samples.parquet"), (SCHEMA, list(TAR_SCHEMA)[len(SCHEMA) :])):
        assert [(row[0], row[1]) for row in rows] == [(field.name, str(field.type)) for field in fields]
    assert len(tables("Columns of samples.parquet")) == 2


def test_samples_of_one_name_and_names_without_letters_are_refused():
    twice = [*make_samples(3), *make_samples(1)]
    with pytest.raises(SchemaError, match=r"sample_id 'class0/0000.png' is there 2 times"):
        samples_to_bytes(twice)
    odd = Sample(sample_id="class0/\udcff.png", label=0, class_name="class0", nbytes=1)
    with pytest.raises(SchemaError, match=r"bytes that are no UTF-8; rename that file"):
        samples_to_bytes([odd])
    for mixed in ([*make_samples(2), *in_tars(2)], [*in_tars(2), *make_samples(2)]):
        with pytest.raises(SchemaError, match="all samples lie in tars, or none does"):
            samples_to_bytes(mixed)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


SOUND = samples_from_bytes(samples_to_bytes(make_samples(4)), 4)
SOUND_TARS = samples_from_bytes(samples_to_bytes(in_tars(4)), 4)
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 4, [None, pa.py_buffer(np.arange(5, dtype=np.int32)), pa.py_buffer(b"ab\xffd")]
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a Parquet file"),
        (b"PAR1" * 20, "not a Parquet file"),
        (_parquet(SOUND.drop(["label"])), "columns are sample_index int64 not null, sample_id"),
        (_parquet(SOUND.append_column("x", pa.array([1] * 4))), "columns are"),
        (_parquet(SOUND.rename_columns(["a", "b", "c", "d", "e"])), "columns are a int64"),
        (_parquet(pa.table({n: SOUND[n] for n in SOUND.schema.names})), r"columns are .*"),
        (_parquet(SOUND_TARS.drop(["offset"])), "expected .*, and of images in tars tar string not null, offset int64"),
        (_parquet(SOUND.slice(1)), "3 rows, store.json says 4"),
        (_parquet(pa.concat_tables([SOUND.slice(1), SOUND.slice(0, 1)])), "is not 0, 1, 2"),
        (_parquet(SOUND.set_column(1, SCHEMA.field(1), NOT_UTF8)), "not a Parquet file: .*UTF8"),
    ],
)
def test_other_tables_are_refused(data, message):
    with pytest.raises(SchemaError, match=message):
        samples_from_bytes(data, 4)


@given(st.dictionaries(names, st.integers(0, 2**62), max_size=30), st.randoms(use_true_random=False))
def test_the_source_digest_is_of_the_sorted_names_and_sizes(sizes, rng):
    pairs = list(sizes.items())
    rng.shuffle(pairs)
    samples = [Sample(sample_id=name, label=0, class_name="x", nbytes=nbytes) for name, nbytes in pairs]
    expected = sha256(canonical_json({"samples": sorted([s.sample_id, s.nbytes] for s in samples)}))
    assert source_digest(samples) == expected


def test_the_source_digest_never_changes():
    """The values that stores written before have; several pieces of JSON, so that joints between them are seen."""
    samples = [
        Sample(sample_id=f'n{i % 1000:04d}/é{i}"\\\n.JPEG', label=0, class_name="", nbytes=i) for i in range(40_000)
    ]
    random.Random(0).shuffle(samples)
    assert source_digest(samples) == "1061e2c6b4f2ec32367ed67e276df65ed226c7002337b55ca749b98a8e7bfb42"
    assert source_digest([]) == "24a2958cf79f565136959e589c41b21c405ca77e9f574cf6b83897b042915109"


@pytest.mark.parametrize("make", [make_samples, in_tars], ids=["objects", "tars"])
def test_samples_take_few_bytes_and_their_order_in_memory_does_not_show(make):
    samples = make(40_000)
    columns = Samples.of(iter(samples))
    assert columns.table.nbytes / len(columns) < 80
    order = np.random.default_rng(0).permutation(len(columns))
    shuffled = columns.take(order)
    assert source_digest(shuffled) == source_digest(columns)
    assert samples_to_bytes(shuffled) == samples_to_bytes([samples[place] for place in order])
    assert list(shuffled.sorted_by(shuffled.table["sample_id"])) == sorted(samples, key=lambda s: s.sample_id)

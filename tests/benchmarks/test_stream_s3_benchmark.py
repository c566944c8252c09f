"""The S3 stream benchmark compares equal work and leaves nothing behind."""

import os
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import stream_s3
from storage_schemas import Span, open_store
from tests.stores import make_spec, write_planted


@pytest.mark.s3
def test_stream_and_plain_gets_are_reported_side_by_side() -> None:
    before = dict(os.environ)
    result = stream_s3.run(stream_s3.QUICK)
    assert dict(os.environ) == before
    (row,) = result.rows
    assert (row["precision"], row["threads"]) == ("int8", 32)
    assert row["ratio"] == row["stream, samples/s"] / row["plain GETs, samples/s"]
    assert result.goals == []


def test_plain_gets_are_those_of_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infra.objects import FolderObjects

    write_planted(FolderObjects(tmp_path), make_spec(precision="int8"))
    store, seen = open_store(tmp_path), Counter[tuple[str, int, int]]()

    def get(store, location, buffer) -> None:
        seen[location.key, location.offset, location.nbytes] += 1

    monkeypatch.setattr(stream_s3, "_get", get)
    assert stream_s3._plain_gets(store, Span(0, 1), 3) == store.n_samples
    with stream_s3._stream(store, Span(0, 1), 2) as one_pass:
        assert one_pass() == store.n_samples
    assert sum(seen.values()) == len(seen) == 2 * 4 * store.spec.n_chunks

    def fail(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(stream_s3, "_get", fail)
    with pytest.raises(OSError, match="gone"):
        stream_s3._plain_gets(store, Span(0, 1), 3)

"""The stream benchmark runs, every loader delivers the planted numbers, and the report is written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import stream
from benchmarks.peers import Batch, Part
from benchmarks.stream_data import StreamData, make_spec, planted_states, write_stream_data

# webdataset leaves its tars to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"),
]
CONTESTANTS = stream.contestants(stream.QUICK, 1 << 20)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StreamData:
    spec = make_spec(stream.QUICK.n_samples, stream.QUICK.span, small=True)
    return write_stream_data(tmp_path_factory.mktemp("stream"), spec, stream.QUICK.span)


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=[contestant.name for contestant in CONTESTANTS])
def test_every_loader_delivers_every_sample_bit_for_bit(contestant, data):
    for setting in contestant.settings:
        with contestant.loader(data, **setting) as one_pass:
            for _ in range(2):  # buffers are used again
                stream.check_numbers(data, one_pass, n_compared=data.spec.n_samples)


def batches(data: StreamData, rows: list[int], change: float = 0.0):
    for row in rows:
        states = planted_states(data.spec, range(row, row + 1))
        states[0, 1, 2, 3] += change
        yield Batch(sample_index=[row], parts=[Part(kind="tokens", state=None, values=states)])


def test_the_check_would_notice_a_wrong_number_a_lost_and_a_repeated_sample(data):
    rows = list(range(data.spec.n_samples))
    stream.check_numbers(data, lambda: batches(data, rows), n_compared=len(rows))
    with pytest.raises(AssertionError, match="not what was planted"):
        stream.check_numbers(data, lambda: batches(data, rows, change=1e-3), n_compared=len(rows))
    with pytest.raises(AssertionError, match="71 samples came"):
        stream.check_numbers(data, lambda: batches(data, rows[:-1]))
    with pytest.raises(AssertionError, match="71 different"):
        stream.check_numbers(data, lambda: batches(data, [0, *rows[:-1]]))


def test_the_same_states_are_float32_in_the_reference_and_need_rounding():
    states = planted_states(make_spec(2, stream.SPAN, small=True), range(2))
    assert not np.array_equal(states.astype(np.float16).astype(np.float32), states)


def test_a_failing_reader_thread_is_heard(data, tmp_path):
    lost = replace(data, tars=(*data.tars, tmp_path / "missing.tar"))
    loader = next(contestant.loader for contestant in CONTESTANTS if contestant.name == "webdataset")
    with loader(lost, threads=2) as one_pass, pytest.raises(FileNotFoundError):
        stream.consume(one_pass)


@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_run_reports_every_loader_and_writes_no_place_or_host(tmp_path: Path):
    data_folder, out = tmp_path / "data", tmp_path / "out"
    data_folder.mkdir()
    config = replace(stream.QUICK, n_samples=40)
    result = stream.run(config, data_folder)
    assert not any(data_folder.iterdir())  # temporary data is gone
    assert {row["loader"] for row in result.rows} == {contestant.name for contestant in CONTESTANTS}
    limit = next(row for row in result.rows if row["loader"] == stream.LIMIT)
    assert limit["of the limit"] == 1.0
    assert [goal.what for goal in result.goals if goal.met] == ["bytes fetched / bytes needed"]
    markdown = result.save(out)
    document = json.loads(markdown.with_suffix(".json").read_text())
    assert document["goals"][0]["met"] is True
    assert set(document["details"]["samples_per_s"]) == {contestant.name for contestant in CONTESTANTS}
    for text in (markdown.read_text(), markdown.with_suffix(".json").read_text()):
        assert str(tmp_path) not in text
    assert markdown.read_text().count("\n| ") == len(CONTESTANTS) + 2

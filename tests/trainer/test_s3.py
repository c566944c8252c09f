"""Streams and runs on S3: the same numbers as from a folder, no request more than needed, resumed after a kill."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save

from infra.console import ExitCode, run_door
from infra.objects import FolderObjects, ObjectAccessError, open_objects
from infra.s3 import S3Objects
from storage_schemas import open_store
from storage_schemas.from_arrays import write_store
from storage_schemas.reader import Store
from tests.fault_proxy import Entry
from tests.s3_servers import S3Server, anonymous_environment, read_only_environment, settings_of
from tests.stores import as_stored, make_samples, make_spec, planted_states, write_planted
from tests.trainer.ranks import start_process
from tests.trainer.streaming import wait_until
from tests.trainer.test_resume import assert_same_run, train_slowly, wait_for
from tests.trainer.test_stream import PEAK
from tests.trainer.tiny import CPU, tiny_config, tiny_teacher, write_tiny_pair
from trainer.__main__ import main
from trainer.commands.start import default_run
from trainer.data import open_training_data
from trainer.run_files import RunFiles
from trainer.stream import LayerSliceStream, Span
from trainer.train import train

Door = Callable[..., tuple[int, str, str]]


@pytest.fixture
def door(capsys: pytest.CaptureFixture[str]) -> Door:
    """Trains through the door; returns exit code, standard output and standard error."""

    def run(**options: object) -> tuple[int, str, str]:
        arguments = ["train", "--device", "cpu", "--block", "0-2"]
        for name, value in options.items():
            arguments += [f"--{name}", str(value)]
        code = run_door(lambda: main(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def entries_below(server: S3Server, location: str, key: str = "") -> list[Entry]:
    """The server's log of the requests for objects below a place."""
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    return [entry for entry in server.proxy.entries(key=f"^{prefix}/.*{key}") if entry.bucket == bucket]


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_span_takes_one_get_for_each_chunk(
    s3_server: S3Server, s3_location: str, precision: str, backend: str
) -> None:
    spec = make_spec(n_samples=45, precision=precision, backend=backend)
    write_planted(open_objects(s3_location), spec, {5: "truncated"})
    store = open_store(s3_location)
    n_before = len(entries_below(s3_server, s3_location))
    with LayerSliceStream(store, Span(1, 2), batch_size=8) as stream:
        for batch in stream:
            assert np.array_equal(batch.to().activations.numpy(), _local(store, batch.sample_index))
        assert stream.amplification == 1.0
        fetched = stream.bytes_fetched
    sent = entries_below(s3_server, s3_location)[n_before:]
    prefix = s3_location.removeprefix("s3://").partition("/")[2]
    expected: Counter[tuple[str, str]] = Counter()
    for kind in ("cls", "registers", "patches", *(["patches_scale"] if precision == "int8" else [])):
        for layer in (1, 2):
            for chunk in range(store.spec.n_chunks):
                at = store.chunk(layer, kind, chunk)
                expected[f"{prefix}/{at.key}", f"bytes={at.offset}-{at.offset + at.nbytes - 1}"] += 1
    assert Counter((entry.key, entry.range) for entry in sent) == expected
    assert {(entry.method, entry.status) for entry in sent} == {("GET", 206)}
    assert sum(entry.nbytes_out for entry in sent) == fetched


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ViT-B/14's size: two layers of 56 samples, 16 to a chunk."""
    size = {"layers": (0, 1), "dim": 768, "n_registers": 4, "grid": (16, 16), "n_samples": 56}
    place = tmp_path_factory.mktemp("vit_b")
    write_planted(FolderObjects(place), make_spec(**size, samples_per_shard=32, samples_per_chunk=16))
    return place


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)
def test_bytes_fetched_are_bytes_needed_at_vit_b_size(vit_b: Path, s3_server: S3Server, s3_location: str) -> None:
    """By the server's own count, for a span, for CLS alone, for random samples."""
    there, local = open_objects(s3_location), FolderObjects(vit_b)
    for info in local.list():
        there.put(info.key, local.get(info.key))
    store, here = open_store(s3_location), open_store(vit_b)
    chosen = np.random.default_rng(0).choice(56, 3, replace=False).tolist()

    def stream_span() -> None:
        with LayerSliceStream(store, Span(0, 1)) as stream:
            for batch in stream:
                assert np.array_equal(batch.to().activations[:2], here.read(samples=batch.sample_index[:2]))

    every, whole = range(store.spec.n_chunks), ("cls", "registers", "patches")
    for use, kinds, chunks in (
        (stream_span, whole, every),
        (lambda: _same(store, here, tokens="cls"), ("cls",), every),
        (lambda: _same(store, here, samples=chosen), whole, {sample // 16 for sample in chosen}),
    ):
        n_before = len(entries_below(s3_server, s3_location))
        use()
        sent = entries_below(s3_server, s3_location)[n_before:]
        needed = sum(store.chunk(layer, kind, chunk).nbytes for layer in (0, 1) for kind in kinds for chunk in chunks)
        fetched = sum(entry.nbytes_out for entry in sent)
        assert 1 <= fetched / needed <= 1.02
        assert len(sent) == 2 * len(kinds) * len(chunks)


def _same(store: Store, other: Store, **request: Any) -> None:
    assert np.array_equal(store.read(**request), other.read(**request))


def _local(store: Store, samples: np.ndarray) -> np.ndarray:
    """The same numbers by another road than the stream's."""
    rows = np.concatenate([planted_states(store.spec, range(int(i), int(i) + 1)) for i in samples])
    return as_stored(store.spec, rows)[:, 1:3]


def test_an_object_that_cannot_be_read_is_named(s3_server: S3Server, s3_location: str) -> None:
    write_planted(open_objects(s3_location), make_spec(n_samples=45))
    store = open_store(s3_location)
    refused = s3_server.proxy.injected("403", "GET", "layer_01/patches/c/3", times=None)
    named = pytest.raises(ObjectAccessError, match=f"{s3_location}/layer_01/patches/c/3.*403")
    with refused, LayerSliceStream(store, Span(0, 1), batch_size=8) as stream, named:
        for _ in stream:
            pass
    passing = s3_server.proxy.injected("503", "GET", "layer_01/patches", times=3)
    with passing, LayerSliceStream(store, Span(0, 1), batch_size=8) as stream:
        assert sum(len(batch) for batch in stream) == 45


def test_close_does_not_wait_for_a_server_that_hangs(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do the threads that are left behind ask again, once their requests have come to an end."""
    monkeypatch.setattr("trainer.chunk_reader._JOIN_S", 0.5)
    location = f"s3://{s3_server.make_bucket()}/store"
    with s3_server.faulty() as proxy:
        objects = S3Objects(location, settings=settings_of(proxy.endpoint), stall_s=20.0)
        write_planted(objects, make_spec(n_samples=45))
        stalled = proxy.inject("stall", "GET", "layer_01/patches", times=None)
        stream = LayerSliceStream(open_store(objects), Span(0, 1), batch_size=8, threads=2)

        def close() -> None:
            wait_until(lambda: stalled.n_hit > 0, "a read hangs")
            stream.close()

        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(RuntimeError, match="closed"):
            next(stream)
        closing.join()
        assert any(thread.name.startswith("stream-reader") for thread in threading.enumerate()), "it waited for them"
    wait_for_threads(240)  # the server is gone now
    said = capsys.readouterr().err
    assert f"{location}: some reads hang; they are left behind" in said
    assert "again in" not in said


def wait_for_threads(seconds: float) -> None:
    """Until no reading thread is left."""
    deadline = time.monotonic() + seconds
    while any(thread.name.startswith("stream-reader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_measured_peak_stays_under_the_statement_from_s3(moto: S3Server) -> None:
    location = f"s3://{moto.make_bucket()}/store"
    sizes = {"dim": 128, "grid": (16, 16), "n_samples": 320, "samples_per_shard": 64, "samples_per_chunk": 16}
    spec = make_spec(**sizes)
    states = planted_states(spec, range(64))
    objects = S3Objects(location, settings=settings_of(moto.endpoint))
    write_store(objects, spec, make_samples(320), lambda rows: states[: len(rows)])
    command = [sys.executable, "-c", PEAK, "compiled", location]
    environment = {**os.environ, **moto.environment}
    *_, measured, stated = subprocess.check_output(command, env=environment, text=True).split()
    assert 0.4 * int(stated) < int(measured) <= int(stated)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("s3_server", ["moto"], indirect=True)  # tests of the door and of streams see both
def test_training_on_s3_is_training_in_a_folder(s3_location: str, tmp_path: Path) -> None:
    """Store and RUN on S3, another process killed in the middle: the same run, bit for bit."""
    store = write_tiny_pair(f"{s3_location}/store")
    run = RunFiles(open_objects(f"{s3_location}/runs/x"))
    objects = open_objects(f"{s3_location}/runs/x/checkpoints")
    process = start_process(train_slowly, store, run.location)
    wait_for(lambda: any(info.key == "000000006.json" for info in objects.list()), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert run.read_result() is None
    assert train(tiny_config(), open_training_data(store, "0-2"), run, machine=CPU) is not None
    local = write_tiny_pair(tmp_path / "store")
    expected = RunFiles(FolderObjects(tmp_path / "run"))
    train(tiny_config(), open_training_data(local, "0-2"), expected, machine=CPU)
    assert_same_run(run, expected)


def test_the_door_on_s3(door: Door, s3_location: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store, run = write_tiny_pair(f"{s3_location}/store"), f"{s3_location}/runs/x"
    head = tiny_teacher().head
    assert head is not None
    open_objects(s3_location).put("head.safetensors", save(head.state_dict()))
    options = {"store": store, "run": run, "steps": 6, "head": f"{s3_location}/head.safetensors"}
    code, out, err = door(**options)
    assert code == ExitCode.OK, err
    assert f"run: {run}" in err
    for part in (
        f"weights     {run}/block.safetensors",
        f"--logdir {s3_location}/runs\n",
        f"STORE={store} HEAD={s3_location}/head.safetensors",
        "untrained block",
    ):
        assert part in out
    keys = {info.key for info in open_objects(run).list()}
    assert {"config.json", "metrics.jsonl", "block.safetensors", "result.json", "checkpoints/000000006.json"} <= keys
    assert "heartbeat.json" not in keys
    events = EventAccumulator(f"{run}/tensorboard").Reload()
    lines = RunFiles(open_objects(run)).read_metrics()
    assert [event.step for event in events.Scalars("train/loss")] == [line["step"] for line in lines if "loss" in line]
    code, again, _ = door(**options)
    assert (code, "finished; there is nothing to do" in again) == (ExitCode.OK, True)


@pytest.mark.parametrize(
    ("become", "s3_server"),
    [(read_only_environment, "moto"), (anonymous_environment, "rclone")],
    indirect=["s3_server"],
    ids=["read-only, moto", "anonymous, rclone"],
)
def test_reading_needs_no_right_to_write(
    become: Callable[[S3Server, str], dict[str, str]],
    door: Door,
    s3_server: S3Server,
    s3_location: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With read-only credentials or none: a RUN there is refused, one here is trained, and nothing there changes."""
    store, run = write_tiny_pair(f"{s3_location}/store"), f"{s3_location}/runs/x"
    n_before = len(entries_below(s3_server, s3_location))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in become(s3_server, s3_location.split("/")[2]).items():
        monkeypatch.setenv(name, value)
    code, _, err = door(store=store, run=run, steps=4)
    assert code == ExitCode.BAD_INPUT
    assert f"RUN={run} may not be written: " in err
    assert "403" in err
    code, _, err = door(store=store, run=tmp_path / "run", steps=4)
    assert code == ExitCode.OK, err
    sent = entries_below(s3_server, s3_location, "store/")[n_before:]
    assert {entry.method for entry in sent} <= {"GET", "HEAD", "LIST"}
    assert len(sent) > 10


def test_default_run_of_a_store_on_s3_is_local() -> None:
    assert default_run("s3://bucket/digits", "0-7", 3) == "data/runs/digits/0-7-seed3"
    assert default_run("s3://bucket/a/imagenet/train/", "7-10", 0) == "data/runs/imagenet-train/7-10-seed0"
    assert default_run("s3://bucket", "7-10", 0) == "data/runs/bucket/7-10-seed0"

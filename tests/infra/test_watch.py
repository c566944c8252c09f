"""`make watch` shows what a job's documents and metrics say, says when a run is over or lost, and only reads."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from infra.memory_objects import MemoryObjects
from infra.objects import FolderObjects
from infra.running_ray import Value
from infra.status import DEAD_AFTER_S, status_document
from infra.watch import Over, Seen
from infra.watch_source import LOOK_EVERY_S, RATES_OVER_S, Place, Scrape, Status, machines
from infra.watch_view import line, panel, short_names

NOW = 1_800_000_000.0
EXTRACTION = {
    "state": "running",
    "images_done": 640,
    "images_total": 1438,
    "images_per_s": 41.25,
    "bytes_per_s": 5_300_000,
    "seconds_left": 19.3,
    "seconds": 25.0,
    "workers_ready": 1,
    "workers_wanted": 2,
    "shards": {"done": 5, "retried": 1, "quarantined": 0},
    "errors": {"store throttled": 3, "network reset": 0},
    "bad_images": 2,
    "busy": {"decode": 0.12, "device": 0.91, "write": 0.3},
    "verdict": "limited by device, busy 91 % of the time; a faster device or more workers would help",
    "messages": ["shard 3 will be tried again"],
}
TRAINING = {
    "state": "running",
    "step": 300,
    "n_steps": 1000,
    "samples_done": 9600,
    "samples_total": 32000,
    "samples_per_s": 812.0,
    "loss": 0.03125,
    "loader_wait": 0.034,
    "step_s": 0.0391,
    "amplification": 1.07,
    "seconds_left": 27.6,
    "messages": [],
}


def put(objects, key: str, document: dict, *, at: float = NOW) -> None:
    objects.put(key, status_document(run_id="r", now=at, **document))


def drawn(status: Status) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(panel(status, short_names([status])[0]))
    return console.file.getvalue()


def test_an_extraction_shows_all_its_figures():
    shown = drawn(Status(place="data/stores/digits/train", document=EXTRACTION, age_s=4.0))
    for words in (
        *(
            "extraction digits/train",
            "45 %",
            "640 of 1,438 images",
            "19 s",
            "41.2 images/s",
            "5.3 MB/s",
            "1 of 2 ready",
        ),
        *("5 done, 1 retried, 0 quarantined", "store throttled 3", "91 %", "limited by device", "tried again"),
        "running, last sign of life 4.0 s ago",
    ):
        assert words in shown, words
    assert "network reset" not in shown


def test_a_training_shows_all_its_figures():
    shown = drawn(Status(place="data/runs/digits/0-7", document={**TRAINING, "mfu": 0.41}, age_s=1.0))
    for words in (
        *(
            "training digits/0-7",
            "30 %",
            "300 of 1,000",
            "0.03125",
            "812 samples/s",
            "3.4 % of the time",
            "39.1 ms",
            "1.07",
            "41.0 %",
        ),
        "28 s",
    ):
        assert words in shown, words


@pytest.mark.parametrize(
    ("state", "age_s", "words"),
    [
        ("running", 25.0, "running, last sign of life 25 s ago"),
        ("running", 93.0, "no longer alive: last sign of life 1 min 33 s ago"),
        ("complete", 7200.0, "over: complete after 25 s, 2 h 00 min ago"),
        ("incomplete", 5.0, "over: incomplete after 25 s, 5.0 s ago. The same command goes on"),
        ("stopped", 5.0, "over: stopped after 25 s, 5.0 s ago: the disk is full"),
    ],
)
def test_it_says_whether_a_run_lives(state, age_s, words):
    document = {**EXTRACTION, "state": state, "cause": "the disk is full"}
    status = Status(place="a/train", document=document, age_s=age_s)
    assert words in line(status, "a/train")
    assert words in drawn(status)
    assert status.living == (state == "running" and age_s < DEAD_AFTER_S)


def test_a_document_of_another_version_is_shown_as_far_as_it_goes():
    odd = {
        "state": 3,
        "images_done": "many",
        "images_total": None,
        "busy": [1],
        "shards": {"done": "x", "lost": 2},
        "messages": "no list",
        "verdict": "\x1b[2J[bold]not markup[/bold]",
        "loss": float("nan"),
    }
    shown = drawn(Status(place="a", document=odd, age_s=1.0))
    assert "[bold]not markup[/bold]" in shown
    assert "\x1b" not in shown
    assert "2 lost" in shown
    assert "over: 3" in line(Status(place="a", document=odd, age_s=1.0), "a")


class Counting(MemoryObjects):
    """Counts requests, and refuses all that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.read = 0, 0

    def list_folder(self, prefix: str = ""):
        self.listed += 1
        return super().list_folder(prefix)

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        self.read += 1
        return super().get(key, at_most=at_most)


def test_runs_are_found_in_a_store_in_its_splits_and_in_folders_of_runs():
    for keys in (
        ["log/20260101T000000-1-a/status.json"],
        ["train/log/20260101T000000-1-a/status.json", "val/log/20260101T000000-1-a/status.json"],
        ["digits/train/log/20260101T000000-1-a/status.json"],
        ["status.json"],
        ["log/status.json"],
        ["0-7/log/status.json", "7-10/log/status.json"],
    ):
        objects = MemoryObjects()
        for key in keys:
            put(objects, key, EXTRACTION)
        found = Place("s3://b/x", objects=objects, clock=lambda: NOW + 2).read()
        assert len(found) == len(keys), keys
        assert all(status.age_s == 2.0 for status in found)


def test_the_objects_of_a_store_are_not_searched():
    objects = Counting()
    put(objects, "train/log/20260101T000000-1-a/status.json", EXTRACTION)
    objects.put("train/layer_00/patches/0", b"x")
    place = Place("s3://b/x", objects=objects, clock=lambda: NOW)
    place.read()
    assert objects.listed == 3  # the place, its split, the split's log
    assert objects.read == 1


def test_of_ended_runs_the_newest_is_shown_and_read_only_once():
    objects, clock = Counting(), [NOW]
    for day in range(1, 9):
        put(objects, f"log/2026010{day}T000000-1-a/status.json", {**EXTRACTION, "state": "complete"}, at=NOW - 9 + day)
    place = Place("s3://b/x", objects=objects, clock=lambda: clock[0])
    (first,) = place.read()
    n_read = objects.read
    clock[0] += 3
    (again,) = place.read()
    assert (first.age_s, again.age_s) == (1.0, 4.0)
    assert objects.read == n_read


def test_a_new_run_is_seen_and_the_old_one_goes():
    objects, clock = MemoryObjects(), [NOW]
    put(objects, "log/20260101T000000-1-a/status.json", {**EXTRACTION, "state": "complete"})
    place = Place("s3://b/x", objects=objects, clock=lambda: clock[0])
    assert not place.read()[0].living
    clock[0] += LOOK_EVERY_S + 1
    put(objects, "log/20260102T000000-1-b/status.json", EXTRACTION, at=clock[0])
    (found,) = place.read()
    assert found.living


@pytest.mark.parametrize("key", ["log/status.json", "status.json", "digits/0-7/log/status.json"])
def test_a_training_that_is_resumed_is_seen_in_the_document_that_said_it_had_ended(key):
    objects, clock = MemoryObjects(), [NOW]
    place = Place("s3://b/x", objects=objects, clock=lambda: clock[0])
    for state in ("running", "incomplete", "running", "complete"):
        clock[0] += 3
        put(objects, key, {**TRAINING, "state": state}, at=clock[0])
        for _ in range(2):
            (found,) = place.read()
            assert found.document["state"] == state
            assert found.living == (state == "running")


def test_torn_foreign_and_missing_documents_are_nothing():
    objects = MemoryObjects()
    for name, text in {"a": b'{"time": 1', "b": b"[]", "c": b'{"time": "x"}', "d": b"3"}.items():
        objects.put(f"log/{name}/status.json", text)
    objects.put("log/claims/7.json", b"{}")
    assert Place("s3://b/x", objects=objects).read() == []


def test_a_read_only_folder_is_enough(tmp_path):
    put(FolderObjects(tmp_path), "train/log/20260101T000000-1-a/status.json", EXTRACTION)
    before = sorted(tmp_path.rglob("*"))
    (found,) = Place(str(tmp_path), clock=lambda: NOW).read()
    assert found.place == f"{tmp_path}/train"
    assert sorted(tmp_path.rglob("*")) == before


def extraction_values(images: float, decode: float, **more: float) -> list[Value]:
    store = {"store": "digits/train"}
    return [
        Value(name="ray_activations_images_total", labels={**store, "WorkerId": "1"}, value=images / 2),
        Value(name="ray_activations_images_total", labels={**store, "WorkerId": "2"}, value=images / 2),
        Value(name="ray_activations_written_bytes_total", labels=store, value=images * 1000),
        Value(name="ray_activations_stage_seconds_total", labels={**store, "stage": "decode"}, value=decode),
        Value(name="ray_activations_stage_lanes", labels={**store, "stage": "decode"}, value=4.0),
        Value(name="ray_activations_planned_images", labels=store, value=1000.0),
        Value(name="ray_activations_committed_images", labels=store, value=images),
        Value(name="ray_activations_workers_ready", labels=store, value=2.0),
        Value(name="ray_activations_workers_wanted", labels=store, value=2.0),
        Value(name="ray_activations_shards_total", labels={**store, "result": "done"}, value=images / 100),
        Value(
            name="ray_activations_errors_total",
            labels={**store, "where": "store", "kind": "throttled"},
            value=more.get("errors", 0.0),
        ),
    ]


def test_metrics_alone_make_the_same_picture():
    clock = [100.0]
    scrape = Scrape(clock=lambda: clock[0])
    scrape.statuses(extraction_values(200, 10))
    clock[0] += 10
    scrape.statuses(extraction_values(200, 10))  # Ray has not renewed its numbers: no rate of zero
    clock[0] += 10
    (found,) = scrape.statuses(extraction_values(600, 70, errors=3))
    assert found.living
    document = found.document
    assert document["images_per_s"] == pytest.approx(400 / 20)
    assert document["bytes_per_s"] == pytest.approx(400_000 / 20)
    assert document["busy"] == {"decode": pytest.approx(60 / 20 / 4)}
    assert document["seconds_left"] == pytest.approx(400 / 20)
    assert document["shards"] == {"done": 6.0}
    assert "store throttled 3" in line(found, "x")
    assert "2 of 2 ready" in line(found, "x")


def of_driver(driver: str, values: list[Value]) -> list[Value]:
    return [replace(value, labels={**value.labels, "WorkerId": driver}) for value in values]


def test_of_two_drivers_that_fill_one_store_workers_and_lanes_are_added():
    clock = [0.0]
    scrape = Scrape(clock=lambda: clock[0])
    scrape.statuses(of_driver("1", extraction_values(100, 10)) + of_driver("2", extraction_values(200, 20)))
    clock[0] = 20.0
    both = of_driver("1", extraction_values(300, 70)) + of_driver("2", extraction_values(500, 100))
    (found,) = scrape.statuses(both)
    assert found.document["workers_ready"] == found.document["workers_wanted"] == 4.0
    assert found.document["busy"] == {"decode": pytest.approx((60 + 80) / 20 / (4 + 4))}
    assert found.document["images_done"] == 500.0  # both know of the same store, one of them more
    assert found.document["images_total"] == 1000.0


def test_what_grows_once_a_minute_has_its_mean_rate_while_others_change_all_the_time():
    clock = [0.0]
    scrape = Scrape(clock=lambda: clock[0])
    rates = []
    for second in range(0, 1200, 5):
        clock[0] = float(second)
        images = min(second, 600) // 60 * 120  # a shard a minute, for ten minutes; errors for ever
        (found,) = scrape.statuses(extraction_values(images, images / 60, errors=second))
        rates.append(found.document.get("images_per_s"))
    assert rates[0] is None
    settled = rates[60:120]  # from minute 5 to 10
    assert min(settled) == pytest.approx(2.0, rel=0.21)
    assert max(settled) == pytest.approx(2.0, rel=0.21)
    assert rates[-1] == 0.0  # and none of them of more than five minutes ago


def test_a_rate_falls_to_zero_when_all_stands_still():
    clock = [0.0]
    scrape = Scrape(clock=lambda: clock[0])
    for second in range(0, 60, 10):
        clock[0] = float(second)
        scrape.statuses(extraction_values(10 * second, second))
    for second in range(60, 60 + int(RATES_OVER_S) + 100, 5):
        clock[0] = float(second)
        (found,) = scrape.statuses(extraction_values(500, 50))
    assert found.document["images_per_s"] == 0.0


def test_a_counter_that_falls_as_its_node_is_gone_gives_no_negative_rate():
    clock = [0.0]
    scrape = Scrape(clock=lambda: clock[0])
    one, two = (of_driver(name, extraction_values(1000, 10)) for name in "12")
    scrape.statuses(one + two)
    clock[0] = 10.0
    (found,) = scrape.statuses(one)
    assert "images_per_s" not in found.document
    clock[0] = 20.0
    (found,) = scrape.statuses(of_driver("1", extraction_values(1050, 11)))
    assert found.document["images_per_s"] == pytest.approx(5.0)


def test_training_metrics_make_the_same_picture():
    def values(t: float) -> list[Value]:
        numbers = {
            "steps_total": 10 * t,
            "samples_total": 320 * t,
            "loader_wait_seconds_total": 0.25 * t,
            "step_seconds_total": 0.75 * t,
            "fetched_bytes_total": 3 * t,
            "needed_bytes_total": 2 * t,
            "loss": 0.5,
            "planned_samples": 32000,
            "done_samples": 320 * (t + 30),  # it has been resumed, and its counters began at zero
            "done_steps": 10 * (t + 30),
        }
        return [
            Value(name=f"ray_activations_train_{name}", labels={"run": "r", "block": "0-7"}, value=float(value))
            for name, value in numbers.items()
        ]

    clock = [0.0]
    scrape = Scrape(clock=lambda: clock[0])
    scrape.statuses(values(10))
    clock[0] = 10.0
    (found,) = scrape.statuses(values(20))
    assert found.place == "r 0-7"
    expected = {"loader_wait": 0.25, "step_s": 0.075, "amplification": 1.5, "samples_per_s": 320, "loss": 0.5}
    expected |= {"step": 500, "samples_done": 16000, "samples_total": 32000}
    for name, value in expected.items():
        assert found.document[name] == pytest.approx(value), name
    assert found.document["seconds_left"] == pytest.approx((32000 - 16000) / 320)


def test_counters_that_an_ended_job_left_are_no_job():
    values = [value for value in extraction_values(200, 1) if value.name.endswith("_total")]
    assert Scrape().statuses(values) == []


def test_machines_are_told_in_a_line_each():
    numbers = {
        "ray_node_cpu_utilization": 83.0,
        "ray_node_mem_used": 4e9,
        "ray_node_mem_total": 16e9,
        "ray_node_disk_utilization_percentage": 40.0,
    }
    values = [
        Value(name=name, labels={"ip": ip}, value=value) for ip in ("n1", "n2") for name, value in numbers.items()
    ]
    values.append(Value(name="ray_object_store_used_memory", labels={"NodeAddress": "n1"}, value=2e6))
    values += [
        Value(name="ray_node_gpus_utilization", labels={"ip": "n2", "GpuIndex": str(i)}, value=90.0 + i)
        for i in range(2)
    ]
    one, two = machines(values)
    assert one == "n1: processors 83 %, memory 25 %, disk 40 %, object store 2 MB"
    assert two.endswith("GPUs 90 %, 91 %")


def seen(*states: str, troubles: list[str] | None = None) -> Seen:
    statuses = [Status(place="a", document={"state": state}, age_s=0.0) for state in states]
    return Seen(statuses=statuses, nodes=[], troubles=troubles or [])


def test_a_pause_between_two_splits_is_not_the_end():
    clock = [0.0]
    over = Over(clock=lambda: clock[0])
    living, ended = seen("running"), seen("complete")
    assert not over(living)
    clock[0] = 10.0
    assert not over(ended)
    assert not over(living)
    clock[0] = 29.0
    assert not over(ended)
    clock[0] = 31.0
    assert over(ended)
    assert Over()(ended)  # it was over when we came
    assert not Over()(seen())  # nothing has begun yet


def test_what_is_no_longer_shown_is_over_unless_it_only_cannot_be_read():
    clock = [0.0]
    over = Over(clock=lambda: clock[0])
    assert not over(seen("running"))
    clock[0] = 15.0
    assert not over(seen())  # gauges may be missed for a look
    clock[0] = 300.0
    assert not over(seen(troubles=["S3 does not answer"]))
    assert over(seen())


# ---- the real command


def watch(*arguments: str, tmp_path: Path, **settings) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(tmp_path / "none")}
    return subprocess.Popen(
        [sys.executable, "-m", "infra", "watch", *arguments],
        cwd=Path(__file__).parents[2],
        env=environment,
        **settings,
    )


def test_without_a_terminal_lines_are_printed_until_it_is_over(tmp_path):
    objects = FolderObjects(tmp_path / "store")
    key = "train/log/20260101T000000-1-a/status.json"
    put(objects, key, EXTRACTION, at=time.time())
    with watch("--store", str(tmp_path / "store"), tmp_path=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(500) == 0
    assert "45 %, 640/1,438 images" in first
    assert "busy: device 91 %" in first
    put(objects, key, {**EXTRACTION, "state": "complete"}, at=time.time())
    again = watch("--store", str(tmp_path / "store"), tmp_path=tmp_path, stdout=subprocess.PIPE, text=True)
    said, _ = again.communicate(timeout=500)
    assert "over: complete after 25 s" in said
    assert again.returncode == 0


def test_on_a_terminal_one_picture_is_drawn(tmp_path):
    put(FolderObjects(tmp_path / "store"), "log/20260101T000000-1-a/status.json", EXTRACTION, at=time.time())
    here, there = pty.openpty()
    process = watch(
        *("--store", str(tmp_path / "store"), "--once"), tmp_path=tmp_path, stdin=there, stdout=there, stderr=there
    )
    os.close(there)
    shown = b""
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(500) == 0
    text = shown.decode()
    assert "limited by device" in text
    assert "\x1b[" in text  # coloured
    assert "91 %" in text.replace("\r\n", " ")


class _Dashboard(BaseHTTPRequestHandler):
    """As Ray's dashboard and a node of it answer."""

    def do_GET(self) -> None:
        if self.path == "/metrics":
            body = b"# TYPE ray_activations_planned_images gauge\n" + b"".join(
                f'ray_activations_{name}{{store="digits/train"}} {value}\n'.encode()
                for name, value in {"planned_images": 100.0, "committed_images": 40.0}.items()
            )
        elif self.headers.get("Authorization") != "Bearer right":
            self.send_error(401)
            return
        else:
            body = json.dumps([{"labels": {}, "targets": [f"127.0.0.1:{self.server.server_port}"]}]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("token", ["right", "wrong"])
def test_a_cluster_is_watched_by_its_dashboard_with_a_token_that_is_never_shown(tmp_path, token):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text(f"{token}\n")
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "infra", "watch", "--once"),
                f"--ray-address=http://127.0.0.1:{server.server_port}",
            ],
            cwd=Path(__file__).parents[2],
            env={k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"}
            | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
            capture_output=True,
            text=True,
            timeout=500,
        )
    finally:
        server.shutdown()
        server.server_close()
    if token == "right":
        assert "40 %, 40/100 images" in done.stdout
        assert done.returncode == 0
    else:
        assert done.returncode == 2
        assert "asks for a token (401)" in done.stderr
        assert "wrong" not in done.stderr + done.stdout


class _Refusing(BaseHTTPRequestHandler):
    """As an S3 that is down, or one that lets nobody in."""

    code = 503

    def do_GET(self) -> None:
        self.server.asked.set()
        self.send_error(self.code)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


class _Forbidding(_Refusing):
    code = 403


class _Silent(_Refusing):
    def do_GET(self) -> None:
        self.server.asked.set()
        time.sleep(250)

    do_HEAD = do_GET


@contextmanager
def s3_that(handler: type[_Refusing]) -> Iterator[tuple[str, threading.Event]]:
    """Its endpoint, and whether it has been asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked, server.daemon_threads, server.block_on_close = threading.Event(), True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()


def test_one_picture_of_what_cannot_be_read_or_is_not_there_is_an_error(tmp_path):
    with s3_that(_Forbidding) as (endpoint, _):
        forbidden = ("--store", "s3://bucket/digits", "--endpoint-url", endpoint)
        for arguments, words in ((forbidden, "403"), (("--store", str(tmp_path / "none")), "nothing to be seen in")):
            process = watch(*arguments, "--once", tmp_path=tmp_path, stdout=subprocess.PIPE, text=True)
            said, _ = process.communicate(timeout=500)
            assert words in said
            assert process.returncode == 2


@pytest.mark.parametrize("handler", [_Refusing, _Silent])
def test_ctrl_c_does_not_wait_for_a_server_that_is_down(tmp_path, handler):
    """Which is given minutes otherwise."""
    with s3_that(handler) as (endpoint, asked):
        process = watch(
            *("--store", "s3://bucket/digits", "--endpoint-url", endpoint), tmp_path=tmp_path, stderr=subprocess.DEVNULL
        )
        assert asked.wait(300)
        time.sleep(0.5)  # it is about to try again
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 0

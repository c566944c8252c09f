"""Ray starts while libraries load: when it does, that the store is the same, and that whatever happens it ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import infra.ray_ahead
from infra.cluster import Connection
from infra.console import ExitCode, UserError
from infra.ray_ahead import RayAhead
from pipeline.ahead import ray_ahead, will_want_ray
from pipeline.config import ExtractConfig
from pipeline.run_config import RunConfig
from storage_schemas.keys import INDEX_KEY
from tests.kills import wait_for
from tests.marked import end_marked, left_after, marked
from tests.pipeline_jobs import digest_of, make_tree
from tests.test_signals import ENDED_S, Command


def test_commands_are_read_without_any_library_for_teachers() -> None:
    script = (
        "import sys, pipeline.__main__\n"
        "try: pipeline.__main__.main(['extract', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'timm', 'ray', 'sklearn', 'zarr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_ray_is_wanted_where_something_is_missing(tmp_path: Path) -> None:
    config = ExtractConfig(store=str(tmp_path))
    assert will_want_ray(config, RunConfig())
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        assert will_want_ray(config, RunConfig())
        (tmp_path / split / INDEX_KEY).touch()
    assert not will_want_ray(config, RunConfig())


def test_ray_is_not_started_for_what_may_yet_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(tmp_path / "store")
    for asked in ({"teacher": "vit_x"}, {"weights": "random:0"}, {"head": "/x.pt"}, {"layers": "99"}):
        assert not will_want_ray(ExtractConfig(store=store, **asked), RunConfig())
    for elsewhere in ({"images": "s3://bucket/x"}, {"store": "s3://bucket/x"}):
        assert not will_want_ray(ExtractConfig(**elsewhere), RunConfig())
    for run in (RunConfig(no_ray=True), RunConfig(ray_address="head:6379")):
        assert not will_want_ray(ExtractConfig(store=store), run)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not will_want_ray(ExtractConfig(store=store), RunConfig())


def test_what_cannot_be_is_refused_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infra.ray_ahead, "connect", lambda *args, **settings: pytest.fail("Ray was started"))
    images = make_tree(tmp_path / "images", 2)
    for config, run, said in (
        (ExtractConfig(images=str(tmp_path / "none")), RunConfig(), "none"),
        (ExtractConfig(codec="zip"), RunConfig(), "CODEC=zip"),
        (ExtractConfig(), RunConfig(workers=0), "WORKERS=0"),
        (ExtractConfig(images=str(images), store=str(images / "store")), RunConfig(), "lies inside IMAGES"),
    ):
        with pytest.raises(UserError, match=said), ray_ahead(config, run):
            pass


def test_the_thread_that_started_ray_lives_until_ray_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel kills the processes of an embedded Ray when the thread that started them ends."""
    ours = Connection(address="x:1", embedded=True, owned=True, dashboard_url="", needs_token=False)
    starters: list[threading.Thread] = []
    ended: list[bool] = []

    def connect(address: str, **settings: object) -> Connection:
        assert (address, settings) == ("local", {"dashboard": False})
        starters.append(threading.current_thread())
        return ours

    monkeypatch.setattr(infra.ray_ahead, "connect", connect)
    monkeypatch.setattr(infra.ray_ahead, "disconnect", lambda one: ended.append(one is ours and starters[0].is_alive()))
    with RayAhead(dashboard=False) as ahead:
        assert ahead.connection() is ours
        assert starters[0] is not threading.current_thread()
        assert not wait_for(lambda: not starters[0].is_alive(), timeout_s=0.2)
    assert ended == [True]
    assert not starters[0].is_alive()


@pytest.mark.parametrize(
    ("used_s", "looks"),
    [([0.09, 0.05, 0.011, 0.009, 0.1], 4), ([0.0], 1), ([0.1] * 50, 20)],
    ids=["it-works-then-waits", "it-waits-at-once", "it-never-waits"],
)
def test_what_follows_begins_when_ray_leaves_the_processor(
    used_s: list[float], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`used_s`: what the thread that starts Ray uses of each 0.1 s."""
    over = threading.Event()
    monkeypatch.setattr(infra.ray_ahead, "connect", lambda address: over.wait())
    monkeypatch.setattr(infra.ray_ahead, "disconnect", lambda one: None)
    slept: list[float] = []
    clock = SimpleNamespace(
        pthread_getcpuclockid=time.pthread_getcpuclockid,
        clock_gettime=lambda number: sum(used_s[: len(slept)]),
        monotonic=lambda: sum(slept),
        sleep=slept.append,
    )
    with RayAhead() as ahead:
        monkeypatch.setattr(infra.ray_ahead, "time", clock)
        ahead.wait_until_it_waits(at_most_s=1.95, idle_s=0.1)
        over.set()
    assert slept == [0.1] * looks


def test_why_ray_did_not_start_is_told_to_whoever_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(address: str, **settings: object) -> Connection:
        raise UserError("Ray does not start in this machine")

    monkeypatch.setattr(infra.ray_ahead, "connect", connect)
    with RayAhead() as ahead, pytest.raises(UserError, match="does not start"):
        ahead.connection()


@pytest.fixture
def digits(tmp_path: Path) -> Iterator[Command]:
    """`make extract` of digits, just typed."""
    command = Command(["-m", "pipeline", "extract", "--store", str(tmp_path / "store")], tmp_path / "told")
    yield command
    end_marked(command.mark)
    command.process.wait()


@pytest.mark.slow
@pytest.mark.ray
def test_the_store_is_that_of_an_extraction_without_ray(digits: Command, tmp_path: Path) -> None:
    assert digits.process.wait(600) == ExitCode.OK, digits.told
    assert left_after(digits.mark, ENDED_S) == []
    assert "Ray runs inside this job, dashboard: http://127.0.0.1:" in digits.told
    alone = Command(
        ["-m", "pipeline", "extract", "--no-ray", "--store", str(tmp_path / "alone")], tmp_path / "alone.txt"
    )
    assert alone.process.wait(600) == ExitCode.OK, alone.told
    for split in ("train", "val"):
        assert digest_of(tmp_path / "store" / split) == digest_of(tmp_path / "alone" / split)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_while_ray_is_on_its_way_leaves_nothing_behind(number: signal.Signals, digits: Command) -> None:
    assert wait_for(lambda: len(marked(digits.mark)) > 1 or digits.process.poll() is not None)
    digits.press_ctrl_c() if number == signal.SIGINT else os.kill(digits.process.pid, number)
    assert digits.process.wait(ENDED_S) in (ExitCode.KILLED, ExitCode.INTERRUPTED, -signal.SIGKILL), digits.told
    # Ctrl-C reaches a child that Ray has just forked, too, which may say so on its way to the program that it becomes.
    told = re.sub(r"Exception ignored in: .*?KeyboardInterrupt:? *\n", "", digits.told, flags=re.DOTALL)
    assert "Traceback" not in told
    assert left_after(digits.mark, ENDED_S) == []

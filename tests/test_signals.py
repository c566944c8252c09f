"""Ctrl-C, SIGTERM and SIGKILL: what a command that is stopped says with its exit code, and that nothing outlives it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from infra.console import ExitCode
from pipeline.extract import extract
from storage_schemas import open_store
from tests.kills import REPO, wait_for
from tests.marked import end_marked, left_after, marked, new_mark
from tests.pipeline_jobs import THREADS, digest_of, fake_arguments, fake_config, leftovers, make_tree, run_job

N_IMAGES = 400
ENDED_S = 400.0


class Command:
    """A command of ours as a shell starts it: in a process group of its own, which Ctrl-C reaches as a whole."""

    def __init__(self, words: Sequence[str], told: Path) -> None:
        self._told, self.mark = told, new_mark()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with told.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=REPO,
                env={**environment, **self.mark, "RAY_AUTH_MODE": "disabled"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def told(self) -> str:
        return self._told.read_text()

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def await_text(self, text: str) -> None:
        assert wait_for(lambda: text in self.told or self.process.poll() is not None)
        assert text in self.told, self.told


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    store = tmp_path_factory.mktemp("peace") / "store"
    run_job(fake_config(images, store), THREADS)
    return digest_of(store)


@pytest.fixture
def extraction(images: Path, tmp_path: Path) -> Iterator[Command]:
    """`make extract` with a Ray of its own, dashboard and all."""
    flags = [flag for flag in fake_arguments(images, tmp_path / "store") if flag != "--no-ray"]
    command = Command(["-m", "pipeline", "extract", *flags, "--workers", "1", "--depth", "1"], tmp_path / "told")
    yield command
    end_marked(command.mark)
    command.process.wait()


def n_commits(store: Path) -> int:
    return len(list((store / "commits").glob("*.json")))


def await_work(command: Command, store: Path) -> None:
    assert wait_for(lambda: n_commits(store) >= 2 or command.process.poll() is not None)
    assert command.process.poll() is None, command.told
    assert len(marked(command.mark)) > 5, "Ray and its dashboard run"


def goes_on(images: Path, store: Path, undisturbed: str) -> None:
    """The same command again: it keeps what is committed, and ends in the undisturbed store."""
    n_before = n_commits(store)
    assert not open_store(store).is_complete
    (result,) = extract(fake_config(images, store), THREADS)
    assert result.complete
    assert len(result.reports) == 50 - n_before
    assert digest_of(store) == undisturbed
    assert leftovers(store) == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_extraction_finishes_its_shards_and_takes_its_ray_along(
    number: signal.Signals, extraction: Command, images: Path, undisturbed: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    await_work(extraction, store)
    extraction.press_ctrl_c() if number == signal.SIGINT else extraction.process.send_signal(number)
    assert extraction.process.wait(ENDED_S) == ExitCode.INTERRUPTED, extraction.told
    assert left_after(extraction.mark, ENDED_S) == []
    goes_on(images, store, undisturbed)


@pytest.mark.slow
@pytest.mark.ray
def test_a_second_ctrl_c_ends_all_at_once(extraction: Command, images: Path, undisturbed: str, tmp_path: Path) -> None:
    await_work(extraction, tmp_path / "store")
    extraction.press_ctrl_c()
    extraction.await_text("press Ctrl-C again")
    extraction.press_ctrl_c()
    assert extraction.process.wait(ENDED_S) in (ExitCode.KILLED, ExitCode.INTERRUPTED), extraction.told
    assert left_after(extraction.mark, ENDED_S) == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_that_vanishes_leaves_nothing_behind(
    extraction: Command, images: Path, undisturbed: str, tmp_path: Path
) -> None:
    await_work(extraction, tmp_path / "store")
    extraction.process.kill()
    assert extraction.process.wait(ENDED_S) == -signal.SIGKILL
    assert left_after(extraction.mark, ENDED_S) == []
    goes_on(images, tmp_path / "store", undisturbed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_ray_starts_leaves_nothing_behind(number: signal.Signals, extraction: Command) -> None:
    assert wait_for(lambda: len(marked(extraction.mark)) > 3 or extraction.process.poll() is not None)
    extraction.press_ctrl_c() if number == signal.SIGINT else extraction.process.send_signal(number)
    assert extraction.process.wait(ENDED_S) in (ExitCode.KILLED, ExitCode.INTERRUPTED), extraction.told
    assert "Traceback" not in extraction.told
    assert left_after(extraction.mark, ENDED_S) == []


DOOR = """
import sys, time
from infra.console import run_door

def main():
    try:
        print("at work", flush=True)
        time.sleep(600)
    finally:
        print("cleared away", flush=True)

sys.exit(run_door(main))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_door_that_is_stopped_clears_away(number: signal.Signals, tmp_path: Path) -> None:
    command = Command(["-c", DOOR], tmp_path / "told")
    command.await_text("at work")
    command.process.send_signal(number)
    assert command.process.wait(ENDED_S) == ExitCode.KILLED
    assert command.told.splitlines() == ["at work", "cleared away", "interrupted"]


def test_the_exit_codes_are_those_of_the_page() -> None:
    """docs/cluster.md has the table that people read."""
    rows = [line for line in (REPO / "docs" / "cluster.md").read_text().splitlines() if line.startswith("| ")]
    documented = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in rows}
    assert {str(int(code)): code.meaning for code in ExitCode}.items() <= documented.items()

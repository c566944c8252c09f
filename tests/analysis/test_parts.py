"""Parts run beside each other, once each, stop, fail and go on as a person would wish. Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from analysis.parts import Part, Parts, hold
from infra.console import ExitCode, JobError, Progress

#: A command that says when it starts and ends, can be interrupted as our doors can, and may fail.
WORKER = """
import os, signal, sys, time
folder, name, seconds, code = sys.argv[1:5]
def note(text):
    with open(f"{folder}/events", "a") as file:
        file.write(f"{text} {name}\\n")
def stop(*_):
    note("stopped")
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
note("began")
print(f"work on {name} 40%: 4/10", flush=True)
end = time.monotonic() + float(seconds)
while time.monotonic() < end or os.path.exists(f"{folder}/hold-{name}"):
    time.sleep(0.01)
if int(code):
    sys.exit("it would not work")
open(f"{folder}/{name}.made", "w").close()
note("ended")
"""
#: The parts in a process of their own, for signals and kills.
CHAIN = """
import sys
from pathlib import Path
from analysis.parts import Parts, hold
from infra.console import Progress, run_door, stop_on_signals
from tests.analysis.test_parts import chain
def main():
    folder = Path(sys.argv[1])
    with stop_on_signals() as stopping, hold(folder, stopping) as lock:
        with Progress(total=3, unit="parts", label="chain") as progress:
            parts = Parts(folder, at_once=2, progress=progress, stopping=stopping, lock=lock)
            return 0 if parts.run(chain(folder)) else 75
sys.exit(run_door(main))
"""


def part(folder: Path, name: str, needs: Sequence[str] = (), seconds: float = 0.0, code: int = 0) -> Part:
    return Part(
        name=name,
        arguments=["worker", str(folder), name, str(seconds), str(code)],
        command=f"make {name}",
        made=folder / f"{name}.made",
        needs=needs,
    )


def chain(folder: Path) -> list[Part]:
    """One, then another, then one that needs both."""
    return [part(folder, "a"), part(folder, "b", ["a"]), part(folder, "c", ["a", "b"])]


@pytest.fixture(autouse=True)
def _worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/bin{os.pathsep}{Path(__file__).parents[2]}")


def run(folder: Path, parts: Sequence[Part], stopping: Callable[[], bool] = lambda: False) -> bool:
    with hold(folder, stopping) as lock, Progress(total=len(parts), unit="parts", label="test") as progress:
        assert lock is not None
        return Parts(folder, at_once=2, progress=progress, stopping=stopping, lock=lock).run(parts)


def events(folder: Path) -> list[str]:
    path = folder / "events"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for four minutes"
        time.sleep(0.02)


def test_each_waits_for_what_it_needs_and_runs_once(tmp_path: Path) -> None:
    assert run(tmp_path, chain(tmp_path)[::-1])
    assert events(tmp_path) == [f"{what} {name}" for name in "abc" for what in ("began", "ended")]
    assert run(tmp_path, chain(tmp_path))
    assert len(events(tmp_path)) == 6, "nothing is done twice"


def test_two_at_once_and_not_more(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"hold-{name}").touch()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run, tmp_path, [part(tmp_path, name) for name in "abc"])
        wait_for(lambda: len(events(tmp_path)) >= 2 or ended.done())
        time.sleep(0.5)  # in which a third one might begin
        assert sorted(events(tmp_path)) == ["began a", "began b"]
        for name in "ab":
            (tmp_path / f"hold-{name}").unlink()
        assert ended.result()
    found = events(tmp_path)
    assert found[2].startswith("ended")
    assert found.index("began c") > 2


def test_other_arguments_or_a_lost_file_make_it_run_again(tmp_path: Path) -> None:
    assert run(tmp_path, [part(tmp_path, "a"), part(tmp_path, "b")])
    (tmp_path / "a.made").unlink()
    assert run(tmp_path, [part(tmp_path, "a"), part(tmp_path, "b", seconds=0.01)])
    assert sorted(events(tmp_path)[4:]) == ["began a", "began b", "ended a", "ended b"]


def test_a_torn_stamp_is_no_stamp(tmp_path: Path) -> None:
    assert run(tmp_path, [part(tmp_path, "a")])
    (tmp_path / "done/a.json").write_text('["wor')
    assert run(tmp_path, [part(tmp_path, "a")])
    assert events(tmp_path) == ["began a", "ended a"] * 2


def test_a_failure_shows_the_log_stops_the_others_and_goes_on_later(tmp_path: Path) -> None:
    (tmp_path / "hold-slow").touch()
    (tmp_path / "hold-bad").touch()
    parts = [part(tmp_path, "slow"), part(tmp_path, "bad", code=3), part(tmp_path, "never", ["bad"])]

    def fail_once_both_are_at_work() -> None:
        wait_for(lambda: {"began slow", "began bad"} <= set(events(tmp_path)))
        (tmp_path / "hold-bad").unlink()

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(fail_once_both_are_at_work)
        with pytest.raises(JobError) as error:
            run(tmp_path, parts)
        failing.result()
    for text in ("bad failed with exit code 1", "it would not work", f"{tmp_path}/log/bad.log", "make bad"):
        assert text in str(error.value)
    assert "stopped slow" in events(tmp_path)
    assert "began never" not in events(tmp_path)
    assert run(tmp_path, [part(tmp_path, "bad"), part(tmp_path, "never", ["bad"])])


def test_one_that_makes_nothing_is_no_success(tmp_path: Path) -> None:
    made_nothing = Part(
        name="a", arguments=["worker", str(tmp_path), "other", "0", "0"], command="make a", made=tmp_path / "nothing"
    )
    (tmp_path / "hold-slow").touch()
    with pytest.raises(JobError, match="ended well but made no"):
        run(tmp_path, [part(tmp_path, "slow"), made_nothing])
    seen = events(tmp_path)
    assert ("began slow" in seen) == ("stopped slow" in seen), "no part is left behind"
    assert "ended slow" not in seen


@contextmanager
def chain_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", CHAIN, str(folder)], stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "hold-b").touch()
    with chain_process(tmp_path) as process:
        wait_for(lambda: "began b" in events(tmp_path))
        process.send_signal(number)
        _, said = process.communicate(timeout=240)
    assert process.returncode == ExitCode.INTERRUPTED, said
    assert events(tmp_path) == ["began a", "ended a", "began b", "stopped b"]
    (tmp_path / "hold-b").unlink()
    with chain_process(tmp_path) as again:
        _, said = again.communicate(timeout=240)
    assert again.returncode == ExitCode.OK, said
    assert events(tmp_path)[4:] == ["began b", "ended b", "began c", "ended c"]


def test_after_a_kill_the_next_one_waits_for_what_is_left_behind(tmp_path: Path) -> None:
    """The part whose parent was killed ends by itself; nothing runs beside it, and only what it did is done again."""
    (tmp_path / "hold-b").touch()
    with chain_process(tmp_path) as process:
        wait_for(lambda: "began b" in events(tmp_path))
        process.kill()
        process.communicate(timeout=240)
    with chain_process(tmp_path) as again:
        assert again.stderr is not None
        assert "waiting for them" in again.stderr.readline()
        assert events(tmp_path) == ["began a", "ended a", "began b"]
        (tmp_path / "hold-b").unlink()
        _, said = again.communicate(timeout=240)
    assert again.returncode == ExitCode.OK, said
    assert events(tmp_path)[3:] == ["ended b", "began b", "ended b", "began c", "ended c"]

"""Progress, words for numbers, exit codes and what Ctrl-C does."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from infra.console import (
    ExitCode,
    JobError,
    Progress,
    UserError,
    Window,
    human_bytes,
    human_duration,
    human_rate,
    interrupted_by_sigterm,
    interrupts_kept,
    run_door,
    stop_on_signals,
)


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("n", "words"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (99_940, "99.9 kB"), (99_960, "100 kB"), (999_600, "1.0 MB"),
     (13.36e12, "13.4 TB"), (2.5e18, "2,500.0 PB")],
)  # fmt: skip
def test_bytes(n: float, words: str) -> None:
    assert human_bytes(n) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
     (7620, "2 h 07 min"), (3 * 86400 + 5 * 3600, "3 d 5 h")],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert human_duration(seconds) == words


@pytest.mark.parametrize(("rate", "words"), [(0.518, "0.52"), (12.34, "12.3"), (99.96, "100"), (4154.4, "4,154")])
def test_rates(rate: float, words: str) -> None:
    assert human_rate(rate) == words


def test_a_window_forgets_the_slow_start_and_survives_bursts() -> None:
    clock = Clock()
    window = Window(seconds=10, clock=clock)
    assert window.per_s() == 0
    for _ in range(30):  # bursts of 20 every 2 s
        clock.now += 2
        window.add(20)
    assert window.per_s() == pytest.approx(10)
    clock.now += 90  # a long wait first, then much faster
    for _ in range(30):
        clock.now += 1
        window.add(50)
    assert window.per_s() == pytest.approx(50, rel=0.1)


def test_the_line_says_rate_bytes_time_left_fields_and_status() -> None:
    clock = Clock()
    progress = Progress(total=1000, unit="images", label="extract", done=200, stream=io.StringIO(), clock=clock)
    progress.status("7 of 32 workers ready")
    assert progress.line() == "200/1,000 images, 0.0 s so far, 7 of 32 workers ready"
    clock.now += 4
    progress.advance(80, n_bytes=400_000_000)
    progress.status("")
    assert progress.line() == "280/1,000 images, 20.0 images/s, 100 MB/s written, 36 s left"
    progress.fields(loader_wait="3 %", loss="0.124")
    assert "images/s" in progress.line()
    assert progress.line().endswith("loader wait 3 %, loss 0.124, 36 s left")
    progress.estimate(False)
    assert progress.line().endswith("loss 0.124, 4.0 s so far")
    progress.estimate(True)
    assert progress.line().endswith("36 s left")


def test_without_a_terminal_it_writes_plain_lines_and_is_never_silent() -> None:
    stream = io.StringIO()
    with Progress(total=10, unit="steps", label="train", every_s=0.05, stream=stream) as progress:
        deadline = time.monotonic() + 60
        while stream.getvalue().count("train 0%: 0/10 steps") < 3 and time.monotonic() < deadline:
            time.sleep(0.02)  # nothing is finished, and yet it speaks
        progress.say("a message")
        progress.advance(10)
    lines = stream.getvalue().splitlines()
    assert "a message" in lines
    assert lines[-1].startswith("train 100%: 10/10 steps")
    assert "\r" not in stream.getvalue()


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_draws_one_bar() -> None:
    stream = Terminal()
    with Progress(total=10, unit="images", label="extract {odd}", stream=stream) as progress:
        progress.advance(5)
        progress.say("shard 3 will be tried again")
        progress.status("2 of 2 workers ready")
    text = stream.getvalue()
    assert re.search(r"extract \{odd\}\s+50% \|.*\| 5/10 images.*2 of 2 workers ready", text)
    assert "shard 3 will be tried again\n" in text
    assert text.count("\n") == 2  # the message, and the end of the bar


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no such folder"), 2), (JobError("12 bad images"), 3), (KeyboardInterrupt(), 130)]
)
def test_the_door_turns_known_errors_into_one_line_and_a_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert run_door(main) == code
    said = capsys.readouterr().err
    assert said == (f"error: {error}\n" if str(error) else "interrupted\n")


def test_the_door_passes_on_codes_and_bugs() -> None:
    assert run_door(lambda: None) == ExitCode.OK
    assert run_door(lambda: ExitCode.INTERRUPTED) == 75

    def bug() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_door(bug)


@pytest.mark.parametrize("n_lines", [1, 100_000], ids=["when-it-ends", "in-the-midst"])
def test_a_reader_that_leaves_ends_the_command_in_silence(n_lines: int) -> None:
    script = f"from infra.console import leave, run_door; leave(run_door(lambda: print('line\\n' * {n_lines})))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_broken_pipe_elsewhere_is_told() -> None:
    def broken() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_door(broken)


def test_leaving_ends_threads_and_runs_what_was_registered() -> None:
    script = (
        "import atexit, threading, time\n"
        "from infra.console import leave\n"
        "atexit.register(print, 'registered')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "leave(75)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (75, ["thread", "registered"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop_and_the_handlers_come_back(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert signal.getsignal(number) is former


def call_library(seen: list[bool], *numbers: signal.Signals, fails: Exception | None = None) -> None:
    """It gets these signals, and then fails or not; seen is what the flag said after each."""
    with interrupts_kept() as stopped:
        for number in numbers:
            os.kill(os.getpid(), number)
            seen.append(stopped())
        if fails is not None:
            raise fails


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_midst_of_a_library_is_raised_at_its_end(number: signal.Signals) -> None:
    seen: list[bool] = []
    with interrupted_by_sigterm():
        former = signal.getsignal(number)
        call_library(seen)
        with pytest.raises(KeyboardInterrupt):
            call_library(seen, number)
        assert signal.getsignal(number) is former
    assert seen == [True]


def test_a_library_that_fails_of_a_signal_was_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt):
        call_library([], signal.SIGINT, fails=OSError("its processes got it too"))
    with pytest.raises(OSError, match="of itself"):
        call_library([], fails=OSError("of itself"))


def test_a_second_signal_is_not_kept() -> None:
    seen: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        call_library(seen, signal.SIGINT, signal.SIGINT)
    assert seen == [True]


def test_a_job_in_another_thread_runs_without_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def job() -> None:
        with stop_on_signals() as stop:
            seen.append(stop())
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_the_second_signal_ends_the_process_at_once_with_130() -> None:
    program = (
        "import time\nfrom infra.console import stop_on_signals\n"
        "with stop_on_signals():\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        try: time.sleep(600)\n"
        "        finally: print('left', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.stderr.readline()
        assert "stopping" in process.stderr.readline()  # and it goes on
        process.send_signal(signal.SIGTERM)
        assert process.wait(400) == 130
        assert "left" not in process.stdout.read()

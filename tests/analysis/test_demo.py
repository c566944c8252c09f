"""`make demo`: what it prints is what it runs; all of it at a tiny size, interrupted and repeated."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.demo import N_BLOCKS, _model_parts, _store_parts
from analysis.parts import claim, place_problems
from infra.console import ExitCode, UserError, run_door

REPOSITORY = Path(__file__).parents[2]
BLOCKS = {1: ["0-12"], 2: ["0-7", "7-12"], 3: ["0-7", "7-10", "10-12"]}


def flags(words: list[str]) -> dict[str, str]:
    """Values by option; an option without one has ""."""
    found: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = word
    return found


def test_printed_commands_are_those_that_run(tmp_path: Path) -> None:
    parts = [*_store_parts(tmp_path / "a b", 100), *_model_parts(tmp_path / "a b", BLOCKS, 1, 7)]
    for part in parts:
        command = ["make", "-n", *shlex.split(part.command)[1:]]
        made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        *_, last = made.stdout.replace("\\\n", "").strip().splitlines()  # before it, make may bring .venv up to date
        _, _, package, door, *options = shlex.split(last)
        assert [package, door] == list(part.arguments[:2]), part.command
        assert flags(options) == flags(list(part.arguments[2:])), part.command


def test_every_span_is_trained_once_and_before_the_raptors_that_need_it(tmp_path: Path) -> None:
    parts = _model_parts(tmp_path, BLOCKS, 0, None)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert len([name for name in names if name.startswith("block")]) == 5, "0-7 serves two Raptors"
    assert all(need in names for part in parts for need in part.needs)
    by_name = {part.name: part for part in parts}
    assert list(by_name["raptor k=3 seed 0"].needs) == ["block 0-7 seed 0", "block 7-10 seed 0", "block 10-12 seed 0"]
    assert {part.name for part in parts if "raptor" in " ".join(part.needs)} == {
        f"probe k={k} seed 0" for k in N_BLOCKS
    }


def test_bad_settings_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from analysis.__main__ import main

    arguments = ["demo", "--demo", "s3://bucket/x", "--seeds", "0", "--limit", "3", "--steps", "0"]
    assert run_door(lambda: main(arguments)) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err
    for name in ("DEMO", "SEEDS", "LIMIT", "STEPS"):
        assert f"{name}=" in said


def test_a_comma_in_its_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RUNS of a Raptor are joined with commas."""
    from analysis.__main__ import main

    assert run_door(lambda: main(["demo", "--demo", f"{tmp_path}/a,b"])) == ExitCode.BAD_INPUT
    assert "without a comma" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_choices_in_the_same_place_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from analysis.__main__ import main

    claim(tmp_path, {"limit": 96, "steps": None}, "DEMO")
    claim(tmp_path, {"limit": 96, "steps": None}, "DEMO")
    for flags_ in (["--limit", "96", "--steps", "3"], ["--limit", "97"], []):
        assert run_door(lambda typed=flags_: main(["demo", "--demo", str(tmp_path), *typed])) == ExitCode.BAD_INPUT
        assert "begun with LIMIT=96 STEPS=, not" in (said := capsys.readouterr().err)
        assert "give another DEMO=" in said
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", ".lock"}


def test_a_folder_that_holds_other_things_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Listed with what else is wrong; what a killed first start and a Mac leave behind are no other things."""
    from analysis.__main__ import main

    names = [f"{letter}.txt" for letter in "abcdef"]
    for name in names:
        (tmp_path / name).touch()
    assert run_door(lambda: main(["demo", "--demo", str(tmp_path), "--seeds", "0"])) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err
    assert f"DEMO={tmp_path} has no config.json, so make demo did not begin it, but it holds a.txt, b.txt" in said
    assert "e.txt and more. Give an empty or new place (DEMO=...)" in said
    assert "SEEDS=0" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        (tmp_path / name).unlink()
    for name in (".DS_Store", ".lock", "config.draft"):
        (tmp_path / name).touch()
    assert place_problems(tmp_path, "DEMO") == []
    claim(tmp_path, {"limit": None}, "DEMO")
    (tmp_path / "stores").mkdir()
    assert place_problems(tmp_path, "DEMO") == place_problems(tmp_path / "new", "DEMO") == []


@pytest.mark.parametrize("text", ["", "[]", '{"limit": 96}'])
def test_a_changed_file_of_choices_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not as make demo wrote it"):
        claim(tmp_path, {"limit": 96, "steps": None}, "DEMO")


@pytest.mark.slow
def test_all_of_it_interrupted_and_repeated(tmp_path: Path) -> None:
    """Stopped by a signal in the middle, it goes on with what was not done; a third time it does nothing."""
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "analysis", "demo", "--demo", str(folder), "--limit", "96", "--steps", "3"]

    def stamps() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("done/*.json")}

    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 900
    while len(stamps()) < 6:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == ExitCode.INTERRUPTED, said
    before = stamps()
    logs = {path: path.read_bytes() for path in folder.glob("log/*.log") if f"{path.stem}.json" in before}
    assert not (folder / "table").exists()

    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == ExitCode.OK, done.stderr
    assert {name: stamps()[name] for name in before} == before
    assert {path: path.read_bytes() for path in logs} == logs, "what had ended was started again"
    for text in ("k=1", "k=2", "k=3", "Probe on digits", "epsilon of each layer", "table/accuracy_and_r2.png"):
        assert text in done.stdout, text
    assert (folder / "table/table.csv").exists()

    after = stamps()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == ExitCode.OK, again.stderr
    assert stamps() == after
    assert ": make " not in again.stderr, "no part was started"

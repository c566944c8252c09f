"""What the world does to a training: a disk that fills, objects that vanish or cannot be read. One message, then on."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra.console import ExitCode, run_door
from infra.objects import FolderObjects, ObjectAccessError
from tests.trainer.tiny import write_tiny_pair
from trainer.__main__ import main
from trainer.run_files import Checkpoint, RunFiles

Train = Callable[[Path], tuple[int, str]]
N_STEPS = 110  # checkpoints at 100 and at the end


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(write_tiny_pair(tmp_path / "store"))


@pytest.fixture
def train(store: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Trains into a RUN through the door; returns exit code and what was said."""

    def run(place: Path) -> tuple[int, str]:
        code = run_door(lambda: main(arguments(store, place)))
        return code, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert run_door(lambda: main(arguments(write_tiny_pair(root / "store"), root / "run"))) == ExitCode.OK
    return (root / "run/block.safetensors").read_bytes()


def arguments(store: str | Path, run: Path) -> list[str]:
    values = {"device": "cpu", "recipe": "digits_stage1", "steps": N_STEPS, "block": "0-2", "store": store, "run": run}
    return ["train", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


@pytest.fixture
def after_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something happen once, right after the first checkpoint."""

    def plan(happen: Callable[[], None]) -> None:
        save, todo = RunFiles.save_checkpoint, [happen]

        def save_then_happen(run: RunFiles, checkpoint: Checkpoint) -> None:
            save(run, checkpoint)
            if todo:
                todo.pop()()

        monkeypatch.setattr(RunFiles, "save_checkpoint", save_then_happen)

    return plan


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has no room for a second checkpoint; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_stops_the_run_and_room_lets_it_go_on(
    train: Train, small_disk: Path, undisturbed: bytes, after_a_checkpoint: Callable[[Callable[[], None]], None]
) -> None:
    def fill() -> None:
        for nbytes in (65536, 4096):  # to the last block
            with suppress(OSError), open(small_disk / f"filler{nbytes}", "wb", buffering=0) as file:
                while file.write(bytes(nbytes)) == nbytes:
                    pass

    after_a_checkpoint(fill)
    code, said = train(small_disk / "run")
    assert code == ExitCode.PROBLEMS, said
    assert "could not be written: No space left on device" in said
    assert "last checkpoint" in said
    assert "Traceback" not in said
    assert not list(small_disk.rglob("*.put-tmp"))
    for filler in small_disk.glob("filler*"):
        filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert train(small_disk / "run")[0] == ExitCode.OK
    assert (small_disk / "run/block.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("key", ["train/layer_01/patches/c/2/0/0", "val/layer_02/cls/c/1/0"])
def test_an_object_that_vanishes_while_training(
    train: Train,
    store: Path,
    tmp_path: Path,
    key: str,
    undisturbed: bytes,
    after_a_checkpoint: Callable[[Callable[[], None]], None],
) -> None:
    kept = (store / key).read_bytes()
    after_a_checkpoint((store / key).unlink)
    code, said = train(tmp_path / "run")
    assert code == ExitCode.PROBLEMS, said
    assert f"{key} is missing" in said
    assert "last checkpoint" in said
    assert "Traceback" not in said
    (store / key).write_bytes(kept)
    code, said = train(tmp_path / "run")
    assert code == ExitCode.OK
    assert "going on from step 1" in said  # the last checkpoint before it was missed
    assert (tmp_path / "run/block.safetensors").read_bytes() == undisturbed


def test_an_object_that_cannot_be_read(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = FolderObjects.read_rows

    def fail(objects: FolderObjects, key: str, *args: object) -> int:
        if key.startswith("layer_02/patches"):
            raise ObjectAccessError(key, f"{objects.location}/{key} could not be read: Input/output error")
        return read(objects, key, *args)

    monkeypatch.setattr(FolderObjects, "read_rows", fail)
    code, said = train(tmp_path / "run")
    assert code == ExitCode.PROBLEMS
    assert "layer_02/patches" in said
    assert "Input/output error" in said
    assert "Traceback" not in said

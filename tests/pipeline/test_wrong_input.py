"""What a person gets wrong, through the real door: one clear message with what to do, no damage, exit code not zero."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import pipeline.extract
from infra.console import ExitCode, run_door
from pipeline.__main__ import main
from storage_schemas.__main__ import main as storage_main
from storage_schemas.keys import HEARTBEAT_KEY
from tests.pipeline_jobs import digest_of, fake_arguments, leftovers, make_tree, snapshot

REPO = Path(__file__).parents[2]

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("images"), 28)


@pytest.fixture(scope="module")
def store(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole") / "store"
    assert main(["extract", *fake_arguments(images, place)]) == ExitCode.OK
    return place


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture) -> Refuse:
    """Run a command that must be refused; gives what it said on standard error."""

    def refuse_(*arguments: str, code: int = ExitCode.BAD_INPUT, door: Callable[[list[str]], int] = main) -> str:
        capfd.readouterr()
        try:
            found = door(list(arguments))
        except SystemExit as error:  # an argument that the parser refuses
            found = int(error.code or 0)
        said = "".join(capfd.readouterr())
        assert found == code, said
        assert "Traceback" not in said
        assert said.count("error:") <= 1
        return said

    return refuse_


def extract_arguments(images: Path | str, store: Path | str, *more: str) -> list[str]:
    return ["extract", *fake_arguments(images, store, *more)]


def test_images_that_are_not_there(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("loading a teacher may take minutes: the images are looked at first")

    monkeypatch.setattr(pipeline.extract, "make_teacher", never)
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    said = {
        name: refuse(*extract_arguments(tmp_path / name, tmp_path / "store"))
        for name in ("none", "empty", "flat", "file")
    }
    assert all(str(tmp_path / name) in text for name, text in said.items())
    assert "is empty; expected class folders" in said["empty"]
    assert "holds no class folders, but 1 image" in said["flat"]
    assert not (tmp_path / "store").exists()


def test_class_folders_without_an_image(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "images/cats").mkdir(parents=True)
    (tmp_path / "images/cats/notes.txt").write_text("soon")
    said = refuse(*extract_arguments(tmp_path / "images", tmp_path / "store"))
    assert "1 class folder and no image" in said
    assert not (tmp_path / "store").exists()


def test_a_file_whose_name_is_no_text(refuse: Refuse, tmp_path: Path) -> None:
    make_tree(tmp_path / "images", 4)
    strange = os.fsencode(tmp_path / "images/class0") + b"/caf\xe9.jpg"
    with open(strange, "wb") as file:
        file.write(b"x")
    said = refuse(*extract_arguments(tmp_path / "images", tmp_path / "store"))
    assert "caf\\udce9.jpg': the name is not UTF-8" in said
    assert not (tmp_path / "store").exists()


def test_a_place_that_is_no_store(refuse: Refuse, images: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    home = str(tmp_path / "home")
    for door, arguments in (
        (main, ["verify", "--store", home]),
        (main, ["verify", "--store", home, "--repair", "--images", str(images)]),
        (main, ["verify", "--store", str(tmp_path / "nowhere")]),
        (storage_main, ["inspect", home]),
    ):
        said = refuse(*arguments, door=door)
        assert "is not a store" in said
        assert "make extract" in said
    said = refuse(*extract_arguments(images, home))
    assert "is not empty and is no store: it holds letter.txt. Choose another STORE" in said
    said = refuse(*extract_arguments(images, f"{home}/letter.txt"))
    assert "letter.txt is a file; a store is a folder" in said
    assert snapshot(tmp_path) == {"home/letter.txt": b"dear"}


def test_a_place_in_a_store(refuse: Refuse, images: Path, store: Path) -> None:
    """It would be found there as a stranger, and the store no longer be sound."""
    before = snapshot(store)
    said = refuse(*extract_arguments(images, store / "more"))
    assert f"{store / 'more'} would lie inside a store, {store}" in said
    assert f"{store}/train would lie inside a store, {store}" in refuse("extract", "--no-ray", "--store", str(store))
    assert snapshot(store) == before


def test_training_on_what_is_no_store(refuse: Refuse, tmp_path: Path) -> None:
    from trainer.__main__ import main as trainer_main

    (tmp_path / "home").mkdir()
    arguments = ["train", "--block", "0-2", "--store", str(tmp_path / "home"), "--run", str(tmp_path / "run")]
    said = refuse(*arguments, door=lambda args: run_door(lambda: trainer_main(args)))
    assert "is not a store" in said


def test_another_identity(refuse: Refuse, images: Path, store: Path) -> None:
    before = snapshot(store)
    said = refuse(*extract_arguments(images, store, "--precision", "float32", "--codec", "lz4"))
    assert "is a store of another identity" in said
    assert "precision: the store has 'float16', this run asks for 'float32'" in said
    assert "codec: the store has 'none', this run asks for 'lz4'" in said
    assert "--overwrite" in said
    assert snapshot(store) == before


def test_an_unknown_teacher_gets_suggestions(refuse: Refuse, images: Path, tmp_path: Path) -> None:
    arguments = extract_arguments(images, tmp_path / "store", "--teacher", "vit_smal_patch14_dinov2")
    said = refuse(*arguments)
    assert "there is no teacher 'vit_smal_patch14_dinov2'" in said
    assert "vit_small_patch14_dinov2" in said
    assert not (tmp_path / "store").exists()


def test_weights_that_do_not_fit(refuse: Refuse, images: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "other.pth")
    torch.save(torch.nn.Linear(3, 4), tmp_path / "pickled.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:300])
    said = {
        name: refuse(*extract_arguments(images, tmp_path / "store", "--weights", str(tmp_path / name)))
        for name in ("other.pth", "pickled.pth", "torn.pth", "missing.pth", "random")
    }
    assert "do not fit fake_vit" in said["other.pth"]
    assert "holds a pickled torch.nn.modules.linear.Linear" in said["pickled.pth"]
    assert "is no whole .pth file of weights" in said["torn.pth"]
    assert "there is no weights file" in said["missing.pth"]
    assert "there is no weights file" in said["random"]
    assert not (tmp_path / "store").exists()


def test_a_head_that_does_not_fit(refuse: Refuse, images: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(5, 10).state_dict(), tmp_path / "head.pth")
    said = refuse(*extract_arguments(images, tmp_path / "store", "--head", str(tmp_path / "head.pth")))
    assert "does not fit: expected a weight of (classes, 16)" in said


def test_bad_settings_are_listed_all_at_once(refuse: Refuse, images: Path, tmp_path: Path) -> None:
    wrong = {
        "--precision": "float8", "--codec": "brotli", "--compute": "int4", "--format": "hdf5", "--layers": "x",
        "--limit": "0", "--micro-batch": "-1", "--samples-per-shard": "6", "--interpolation": "nearest",
    }  # fmt: skip
    flags = [part for pair in wrong.items() for part in pair]
    said = refuse(*extract_arguments(images, tmp_path / "store", *flags))
    for name, value in wrong.items():
        assert f"{name.removeprefix('--').replace('-', '_').upper()}={value}: expected" in said
    assert "expected one of float32, float16" in said
    assert "expected a multiple of SAMPLES_PER_CHUNK=4" in said
    said = refuse(*extract_arguments(images, tmp_path / "store", "--codec", "gzip"))
    assert "CODEC=gzip: expected one of none, lz4, zstd-1, zstd-3, which FORMAT=zarr has" in said
    said = refuse(*extract_arguments(images, tmp_path / "store", "--depth", "0", "--device", "tpu", "--workers", "-3"))
    assert "DEPTH=0: expected a number of at least 1" in said
    assert "DEVICE=tpu: expected cpu, cuda or auto" in said
    assert "WORKERS=-3: expected" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--layers", "0-9"], "LAYERS=0-9: fake_vit has states 0 to 3"),
        (["--layers", "5"], "LAYERS=5: fake_vit has states 0 to 3"),
        (["--layers", "3-1"], "LAYERS=3-1: expected a range such as 0-7, or a list such as 0,6,12"),
        (["--layers", "3,1,3"], "LAYERS=3,1,3: 3 is there more than once; expected each layer once"),
        (["--resize-size", "4"], "resize_size 4 is under image_size 16"),
        (["--image-size", "17"], "17"),
        (["--limit", "many"], "--limit"),
        (["--colour", "blue"], "--colour"),
    ],
)
def test_a_setting_that_cannot_be(
    flags: list[str], expected: str, refuse: Refuse, images: Path, tmp_path: Path
) -> None:
    assert expected in refuse(*extract_arguments(images, tmp_path / "store", *flags))
    assert not (tmp_path / "store").exists()


def test_addresses_of_other_schemes_are_refused_clearly(refuse: Refuse, images: Path) -> None:
    said = refuse(*extract_arguments(images, "gs://bucket/store"))
    assert "STORE=gs://bucket/store: expected a local path, or s3://bucket/prefix" in said
    assert "gs://bucket/store" in refuse("verify", "--store", "gs://bucket/store")
    assert "gs://bucket/store" in refuse("verify", "--store", "gs://bucket/store", "--repair", "--images", str(images))


def test_a_second_job_is_told_who_is_at_work(refuse: Refuse, images: Path, store: Path, tmp_path: Path) -> None:
    place = shutil.copytree(store, tmp_path / "store")
    (place / "index.parquet").unlink()
    (place / "commits/000001.json").unlink()
    with another_job(place) as pid:
        before = snapshot(place)
        said = refuse(*extract_arguments(images, place))
        assert f"is being written by another job (run theirs, process {pid} on " in said
        assert "Wait for it, or stop it" in said
        said = refuse("verify", "--store", str(place), "--repair", "--images", str(images))
        assert f"process {pid} on " in said
        assert snapshot(place) == before
    # killed: seen to be dead at once, without a wait of a minute
    assert "still alive" not in refuse(*extract_arguments(images, place), code=ExitCode.OK)
    assert digest_of(place) == digest_of(store)
    assert not (place / HEARTBEAT_KEY).exists()


@contextmanager
def another_job(store: Path) -> Iterator[int]:
    """A process that has the store, as its heartbeat says; killed at the end."""
    program = (
        "import sys, time; from infra.status import my_heartbeat;"
        "open(sys.argv[1], 'wb').write(my_heartbeat('theirs', time.time()).to_bytes());"
        "print('at work', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(store / HEARTBEAT_KEY)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        try:
            yield process.pid
        finally:
            process.kill()


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of a few bytes; needs root."""
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_first_image(
    refuse: Refuse, images: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "32k") as disk:
        said = refuse(*extract_arguments(images, disk / "store"))
        assert f"{disk} has 32.8 kB free and up to " in said
        assert "LIMIT=n" in said
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_stops_the_job_and_room_lets_it_go_on(
    refuse: Refuse, images: Path, store: Path, tmp_path: Path
) -> None:
    """Each small file takes a whole block, which the plan does not count: so the check passes and the disk fills."""
    with small_disk(tmp_path / "disk", "300k") as disk:
        said = refuse(*extract_arguments(images, disk / "store"), code=ExitCode.PROBLEMS)
        assert "could not be written: No space left on device. What is committed stays valid" in said
        assert leftovers(disk) == []
        assert not (disk / "store" / HEARTBEAT_KEY).exists()
        assert main(["verify", "--store", str(disk / "store")]) == ExitCode.OK
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert main(extract_arguments(images, disk / "store")) == ExitCode.OK
        assert digest_of(disk / "store") == digest_of(store)


def test_damage_is_told_with_the_next_step(refuse: Refuse, store: Path, tmp_path: Path) -> None:
    place = shutil.copytree(store, tmp_path / "store")
    (place / "layer_01/cls/c/2/0").unlink()
    said = refuse("verify", "--store", str(place), code=ExitCode.PROBLEMS)
    assert "layer_01/cls/c/2/0: object is missing" in said
    assert f"make verify STORE={place} IMAGES=<as extracted> REPAIR=1" in said


@pytest.mark.parametrize(
    ("target", "variables", "expected"),
    [
        ("extract", {"IMAGES": "{tmp}/none", "NO_RAY": "1"}, "{tmp}/none"),
        ("train", {"STORE": "{tmp}", "BLOCK": "0-2", "RUN": "{tmp}/run"}, "is not a store"),
    ],
)
def test_through_make(target: str, variables: dict[str, str], expected: str, tmp_path: Path) -> None:
    values = {name: value.format(tmp=tmp_path) for name, value in variables.items()}
    settings = [f"{name}={value}" for name, value in values.items()]
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", ".venv/.ready", f"PYTHON={sys.executable}", target, *settings],
        cwd=REPO,
        env={name: value for name, value in os.environ.items() if name not in ("IMAGES", "STORE", "MAKEFLAGS")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Traceback" not in said
    assert expected.format(tmp=tmp_path) in said
    assert said.count("error:") == 1


def test_the_same_by_make_works(images: Path, store: Path, tmp_path: Path) -> None:
    settings = {
        "IMAGES": images, "STORE": tmp_path / "store", "TEACHER": "fake_vit", "WEIGHTS": "random:0", "NO_RAY": 1,
        "SAMPLES_PER_SHARD": 8, "SAMPLES_PER_CHUNK": 4, "MICRO_BATCH": 3, "DEVICE": "cpu",
    }  # fmt: skip
    command = ["make", "-o", ".venv/.ready", f"PYTHON={sys.executable}", "extract"]
    done = subprocess.run(
        [*command, *(f"{name}={value}" for name, value in settings.items())], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"Next: make train BLOCK=0-3 STORE={tmp_path / 'store'}" in done.stdout
    assert digest_of(tmp_path / "store") == digest_of(store)

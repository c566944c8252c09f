"""`make phases`, through the real door: what is printed and saved, from folders and S3, and what is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import analysis.phase_report
from analysis.__main__ import default_out, main
from infra.console import ExitCode, run_door
from infra.objects import FolderObjects, Objects, open_objects
from storage_schemas.from_arrays import write_store
from tests.s3_servers import S3Server, anonymous_environment, read_only_environment
from tests.stores import make_samples, make_spec, write_planted
from trainer.commands.blocks import find_blocks

REPOSITORY = Path(__file__).parents[2]
SIZES = (7, 3, 2)
FEW_OBJECTS = {"samples_per_shard": 32, "samples_per_chunk": 8, "n_registers": 0}

Door = Callable[..., tuple[int, str, str]]


def weights_of(n_blocks: int) -> bytes:
    """A weights file with as many empty blocks."""
    tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    head = json.dumps({f"blocks.{i}.norm1.weight": tensor for i in range(n_blocks)}).encode()
    return len(head).to_bytes(8, "little") + head


def phased_states(rows: range, n_tokens: int, n_layers: int = 13, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    """Layers of one phase point one way, with noise; phases are at angles to one another, layer 0 is unlike all."""
    phase = np.concatenate([[len(sizes)], np.repeat(np.arange(len(sizes)), sizes)])[:n_layers]
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 8)))[0].T * 4 + 0.5
    rng = np.random.default_rng((1, rows.start))
    noise = rng.standard_normal((len(rows), n_layers, n_tokens, 16)) * 0.4
    return (directions[phase][None, :, None] + noise).astype(np.float32)


def write_phased(objects: Objects, *, blocks: int | None = 12, bad: dict[int, str] | None = None, **changes) -> None:
    spec = make_spec(**{**FEW_OBJECTS, "layers": tuple(range(13)), "dim": 16, "n_samples": 40} | changes)
    write_store(
        objects,
        spec,
        make_samples(spec.n_samples),
        lambda rows: phased_states(rows, spec.n_tokens)[:, list(spec.layers)],
        bad_images=bad,
        teacher_files=None if blocks is None else {"config.json": b"{}", "weights.safetensors": weights_of(blocks)},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with stores train, whose phases are planted, and val."""
    root = tmp_path_factory.mktemp("stores") / "planted"
    write_phased(FolderObjects(root / "train"))
    write_planted(FolderObjects(root / "val"), make_spec())
    return str(root)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn where they are looked at: that takes longer than all else."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("analysis.__main__.phases_figure", lambda *_, **__: b"figure")


@pytest.fixture
def drawn() -> None:
    """For tests that look at the figure."""


@pytest.fixture
def door(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Door:
    """Run `python -m analysis phases` here, in an empty folder; gives exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_door(lambda: main(["phases", *map(str, arguments)]))
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestWhatIsFound:
    def test_planted_phases_are_printed_and_saved(self, store, door, tmp_path, drawn):
        before = contents(Path(store))
        code, out, _ = door("--store", store, "--k", 3)
        assert code == ExitCode.OK
        assert re.findall(r"^BLOCKS=.*$", out, re.MULTILINE) == ["BLOCKS=0-7,7-10,10-12"]
        assert f"\nnext  make train BLOCK=all BLOCKS=0-7,7-10,10-12 STORE={store}\n" in out
        assert find_blocks("", str(store)) == "0-7,7-10,10-12", "make train BLOCK=all finds what was saved"
        assert re.search(r"10 random contiguous.*\n.*10 random permuted", out)
        saved = tmp_path / "data/phases/planted"
        assert sorted(path.name for path in saved.iterdir()) == ["distance.npz", "k3.json", "k3.png"]
        assert contents(Path(store)) == before

        document = json.loads((saved / "k3.json").read_text())
        assert document["blocks"] == ["0-7", "7-10", "10-12"]
        assert document["groups"] == [list(range(1, 8)), list(range(8, 11)), [11, 12]]
        assert document["command"] == f"make phases K=3 STORE={store}"
        assert document["n_images"] == 40
        for kind in ("random contiguous", "random permuted"):
            scores = [one["score"] for one in document["controls"][kind]]
            assert len(scores) == 10
            assert max(scores) < document["score"]
        three = [found for found in document["epsilon_ranges"] if len(found["layers"]) == 3]
        assert [found["layers"] for found in three] == [document["groups"]]

        matrix = np.load(saved / "distance.npz")
        assert matrix["layers"].tolist() == list(range(1, 13))
        np.testing.assert_allclose(matrix["distance"], (matrix["cls"] + matrix["patch_mean"]) / 2, atol=1e-15)
        assert matrix["distance"].sum() / 2 == pytest.approx(document["total_distance"])

        picture = imread(saved / "k3.png")
        assert picture.shape[0] > 500
        assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20

    def test_the_same_command_again_gives_the_same_bytes(self, store, door, tmp_path, drawn):
        door("--store", store, "--k", 2)
        first = contents(tmp_path)
        door("--store", store, "--k", 2)
        assert contents(tmp_path) == first

    def test_epsilon_alone_gives_the_recursions_spans(self, store, door, tmp_path):
        door("--store", store, "--k", 3)
        ranges = json.loads((tmp_path / "data/phases/planted/k3.json").read_text())["epsilon_ranges"]
        inside = next((found["from"] + found["below"]) / 2 for found in ranges if len(found["layers"]) == 3)
        code, out, _ = door("--store", store, "--epsilon", inside, "--out", "here")
        assert code == ExitCode.OK
        assert "BLOCKS=0-7,7-10,10-12" in out.splitlines()
        document = json.loads((tmp_path / f"here/epsilon{inside:g}.json").read_text())
        assert (document["chosen_by"], document["n_blocks"]) == ("epsilon", 3)

    def test_k_with_epsilon_shows_both(self, store, door):
        code, out, _ = door("--store", store, "--k", 3, "--epsilon", 0.99)
        assert code == ExitCode.OK
        assert "0-12: the recursion, at EPSILON" in out
        assert "BLOCKS=0-7,7-10,10-12" in out.splitlines()

    def test_clusters_that_are_not_contiguous_have_no_blocks(self, door, tmp_path, monkeypatch):
        def swapped(rows: range, n_tokens: int) -> np.ndarray:
            return phased_states(rows, n_tokens)[:, [0, *range(1, 13, 2), *range(2, 13, 2)]]

        spec = make_spec(layers=tuple(range(13)), dim=16, n_samples=8)
        write_store(FolderObjects("mixed"), spec, make_samples(8), lambda rows: swapped(rows, spec.n_tokens))
        code, out, err = door("--store", "mixed", "--epsilon", 0.3)
        assert code == ExitCode.PROBLEMS
        assert "BLOCKS=" not in out
        assert re.search(r"clusters .* are not contiguous, so there is no BLOCKS= for them: give K=2", err)
        assert json.loads(Path("data/phases/mixed/epsilon0.3.json").read_text())["blocks"] is None

    def test_other_objectives_limits_and_one_block(self, store, door, tmp_path):
        code, out, _ = door("--store", f"{store}/train", "--k", 3, "--objective", "cut", "--limit", 9, "--out", "here")
        assert code == ExitCode.OK
        assert "over 9 images" in out
        assert (tmp_path / "here/k3-cut.json").exists()
        code, out, _ = door("--store", store, "--k", 1)
        assert code == ExitCode.OK
        assert "random permuted: there is no other one" in out
        assert "BLOCKS=0-12" in out.splitlines()

    def test_a_store_that_is_not_finished_says_so(self, store, door, tmp_path):
        objects = FolderObjects(tmp_path / "part")
        whole = FolderObjects(f"{store}/train")
        for info in whole.list():
            if info.key not in ("index.parquet", "commits/000001.json"):
                objects.put(info.key, whole.get(info.key))
        code, out, err = door("--store", tmp_path / "part", "--k", 3)
        assert code == ExitCode.OK
        assert "is not finished: phases of the 32 images that are there" in err
        assert "BLOCKS=0-7,7-10,10-12" in out.splitlines()

    def test_more_layers_than_cuts_are_searched_for(self, door, monkeypatch, store):
        monkeypatch.setattr(analysis.phase_report, "MAX_CUT_LAYERS", 11)
        code, out, _ = door("--store", store, "--k", 3)
        assert code == ExitCode.OK
        assert "epsilon recursion: not searched with more than 11 layers" in out
        assert "BLOCKS=0-7,7-10,10-12" in out.splitlines()

    @pytest.mark.parametrize(
        ("typed", "place"),
        [
            ("data/stores/digits", "data/phases/digits"),
            ("data/stores/digits/train/", "data/phases/digits-train"),
            ("s3://bucket/imagenet", "data/phases/imagenet"),
        ],
    )
    def test_default_place(self, typed, place):
        assert default_out(typed) == place


class TestS3:
    def test_a_store_on_s3_is_read_and_never_written(self, s3_location, door):
        write_phased(open_objects(f"{s3_location}/train"), n_samples=8)
        code, out, _ = door("--store", s3_location, "--k", 3)
        assert code == ExitCode.OK
        assert "BLOCKS=0-7,7-10,10-12" in out.splitlines()

    @pytest.mark.parametrize("who", [anonymous_environment, read_only_environment])
    def test_a_bucket_that_may_only_be_read(self, moto: S3Server, door, monkeypatch, who):
        def become(environment: dict[str, str]) -> None:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                monkeypatch.delenv(name)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)

        bucket = moto.make_bucket()
        become(moto.environment)
        write_phased(open_objects(f"s3://{bucket}/planted/train"), n_samples=8)
        become({**who(moto, bucket), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
        n_before = len(moto.log)
        code, out, err = door("--store", f"s3://{bucket}/planted", "--k", 3, "--endpoint-url", moto.endpoint)
        assert code == ExitCode.OK, err
        assert "BLOCKS=0-7,7-10,10-12" in out.splitlines()
        during = [entry for entry in moto.log[n_before:] if entry.bucket == bucket]
        assert {entry.method for entry in during} <= {"GET", "HEAD", "LIST"}
        assert not [entry.key for entry in during if "/patches/" in entry.key]
        said = door("--store", f"s3://{bucket}/planted", "--k", 3, "--out", f"s3://{bucket}/phases")[2]
        assert f"OUT=s3://{bucket}/phases: nothing can be written to" in said

    @pytest.mark.parametrize("below", ["", "/log", "/a/b"])
    def test_a_place_on_s3_in_another_store(self, store, s3_location, door, below):
        other = open_objects(f"{s3_location}/other")
        write_planted(other, make_spec())
        before = list(other.list())
        code, _, err = door("--store", store, "--k", 3, "--out", f"{s3_location}/other{below}")
        assert code == ExitCode.BAD_INPUT
        assert f"OUT={s3_location}/other{below} lies in a store, which is never written to" in err
        assert list(other.list()) == before

    def test_what_is_saved_may_lie_on_s3(self, store, s3_location, door):
        code, _, _ = door("--store", store, "--k", 3, "--out", s3_location)
        assert code == ExitCode.OK
        assert [info.key for info in open_objects(s3_location).list()] == ["distance.npz", "k3.json", "k3.png"]


class TestWhatIsRefused:
    def refused(self, door: Door, *arguments: object) -> str:
        code, out, err = door(*arguments)
        assert (code, out) == (ExitCode.BAD_INPUT, "")
        assert err.count("error:") == 1
        assert not Path("data").exists()
        return err

    def test_everything_at_once(self, store, door):
        said = self.refused(
            door, "--store", store, "--k", 0, "--epsilon", 1.5, "--objective", "best", "--limit", 1, "--out", store
        )
        assert said.splitlines()[0] == "error: make phases cannot start:"
        assert "K=0: expected 1 or more blocks" in said
        assert "EPSILON=1.5: expected a share of the total distance, from 0 to below 1" in said
        assert "OBJECTIVE=best: expected one of normalised_association, cut, cut_per_layer, mean_distance" in said
        assert "LIMIT=1: expected 2 or more images" in said
        assert "lies in a store, which is never written to" in said

    def test_nothing_asked(self, store, door):
        assert "K is missing: give the number of blocks, or EPSILON. For example: make phases K=3" in self.refused(
            door, "--store", store
        )

    def test_no_store(self, door):
        said = self.refused(door, "--store", "nowhere", "--k", -1)
        assert "STORE=nowhere: nowhere is not a store" in said
        assert "K=-1" in said

    def test_a_val_without_train(self, store, door, tmp_path):
        (tmp_path / "only").mkdir()
        (tmp_path / "only/val").symlink_to(f"{store}/val")
        assert "has a store val but none called train" in self.refused(door, "--store", "only", "--k", 2)

    def test_more_blocks_than_the_depth_holds(self, store, door):
        said = self.refused(door, "--store", store, "--k", 7)
        assert (
            "K=7: 12 layers cannot be cut into 7 segments of at least 2: that takes 14 layers, so k is at most 6"
            in said
        )

    @pytest.mark.parametrize("epsilon", ["nan", "-0.1", "1", "inf"])
    def test_epsilon_out_of_range(self, store, door, epsilon):
        assert f"EPSILON={float(epsilon)}: expected" in self.refused(door, "--store", store, f"--epsilon={epsilon}")

    @pytest.mark.parametrize("layers", [(0, 6, 12), tuple(range(8)), (1, 2)])
    def test_layers_that_the_store_lacks(self, door, layers):
        write_phased(FolderObjects("some"), layers=layers)
        said = self.refused(door, "--store", "some", "--k", 2)
        missing = ", ".join(str(layer) for layer in range(1, 13) if layer not in layers)
        assert f"some lacks layers {missing}; phases need all of 1 to 12, the depth of fake" in said

    def test_layers_that_a_store_without_a_teacher_lacks(self, door):
        write_phased(FolderObjects("some"), layers=(0, 1, 2, 3, 5, 6), blocks=None)
        assert "lacks layers 4; phases need all of 1 to 6" in self.refused(door, "--store", "some", "--k", 2)

    def test_layer_0_is_not_needed(self, door):
        write_phased(FolderObjects("some"), layers=tuple(range(1, 13)))
        code, out, _ = door("--store", "some", "--k", 3)
        assert (code, "BLOCKS=0-7,7-10,10-12" in out.splitlines()) == (ExitCode.OK, True)

    @pytest.mark.parametrize(("n_samples", "bad"), [(1, {}), (4, {0: "empty", 1: "empty", 3: "truncated"})])
    def test_one_image(self, door, n_samples, bad):
        write_phased(FolderObjects("one"), n_samples=n_samples, bad=bad)
        assert "one has 1 valid images, expected 2 or more" in self.refused(door, "--store", "one", "--k", 3)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda states: np.ones_like(states), "states are the same at all layers, in direction"),
            (lambda states: states[:, :1] * np.arange(1, 14)[:, None, None], "states are the same at all layers"),
            (lambda states: np.repeat(states[:1], len(states), axis=0), "states are the same for all 8 images"),
            (lambda states: states * (np.arange(13) != 4)[:, None, None], "layer 4, cls: of 8 images"),
        ],
    )
    def test_constant_states(self, door, make, message):
        spec = make_spec(layers=tuple(range(13)), dim=16, n_samples=8)
        states = make(phased_states(range(8), spec.n_tokens)).astype(np.float32)
        write_store(FolderObjects("constant"), spec, make_samples(8), lambda rows: states[list(rows)])
        assert message in self.refused(door, "--store", "constant", "--k", 3)

    def test_a_damaged_commit(self, store, door, tmp_path):
        whole, objects = FolderObjects(f"{store}/train"), FolderObjects("damaged")
        for info in whole.list():
            objects.put(info.key, whole.get(info.key))
        objects.put("commits/000001.json", b"{}")
        objects.delete("index.parquet")
        said = self.refused(door, "--store", "damaged", "--k", 3)
        assert re.search(r"damaged has 1 damaged commits, commits/000001.json: .*make verify STORE=", said)

    @pytest.mark.parametrize(
        ("typed", "out"), [("", ""), ("", "/phases"), ("", "/val/x"), ("/train", "/train/log"), ("/train", "/val")]
    )
    def test_a_place_in_a_store(self, store, door, typed, out):
        before = contents(Path(store))
        said = self.refused(door, "--store", f"{store}{typed}", "--k", 3, "--out", f"{store}{out}")
        assert f"OUT={store}{out} lies in a store" in said
        assert contents(Path(store)) == before

    def test_a_place_where_nothing_can_be_written(self, store, door, tmp_path):
        (tmp_path / "file").write_text("")
        assert "OUT=file/below: nothing can be written to" in self.refused(
            door, "--store", store, "--k", 3, "--out", "file/below"
        )

    def test_damage_that_reading_meets(self, store, door):
        whole, objects = FolderObjects(f"{store}/train"), FolderObjects("damaged")
        for info in whole.list():
            objects.put(info.key, whole.get(info.key))
        key = next(info.key for info in whole.list("layer_03/cls"))
        objects.put(key, objects.get(key)[:10])
        code, out, err = door("--store", "damaged", "--k", 3)
        assert (code, out) == (ExitCode.PROBLEMS, "")
        assert key in err


def test_matplotlib_is_imported_only_when_a_figure_is_drawn():
    program = "import sys, analysis.__main__; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False, timeout=240)
    assert done.returncode == 0


def test_make_passes_every_variable_on():
    typed = {
        "K": "3",
        "STORE": "s",
        "EPSILON": "0.1",
        "OBJECTIVE": "cut",
        "OUT": "o",
        "LIMIT": "9",
        "ENDPOINT_URL": "u",
    }
    done = subprocess.run(
        ["make", "-n", "phases", *(f"{name}={value}" for name, value in typed.items())],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    for name, value in typed.items():
        assert f"--{name.lower().replace('_', '-')} '{value}'" in done.stdout

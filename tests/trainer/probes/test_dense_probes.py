"""The dense probes whole: through the door on data in their real formats, from a teacher and from a Raptor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import VisionTransformer

from infra.console import ExitCode, UserError, run_door
from infra.objects import MemoryObjects, open_objects
from pipeline.preprocess import Preprocessing
from pipeline.teacher import Loaded, Teacher, assemble, load_teacher
from tests.trainer.probes.dense_trees import write_ade20k, write_nyuv2
from tests.trainer.tiny import with_head, write_tiny
from trainer.__main__ import main
from trainer.probes import ade20k, nyuv2
from trainer.probes.backbone import Backbone
from trainer.probes.probe_files import ProbeFiles
from trainer.probes.results import ProbeResult, read_result
from trainer.probes.task import Asked, TaskKind
from trainer.probes.train_probe import Probe, train_probe

Door = Callable[..., tuple[int, str, str]]


@pytest.fixture
def door(capsys: pytest.CaptureFixture[str]) -> Door:
    """Runs a command and returns exit code, standard output and standard error."""

    def run(command: str = "probe", **options: object) -> tuple[int, str, str]:
        arguments = [command, "--device", "cpu"]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, str(value)]
        code = run_door(lambda: main(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("ade"), 2, 1)


@pytest.fixture(scope="module")
def nyu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nyuv2(tmp_path_factory.mktemp("nyu"), 2, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """States of test_vit: 6 blocks of 64 channels, a CLS token, 16 px patches; a teacher that knows any image size."""
    root = tmp_path_factory.mktemp("store")
    teacher = with_head(load_teacher("test_vit", "random:0", image_size=32))
    for split, n_samples, seed in (("train", 16, 0), ("val", 4, 1)):
        write_tiny(open_objects(f"{root}/{split}"), teacher, n_samples, seed)
    return str(root)


def result_in(place: Path) -> ProbeResult:
    return read_result(open_objects(place))


class TestDoor:
    def test_both_tasks_read_a_raptor(self, door: Door, store: str, ade: Path, nyu: Path, tmp_path: Path):
        """One block for all six, trained at 32 px; the probes load its teacher for 512 px, and for 480 x 640."""
        run = tmp_path / "run"
        code, _, err = door("train", store=store, block="0-6", run=run, steps=2)
        assert code == ExitCode.OK, err
        code, out, err = door(
            task="ade20k", store=store, run=run, images=ade, epochs=1, batch_size=2, out=tmp_path / "ade20k"
        )
        assert code == ExitCode.OK, err
        assert "mIoU of ade20k on 1 samples" in out
        found = result_in(tmp_path / "ade20k")
        assert (found.what, found.spans, found.task, found.metric) == ("raptor", ["0-6"], "ade20k", "mIoU")
        assert 0 <= found.last <= 1
        assert set(found.history[1]) == {"mIoU", "pixel accuracy"}
        assert found.task_identity["pixel_size"] == [512, 512]
        code, out, err = door(
            task="nyuv2", store=store, run=run, images=nyu, epochs=1, batch_size=2, out=tmp_path / "nyuv2"
        )
        assert code == ExitCode.OK, err
        found = result_in(tmp_path / "nyuv2")
        assert (found.what, found.metric, found.higher_is_better) == ("raptor", "RMSE (m)", False)
        assert 0 < found.last < 10
        assert found.task_identity["pixel_size"] == [480, 640]

    def test_a_teacher_by_its_name_and_again_nothing(self, door: Door, nyu: Path, tmp_path: Path):
        typed: dict[str, Any] = {
            **{"task": "nyuv2", "teacher": "test_vit", "weights": "random:0", "images": nyu},
            **{"epochs": 1, "batch_size": 2, "out": tmp_path / "out"},
        }
        code, _, err = door(**typed)
        assert code == ExitCode.OK, err
        first = result_in(tmp_path / "out")
        assert (first.what, first.n_train, first.n_evaluation) == ("teacher", 2, 1)
        assert first.data["train"]["n_samples"] == 2
        code, out, err = door(**typed)
        assert code == ExitCode.OK, err
        assert "there is nothing to do" in out
        code, _, err = door(**typed, compat=True)
        assert code == ExitCode.BAD_INPUT
        assert "compat" in err

    def test_wrong_data_is_listed_whole_before_anything_runs(self, door: Door, ade: Path, nyu: Path, tmp_path: Path):
        broken = tmp_path / "broken"
        shutil.copytree(ade, broken / "a")
        shutil.copytree(nyu, broken / "n")
        (broken / "a/annotations/training/ADE_train_00000001.png").unlink()
        (broken / "a/images/validation/ADE_val_00000001.jpg").write_bytes(b"")
        (broken / "n/data/nyu2_test/00000_depth.png").unlink()
        (broken / "n/data/nyu2_train/living_room_0038_out/2.jpg").unlink()
        for task, images, files in (
            ("ade20k", "a", ("annotations/training/ADE_train_00000001.png", "images/validation/ADE_val_00000001.jpg")),
            ("nyuv2", "n", ("nyu2_test/00000_depth.png: missing", "living_room_0038_out/2.jpg: missing")),
        ):
            out = tmp_path / task
            code, _, err = door(task=task, teacher="fake_vit", weights="random:0", images=broken / images, out=out)
            assert code == ExitCode.BAD_INPUT
            assert "has 2 problems" in err
            assert all(name in err for name in files)
            assert not out.exists()

    def test_what_a_task_needs_and_what_it_has_no_use_for(self, door: Door, ade: Path, nyu: Path, tmp_path: Path):
        given = {"weights": "random:0", "out": tmp_path / "out"}
        for task, typed, message in (
            ("ade20k", {"teacher": "fake_vit"}, "IMAGES is missing: give .../ADEChallengeData2016"),
            ("nyuv2", {"teacher": "fake_vit"}, "IMAGES is missing: give the folder that holds data/nyu2_train.csv"),
            ("nyuv2", {"teacher": "test_vit2", "images": nyu}, "test_vit2 has no CLS token"),
            ("nyuv2", {"teacher": "fake_vit", "images": "s3://bucket/nyu"}, "reads files of this machine"),
            ("ade20k", {"teacher": "fake_vit", "images": nyu}, "images/training: no .jpg in it"),
            ("nyuv2", {"teacher": "fake_vit", "images": ade}, "data/nyu2_train.csv: missing"),
        ):
            code, _, err = door(task=task, **given, **typed)
            assert code == ExitCode.BAD_INPUT
            assert message in err

    @pytest.mark.parametrize("kind", [ade20k.KIND, nyuv2.KIND])
    def test_a_head_has_no_use(self, kind: TaskKind, ade: Path):
        with pytest.raises(UserError, match="leave HEAD out"):
            kind.open(asked(ade, head="head.pth"), Backbone(teacher=load_teacher("fake_vit", "random:0")))


def asked(images: Path, *, compat: bool = False, head: str | None = None, **changes: Any) -> Asked:
    return Asked(
        images=str(images),
        store=None,
        head=head,
        compat=compat,
        seed=0,
        changes=changes,
        device=torch.device("cpu"),
    )


def probed(kind: TaskKind, images: Path, teacher: Teacher, *, compat: bool = False, **changes: Any) -> ProbeResult:
    """The result of a probe of a teacher."""
    backbone = Backbone(teacher=teacher)
    task = kind.open(asked(images, compat=compat, **changes), backbone)
    files = ProbeFiles(MemoryObjects())
    probe = Probe(task=task, backbone=backbone, seed=0, compat=compat)
    files.claim(probe.identity())
    result = train_probe(probe, files)
    assert result is not None
    return result


def vit_of_14_px_patches() -> Teacher:
    """A ViT with a CLS token and patches of 14 px, at the size that NYUv2 needs for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = nyuv2.image_size(14)
        model = VisionTransformer(img_size=size, patch_size=14, embed_dim=16, depth=1, num_heads=1, num_classes=0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preprocessing = Preprocessing(image_size=490, resize_size=560, mean=mean, std=std)
    return assemble("vit14", Loaded(model=model, preprocessing=preprocessing, pixel_size=size), None, "cpu", "float32")


def test_segmentation_learns_what_is_in_the_images(tmp_path: Path):
    """Dark is class 2, bright is class 119: found but for the patches at their border."""
    tree = write_ade20k(tmp_path, 8, 4)
    teacher = load_teacher("fake_vit", "random:0", image_size=48)
    for compat in (False, True):
        found = probed(ade20k.KIND, tree, teacher, compat=compat, n_epochs=12, batch_size=2, learning_rate=0.3)
        assert found.initial < 0.01
        scale = 150 / 2 if compat else 1  # published: the 148 classes that are nowhere count 0
        assert found.last * scale > 0.8
        accuracy = found.history[-1]["pixel accuracy"]
        assert (0.8 < accuracy < 0.9) if compat else accuracy > 0.95, "one row in eight has no label"


def test_depth_runs_with_padding(nyu: Path):
    """14 px patches: 480 x 640 px are padded to 490 x 644, and scores come on 140 x 184 cells."""
    teacher = vit_of_14_px_patches()
    assert teacher.grid == (35, 46)
    ours = probed(nyuv2.KIND, nyu, teacher, n_epochs=1, batch_size=2)
    published = probed(nyuv2.KIND, nyu, teacher, compat=True, n_epochs=1, batch_size=2)
    assert ours.task_identity == {"pixel_size": [490, 644], "n_bins": 256}
    assert 0 < ours.initial < 9
    assert ours.initial != published.initial, "the same scores, once cut and once stretched"
    assert abs(ours.initial - published.initial) < 0.05
    prepare = nyuv2.KIND.open(asked(nyu), Backbone(teacher=teacher)).prepare
    pixels = torch.randn(1, 3, 480, 640)
    assert torch.equal(prepare(pixels)[:, :, 5:485, 2:642], pixels), "the image lies in the middle, not stretched"


@pytest.mark.slow
def test_depth_learns_what_is_in_the_images(tmp_path: Path):
    """Brighter is farther, 25 grey values a metre: well under the spread of the depths, through padding and bins."""
    root = write_nyuv2(tmp_path, 8, 2)
    teacher = vit_of_14_px_patches()
    found = probed(nyuv2.KIND, root, teacher, n_epochs=5, batch_size=4, learning_rate=0.1)
    assert found.initial > 1.0
    assert found.best < 0.6 * found.initial


def test_a_result_is_plain_json(ade: Path):
    found = probed(ade20k.KIND, ade, load_teacher("fake_vit", "random:0", image_size=16), n_epochs=1, batch_size=1)
    assert json.loads(json.dumps(found.settings))["learning_rate"] == 1e-3
    assert found.data["train"] != found.data["evaluation"]

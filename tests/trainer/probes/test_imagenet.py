"""TASK=imagenet on a real ImageFolder tree of JPEGs: the recipe, its transforms, its readout, its wrong inputs."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from infra.console import UserError
from infra.objects import FolderObjects, MemoryObjects
from pipeline.extract import extract
from pipeline.teacher import Teacher, load_teacher, teacher_from_files
from storage_schemas import open_store
from storage_schemas.find import find_stores
from tests.pipeline_jobs import ALONE, fake_config
from tests.trainer.probes.imagenet_trees import CLASSES, write_imagenet, write_split
from tests.trainer.probes.tiny_probes import trained_of
from trainer.probes.backbone import Backbone
from trainer.probes.classification import teacher_head_top1
from trainer.probes.imagenet import SETTINGS, ClassImages, augmented, open_imagenet
from trainer.probes.probe_files import ProbeFiles
from trainer.probes.results import ProbeResult
from trainer.probes.task import Asked, find_task
from trainer.probes.train_probe import Probe, train_probe

CHANGES = {"n_epochs": 2, "batch_size": 8, "learning_rate": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def store(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same images, float32."""
    place = tmp_path_factory.mktemp("store") / "imagenet"
    extract(fake_config(images, place, precision="float32"), ALONE)
    return place


def asked(images: Path | None, *, store: Path | None = None, head: Path | None = None) -> Asked:
    return Asked(
        images=None if images is None else str(images),
        store=None if store is None else str(store),
        head=None if head is None else str(head),
        compat=False,
        seed=0,
        changes=CHANGES,
        device=torch.device("cpu"),
    )


def probed(what: Asked, frozen: Backbone) -> ProbeResult:
    probe = Probe(task=open_imagenet(what, frozen), backbone=frozen, seed=0)
    result = train_probe(probe, ProbeFiles(MemoryObjects()))
    assert result is not None
    return result


def frozen_of(teacher: Teacher | None = None, *, raptor: bool = False) -> Backbone:
    teacher = teacher or load_teacher("fake_vit", "random:0")
    return Backbone(teacher=teacher, trained=trained_of(teacher) if raptor else None)


def meta_head(path: Path, n_classes: int = 3, dim: int = 8) -> tuple[Path, nn.Linear]:
    """A seeded head as Meta's files are: weight and bias in a .pth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        head = nn.Linear(2 * dim, n_classes)
    torch.save(head.state_dict(), path)
    return path, head


def test_the_recipe_is_the_published_one() -> None:
    assert dataclasses.asdict(SETTINGS) == {
        "n_epochs": 15,
        "batch_size": 512,
        "evaluation_batch_size": 512,
        "learning_rate": 1e-4,
        "weight_decay": 1e-2,
        "schedule": "warmup_cosine",
        "warmup_iterations": 100,
        "clip_norm": 1.0,
        "precision": "float32",
        "drop_last": True,
    }
    assert find_task("imagenet").image_size is None  # the teacher's own: 224 px for DINOv2


def test_training_crops_are_torchvisions_to_the_bit(images: Path) -> None:
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(16, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    paths = sorted((images / "train").rglob("*.JPEG"))
    for seed, path in enumerate(paths):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = theirs(Image.open(path).convert("RGB"))
        assert torch.equal(augmented(path.read_bytes(), 16, torch.Generator().manual_seed(seed)), expected)


def test_evaluation_images_and_labels_are_torchvisions(images: Path) -> None:
    """Short side resized bicubic (256 for 224; here 18 for 16), centre crop; classes in the order of their folders."""
    frozen = frozen_of()
    evaluation = open_imagenet(asked(images), frozen).evaluation
    transform = v2.Compose([v2.Resize(18, InterpolationMode.BICUBIC), v2.CenterCrop(16), v2.PILToTensor()])
    theirs = ImageFolder(str(images / "val"), transform=transform)
    assert len(evaluation) == len(theirs) == 15
    for index, (pixels, label) in enumerate(theirs):
        ours, target = evaluation.load(index, None)
        assert torch.equal(ours, pixels)
        assert int(target) == label


@pytest.mark.parametrize("raptor", [False, True])
def test_a_head_file_is_where_it_begins(images: Path, tmp_path: Path, raptor: bool) -> None:
    """Epoch 0 is what the teacher with that head reaches, to the sample; a Raptor that is exact reaches the same."""
    path, head = meta_head(tmp_path / "linear_head.pth")
    result = probed(asked(images, head=path), frozen_of(raptor=raptor))
    teacher = dataclasses.replace(load_teacher("fake_vit", "random:0"), head=head.requires_grad_(False))
    evaluation = open_imagenet(asked(images), frozen_of()).evaluation
    loaded = [evaluation.load(index, None) for index in range(15)]
    from pipeline.preprocess import normalise

    pixels = normalise(torch.stack([p for p, _ in loaded]), teacher.preprocessing)
    named = teacher.logits(teacher.layer_states(pixels)[:, -1]).argmax(-1)
    right = int((named == torch.stack([label for _, label in loaded])).sum())
    assert result.initial == right / 15
    assert len(result.history) == 3
    assert result.task_identity["head"] != "random"
    assert result.task_identity["classes"] == 3


def test_evaluating_on_a_stores_val_is_evaluating_on_its_images(images: Path, store: Path, tmp_path: Path) -> None:
    path, _ = meta_head(tmp_path / "linear_head.pth")
    for raptor in (False, True):
        by_images = probed(asked(images, head=path), frozen_of(raptor=raptor))
        by_store = probed(asked(images, store=store, head=path), frozen_of(raptor=raptor))
        assert by_store.history == by_images.history
        assert by_store.data["train"] == by_images.data["train"]
        assert set(by_store.data["evaluation"]) == {"store", "n_samples"}
        assert by_store.n_evaluation == by_images.n_evaluation == 15


def test_the_teachers_own_head_is_measured_beside_it(images: Path, tmp_path: Path) -> None:
    path, head = meta_head(tmp_path / "linear_head.pth")
    place = tmp_path / "store"
    extract(fake_config(images, place, precision="float32", head=str(path)), ALONE)
    teacher = dataclasses.replace(load_teacher("fake_vit", "random:0"), head=head.requires_grad_(False))
    result = probed(asked(images, store=place, head=path), frozen_of(teacher))
    assert result.teacher_head == result.initial


def test_it_learns_the_colours(images: Path) -> None:
    what = dataclasses.replace(asked(images), changes={"n_epochs": 12, "batch_size": 8, "learning_rate": 0.3})
    assert probed(what, frozen_of()).last > 0.6


# ---------------------------------------------------------------- wrong input


def problems_of(what: Asked, frozen: Backbone | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_imagenet(what, frozen or frozen_of())
    return str(caught.value)


def test_no_images() -> None:
    assert "IMAGES is missing: give the folder that holds train/ and val/" in problems_of(asked(None))


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    """One class to train on, none of its kind to evaluate on, no such head, no such store."""
    write_split(tmp_path / "train", 2, classes=("n01440764",))
    write_split(tmp_path / "val", 2, classes=("n02102040",))
    said = problems_of(asked(tmp_path, store=tmp_path / "no-store", head=tmp_path / "no-head.pth"))
    for part in (
        "train has 1 class; a probe needs at least 2",
        "val has 1 class folders that train lacks: n02102040",
        f"HEAD={tmp_path}/no-head.pth: there is no weights file",
        f"STORE={tmp_path}/no-store",
    ):
        assert part in said, part


def test_empty_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
    said = problems_of(asked(tmp_path))
    for split in ("train", "val"):
        assert f"{tmp_path}/{split} has 3 class folders and no image in any of them" in said


def test_files_that_are_no_images_are_named_before_anything_runs(tmp_path: Path) -> None:
    """All of them at once, of both splits: found one by one, each would end a training. Odd images are images."""
    write_imagenet(tmp_path, 2, 1)
    first = next(iter(CLASSES))
    place = tmp_path / "train" / first
    image = Image.effect_noise((30, 24), 80)
    for name, mode in (("grey", "L"), ("colour", "RGB"), ("print", "CMYK")):
        image.convert(mode).save(place / f"{name}.JPEG")
    image.convert("RGBA").save(place / "alpha.png")
    image.save(place / "png.JPEG", format="PNG")
    (place / "below").mkdir()
    (place / "grey.JPEG").rename(place / "below/GREY.JPG")
    (place / "link.jpeg").symlink_to(place / "colour.JPEG")
    for name in ("notes.txt", ".DS_Store", "Thumbs.db"):
        (place / name).write_bytes(b"x")
    task = open_imagenet(asked(tmp_path), frozen_of())
    assert isinstance(task.train, ClassImages)
    assert len(task.train) == 3 * 2 + 6
    for index in range(len(task.train)):
        task.train.load(index, torch.Generator().manual_seed(0))
        task.train.load(index, None)
    torn = (place / "colour.JPEG").read_bytes()[:100]
    bad = {"train": {"._a.JPEG": b"\0\5\26\7", "empty.JPEG": b"", "torn.JPEG": torn}, "val": {"text.JPEG": b"hello"}}
    for split, files in bad.items():
        for name, data in files.items():
            (tmp_path / split / first / name).write_bytes(data)
    said = problems_of(asked(tmp_path))
    for split, files in bad.items():
        assert (
            f"{tmp_path}/{split} has files that are no images: remove them, or give a folder of links to the others:"
            in said
        )
        assert all(f"{first}/{name}: bad image" in said for name in files)
    assert said.count("bad image") == 4
    for number in range(30):
        (place / f"more{number:02d}.JPEG").write_bytes(b"")
    said = problems_of(asked(tmp_path))
    assert said.count("bad image") == 20 + 1
    assert "and 13 more" in said


def test_a_head_of_other_classes(images: Path, tmp_path: Path) -> None:
    narrow, _ = meta_head(tmp_path / "two.pth", n_classes=2)
    wide, _ = meta_head(tmp_path / "thousand.pth", n_classes=1000)
    assert "names 2 classes, train has 3 folders" in problems_of(asked(images, head=narrow))
    assert "names 1,000 classes, train has 3 folders" in problems_of(asked(images, head=wide))
    other_dim, _ = meta_head(tmp_path / "dim.pth", dim=768)
    assert "does not fit: expected a weight of (classes, 16)" in problems_of(asked(images, head=other_dim))


def test_no_val(tmp_path: Path, store: Path) -> None:
    write_split(tmp_path / "train", 3)
    assert "no val/ to evaluate on; add it, or give a STORE" in problems_of(asked(tmp_path))
    assert open_imagenet(asked(tmp_path, store=store), frozen_of()).name == "imagenet"


def test_a_store_whose_labels_mean_other_classes(tmp_path: Path, store: Path) -> None:
    write_split(tmp_path / "train", 3, classes=("n00000001", "n01440764", "n03888257"))
    said = problems_of(asked(tmp_path, store=store))
    assert "label 0 is 'n01440764' there, 'n00000001' in IMAGES; label 1 is 'n02102040' there" in said
    assert "label 2" not in said


def test_a_damaged_image_ends_it_with_its_name(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    path = next((tmp_path / "train" / "n02102040").iterdir())
    path.write_bytes(path.read_bytes()[:-100])  # its header is whole, so that it is found when it is read
    with pytest.raises(UserError, match=rf"n02102040/{path.name} of train cannot be used: bad image \(truncated\)"):
        probed(asked(tmp_path), frozen_of())


def test_a_teacher_without_cls(images: Path) -> None:
    teacher = load_teacher("fake_vit", "random:0")
    said = problems_of(asked(images), frozen_of(dataclasses.replace(teacher, has_cls=False)))
    assert "has no CLS token, which this task reads" in said


def test_the_place_of_a_store_says_nothing_of_it(images: Path, store: Path, tmp_path: Path) -> None:
    """A moved data set is the same: identity has digests and no location."""
    import shutil

    moved = tmp_path / "elsewhere"
    shutil.copytree(images, moved)
    frozen = frozen_of()
    identities = [
        Probe(task=open_imagenet(asked(place, store=store), frozen), backbone=frozen, seed=0).identity()
        for place in (images, moved)
    ]
    assert identities[0] == identities[1]
    assert str(images) not in str(identities[0])
    FolderObjects(moved / "train" / "n02102040").delete(next((moved / "train" / "n02102040").iterdir()).name)
    fewer = Probe(task=open_imagenet(asked(moved, store=store), frozen), backbone=frozen, seed=0).identity()
    assert fewer != identities[0]


# ---------------------------------------------------------------- the real thing


@pytest.mark.skipif("IMAGENET_STORE" not in os.environ, reason="give IMAGENET_STORE=, stores of DINOv2 ViT-B/14 reg")
def test_metas_head_on_the_real_teacher() -> None:
    """Needs weights and images that nobody has here: a store train and val, extracted with HEAD=Meta's linear head."""
    stores = find_stores(os.environ["IMAGENET_STORE"])
    store = open_store(stores["val"])
    teacher = teacher_from_files(store.read_teacher_files())
    assert store.n_valid == 50_000
    assert teacher_head_top1(teacher, store) == pytest.approx(0.846, abs=0.003)

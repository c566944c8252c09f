"""A folder of real JPEGs, some odd or broken, through a DINOv2 ViT-S/14 with weights from a file: the whole way."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from infra.console import ExitCode
from pipeline.__main__ import main
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import open_store
from storage_schemas.from_arrays import split_kinds
from storage_schemas.reader import Store
from tests.pipeline import meta_dinov2 as meta
from tests.pipeline_jobs import encode_image, rotated_jpeg, snapshot

NAME = "vit_small_patch14_reg4_dinov2"
IMAGE_SIZE = 56  # px: 4 x 4 patches
BAD = {"dog/n_torn.jpg": "truncated", "cat/n_text.jpg": "not_an_image"}


def picture(seed: int, size: tuple[int, int], mode: str = "RGB", **save: object) -> bytes:
    """Smooth enough that JPEG and resizing matter as they do in photographs."""
    coarse = Image.open(_file(encode_image(seed, mode="RGB", size=(7, 5), format="PNG")))
    sink = _file(b"")
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(sink, **({"format": "JPEG", "quality": 85} | save))
    return sink.getvalue()


def _file(data: bytes):
    import io

    return io.BytesIO(data)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    files = {f"{('ape', 'cat', 'dog')[i % 3]}/n_{i:03d}.JPEG": picture(i, (90 + 17 * i, 140 - 5 * i)) for i in range(9)}
    files |= {
        "ape/n_grey.jpg": picture(20, (120, 80), "L"),
        "cat/n_grey.jpg": picture(21, (64, 64), "L"),
        "cat/n_cmyk.jpg": picture(22, (100, 130), "CMYK"),
        "dog/n_rotated.jpg": rotated_jpeg(23),
        "dog/deep/er/n_png.png": picture(24, (70, 90), format="PNG"),
        "dog/n_torn.jpg": picture(25, (200, 150))[:1500],
        "cat/n_text.jpg": b"404 not found\n",
        "cat/readme.txt": b"not listed",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(meta.meta_state(), folder / "meta.pth")
    torch.save(meta.linear_head_state(), folder / "head.pth")
    return folder


@pytest.fixture(scope="module")
def arguments(images: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    settings = {
        "images": images, "store": tmp_path_factory.mktemp("out") / "store", "teacher": NAME,
        "weights": weights / "meta.pth", "head": weights / "head.pth", "image-size": IMAGE_SIZE,
        "samples-per-shard": 8, "samples-per-chunk": 4, "micro-batch": 4, "device": "cpu",
    }  # fmt: skip
    return ["extract", "--no-ray", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def store(arguments: list[str]) -> Store:
    assert main(arguments) == ExitCode.OK
    return open_store(arguments[arguments.index("--store") + 1])


@pytest.fixture(scope="module")
def teacher(weights: Path) -> Teacher:
    return load_teacher(NAME, str(weights / "meta.pth"), image_size=IMAGE_SIZE, head=str(weights / "head.pth"))


def test_rows_are_in_the_references_order(store: Store, images: Path) -> None:
    listed = [Path(path).relative_to(images).as_posix() for path, _ in ImageFolder(str(images)).samples]
    order = list(range(len(listed)))
    random.Random(42).shuffle(order)
    assert store.samples["sample_id"].to_pylist() == [listed[place] for place in order]
    assert len(listed) == 16


def test_the_unreadable_are_recorded_and_named(
    store: Store, arguments: list[str], capfd: pytest.CaptureFixture
) -> None:
    names = store.samples["sample_id"].to_pylist()
    assert {names[index]: code for index, code in store.table.bad_images.items()} == BAD
    assert [name for name, valid in zip(names, store.valid) if not valid] == [n for n in names if n in BAD]
    assert main(arguments) == ExitCode.OK  # a second time: nothing to do, and the bad ones are named again
    told = capfd.readouterr().out
    assert "complete already: nothing was done" in told
    assert "2 images did not decode; their rows are invalid:" in told
    assert all(f"{name}: {code}" in told for name, code in BAD.items())


def test_the_rest_are_the_teachers_states_of_torchvisions_pixels(store: Store, images: Path, teacher: Teacher) -> None:
    transform = transforms.Compose(
        [
            transforms.Resize(64, InterpolationMode.BICUBIC),
            transforms.CenterCrop(IMAGE_SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    names = [name for name, valid in zip(store.samples["sample_id"].to_pylist(), store.valid) if valid]
    pixels = []
    for name in names:
        with Image.open(images / name) as image:
            pixels.append(transform(image.convert("RGB")))
    states = teacher.layer_states(torch.stack(pixels))
    assert (store.spec.grid, store.spec.n_registers, store.layers) == ((4, 4), 4, tuple(range(13)))
    for kind, wanted in split_kinds(store.spec, states.numpy()).items():
        found = store.read(tokens=kind)
        wanted = wanted if wanted.ndim == 4 else wanted[:, :, None]
        rounding = 2.0**-11 * np.abs(wanted) if kind == "patches" else 0.0
        assert np.all(np.abs(found - wanted) <= rounding + 1e-4), kind
        assert len(np.unique(found[:, 12], axis=0)) == len(names)  # no two images alike: rows could be told apart
    logits = teacher.head(torch.from_numpy(store.read_head_input()))
    torch.testing.assert_close(logits, teacher.logits(states[:, -1]), atol=1e-3, rtol=1e-3)


def test_the_store_is_sound_and_carries_its_teacher(store: Store, teacher: Teacher) -> None:
    assert main(["verify", "--store", store.location]) == ExitCode.OK
    assert store.read_teacher_files() == teacher.to_files()
    assert not [name for name in snapshot(Path(store.location)) if name.endswith(".put-tmp")]

"""Small extraction jobs: image folders, settings, and what two stores are compared by."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra.objects import FolderObjects
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.job import ExtractResult
from pipeline.run_config import RunConfig
from storage_schemas.digest import content_digest

#: In this process, on the CPU, one thread: nothing of it may change a byte.
ALONE = RunConfig(no_ray=True, device="cpu", cpus_per_worker=1, depth=1)
#: In this process with several shards and micro-batches at once.
THREADS = RunConfig(no_ray=True, device="cpu", cpus_per_worker=3, depth=2)
#: Through a private or shared Ray; a worker costs 5 s of processor time, which is to load torch.
ON_RAY = RunConfig(device="cpu", workers=1, cpus_per_worker=1, depth=2, dashboard=False)
#: Through Ray, where several workers are the subject.
ON_TWO = replace(ON_RAY, workers=2)


def encode_image(seed: int, *, mode: str = "RGB", size: tuple[int, int] = (21, 18), **save: Any) -> bytes:
    """A file of random pixels; JPEG unless `format` says otherwise."""
    n_channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], n_channels), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(values.squeeze(), mode).save(sink, **({"format": "JPEG", "quality": 90} | save))
    return sink.getvalue()


def rotated_jpeg(seed: int) -> bytes:
    """A JPEG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_image(seed, size=(30, 20), exif=exif)


def make_tree(root: Path, n_images: int, *, odd: bool = False) -> Path:
    """A folder of three class folders with `n_images` files; odd ones among them if asked.

    The odd ones replace images: grey, CMYK, rotated by EXIF (all of them fine), truncated, text, empty (all bad).
    """
    files = {f"class{i % 3}/{i:03d}.jpg": encode_image(i) for i in range(n_images)}
    if odd:
        files |= odd_images()
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def odd_images() -> dict[str, bytes]:
    """Fine and bad files by name; the bad ones are those of BAD_IMAGES."""
    return {
        "class0/grey.jpg": encode_image(1000, mode="L"),
        "class1/cmyk.jpg": encode_image(1001, mode="CMYK"),
        "class2/rotated.jpg": rotated_jpeg(1002),
        "class0/truncated.jpg": encode_image(1003, size=(60, 50))[:700],
        "class1/text.jpg": b"this is no image\n",
        "class2/empty.jpg": b"",
    }


BAD_IMAGES = {
    "class0/truncated.jpg": "truncated",
    "class1/text.jpg": "not_an_image",
    "class2/empty.jpg": "empty",
}


def fake_config(images: Path | str, store: Path | str, **changes: Any) -> ExtractConfig:
    """The tiny teacher of pipeline/fake.py with small shards."""
    base = ExtractConfig(
        images=str(images),
        store=str(store),
        teacher="fake_vit",
        weights="random:0",
        samples_per_shard=8,
        samples_per_chunk=4,
        micro_batch=3,
    )
    return replace(base, **changes)


def fake_arguments(images: Path | str, store: Path | str, *more: str) -> list[str]:
    """`fake_config` as arguments of the door, without its command."""
    config = fake_config(images, store)
    names = ("images", "store", "teacher", "weights", "samples_per_shard", "samples_per_chunk", "micro_batch")
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]
    return [*flags, "--no-ray", "--device", "cpu", *more]


def run_job(config: ExtractConfig, run: RunConfig = ALONE) -> ExtractResult:
    """Extract into one store."""
    (result,) = extract(config, run)
    return result


def digest_of(store: Path | str) -> str:
    """What "byte-identical" compares."""
    return content_digest(FolderObjects(store))


def snapshot(folder: Path, *, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(tuple(without))}


def leftovers(store: Path) -> list[str]:
    """Half-written files."""
    return [str(path) for path in store.rglob("*.put-tmp")]

"""Pixels exactly as PIL and torchvision make them, and a fixed verdict on everything that is no image."""

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor
from torchvision import transforms

from pipeline.preprocess import (
    BAD_IMAGE_CODES,
    MAX_PIXELS,
    BadImageError,
    Preprocessing,
    decode_image,
    normalise,
)
from pipeline.preprocessing import resize_size_for
from tests import examples

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(image_size: int = 56, **changes: Any) -> Preprocessing:
    options = {"image_size": image_size, "resize_size": resize_size_for(image_size), "mean": MEAN, "std": STD}
    return Preprocessing(**(options | changes))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int = 96, height: int = 72, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that JPEG and resizing both have something to do."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.RandomState(seed).randint(0, 40, (height, width, 3))
    waves = np.stack([100 + 80 * np.sin(rows / 9), 100 + 80 * np.cos(columns / 7), (rows + columns) % 200], axis=2)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def by_torchvision(data: bytes, chosen: Preprocessing) -> Tensor:
    """The reference's transform on torchvision's own loader."""
    resize = transforms.Resize(chosen.resize_size, transforms.InterpolationMode.BICUBIC, antialias=True)
    crop, to_tensor = transforms.CenterCrop(chosen.image_size), transforms.ToTensor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data)).convert("RGB")
    return transforms.Normalize(chosen.mean, chosen.std)(to_tensor(crop(resize(image))))


def ours(data: bytes, chosen: Preprocessing) -> Tensor:
    return normalise(torch.from_numpy(decode_image(data, chosen))[None], chosen)[0]


def transparent_palette() -> bytes:
    return encode(photo(mode="P"), "PNG", transparency=bytes(range(256)))


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    return encode(photo(), exif=exif)


def sixteen_bit_grey() -> bytes:
    values = np.arange(72 * 96, dtype=np.uint16).reshape(72, 96) * 9
    return encode(Image.fromarray(values), "PNG")


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(photo()),
    "upright jpeg": lambda: encode(photo(60, 110)),
    "small jpeg": lambda: encode(photo(9, 7)),
    "progressive jpeg": lambda: encode(photo(), progressive=True),
    "grey jpeg": lambda: encode(photo(mode="L")),
    "cmyk jpeg": lambda: encode(photo(mode="CMYK")),
    "exif jpeg": rotated_by_exif,
    "png": lambda: encode(photo(), "PNG"),
    "palette png": lambda: encode(photo(mode="P"), "PNG"),
    "transparent palette png": transparent_palette,
    "rgba png": lambda: encode(photo(mode="RGBA"), "PNG"),
    "la png": lambda: encode(photo(mode="LA"), "PNG"),
    "bilevel png": lambda: encode(photo(mode="1"), "PNG"),
    "16-bit png": sixteen_bit_grey,
    "mpo, two pictures in one jpeg": lambda: encode(photo(), "MPO", save_all=True, append_images=[photo(seed=1)]),
    "gif": lambda: encode(photo(), "GIF"),
    "bmp": lambda: encode(photo(), "BMP"),
    "ppm": lambda: encode(photo(), "PPM"),
    "pgm": lambda: encode(photo(mode="L"), "PPM"),
    "tiff": lambda: encode(photo(), "TIFF"),
    "webp": lambda: encode(photo(), "WEBP"),
}


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_torchvisions_to_the_bit(kind: str) -> None:
    data, chosen = FILES[kind](), preprocessing()
    assert torch.equal(ours(data, chosen), by_torchvision(data, chosen))


@settings(max_examples=examples.of(60))
@given(width=st.integers(1, 150), height=st.integers(1, 150), image_size=st.sampled_from([1, 14, 33, 56]))
def test_any_size_resizes_and_crops_as_torchvision_does(width: int, height: int, image_size: int) -> None:
    data, chosen = encode(photo(width, height), "PPM"), preprocessing(image_size)
    assert torch.equal(ours(data, chosen), by_torchvision(data, chosen))


def test_every_level_normalises_as_torchvision_does() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = transforms.Normalize(MEAN, STD)(transforms.ToTensor()(levels))
    found = normalise(torch.from_numpy(levels.transpose(2, 0, 1).copy())[None], preprocessing())[0]
    assert torch.equal(found, expected)


def test_a_plain_colour_stays_what_it_is() -> None:
    found = ours(encode(Image.new("RGB", (300, 200), (10, 130, 250)), "PNG"), preprocessing(224))
    for channel, level in enumerate((10, 130, 250)):
        expected = (np.float32(level) / np.float32(255) - np.float32(MEAN[channel])) / np.float32(STD[channel])
        assert (found[channel] == expected).all()


def test_a_wide_image_loses_its_sides_evenly() -> None:
    """512 x 256 at 224 px is not resized; the crop leaves 144 columns at each side and 16 rows above and below."""
    values = np.zeros((256, 512, 3), np.uint8)
    values[16, 144] = values[239, 367] = 255
    pixels = decode_image(encode(Image.fromarray(values), "PNG"), preprocessing(224))
    assert pixels.shape == (3, 224, 224)
    assert np.argwhere(pixels[0]).tolist() == [[0, 0], [223, 223]]


def test_the_short_side_before_the_crop() -> None:
    assert [resize_size_for(size) for size in (32, 224, 518)] == [37, 256, 592]


def huge_png() -> bytes:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    body = zlib.compress(b"\0" * 1000)
    data = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    return b"\x89PNG\r\n\x1a\n" + chunk + data


BAD = {
    "nothing": (b"", "empty"),
    "text": (b"this is a text file, whatever its name says", "not_an_image"),
    "html": (b"<html><body>404</body></html>", "not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    "zeros": (bytes(5000), "not_an_image"),
    "half a jpeg": (encode(photo())[:-900], "truncated"),
    "half a png": (encode(photo(), "PNG")[:-900], "truncated"),
    "a jpeg's first bytes": (b"\xff\xd8\xff\xe0", "undecodable"),
    "a bitmap in name only": (b"BM" + bytes(60), "undecodable"),
    "a bomb": (huge_png(), "too_large"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_gets_its_code(kind: str) -> None:
    data, code = BAD[kind]
    with pytest.raises(BadImageError, match=rf"bad image \({code}\)") as caught:
        decode_image(data, preprocessing())
    assert caught.value.code == code


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1), (2, 60_000)])
def test_a_strip_that_the_resize_would_blow_up_is_refused(size: tuple[int, int]) -> None:
    """One row of 65,000 px, resized to a short side of 256, is 4 Gpx."""
    with pytest.raises(BadImageError, match="would become") as caught:
        decode_image(encode(Image.new("L", size), "PNG"), preprocessing(224))
    assert caught.value.code == "too_large"


def test_a_bomb_is_refused_by_its_declared_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: ImageFile.ImageFile) -> None:
        raise AssertionError("nothing of it may be decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(BadImageError, match=f"20000 x 20000 px declared, at most {MAX_PIXELS}"):
        decode_image(huge_png(), preprocessing())


@settings(max_examples=examples.of(200))
@given(seed=st.integers(0, 10**9), kind=st.sampled_from(sorted(FILES)))
def test_damaged_files_give_pixels_or_a_code_and_nothing_else(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    data = bytearray(FILES[kind]())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
    del data[rng.randrange(1, len(data) + 1) :]
    code, shape = None, (3, 56, 56)
    try:
        shape = decode_image(bytes(data), preprocessing()).shape
    except BadImageError as error:
        code = error.code
    assert shape == (3, 56, 56)
    assert code is None or code in BAD_IMAGE_CODES


def corrupt_exif_jpeg() -> bytes:
    """An EXIF block whose first entry claims a gigabyte: PIL warns when it looks for the resolution."""
    entry = struct.pack("<HHII", 0x011A, 5, 1, 2**30)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 3) + entry
    plain = encode(photo())
    start = plain.index(b"\xff\xdb")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[start:]


def corrupt_tiff() -> bytes:
    data = bytearray(encode(photo(), "TIFF"))
    directory = struct.unpack("<I", data[4:8])[0]
    (n_entries,) = struct.unpack("<H", data[directory : directory + 2])
    last = directory + 2 + 12 * (n_entries - 1)
    data[last : last + 12] = struct.pack("<HHII", 0x9C9E, 1, 2**20, 2**30)
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "warning"),
    [
        (corrupt_exif_jpeg, "EXIF|File Read|Tag data"),
        (corrupt_tiff, "EXIF|File Read|Tag data"),
        (transparent_palette, "Transparency"),
    ],
)
def test_what_makes_pil_warn_neither_warns_nor_changes_pixels(make: Callable[[], bytes], warning: str) -> None:
    data, chosen = make(), preprocessing()
    with pytest.warns(UserWarning, match=warning):
        Image.open(io.BytesIO(data)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ours(data, chosen)
    assert torch.equal(found, by_torchvision(data, chosen))


def test_nothing_global_is_changed() -> None:
    before = (list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    for make in (corrupt_tiff, corrupt_exif_jpeg):
        decode_image(make(), preprocessing())
    assert (list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_threads_get_what_one_thread_gets() -> None:
    chosen = preprocessing()
    files = [make() for make in FILES.values()] * 4
    alone = [decode_image(data, chosen) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, chosen), files))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_settings_survive_json_and_are_checked_together() -> None:
    chosen = preprocessing(224)
    assert Preprocessing.from_dict(chosen.to_dict()) == chosen
    assert chosen.to_dict()["mean"] == [0.485, 0.456, 0.406]
    with pytest.raises(ValueError, match=r"image_size is 0.*interpolation is 'lanczos'"):
        preprocessing(0, interpolation="lanczos")
    with pytest.raises(ValueError, match="the crop would pad"):
        preprocessing(224, resize_size=200)
    with pytest.raises(ValueError, match="unexpected keyword argument 'color'"):
        Preprocessing.from_dict(chosen.to_dict() | {"color": "RGB"})

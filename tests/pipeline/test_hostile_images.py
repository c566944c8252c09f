"""Images made to harm: bombs, liars, endless scans, foreign formats. Pixels or a code, in bounded memory and time."""

import io
import random
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import TiffImageFile

import pipeline.preprocess
from pipeline.preprocess import (
    BAD_IMAGE_CODES,
    DECODE_NBYTES_PER_PIXEL,
    MAX_SCAN_PIXELS,
    BadImageError,
    decode_image,
)
from tests import examples
from tests.pipeline.test_preprocess import FILES, encode, photo, preprocessing

CHOSEN = preprocessing(56)
FAST_S = 5.0  # of processor time, that refusing may take


def code_of(data: bytes) -> str | None:
    """The code that an image gets; None if it gives pixels."""
    try:
        assert decode_image(data, CHOSEN).shape == (3, 56, 56)
    except BadImageError as error:
        return error.code
    return None


def peak_nbytes(work: Callable[[], object]) -> int:
    """Memory that this process took more than before, at most, while it worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"peaks of memory cannot be measured here: {error}")
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_of_size(width: int, height: int, depth: int, colour: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b""))


def jpeg_of_size(width: int, height: int, **options: object) -> bytes:
    data = bytearray(encode(photo(), **options))
    frame = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_of_size(width: int, height: int) -> bytes:
    data = bytearray(encode(photo(), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_of_canvas(side: int) -> bytes:
    """An animation of 16 px pictures on a canvas of another size."""
    data = bytearray(encode(photo(16, 16), "WEBP", save_all=True, append_images=[photo(16, 16, seed=1)]))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def bmp_of_size(width: int, height: int, compression: int = 0) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(info) + 1024) + info + bytes(1024) + b"\0\2\1\xff" * 9


def tiff(entries: dict[int, tuple[int, int]], data: bytes) -> bytes:
    """A TIFF of one directory; entries are tag: (type 3 or 4, value)."""
    body = data + b"\0" * (len(data) % 2)
    packed = [
        struct.pack("<HHI", tag, kind, 1) + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value))
        for tag, (kind, value) in sorted(entries.items())
    ]
    return b"".join(
        [b"II*\0", struct.pack("<I", 8 + len(body)), body, struct.pack("<H", len(packed)), *packed, bytes(4)]
    )


def tiff_of_tiles(side: int, tile_side: int, data: bytes) -> bytes:
    """A grey image of one deflated tile."""
    tags = {256: side, 257: side, 322: tile_side, 323: tile_side, 324: 8, 325: len(data)}
    shorts = {258: 8, 259: 8, 262: 1, 277: 1}
    return tiff({**{k: (4, v) for k, v in tags.items()}, **{k: (3, v) for k, v in shorts.items()}}, data)


def jpeg_of_scans(side: int, n_more: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, is there again and again."""
    data = encode(Image.new("L", (side, side), 128), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * n_more + data[-2:]


BOMBS: dict[str, Callable[[], bytes]] = {
    "png 30000": lambda: png_of_size(30_000, 30_000, 8, 2),
    "png 60000 in one bit": lambda: png_of_size(60_000, 60_000, 1, 0),
    "png of the largest numbers": lambda: png_of_size(2**31 - 1, 2**31 - 1, 16, 6),
    "jpeg 65500": lambda: jpeg_of_size(65_500, 65_500),
    "progressive jpeg 65500": lambda: jpeg_of_size(65_500, 65_500, progressive=True),
    "gif 65535": lambda: gif_of_size(65_535, 65_535),
    "webp canvas 16384": lambda: webp_of_canvas(16_384),
    "bmp": lambda: bmp_of_size(2**31 - 1, 2**31 - 1),
    "bmp upside down": lambda: bmp_of_size(30_000, -30_000),
    "ppm": lambda: b"P6 1000000 1000000 255\n" + bytes(100),
    "tiff": lambda: tiff({256: (4, 2**31 - 1), 257: (4, 2**31 - 1), 258: (3, 8), 262: (3, 1), 273: (4, 8)}, bytes(99)),
    "tiff tiles of 20000 for 10 px": lambda: tiff_of_tiles(10, 20_000, zlib.compress(bytes(10**8))),
    "jpeg of 2000 scans": lambda: jpeg_of_scans(1500, 2000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_by_what_they_declare(kind: str) -> None:
    data = BOMBS[kind]()
    assert len(data) < 500_000
    codes: list[str | None] = []
    began = time.process_time()
    assert peak_nbytes(lambda: codes.append(code_of(data))) < 40 * 2**20
    assert time.process_time() - began < FAST_S
    assert codes == ["too_large"]


FOREIGN = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "svg after xml": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "zip": b"PK\x03\x04" + bytes(60),
    "elf": b"\x7fELF\x02\x01\x01" + bytes(60),
    "pdf": b"%PDF-1.7\n1 0 obj",
    "windows program": b"MZ\x90\x00" + bytes(60),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(60),
    "pickle": b"\x80\x04\x95" + bytes(60),
    "avif": b"\0\0\0\x1cftypavif" + bytes(60),
    "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
    "icon": b"\0\0\1\0\1\0" + bytes(60),
    "photoshop": b"8BPS\0\1" + bytes(60),
    "big tiff": b"II+\0\x08\0\0\0" + bytes(60),
    "numbers": b"P7\nWIDTH 1\nHEIGHT 1\nENDHDR\n\0",
    "one byte": b"\xff",
    "text in utf-16": "an image".encode("utf-16"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_under_the_name_of_an_image(kind: str) -> None:
    assert code_of(FOREIGN[kind]) == "not_an_image"


@pytest.mark.parametrize("kind", FILES)
def test_files_cut_at_every_tenth(kind: str) -> None:
    """A code, and never half an image; a second picture behind the first may be missing."""
    data = FILES[kind]()
    codes = [code_of(data[: len(data) * tenth // 10]) for tenth in range(10)]
    assert codes[0] == "empty"
    allowed = {"truncated", "undecodable"} | ({None} if kind.startswith("mpo") else set())
    assert set(codes[1:]) <= allowed, codes


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """A sound PNG with more chunks before its data."""
    sound = encode(photo(), "PNG")
    place = sound.index(b"IDAT") - 4
    return sound[:place] + png(*chunks)[8:] + sound[place:]


def jpeg_with(segment: bytes, marker: int, n: int) -> bytes:
    """A sound JPEG with a segment n times."""
    sound = encode(photo())
    return sound[:2] + (b"\xff" + bytes([marker]) + struct.pack(">H", len(segment) + 2) + segment) * n + sound[2:]


def frames(kind: str, n: int, **options: object) -> bytes:
    """An animation, or a file of many pages, whose first picture is `photo(24, 18)`."""
    more = [photo(24, 18, seed=1 + i % 2) for i in range(n)]
    return encode(photo(24, 18), kind, save_all=True, append_images=more, **options)


_ZEROS = zlib.compress(bytes(10**8), 9)  # 100 MB in 97 kB
STUFFED: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "a png's text of 100 MB": (lambda: png_with((b"zTXt", b"a\0\0" + _ZEROS)), "undecodable"),
    "a png's international text": (lambda: png_with((b"iTXt", b"a\0\1\0\0\0" + _ZEROS)), "undecodable"),
    "a png's 200 texts of 1 MB": (
        lambda: png_with(*[(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6), 9))] * 200),
        "undecodable",
    ),
    "a png's profile of 100 MB": (lambda: png_with((b"iCCP", b"a\0\0" + _ZEROS)), "undecodable"),
    "a png's 10,000 comments": (lambda: png_with(*[(b"tEXt", b"a\0b")] * 10_000), None),
    "a jpeg's profile of 16 MB": (
        lambda: jpeg_with(b"ICC_PROFILE\0\1\xff" + bytes(65_000), 0xE2, 255),
        None,
    ),
    "a jpeg's exif of 16 MB": (lambda: jpeg_with(b"Exif\0\0II*\0" + b"\xff" * 65_000, 0xE1, 255), None),
    "a jpeg's comments of 16 MB": (lambda: jpeg_with(bytes(65_000), 0xFE, 255), None),
    "a gif of 60 frames": (lambda: frames("GIF", 60), None),
    "a webp of 100 frames": (lambda: frames("WEBP", 100), None),
    "a png of 100 frames": (lambda: frames("PNG", 100), None),
    "a tiff of 300 pages": (lambda: frames("TIFF", 300), None),
}


@pytest.mark.parametrize("kind", STUFFED)
def test_what_is_stuffed_beside_the_pixels_costs_little(kind: str) -> None:
    make, code = STUFFED[kind]
    data = make()
    codes: list[str | None] = []
    began = time.process_time()
    # PIL copies what it reads, keeps up to 64 MB of texts, and profiles and EXIF up to their size in the file
    assert peak_nbytes(lambda: codes.append(code_of(data))) < 3 * len(data) + 96 * 2**20
    assert time.process_time() - began < FAST_S
    assert codes == [code]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_the_first_counts(kind: str) -> None:
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    many, one = frames(kind, 20, **options), encode(photo(24, 18), kind, **options)
    assert np.array_equal(decode_image(many, CHOSEN), decode_image(one, CHOSEN))


class TestScans:
    """Each scan of a JPEG is a pass over the whole image, and may take a hundred bytes of file."""

    def test_as_many_as_encoders_write_are_read(self) -> None:
        once, again = jpeg_of_scans(700, 0), jpeg_of_scans(700, 60)
        assert again.count(b"\xff\xda") > 60
        assert np.array_equal(decode_image(again, CHOSEN), decode_image(once, CHOSEN))

    @pytest.mark.parametrize("where", ["behind it", "in a preview", "in a comment"])
    def test_marks_that_are_no_scans_do_not_count(self, where: str) -> None:
        """Phones put a film behind the picture, and a preview, which is a JPEG too, before it."""
        sound, marks = encode(photo(500, 500)), b"\xff\xda\0\x08" * 15_000
        assert MAX_SCAN_PIXELS < 15_000 * 500 * 500
        start = {"in a preview": b"\xff\xe1\xea\x6aExif\0\0", "in a comment": b"\xff\xfe\xea\x68\xff\xd9\0\0"}
        data = sound + marks if where == "behind it" else sound[:2] + start[where] + marks + sound[2:]
        assert np.array_equal(decode_image(data, CHOSEN), decode_image(sound, CHOSEN))

    def test_the_largest_images_that_encoders_write_are_below_the_limit(self) -> None:
        scans = encode(photo(64, 64), progressive=True).count(b"\xff\xda")
        assert scans * pipeline.preprocess.MAX_PIXELS < MAX_SCAN_PIXELS / 2

    def test_tiffs_of_jpegs_count_by_what_is_decoded_at_once(self) -> None:
        data = encode(photo(), "TIFF", compression="jpeg")
        assert code_of(data) is None
        assert code_of(data + b"\xff\xda" * 500_000) == "too_large"
        raw = encode(photo(), "TIFF")
        assert code_of(raw + b"\xff\xda" * 500_000) is None  # numbers that look like it


LARGE: dict[str, Callable[[Image.Image], bytes]] = {
    "webp": lambda image: encode(image, "WEBP", lossless=True, method=0),
    "progressive cmyk jpeg": lambda image: encode(image.convert("CMYK"), progressive=True),
    "transparent png": lambda image: encode(image, "PNG"),
    "tiff of floats": lambda image: encode(image.convert("F"), "TIFF", compression="tiff_deflate"),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_images_take_no_more_than_is_stated(kind: str) -> None:
    width, height = 3000, 2500
    data = LARGE[kind](Image.new("RGBA", (width, height), (1, 2, 3, 128)))
    assert peak_nbytes(lambda: decode_image(data, CHOSEN)) < DECODE_NBYTES_PER_PIXEL * width * height + 2**23


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG"])
def test_large_images_take_turns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose reader warns, which are decoded under another lock."""
    monkeypatch.setattr(pipeline.preprocess, "LARGE_PIXELS", 100)
    image = photo()
    data, at_once, most = encode(image, kind), 0, 0
    reader = type(Image.open(io.BytesIO(data)))
    load = reader.load

    def slow(self: object) -> object:
        nonlocal at_once, most
        if not pipeline.preprocess._large_image_turn.locked():
            most = 99
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1
        return load(self)

    monkeypatch.setattr(reader, "load", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode_image(data, CHOSEN), range(6)))
    assert most == 1


@settings(max_examples=examples.of(150))
@given(seed=st.integers(0, 10**9), kind=st.sampled_from(sorted(FILES)))
def test_hostile_numbers_in_headers_give_pixels_or_a_code(seed: int, kind: str) -> None:
    """Whole fields with the numbers that break arithmetic, where flipped bytes seldom hit them."""
    rng = random.Random(seed)
    data = bytearray(FILES[kind]())
    for _ in range(rng.randint(1, 4)):
        width = rng.choice([1, 2, 4])
        place = rng.randrange(4, min(len(data), 300))
        value = rng.choice([0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1, 255])
        data[place : place + width] = value.to_bytes(width, rng.choice(["little", "big"]))
    code = code_of(bytes(data))
    assert code is None or code in BAD_IMAGE_CODES


@pytest.mark.parametrize("tag", [322, 323, 278, 259, 256])
@pytest.mark.parametrize("kind", [2, 5, 7, 11, 12, 99])
def test_tags_of_other_types_give_a_code(tag: int, kind: int) -> None:
    """A tile's width as text, as a fraction, as a float."""
    data = bytearray(encode(photo(), "TIFF", compression="tiff_deflate"))
    directory = struct.unpack("<I", data[4:8])[0]
    n_entries = struct.unpack("<H", data[directory : directory + 2])[0]
    places = [directory + 2 + 12 * i for i in range(n_entries)]
    found = [p for p in places if struct.unpack("<H", data[p : p + 2])[0] == tag]
    place = found[0] if found else places[-1]
    data[place : place + 12] = struct.pack("<HHII", tag, kind, 1, 8)
    assert code_of(bytes(data)) in (None, *BAD_IMAGE_CODES)


@pytest.mark.parametrize("tile", [("wide", 8), (8, None), ((8, 8), 8), (8.0, 8)])
def test_tiles_without_a_size_are_refused(tile: tuple[object, object]) -> None:
    image = TiffImageFile(io.BytesIO(encode(photo(), "TIFF")))
    with pytest.raises(BadImageError, match="expected their width and length"):
        pipeline.preprocess._tile_pixels(_with_tags(image, {322: tile[0], 323: tile[1]}))


def _with_tags(image: TiffImageFile, tags: dict[int, object]) -> TiffImageFile:
    image.tag_v2 = tags
    return image


def test_a_profile_in_a_png_that_pil_writes_is_kept_out_of_the_pixels() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 100_000, zip=True)
    data = encode(photo(), "PNG", pnginfo=info, icc_profile=bytes(100_000))
    assert np.array_equal(decode_image(data, CHOSEN), decode_image(encode(photo(), "PNG"), CHOSEN))

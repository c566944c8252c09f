"""From the bytes of an image file to the pixels a teacher sees, exactly as PIL and torchvision do it.

Two halves, because they run on different machines' parts: `decode_image` on CPU threads, where PIL lets go of the
interpreter lock while it decodes and resizes; `normalise` on the teacher's device, on a quarter of the bytes.

Nothing of PIL's global state is read or set by us: each file is opened by the class that its first bytes name, not by
`Image.open`, whose size check warns instead of refusing, and which would hand an EPS named .jpg to Ghostscript.
"""

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.preprocessing import Preprocessing
from storage_schemas.commit import BAD_IMAGE_CODES

#: Declared pixels above which an image is refused unread. PIL itself warns of a bomb from here on.
MAX_PIXELS = 89_478_485

#: Images of more pixels are decoded one at a time, so that their memory does not multiply with the threads.
LARGE_PIXELS = 4_000_000

#: Memory per pixel while an image is decoded, converted and resized, bytes. Measured on 64 Mpx: WebP 16.1, progressive
#: CMYK JPEG 12.0, TIFF of float32 9.0, PNG 8.1.
DECODE_NBYTES_PER_PIXEL = 17

#: Pixels times scans above which a JPEG is refused undecoded: each scan costs a pass over the whole image and may take
#: a hundred bytes. Encoders write 10 to 15 scans; this allows 24 of the largest image, which take some 5 s.
MAX_SCAN_PIXELS = 2**31

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class BadImageError(Exception):
    """The bytes arrived and are no usable image.

    Attributes:
        code: One of BAD_IMAGE_CODES. It goes into the commit; the message, which may hold anything, does not.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        assert code in BAD_IMAGE_CODES
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"bad image ({self.code}){': ' if self.detail else ''}{self.detail}"


class _QuietJpegFile(JpegImageFile):
    """A JPEG without its EXIF resolution, which pixels do not need and whose damage PIL reports as a warning."""

    def _read_dpi_from_exif(self) -> None:
        pass


_PNG_MARK = b"\x89PNG\r\n\x1a\n"
# Bit depth and colour type, 0 grey and 3 palette, in the header that every PNG begins with. Fewer bits PIL would scale.
_PNG_VALUES = {(8, 0), (8, 3), (16, 0)}
PNG_HEAD_NBYTES = 26
_MARK_NBYTES = 8

# First bytes -> reader: what torchvision's ImageFolder accepts by extension, and GIF, which turns up under other names.
_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", _QuietJpegFile),
    (_PNG_MARK, PngImageFile),
    (b"BM", BmpImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    *((b"P%d" % kind, PpmImageFile) for kind in range(1, 7)),
    (b"II*\x00", TiffImageFile),
    (b"MM\x00*", TiffImageFile),
    (b"RIFF", WebPImageFile),
)

_APNG_MARK = b"acTL"
_TIFF_TILE = (322, 323)  # width and length of a tile
_TIFF_STRIP_ROWS = 278
_TIFF_COMPRESSION = 259
_TIFF_JPEG = (6, 7)
# Where segments of a JPEG begin: after 0xff, what is neither data (0x00) nor a restart within it.
_JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA
_Out = TypeVar("_Out")
_warnings_lock = threading.Lock()
_large_image_turn = threading.Lock()


def decode_image(data: bytes, preprocessing: Preprocessing) -> UInt8[np.ndarray, "3 image_size image_size"]:
    """Decode, convert to RGB, resize the short side, crop the centre.

    The values equal torchvision's `Resize(resize_size, BICUBIC)` and `CenterCrop(image_size)` on PIL's
    `open(...).convert("RGB")`, bit for bit: grey, palette, CMYK and transparent images as PIL converts them, EXIF
    rotation ignored, no draft mode. Safe to call from many threads.

    Args:
        data: A whole file: JPEG, PNG, BMP, PPM/PGM, TIFF, WebP or GIF (its first frame).
        preprocessing: Sizes and interpolation; mean and std are `normalise`'s.

    Raises:
        BadImageError: The bytes are no usable image; its code says why. An image of more than MAX_PIXELS declared
            pixels, before or after the resize, or in one of its tiles, or with more scans than any encoder writes, is
            refused before anything of it is decoded.
    """
    rgb = _decoded(
        data,
        lambda width, height: _refuse_bombs(width, height, preprocessing),
        lambda image: _crop(_resize(_to_rgb(image), preprocessing), preprocessing.image_size),
    )
    return np.array(np.asarray(rgb).transpose(2, 0, 1), order="C")  # a copy, always: PIL's own memory is read-only


def decode_rgb(data: bytes) -> Image.Image:
    """The whole image as RGB, for those who crop and resize it their own way; else as `decode_image`.

    Raises:
        BadImageError: The bytes are no usable image, or declare more than MAX_PIXELS.
    """
    return _decoded(data, _refuse_large, _to_rgb)


def decode_png_values(data: bytes) -> UInt8[np.ndarray, "height width"] | UInt16[np.ndarray, "height width"]:
    """The numbers in a PNG of one channel, such as a label mask or a depth map: never scaled, never as colours.

    Args:
        data: A whole PNG of 8 or 16 bits a pixel, grey or with a palette (then its indices).

    Returns:
        uint8 or uint16, as stored.

    Raises:
        BadImageError: The bytes are no PNG, or not of one channel; or they declare more than MAX_PIXELS.
    """
    dtype = {8: np.uint8, 16: np.uint16}[png_bits(data)]
    return _decoded(data, _refuse_large, lambda image: np.array(image, dtype=dtype))


def png_bits(head: bytes) -> int:
    """Bits of a pixel of a PNG with one channel, grey or of palette indices: 8 or 16.

    Args:
        head: At least the first PNG_HEAD_NBYTES of a file.

    Raises:
        BadImageError: It is no PNG, or another kind of one.
    """
    if not head:
        raise BadImageError("empty", "the file has no bytes")
    if not head.startswith(_PNG_MARK) or len(head) < PNG_HEAD_NBYTES:
        raise BadImageError("not_an_image", f"it begins with {head[:8]!r}, expected a PNG")
    depth, colour = head[24:26]
    if (depth, colour) not in _PNG_VALUES:
        kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}.get(colour, f"colour type {colour}")
        raise BadImageError(
            "undecodable", f"a PNG with {depth} bits of {kind}; expected one channel of 8 or 16 bits a pixel"
        )
    return depth


def read_size(stream: io.BytesIO | io.BufferedReader) -> tuple[int, int]:
    """Width and height in px that an image file declares; nothing of it is decoded.

    Args:
        stream: Of a whole file, at its beginning.

    Raises:
        BadImageError: It is no image that `decode_rgb` would take.
    """
    reader = _reader_for(stream.read(_MARK_NBYTES))
    stream.seek(0)
    try:
        with _quiet(reader, _APNG_MARK):  # any PNG may be an animated one here
            image = reader(stream)
        _refuse_large(image.width, image.height)
        return image.width, image.height
    except (BadImageError, MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # PIL's own, about the bytes
            raise BadImageError("undecodable", str(error)) from error
        raise
    except Exception as error:  # as in `_decoded`
        raise BadImageError("undecodable", f"{type(error).__name__}: {error}") from error


def _decoded(data: bytes, refuse: Callable[[int, int], None], finish: Callable[[Image.Image], _Out]) -> _Out:
    """What `finish` makes of the decoded image. `refuse` sees width and height before anything is decoded."""
    reader = _reader_for(data)
    try:
        with _quiet(reader, data):
            image = reader(io.BytesIO(data))
        refuse(image.width, image.height)
        unit_pixels = _tile_pixels(image) if isinstance(image, TiffImageFile) else image.width * image.height
        _refuse_scans(image, data, unit_pixels)
        with _large_image_turn if max(image.width * image.height, unit_pixels) > LARGE_PIXELS else nullcontext():
            with _quiet(reader, data):  # TIFF and GIF read on while they decode
                image.load()
            return finish(image)
    except (BadImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # some readers look for themselves, at twice the pixels
        raise BadImageError("too_large", str(error)) from error
    except Exception as error:  # hostile bytes make PIL's Python readers raise almost anything
        detail = f"{type(error).__name__}: {error}"
        raise BadImageError("truncated" if "truncat" in detail.lower() else "undecodable", detail) from error


def normalise(
    pixels: UInt8[torch.Tensor, "batch 3 height width"], preprocessing: Preprocessing
) -> Float32[torch.Tensor, "batch 3 height width"]:
    """(pixels / 255 - mean) / std on the pixels' device, bit-equal to torchvision's ToTensor and Normalize."""
    # Divisors are tensors on the device: CUDA turns division by a Python number into a product with its reciprocal.
    scale = torch.tensor(255.0, device=pixels.device)
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, device=pixels.device).view(-1, 1, 1)
    return pixels.to(torch.float32).div_(scale).sub_(mean).div_(std)


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError("too_large", f"{width} x {height} px declared, at most {MAX_PIXELS} px are decoded")


def _refuse_bombs(width: int, height: int, preprocessing: Preprocessing) -> None:
    _refuse_large(width, height)
    new_width, new_height = _resized(width, height, preprocessing)
    if new_width * new_height > MAX_PIXELS:  # a strip of one row grows in both directions
        raise BadImageError(
            "too_large", f"{width} x {height} px would become {new_width} x {new_height}; at most {MAX_PIXELS} px"
        )


def _tile_pixels(image: TiffImageFile) -> int:
    """Pixels that a TIFF decodes at once: those of a tile, however small the image is, or of a strip."""
    width, height = (image.tag_v2.get(tag) for tag in _TIFF_TILE)
    if width is None and height is None:
        rows = image.tag_v2.get(_TIFF_STRIP_ROWS)
        return image.width * (rows if type(rows) is int and 0 < rows < image.height else image.height)
    if not isinstance(width, int) or not isinstance(height, int):
        raise BadImageError("undecodable", f"tiles of {width!r:.40} by {height!r:.40}, expected their width and length")
    if width * height > MAX_PIXELS:
        raise BadImageError(
            "too_large", f"tiles of {width} x {height} px declared, at most {MAX_PIXELS} px are decoded"
        )
    return width * height


def _refuse_scans(image: ImageFile.ImageFile, data: bytes, unit_pixels: int) -> None:
    """Refuse a JPEG, or a TIFF of JPEGs, that is decoded again and again."""
    if isinstance(image, TiffImageFile):
        n_scans = data.count(b"\xff\xda") if image.tag_v2.get(_TIFF_COMPRESSION) in _TIFF_JPEG else 0
    elif isinstance(image, JpegImageFile):
        n_scans = data.count(b"\xff\xda")  # a bound, found much faster than the number
        n_scans = _n_scans(data) if n_scans * unit_pixels > MAX_SCAN_PIXELS else n_scans
    else:
        return
    if n_scans * unit_pixels > MAX_SCAN_PIXELS:
        raise BadImageError("too_large", f"{n_scans} scans of {unit_pixels} px; at most {MAX_SCAN_PIXELS} px in all")


def _n_scans(jpeg: bytes) -> int:
    """Scans of a JPEG's first picture; previews within it, and films behind it, do not count."""
    n_scans, place = 0, 2
    while (found := _JPEG_MARKER.search(jpeg, place)) and found[1][0] != _JPEG_END:
        n_scans += found[1][0] == _JPEG_SCAN
        place = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return n_scans


def _to_rgb(image: Image.Image) -> Image.Image:
    # Transparency never changes RGB values here, and PIL warns while it drops that of palettes.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _reader_for(data: bytes) -> type[ImageFile.ImageFile]:
    if not data:
        raise BadImageError("empty", "the file has no bytes")
    for prefix, reader in _READERS:
        if data.startswith(prefix):
            return reader
    raise BadImageError("not_an_image", f"it begins with {data[:8]!r}, which no supported format does")


@contextmanager
def _quiet(reader: type[ImageFile.ImageFile], data: bytes) -> Iterator[None]:
    """Readers that may warn are silenced one at a time: Python's filters belong to the process."""
    may_warn = reader in (TiffImageFile, GifImageFile) or (reader is PngImageFile and _APNG_MARK in data)
    if not may_warn:
        yield
        return
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _resized(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """As torchvision's Resize with one number: the long side is cut, not rounded, to whole px."""
    short, long = sorted((width, height))
    new_long = int(preprocessing.resize_size * long / short)
    return (preprocessing.resize_size, new_long) if width <= height else (new_long, preprocessing.resize_size)


def _resize(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    new_size = _resized(*image.size, preprocessing)
    return image if image.size == new_size else image.resize(new_size, _RESAMPLING[preprocessing.interpolation])


def _crop(image: Image.Image, size: int) -> Image.Image:
    """As torchvision's CenterCrop: offsets rounded half to even."""
    left = round((image.width - size) / 2)
    top = round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))

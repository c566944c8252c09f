"""Images decoded whole, maps decoded as numbers, sizes told from headers."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.preprocess import BadImageError, decode_png_values, decode_rgb, png_bits, read_size
from tests.trainer.probes.dense_trees import png_that_declares


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(dtype: type, shape: tuple[int, ...] = (7, 9)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


class TestValues:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_numbers_come_back(self, dtype: type):
        values = noise(dtype)
        found = decode_png_values(encoded(Image.fromarray(values)))
        assert found.dtype == dtype
        assert np.array_equal(found, values)

    def test_a_palette_gives_its_indices(self):
        values = noise(np.uint8)
        image = Image.fromarray(values)
        image.putpalette(noise(np.uint8, (768,)).tobytes())
        data = encoded(image)
        assert data[25] == 3
        assert np.array_equal(decode_png_values(data), values)

    @pytest.mark.parametrize(
        ("image", "what"),
        [
            (Image.new("RGB", (3, 3)), "8 bits of RGB"),
            (Image.new("RGBA", (3, 3)), "8 bits of RGBA"),
            (Image.new("LA", (3, 3)), "8 bits of grey and alpha"),
            (Image.new("1", (3, 3)), "1 bits of grey"),
        ],
    )
    def test_other_kinds_of_png_are_refused(self, image: Image.Image, what: str):
        """PIL would scale grey of fewer bits, and colours are no numbers."""
        with pytest.raises(BadImageError, match=f"a PNG with {what}; expected one channel of 8 or 16 bits") as caught:
            decode_png_values(encoded(image))
        assert caught.value.code == "undecodable"

    def test_what_is_no_png(self):
        for data, code in ((b"", "empty"), (b"hello", "not_an_image"), (b"\x89PNG\r\n\x1a\n", "not_an_image")):
            with pytest.raises(BadImageError) as caught:
                decode_png_values(data)
            assert caught.value.code == code
        with pytest.raises(BadImageError, match="expected a PNG"):
            decode_png_values(encoded(Image.new("L", (4, 4)), "JPEG"))

    def test_damage_and_bombs(self):
        data = encoded(Image.fromarray(noise(np.uint8, (64, 64))))
        with pytest.raises(BadImageError):
            decode_png_values(data[: len(data) // 2])
        with pytest.raises(BadImageError, match="30000 x 30000 px declared") as caught:
            decode_png_values(png_that_declares(30_000, 30_000))
        assert caught.value.code == "too_large"


class TestWhole:
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_rgb_is_pils(self, mode: str):
        image = Image.fromarray(noise(np.uint8, (11, 13, 3))).convert(mode)
        data = encoded(image, "JPEG")
        found = decode_rgb(data)
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))

    def test_damage_is_named(self):
        with pytest.raises(BadImageError, match="truncated"):
            decode_rgb(encoded(Image.fromarray(noise(np.uint8, (64, 64, 3))), "JPEG")[:700])


class TestSize:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
    def test_of_every_format(self, kind: str):
        assert read_size(io.BytesIO(encoded(Image.new("RGB", (13, 7)), kind))) == (13, 7)

    def test_of_what_is_no_image(self):
        for data in (b"", b"hello world", b"\xff\xd8\xff\xe0", encoded(Image.new("L", (3, 3)))[:20]):
            with pytest.raises(BadImageError):
                read_size(io.BytesIO(data))

    def test_of_a_bomb(self):
        with pytest.raises(BadImageError, match="30000 x 30000 px declared"):
            read_size(io.BytesIO(png_that_declares(30_000, 30_000)))


def test_bits_from_the_head_alone():
    assert png_bits(encoded(Image.new("L", (3, 3)))[:26]) == 8
    assert png_bits(encoded(Image.fromarray(noise(np.uint16)))[:26]) == 16

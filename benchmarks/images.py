"""Photographs that nobody took: JPEGs of ImageNet's size whose spectra fall off as those of natural images do."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((500, 375), (500, 333), (375, 500))  # width, height; ImageNet's mean is about the first
SPECTRAL_SLOPE = 1.1  # amplitude ~ 1 / frequency^1.1
QUALITY = 90  # with the slope above: 110 kB at 500 x 375, as ImageNet's mean
N_CLASSES = 4


def write_images(folder: Path, n_images: int, *, scale: float = 1.0) -> list[Path]:
    """Write an ImageFolder tree of seeded JPEGs; `scale` shrinks them. Returns the paths."""
    paths = []
    for number in range(n_images):
        width, height = SIZES[number % len(SIZES)]
        path = folder / f"class_{number % N_CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, round(width * scale), round(height * scale)))
        paths.append(path)
    return paths


def jpeg(seed: int, width: int, height: int) -> bytes:
    """One image: random phases, falling amplitudes, colours a quarter as strong as brightness."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None])
    frequency[0, 0] = np.inf
    planes = []
    for mean, std in ((120, 55), (128, 14), (128, 14)):  # Y, Cb, Cr
        spectrum = (rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)) * (
            frequency**-SPECTRAL_SLOPE
        )
        plane = np.fft.irfft2(spectrum, s=(height, width))
        values = mean + std * plane / plane.std()
        planes.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    file = io.BytesIO()
    Image.merge("YCbCr", planes).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()

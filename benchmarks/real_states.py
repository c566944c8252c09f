"""Patch states of real images through real teachers, for measurements that depend on what states look like."""

import io

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.preprocess import decode_image, normalise
from pipeline.sources import DigitsSource
from pipeline.teacher import Teacher, load_teacher

VIT_B = "vit_base_patch14_reg4_dinov2"

States = Float32[np.ndarray, "sample layer patch dim"]


def digits_states(n_samples: int) -> States:
    """Of handwritten digits that `digits_vit`, the shipped teacher, was not trained on."""
    source = DigitsSource("val")
    listed = source.listing()[:n_samples]
    return _patch_states(load_teacher("digits_vit"), [source.read(sample) for sample in listed])


def photo_states(n_samples: int) -> States:
    """Of crops of scikit-learn's two photographs through a ViT-B/14 with random weights, at 224 px."""
    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    files = []
    for i in range(n_samples):
        photo = photos[i % len(photos)]
        top, left = rng.integers(0, photo.shape[0] - 320), rng.integers(0, photo.shape[1] - 320)
        sink = io.BytesIO()
        Image.fromarray(photo[top : top + 320, left : left + 320]).save(sink, "PNG")
        files.append(sink.getvalue())
    return _patch_states(load_teacher(VIT_B, "random:0", 224), files)


def _patch_states(teacher: Teacher, files: list[bytes]) -> States:
    pixels = np.stack([decode_image(data, teacher.preprocessing) for data in files])
    with torch.inference_mode():
        states = teacher.layer_states(normalise(torch.from_numpy(pixels), teacher.preprocessing))
    return states[:, :, int(teacher.has_cls) + teacher.n_registers :].numpy()

"""What is known of the dynamics of DINOv2 ViT-B/14 reg: found again on planted states, and on the real ones."""

import os

import numpy as np
import pytest

from analysis.gallery.encoders import store_alike
from analysis.measure import measure_store
from infra.objects import MemoryObjects
from storage_schemas import Store, open_store
from storage_schemas.from_arrays import write_store
from tests.analysis.published import DISTANCE
from tests.stores import make_samples, make_spec

# Seeds.md 3.5, means over CLS and patch mean of layers 1 to 12: 1 - cosine of each two that follow each other, and of
# each with the last.
CONSECUTIVE = (0.08, 0.11, 0.05, 0.09, 0.09, 0.10, 0.17, 0.14, 0.16, 0.25, 0.75)
TO_LAST = (1.08, 1.09, 1.11, 1.11, 1.07, 1.06, 1.04, 0.94, 0.86, 0.81, 0.75)
JUMPS = {7, 10, 11}  # the layers that the three largest steps start from


def check_known_values(store: Store, n_images: int) -> None:
    alike = store_alike(store, limit=n_images, wide_limit=4).distance[1:, 1:]
    np.testing.assert_allclose(np.diagonal(alike, 1), CONSECUTIVE, rtol=0, atol=0.02)
    dynamics = measure_store(store, limit=n_images, wide_limit=4).dynamics
    to_last = 1 - np.mean([dynamics[kind].to_final.mean for kind in ("cls", "patch_mean")], axis=0)
    np.testing.assert_allclose(to_last[1:-1], TO_LAST, rtol=0, atol=0.02)
    speed = np.mean([dynamics[kind].speed.mean for kind in ("cls", "patch_mean")], axis=0)[1:]
    assert set((np.argsort(speed)[-3:] + 1).tolist()) == JUMPS


def test_they_are_found_on_states_that_have_the_published_distances():
    """Directions with those cosines, another rotation and length for each image: only the real weights are missing."""
    values, vectors = np.linalg.eigh(1 - DISTANCE)
    layers = vectors * np.sqrt(values.clip(min=0))
    layers /= np.linalg.norm(layers, axis=1, keepdims=True)
    spec = make_spec(layers=tuple(range(13)), dim=12, grid=(1, 2), n_registers=0, precision="float32")

    def states(rows: range) -> np.ndarray:
        random = np.random.default_rng(rows.start)
        turns = np.linalg.qr(random.standard_normal((len(rows), 12, 12)))[0]
        paths = np.concatenate([random.standard_normal((len(rows), 1, 12)), layers @ turns], axis=1)
        return np.repeat(paths[:, :, None] * random.uniform(1, 9, (len(rows), 13, 1, 1)), 3, axis=2).astype(np.float32)

    objects = MemoryObjects()
    write_store(
        objects,
        spec,
        make_samples(spec.n_samples),
        states,
        head_inputs_of=lambda rows: np.zeros((len(rows), 24), np.float32),
    )
    check_known_values(open_store(objects), 21)


@pytest.mark.skipif("IMAGENET_STORE" not in os.environ, reason="give IMAGENET_STORE=, a store of DINOv2 ViT-B/14 reg")
def test_they_are_found_on_the_real_teacher():
    """Needs weights and images that nobody has here: states of 10,000 ImageNet training images."""
    check_known_values(open_store(os.environ["IMAGENET_STORE"]), 10_016)

"""Layers of encoders of any depth: from a model, from arrays, from stores, and against each other."""

import numpy as np
import pytest
import torch
from torch import nn

from analysis.gallery.encoders import AlikeAccumulator, cka_between, same_images, store_alike
from analysis.gallery.models import by_kind, model_alike
from analysis.interventions import token_kinds
from analysis.similarity import CosineAccumulator, minibatch_cka
from infra.console import UserError
from infra.objects import open_objects
from pipeline.teacher import load_teacher
from storage_schemas import open_store
from tests.stores import make_spec, write_planted


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("name", "kinds"), [("test_vit", {"cls", "patches"}), ("test_vit2", {"registers", "patches"})])
def test_a_model_whose_blocks_add_nothing_is_all_ones(name, kinds):
    """Depth and tokens are the model's own."""
    model = load_teacher(name, "random:0", image_size=32)
    for block in model.model.blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(last.weight)
    x = model.embed(torch.from_numpy(normal(9, 3, 32, 32)))
    where = token_kinds(has_cls=model.has_cls, n_registers=model.n_registers, n_patches=model.n_patches)
    found = model_alike(model, x, where, batch_rows=4)  # 4, 4, and 1 that CKA leaves out
    assert set(found.cosines) == kinds | {"patch_mean"}
    assert found.layers == tuple(range(len(model.model.blocks) + 1))
    for one in found.cosines.values():
        np.testing.assert_allclose(one.mean, 1, atol=1e-6)
        assert one.n == 9
    assert found.cka is not None
    np.testing.assert_allclose(found.cka.values, 1, atol=1e-6)
    assert (found.cka.n_rows, found.cka.n_dropped) == (8, 1)
    np.testing.assert_allclose(found.distance, 0, atol=1e-6)
    assert found.mean_cosine("patches") == pytest.approx(1)


def test_tokens_are_cut_into_their_kinds():
    states = normal(2, 3, 7, 4)
    found = by_kind(states, token_kinds(has_cls=True, n_registers=2, n_patches=4))
    np.testing.assert_array_equal(np.concatenate([found[k] for k in ("cls", "registers", "patches")], axis=2), states)
    np.testing.assert_allclose(found["patch_mean"][:, :, 0], states[:, :, 3:].mean(axis=2), rtol=1e-6)


def test_it_is_cosines_and_cka_of_each_kind_in_any_deal_to_workers():
    cls, patches = normal(12, 4, 1, 5), normal(12, 4, 3, 5, seed=1)
    mean = patches.mean(axis=2, keepdims=True)
    workers = [AlikeAccumulator((0, 2, 3, 9)) for _ in range(2)]
    for i, start in enumerate((6, 0)):
        rows = slice(start, start + 6)
        workers[i].update({"cls": cls[rows], "patch_mean": mean[rows]})
        workers[1 - i].update({"patches": patches[rows]})
    workers[0].merge(workers[1])
    found = workers[0].result()
    assert found.layers == (0, 2, 3, 9)
    whole = CosineAccumulator(4)
    whole.update(patches)
    np.testing.assert_allclose(found.cosines["patches"].mean, whole.result().mean, rtol=1e-12)
    joined = np.concatenate([cls, mean], axis=-1)[:, :, 0]
    assert found.cka is not None
    np.testing.assert_allclose(found.cka.values, minibatch_cka(joined, batch_rows=6).values, rtol=1e-9)


def write(place, *, n_samples: int = 12, seed: int = 0, **changes):
    spec = make_spec(**{"layers": tuple(range(4)), "n_samples": n_samples} | changes)
    write_planted(open_objects(str(place)), spec, seed=seed)
    return open_store(place)


def test_a_store_gives_its_own_layers_and_kinds(tmp_path):
    store = write(tmp_path / "a", layers=(1, 2, 5), n_registers=0)
    found = store_alike(store, limit=9, wide_limit=6)
    assert found.layers == (1, 2, 5)
    assert {kind: one.n for kind, one in found.cosines.items()} == {"cls": 9, "patch_mean": 9, "patches": 6}
    whole = CosineAccumulator(3)
    whole.update(store.read(None, range(6), "patches"))
    np.testing.assert_allclose(found.cosines["patches"].mean, whole.result().mean, rtol=1e-9)


def test_encoders_of_other_depth_and_width_are_compared_on_their_images(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", layers=(0, 1), dim=5, has_cls=False, seed=3)
    rows = same_images([first, second], 100)
    np.testing.assert_array_equal(rows, range(12))
    found = cka_between(first, second, rows)
    means = [store.read(None, rows, "patch_mean")[:, :, 0] for store in (first, second)]
    np.testing.assert_allclose(found, minibatch_cka(*means, batch_rows=12).values[:4, 4:], rtol=1e-9)


def test_images_are_the_same_as_far_as_both_stores_go(tmp_path):
    first = write(tmp_path / "a", n_samples=12)
    shorter = write(tmp_path / "b", n_samples=7)
    np.testing.assert_array_equal(same_images([first, shorter], 100), range(7))
    np.testing.assert_array_equal(same_images([first, shorter], 5), range(5))
    other = tmp_path / "c"
    from tests import stores

    samples = stores.make_samples(12)[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "make_samples", lambda n: samples)
        write(other)
    assert not len(same_images([first, open_store(other)], 100))


def test_images_of_another_source_are_other_images_whatever_their_names(tmp_path):
    first, other = write(tmp_path / "a"), write(tmp_path / "b", source_digest="2" * 64)
    assert first.samples["sample_id"].equals(other.samples["sample_id"])
    assert len(same_images([first, first], 100)) == 12
    assert not len(same_images([first, other], 100))


def test_encoders_with_nothing_in_common_are_refused(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    with pytest.raises(UserError, match="have 3 images and cls, patch_mean in common; expected 4 images or more"):
        cka_between(first, second, np.arange(3))

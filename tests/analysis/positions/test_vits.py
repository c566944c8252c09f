"""Positional attention sees places and no images, small ViTs learn, and CIFAR's binary files are read as they are."""

import numpy as np
import pytest
import torch

from analysis.positions.images import LabelledImages, load_images
from analysis.positions.maps import encoding_similarity, locality
from analysis.positions.vit_training import VitTraining, linear_accuracy, train_vit
from analysis.positions.vits import PositionalAttention, SmallVit, VitSize, cut_patches
from infra.console import UserError

SIZE = VitSize(grid=(3, 4), patch_dim=5, n_classes=6, dim=16, depth=2, heads=4)


@pytest.fixture
def _no_gradients():
    with torch.no_grad():
        yield


def attention(n_tokens: int = 7, seed: int = 0) -> PositionalAttention:
    torch.manual_seed(seed)
    return PositionalAttention(torch.nn.Parameter(torch.randn(n_tokens, 16)), 16, 4).double()


def tokens(n: int, seed: int, n_tokens: int = 7) -> torch.Tensor:
    return torch.randn(n, n_tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n: int = 240, seed: int = 0) -> LabelledImages:
    """Which half of the picture is bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    pictures = rng.standard_normal((n, 1, 4, 4)).astype(np.float32)
    pictures[np.arange(n), :, 0] += np.where(labels == 0, 3, -3)[:, None, None].astype(np.float32)
    half = n // 2
    return LabelledImages(
        name="halves",
        train=pictures[:half],
        train_labels=labels[:half],
        test=pictures[half:],
        test_labels=labels[half:],
        n_classes=2,
        patch_side=1,
    )


@pytest.mark.usefixtures("_no_gradients")
class TestPositionalAttention:
    def test_output_is_linear_in_the_tokens(self):
        layer, x, y = attention(), tokens(3, 1), tokens(3, 2)
        bias = layer(torch.zeros_like(x))
        found = layer(2 * x - 5 * y) - bias
        torch.testing.assert_close(found, 2 * (layer(x) - bias) - 5 * (layer(y) - bias))

    def test_weights_are_the_softmax_of_positions_alone(self):
        layer = attention()
        found = layer.weights()
        assert found.shape == (4, 7, 7)
        torch.testing.assert_close(found.sum(-1), torch.ones(4, 7, dtype=torch.float64))
        p = torch.nn.functional.layer_norm(layer.positions, (16,), eps=1e-6)
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            q, k = ((p @ one.weight.T)[:, part] for one in (layer.query, layer.key))
            torch.testing.assert_close(found[head], (q @ k.T / 2).softmax(-1))

    def test_output_is_those_weights_times_values(self):
        layer, x = attention(), tokens(2, 3)
        heads = [layer.weights()[head] @ layer.value(x)[..., 4 * head : 4 * head + 4] for head in range(4)]
        torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, dim=-1)))

    def test_tokens_permuted_with_their_positions_are_permuted_outputs(self):
        layer, x = attention(), tokens(2, 4)
        expected = layer(x)
        order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
        assert not torch.allclose(layer(x[:, order]), expected[:, order])
        layer.positions.copy_(layer.positions[order].clone())
        torch.testing.assert_close(layer(x[:, order]), expected[:, order])


@pytest.mark.usefixtures("_no_gradients")
class TestSmallVit:
    @pytest.mark.parametrize("kind", ["ordinary", "positional"])
    def test_patches_permuted_with_their_positions_are_the_same_to_it(self, kind):
        model = SmallVit(SIZE, kind, seed=1).double()
        patches = torch.randn(2, 12, 5, dtype=torch.float64)
        expected, order = model(patches), torch.randperm(12)
        assert expected.shape == (2, 6)
        assert not torch.allclose(model(patches[:, order]), expected, atol=1e-9)
        model.positions[1:] = model.positions[1:][order].clone()
        torch.testing.assert_close(model(patches[:, order]), expected)

    def test_positional_models_share_one_set_of_positions_and_add_none_to_tokens(self):
        model = SmallVit(SIZE, "positional", seed=1)
        assert [name for name, _ in model.named_parameters() if name.endswith("positions")] == ["positions"]
        assert all(block.attn.positions is model.positions for block in model.blocks)
        seen = []
        model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        patches = torch.randn(2, 12, 5)
        model(patches)
        torch.testing.assert_close(seen[0][:, 1:], model.embed(patches))

    def test_seeds_make_weights_and_leave_torchs_generator_alone(self):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        one, again, other = SmallVit(SIZE, "ordinary", 1), SmallVit(SIZE, "ordinary", 1), SmallVit(SIZE, "ordinary", 2)
        assert torch.rand(1) == expected
        assert torch.equal(one.positions, again.positions)
        assert not torch.equal(one.positions, other.positions)

    @pytest.mark.parametrize(("kind", "heads"), [("rotary", 4), ("ordinary", 3)])
    def test_what_cannot_be_made_is_refused(self, kind, heads):
        size = VitSize(grid=(3, 4), patch_dim=5, n_classes=6, dim=16, heads=heads)
        with pytest.raises(ValueError, match=f"attention is '{kind}'.*16 channels for {heads} heads"):
            SmallVit(size, kind, 0)


def test_patches_are_cut_in_row_order():
    pixels = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    cut = cut_patches(pixels, 2)
    assert cut.shape == (2, 6, 12)
    torch.testing.assert_close(cut[1, 4], pixels[1, :, 2:4, 2:4].reshape(-1))
    with pytest.raises(ValueError, match="4 x 6 px are not cut into patches of 4 px"):
        cut_patches(pixels, 4)


class TestTraining:
    @pytest.mark.parametrize("kind", ["ordinary", "positional"])
    def test_it_learns_where_brightness_is(self, kind):
        found = train_vit(planted(), VitTraining(attention=kind, n_epochs=6, dim=16, depth=1, heads=2, batch_size=16))
        assert found.accuracy > 0.9
        assert found.losses[-1] < 0.5 * found.losses[0]
        assert not np.allclose(found.before, found.after)
        np.testing.assert_array_equal(found.order, np.arange(16))

    def test_a_permuted_training_sees_the_same_pictures_with_their_patches_permuted(self, monkeypatch):
        seen: list[torch.Tensor] = []
        forward = SmallVit.forward
        monkeypatch.setattr(
            SmallVit, "forward", lambda model, patches: (seen.append(patches), forward(model, patches))[1]
        )
        settings = {"n_epochs": 1, "dim": 16, "depth": 1, "heads": 2}
        one = train_vit(planted(), VitTraining(**settings))
        n_seen = len(seen)
        other = train_vit(planted(), VitTraining(**settings, permuted=True))
        assert len(seen) == 2 * n_seen
        assert sorted(other.order) == list(range(16))
        assert list(other.order) != list(range(16))
        for plain, permuted in zip(seen[:n_seen], seen[n_seen:]):
            torch.testing.assert_close(plain[:, other.order], permuted)
            torch.testing.assert_close(permuted[:, other.back], plain)
        np.testing.assert_array_equal(one.before, other.before)

    def test_the_same_seed_is_the_same_training(self):
        training = VitTraining(n_epochs=1, dim=16, depth=1, heads=2)
        one, again = train_vit(planted(), training), train_vit(planted(), training)
        np.testing.assert_array_equal(one.after, again.after)

    def test_a_loss_that_is_nan_is_named(self):
        images = planted()
        images.train[:] = np.nan
        with pytest.raises(UserError, match="the loss became nan in epoch 1"):
            train_vit(images, VitTraining(n_epochs=1, dim=16, depth=1, heads=2))

    def test_linear_accuracy_counts_other_images(self):
        assert linear_accuracy(planted()) > 0.95


class TestImages:
    def test_digits_are_the_built_in_split_and_scaled(self):
        found = load_images("digits")
        assert (len(found.train), len(found.test), found.grid, found.n_classes) == (1438, 359, (8, 8), 10)
        assert abs(found.train.mean()) < 1e-5
        assert found.train.std() == pytest.approx(1, abs=1e-5)
        assert found.digest == load_images("digits").digest

    @pytest.mark.parametrize(
        ("train", "test", "n_labels", "n_classes"),
        [
            ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 1, 10),
            (["train.bin"], "test.bin", 2, 100),
        ],
    )
    def test_cifars_binary_files_are_read(self, tmp_path, train, test, n_labels, n_classes):
        """Records as the format's page says: label bytes, then planes of red, green and blue, row by row."""
        rng, pictures, fine = np.random.default_rng(0), [], []
        for name in [*train, test]:
            labels = rng.integers(0, n_classes, (4, n_labels), dtype=np.uint8)
            pixels = rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
            records = [bytes(label) + picture.tobytes() for label, picture in zip(labels, pixels)]
            (tmp_path / name).write_bytes(b"".join(records))
            pictures.append(pixels)
            fine.append(labels[:, -1])
        found = load_images(str(tmp_path))
        assert (found.grid, found.n_classes, found.patch_side) == ((8, 8), n_classes, 4)
        np.testing.assert_array_equal(found.train_labels, np.concatenate(fine[:-1]))
        np.testing.assert_array_equal(found.test_labels, fine[-1])
        raw = np.concatenate(pictures[:-1]).astype(np.float64)
        mean, std = raw.mean((0, 2, 3), keepdims=True), raw.std((0, 2, 3), keepdims=True)
        np.testing.assert_allclose(found.train, (raw - mean) / std, atol=1e-5)
        np.testing.assert_allclose(found.test, (pictures[-1] - mean) / std, atol=1e-5)

    def test_a_folder_without_them_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"pickles, which are not read\. Found neither"):
            load_images(str(tmp_path))

    def test_damaged_files_are_all_named(self, tmp_path):
        (tmp_path / "train.bin").write_bytes(b"\x00" * 3073)
        (tmp_path / "test.bin").write_bytes(b"\x00\xc8" + b"\x00" * 3072)
        with pytest.raises(UserError, match=r"train.bin: 3,073 bytes, expected whole records of 3,074\n.*label 200"):
            load_images(str(tmp_path))
        (tmp_path / "test.bin").unlink()
        with pytest.raises(UserError, match=r"test.bin: No such file"):
            load_images(str(tmp_path))


@pytest.mark.slow
def test_small_vits_of_the_digits():
    """J9 and J10, one seed, 30 epochs: no less than a linear model; positions follow the permutation of the pixels."""
    images = load_images("digits")
    baseline = linear_accuracy(images)
    ordinary, positional = (train_vit(images, VitTraining(attention=kind)) for kind in ("ordinary", "positional"))
    error = np.sqrt(baseline * (1 - baseline) / len(images.test))  # another machine may well move one digit of 359
    assert min(ordinary.accuracy, positional.accuracy) > baseline - error
    permuted = train_vit(images, VitTraining(permuted=True))
    seen = locality(encoding_similarity(permuted.after), images.grid)
    back = locality(encoding_similarity(permuted.after[permuted.back]), images.grid)
    assert back.neighbours > 2 * seen.neighbours
    assert back.neighbours > 2 * back.chance

"""ADE20K's tree: what is listed, what comes out, and how wrong trees are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infra.console import UserError
from tests.trainer.probes.dense_trees import ade_scene, png_that_declares, write_ade20k, write_jpg, write_png
from trainer.probes import dense_files
from trainer.probes.ade20k_data import open_ade20k
from trainer.probes.segmentation_head import IGNORED

SIZE = (48, 48)


def refusal(tree: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        open_ade20k(str(tree), SIZE)
    return str(caught.value).splitlines()


class TestTree:
    def test_both_splits_in_the_order_of_their_names(self, tmp_path: Path):
        tree = write_ade20k(tmp_path, 3, 2)
        training, validation = open_ade20k(str(tree), SIZE)
        assert (len(training), len(validation)) == (3, 2)
        assert [pair.image for pair in training.files.pairs] == [
            f"images/training/ADE_train_0000000{number}.jpg" for number in (1, 2, 3)
        ]
        assert [pair.map for pair in validation.files.pairs] == [
            f"annotations/validation/ADE_val_0000000{number}.png" for number in (1, 2)
        ]

    def test_the_folder_around_it_will_do(self, tmp_path: Path):
        write_ade20k(tmp_path)
        assert len(open_ade20k(str(tmp_path), SIZE)[0]) == 6

    def test_identity_is_of_names_and_sizes_not_of_the_place(self, tmp_path: Path):
        one = write_ade20k(tmp_path / "a")
        first = open_ade20k(str(one), SIZE)[0].identity
        shutil.copytree(one, tmp_path / "b")
        assert open_ade20k(str(tmp_path / "b"), SIZE)[0].identity == first
        mask = one / "annotations/training/ADE_train_00000001.png"
        mask.write_bytes(mask.read_bytes() + b" ")
        assert open_ade20k(str(one), SIZE)[0].identity != first
        assert first["n_samples"] == 6

    def test_many_files_are_not_checked_in_silence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        tree = write_ade20k(tmp_path, 4, 2)
        monkeypatch.setattr(dense_files, "_N_SILENT", 3)
        open_ade20k(str(tree), SIZE)
        told = capsys.readouterr().err
        assert "check training 100%: 4/4 pairs" in told
        assert "check validation" not in told


class TestLoading:
    def test_an_evaluation_squeezes_the_whole_image(self, tmp_path: Path):
        tree = write_ade20k(tmp_path)
        pixels, labels = open_ade20k(str(tree), SIZE)[1].load(0, None)
        image = Image.open(tree / "images/validation/ADE_val_00000001.jpg").resize((48, 48), Image.Resampling.BILINEAR)
        mask = Image.open(tree / "annotations/validation/ADE_val_00000001.png").resize(
            (48, 48), Image.Resampling.NEAREST
        )
        assert np.array_equal(pixels.numpy(), np.asarray(image).transpose(2, 0, 1))
        assert torch.equal(labels, torch.from_numpy(np.asarray(mask) - np.uint8(1)))
        assert sorted(labels.unique().tolist()) == [2, 119, IGNORED]

    def test_training_draws_a_part_and_shows_its_own_labels(self, tmp_path: Path):
        """Bright pixels are class 119 and dark ones class 2 in whatever part, mirrored or not."""
        training, _ = open_ade20k(str(write_ade20k(tmp_path)), SIZE)
        seen = set()
        for seed in range(12):
            pixels, labels = training.load(2, torch.Generator().manual_seed(seed))
            assert pixels.shape == (3, *SIZE)
            assert labels.shape == SIZE
            bright = pixels[0] > 125
            labelled = labels != IGNORED
            assert (bright == (labels == 119))[labelled].float().mean() > 0.95
            seen.add(pixels.numpy().tobytes())
        assert len(seen) == 12
        again = training.load(2, torch.Generator().manual_seed(11))[0]
        assert torch.equal(again, pixels)

    def test_palette_masks_are_their_indices(self, tmp_path: Path):
        tree = write_ade20k(tmp_path)
        path = tree / "annotations/validation/ADE_val_00000001.png"
        plain = open_ade20k(str(tree), SIZE)[1].load(0, None)[1]
        with Image.open(path) as stored:
            image = stored.copy()
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
        image.save(path)
        assert path.read_bytes()[25] == 3, "colours from a palette"
        assert torch.equal(open_ade20k(str(tree), SIZE)[1].load(0, None)[1], plain)


class TestRefusals:
    def test_no_tree(self, tmp_path: Path):
        lines = refusal(tmp_path / "nothing")
        assert lines[0].endswith("has 2 problems:")
        assert "images/training: no .jpg in it, or no such folder" in lines[1]
        assert "images/validation" in lines[2]
        assert "Expected ADEChallengeData2016 as published" in lines[-1]

    def test_everything_wrong_is_named_at_once(self, tmp_path: Path):
        tree = write_ade20k(tmp_path, 8, 4)
        images, masks = tree / "images/training", tree / "annotations/training"
        (masks / "ADE_train_00000001.png").unlink()
        (images / "ADE_train_00000002.jpg").unlink()
        write_png(masks / "ADE_train_00000003.png", np.zeros((20, 30), np.uint8))
        write_png(masks / "ADE_train_00000004.png", ade_scene(3, 64)[1].astype(np.uint16))
        write_png(masks / "ADE_train_00000005.png", ade_scene(4, 65)[0])
        (masks / "ADE_train_00000006.png").write_bytes(b"")
        (images / "ADE_train_00000007.jpg").write_bytes(b"no image")
        write_jpg(tree / "annotations/validation/x.jpg", ade_scene(0)[0])
        (tree / "annotations/validation/x.jpg").rename(tree / "annotations/validation/ADE_val_00000001.png")
        text = "\n".join(refusal(tree))
        for part in (
            "has 8 problems:",
            "images/training/ADE_train_00000001.jpg: annotations/training/ADE_train_00000001.png is missing",
            "annotations/training/ADE_train_00000002.png: images/training/ADE_train_00000002.jpg is missing",
            "annotations/training/ADE_train_00000003.png: 20 x 30 px (height x width), but its image "
            "images/training/ADE_train_00000003.jpg has 63 x 80 px",
            "annotations/training/ADE_train_00000004.png: 16 bits a pixel, expected a mask of 8",
            "annotations/training/ADE_train_00000005.png: bad image (undecodable): a PNG with 8 bits of RGB",
            "annotations/training/ADE_train_00000006.png: bad image (empty)",
            "images/training/ADE_train_00000007.jpg: bad image (not_an_image)",
            "annotations/validation/ADE_val_00000001.png: bad image (not_an_image)",
        ):
            assert part in text

    def test_a_long_list_is_cut(self, tmp_path: Path):
        tree = write_ade20k(tmp_path, 30, 1)
        shutil.rmtree(tree / "annotations/training")
        lines = refusal(tree)
        assert lines[0].endswith("has 30 problems:")
        assert "and 10 more" in lines[-2]

    def test_values_above_150_are_refused_with_the_file(self, tmp_path: Path):
        tree = write_ade20k(tmp_path)
        name = "annotations/validation/ADE_val_00000002.png"
        mask = np.asarray(Image.open(tree / name)).copy()
        mask[5, 5] = 151
        write_png(tree / name, mask)
        validation = open_ade20k(str(tree), SIZE)[1]
        with pytest.raises(UserError, match=r"ADE_val_00000002.png is no mask of ADE20K: it holds the value 151"):
            validation.load(1, None)

    def test_hidden_files_are_no_images(self, tmp_path: Path):
        tree = write_ade20k(tmp_path)
        expected = open_ade20k(str(tree), SIZE)[0].files.pairs
        for name in (".DS_Store", "._ADE_train_00000001.jpg"):
            (tree / "images/training" / name).write_bytes(b"left by a Mac")
        assert open_ade20k(str(tree), SIZE)[0].files.pairs == expected

    def test_damage_behind_the_header_names_the_file(self, tmp_path: Path):
        tree = write_ade20k(tmp_path)
        path = tree / "images/training/ADE_train_00000001.jpg"
        path.write_bytes(path.read_bytes()[:-300])
        mask = tree / "annotations/training/ADE_train_00000002.png"
        mask.write_bytes(mask.read_bytes()[:60])
        training = open_ade20k(str(tree), SIZE)[0]
        with pytest.raises(UserError, match=r"ADE_train_00000001.jpg: bad image"):
            training.load(0, None)
        with pytest.raises(UserError, match=r"ADE_train_00000002.png: bad image"):
            training.load(1, None)

    def test_files_that_change_or_go_after_the_check_are_named(self, tmp_path: Path):
        tree = write_ade20k(tmp_path)
        training = open_ade20k(str(tree), SIZE)[0]
        write_png(tree / "annotations/training/ADE_train_00000001.png", np.zeros((9, 9), np.uint8))
        (tree / "images/training/ADE_train_00000002.jpg").unlink()
        with pytest.raises(UserError, match=r"ADE_train_00000001.png has 9 x 9 px of 8 bits, .* 61 x 80 of 8 expected"):
            training.load(0, None)
        with pytest.raises(UserError, match=r"cannot read .*ADE_train_00000002.jpg: No such file"):
            training.load(1, None)

    def test_bombs_are_refused_before_they_are_decoded(self, tmp_path: Path):
        """Files of some hundred bytes that declare 30,000 x 30,000 px."""
        tree = write_ade20k(tmp_path)
        bomb = png_that_declares(30_000, 30_000)
        (tree / "images/training/ADE_train_00000001.jpg").write_bytes(bomb)
        (tree / "annotations/training/ADE_train_00000002.png").write_bytes(bomb)
        text = "\n".join(refusal(tree))
        assert "ADE_train_00000001.jpg: bad image (too_large): 30000 x 30000 px declared" in text
        assert "ADE_train_00000002.png: 30000 x 30000 px (height x width), but its image" in text

"""Kaggle's tables of NYUv2: what they name, what comes out, and how wrong ones are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from infra.console import UserError
from tests.trainer.probes.dense_trees import nyu_scene, write_nyuv2, write_png, write_table
from trainer.probes.augment import draw_crop
from trainer.probes.dense_transforms import to_tensors
from trainer.probes.nyuv2_data import depth_of_train, open_nyuv2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nyuv2(tmp_path_factory.mktemp("nyu"), 2, 2)


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_nyuv2(str(root))
    return str(caught.value)


class TestLoading:
    def test_the_tables_are_followed_in_their_order(self, root: Path):
        train, test = open_nyuv2(str(root))
        assert (len(train), len(test)) == (2, 2)
        assert [pair.map for pair in test.files.pairs] == [f"data/nyu2_test/0000{n}_depth.png" for n in (0, 1)]
        assert train.files.pairs[1].image == "data/nyu2_train/living_room_0038_out/2.jpg"

    def test_test_depth_is_its_millimetres(self, root: Path):
        pixels, depth = open_nyuv2(str(root))[1].load(1, None)
        image, truth = nyu_scene(1001)
        assert np.array_equal(pixels.numpy(), image.transpose(2, 0, 1))
        assert depth.dtype == torch.float32
        np.testing.assert_allclose(depth.numpy(), truth, atol=0.0006)
        assert (depth[:60, :60] == 0).all()

    def test_train_depth_is_its_share_of_ten_metres(self, root: Path):
        depth = depth_of_train(to_tensors(*open_nyuv2(str(root))[0].files.read(0))[1])
        np.testing.assert_allclose(depth.numpy(), nyu_scene(1)[1], atol=10 / 255 / 2 + 1e-5)

    def test_training_keeps_colour_and_depth_in_step(self, root: Path):
        """Grey values are 25 per metre: after crop and flip still, if colours are within their 20 %."""
        train, _ = open_nyuv2(str(root))
        seen = set()
        for seed in range(6):
            pixels, depth = train.load(0, torch.Generator().manual_seed(seed))
            assert pixels.shape == (3, 480, 640)
            known = depth > 0
            grey = pixels.float().mean(0)[known]
            assert float(torch.corrcoef(torch.stack([grey, depth[known]]))[0, 1]) > 0.98
            seen.add(pixels.numpy().tobytes())
        assert len(seen) == 6
        assert torch.equal(train.load(0, torch.Generator().manual_seed(5))[0], pixels)

    def test_crops_that_are_possible_and_the_published_ones(self):
        """Up to twice the area can mostly not be: one crop in about sixty is the whole image then, else hardly any."""

        def whole(scale: tuple[float, float]) -> float:
            draw = torch.Generator().manual_seed(0)
            boxes = [draw_crop(480, 640, scale=scale, ratio=(4 / 3, 4 / 3), draw=draw) for _ in range(2000)]
            assert all(240 < box[2] <= 480 for box in boxes)
            return sum(box == (0, 0, 480, 640) for box in boxes) / len(boxes)

        assert whole((0.5, 1.0)) < 0.006
        assert whole((0.5, 2.0)) == pytest.approx((2 / 3) ** 10 + 0.002, abs=0.009)

    def test_compat_draws_other_crops(self, root: Path):
        ours, theirs = (open_nyuv2(str(root), compat=compat)[0] for compat in (False, True))
        same = [
            torch.equal(*(data.load(0, torch.Generator().manual_seed(seed))[1] for data in (ours, theirs)))
            for seed in range(3)
        ]
        assert not all(same)
        assert ours.files.identity == theirs.files.identity


class TestRefusals:
    def test_no_tables(self, tmp_path: Path):
        text = refusal(tmp_path)
        assert "has 2 problems" in text
        assert "data/nyu2_train.csv: missing" in text
        assert "data/nyu2_test.csv: missing" in text
        assert "Expected Kaggle's nyu-depth-v2" in text

    def test_everything_wrong_is_named_at_once(self, tmp_path: Path):
        root = write_nyuv2(tmp_path, 5, 3)
        train = [[f"data/nyu2_train/living_room_0038_out/{n}.{s}" for s in ("jpg", "png")] for n in range(1, 6)]
        (root / train[0][0]).unlink()
        write_png(root / train[1][1], np.zeros((480, 640), np.uint16))
        write_png(root / train[2][1], np.zeros((240, 320), np.uint8))
        write_table(
            root / "data/nyu2_train.csv",
            [*train, ["data/nyu2_train/gone.jpg", "data/nyu2_train/gone.png"], ["only one"], ["../../etc/a", "/b"]],
        )
        write_png(root / "data/nyu2_test/00000_depth.png", np.zeros((480, 640), np.uint8))
        write_png(root / "data/nyu2_test/00001_colors.png", np.zeros((240, 320, 3), np.uint8))
        write_png(root / "data/nyu2_test/00001_depth.png", np.zeros((240, 320), np.uint16))
        text = refusal(root)
        for part in (
            "has 9 problems:",
            f"{train[0][0]}: missing",
            f"{train[1][1]}: 16 bits a pixel, expected a depth map of 8",
            f"{train[2][1]}: 240 x 320 px (height x width), but its image {train[2][0]} has 480 x 640 px",
            "data/nyu2_train/gone.jpg: missing",
            "data/nyu2_train/gone.png: missing",
            "data/nyu2_train.csv, line 7: 1 columns, expected two: image and depth map",
            "data/nyu2_train.csv, line 8: '../../etc/a' is no path below the folder of the data set",
            "data/nyu2_test/00000_depth.png: 8 bits a pixel, expected a depth map of 16",
            "data/nyu2_test/00001_colors.png: 240 x 320 px (height x width), expected 480 x 640 px",
        ):
            assert part in text, part

    @pytest.mark.parametrize(
        ("before", "comma", "line_end"), [(b"\xef\xbb\xbf", b",", b"\r\n"), (b"", b", ", b"\r"), (b"\n", b",", b"\n\n")]
    )
    def test_tables_as_spreadsheets_write_them(self, root: Path, before: bytes, comma: bytes, line_end: bytes):
        """A mark before the text, other line ends, blanks, empty lines: the same pairs."""
        expected = open_nyuv2(str(root))[0].files.pairs
        table = root / "data/nyu2_train.csv"
        plain = table.read_bytes()
        table.write_bytes(before + plain.replace(b"\r\n", line_end).replace(b",", comma))
        try:
            assert open_nyuv2(str(root))[0].files.pairs == expected
        finally:
            table.write_bytes(plain)

    def test_a_path_that_no_file_can_have(self, tmp_path: Path):
        root = write_nyuv2(tmp_path, 1, 1)
        with (root / "data/nyu2_train.csv").open("ab") as file:
            file.write(b"data/\0.jpg,data/1.png\n")
        assert "line 2: 'data/\\x00.jpg' is no path below the folder" in refusal(root)

    def test_an_empty_table_and_one_that_is_no_text(self, tmp_path: Path):
        root = write_nyuv2(tmp_path, 1, 1)
        (root / "data/nyu2_train.csv").write_bytes(b"")
        (root / "data/nyu2_test.csv").write_bytes(b"\xff\xfe\x00")
        text = refusal(root)
        assert "data/nyu2_train.csv: empty" in text
        assert "data/nyu2_test.csv: 'utf-8' codec can't decode" in text

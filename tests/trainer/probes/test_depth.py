"""Bins, losses, padding and error of depth: closed forms and planted ramps (F5 to F9)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from trainer.probes.dense_padding import Padding
from trainer.probes.depth_bins import NO_BIN, DepthBins
from trainer.probes.depth_head import DepthHead
from trainer.probes.depth_loss import bin_loss, scale_invariant_error
from trainer.probes.depth_metrics import NYU_SIZE, SquaredErrors, counted_pixels
from trainer.probes.nyuv2 import DepthMetric, DepthProtocol, image_size, settings_on
from trainer.probes.nyuv2_data import depth_of_test, depth_of_train

BINS = DepthBins()
PADDING = Padding(size=NYU_SIZE, multiple=14)
GRID = (140, 184)  # four cells per 14 px patch of the padded 490 x 644 px


def logits_of(depth: torch.Tensor) -> torch.Tensor:
    """Scores whose decoded depth is `depth`, (batch, row, column) in m: weight on the two bins beside it."""
    centres = BINS.centres()
    place = ((depth - centres[0]) / (centres[1] - centres[0])).clamp(0, 255 - 1e-4)
    low = place.floor().long()
    weight = torch.zeros(*depth.shape, 256)
    weight.scatter_(-1, low[..., None], (1 - (place - low))[..., None])
    weight.scatter_add_(-1, (low + 1)[..., None], (place - low)[..., None])
    return weight.clamp(min=1e-30).log().permute(0, 3, 1, 2)


class TestBins:
    def test_edges_and_centres_are_linear(self):
        width = (10 - 0.001) / 256
        edges, centres = BINS.edges(), BINS.centres()
        assert (len(edges), len(centres)) == (257, 256)
        np.testing.assert_allclose(edges.numpy(), 0.001 + width * np.arange(257), atol=2e-6)
        np.testing.assert_allclose(centres.numpy(), 0.001 + width * (np.arange(256) + 0.5), atol=2e-6)
        assert edges[-1] == 10.0

    def test_one_hot_scores_decode_to_the_centre(self):
        logits = torch.full((256, 256, 1, 1), -1e4)
        logits[torch.arange(256), torch.arange(256)] = 0.0
        torch.testing.assert_close(BINS.decode(logits)[:, 0, 0], BINS.centres(), atol=1e-6, rtol=0)

    def test_even_scores_decode_to_the_middle_of_the_range(self):
        assert float(BINS.decode(torch.zeros(1, 256, 1, 1))) == pytest.approx((0.001 + 10) / 2, abs=1e-5)

    @pytest.mark.parametrize(
        ("depth", "bin"),
        [
            (0.0, NO_BIN),
            (-1.0, NO_BIN),
            (0.0005, NO_BIN),
            (0.001, 0),
            (0.0011, 0),
            (5.0, 127),
            (9.99, 255),
            (10.0, 255),
            (10.001, NO_BIN),
            (65.535, NO_BIN),
            (math.nan, NO_BIN),
            (math.inf, NO_BIN),
        ],
    )
    def test_values_at_the_ends(self, depth: float, bin: int):
        assert int(BINS.index(torch.tensor([depth]))) == bin

    def test_an_inner_edge_belongs_to_the_bin_below_and_a_centre_to_its_own(self):
        assert torch.equal(BINS.index(BINS.edges()[1:]), torch.arange(256))
        assert torch.equal(BINS.index(BINS.centres()), torch.arange(256))
        above = torch.nextafter(BINS.edges()[:-1], torch.tensor(100.0))
        assert torch.equal(BINS.index(above), torch.arange(256))

    @given(st.floats(0.002, 10.0))
    def test_a_depth_lies_within_half_a_bin_of_its_centre(self, depth: float):
        number = int(BINS.index(torch.tensor([depth])))
        assert abs(float(BINS.centres()[number]) - depth) <= (10 - 0.001) / 256 / 2 + 2e-6


def test_depth_from_the_two_files():
    assert depth_of_train(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [0.0, 2.0, 10.0]
    assert depth_of_test(torch.tensor([0, 1, 2500, 10000], dtype=torch.uint16)).tolist() == pytest.approx(
        [0.0, 0.001, 2.5, 10.0]
    )


def test_the_head_is_the_published_one_with_its_products_made_first():
    """conv(enlarge(x)) and enlarge(conv(x)) are one function: enlarging weighs neighbours by weights that sum to 1."""
    head = DepthHead(8, 256)
    features = torch.randn(2, 16, 5, 7)
    enlarged = functional.interpolate(features, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(features), head.conv(enlarged), atol=1e-5, rtol=1e-5)
    assert head.conv.weight.shape == (256, 16, 1, 1)


class TestIgnored:
    def test_cells_without_depth_have_no_gradient_and_a_true_depth_of_9_99_m_has(self):
        logits = torch.randn(1, 256, 1, 3, requires_grad=True)
        bins = BINS.index(torch.tensor([[[0.0, 9.99, 3.0]]]))
        assert bins.tolist() == [[[NO_BIN, 255, 76]]]
        bin_loss(logits, bins).backward()
        assert logits.grad is not None
        assert (logits.grad[..., 0] == 0).all()
        assert (logits.grad[..., 1] != 0).all()

    def test_published_indices_teach_the_last_bin_where_there_is_no_depth(self):
        """255 marks what has no depth and 256 is ignored: such a cell pulls towards 9.98 m."""
        logits = torch.zeros(1, 256, 1, 1, requires_grad=True)
        marked = BINS.index(torch.zeros(1, 1, 1), unknown=255)
        bin_loss(logits, marked, ignored=256).backward()
        assert logits.grad is not None
        assert logits.grad[0, 255, 0, 0] == pytest.approx(1 / 256 - 1)

    @pytest.mark.parametrize("compat", [False, True])
    def test_the_whole_loss_sees_them_so(self, compat: bool):
        """Only the last bin's scores of a corner without depth tell the two apart."""
        protocol = DepthProtocol(bins=BINS, padding=PADDING, compat=compat)
        depth = torch.full((1, *NYU_SIZE), 4.0)
        depth[:, :200, :200] = 0
        logits = torch.zeros(1, 256, *GRID, requires_grad=True)
        protocol.loss(logits, depth).backward()
        assert logits.grad is not None
        corner = logits.grad[0, :, 5:40, 5:40]
        assert bool((corner != 0).any()) == compat
        assert bool((corner[255] < 0).all()) == compat
        assert (logits.grad[0, :, 60:, 60:100] != 0).any()

    def test_an_image_without_depth_has_loss_zero(self):
        protocol = DepthProtocol(bins=BINS, padding=PADDING)
        logits = torch.randn(1, 256, *GRID, requires_grad=True)
        loss = protocol.loss(logits, torch.zeros(1, *NYU_SIZE))
        loss.backward()
        assert loss == 0
        assert logits.grad is not None
        assert (logits.grad == 0).all()

    def test_cells_of_the_padding_teach_nothing(self):
        """5 rows above and below, 2 columns left and right: the outermost cells have their middles in them."""
        protocol = DepthProtocol(bins=BINS, padding=PADDING)
        entropy = torch.zeros(1, 256, *GRID, requires_grad=True)
        padded = PADDING.pad_map(BINS.index(torch.full((1, *NYU_SIZE), 4.0)), NO_BIN)
        small = functional.interpolate(padded[:, None].float(), size=GRID, mode="nearest-exact")[0, 0]
        assert (small[0] == NO_BIN).all()
        assert (small[:, 0] == NO_BIN).all()
        assert (small[2:-2, 1:-1] == 102).all()
        protocol.loss(entropy, torch.full((1, *NYU_SIZE), 4.0)).backward()
        assert entropy.grad is not None
        assert torch.isfinite(entropy.grad).all()


class TestScaleInvariant:
    @given(st.floats(0.2, 5.0))
    def test_a_common_factor_costs_its_closed_form(self, factor: float):
        """Errors were 0; predictions times c: g = ln c everywhere, so (1 - 0.85) ln^2 c."""
        depth = torch.rand(2, 6, 7, dtype=torch.float64) * 9 + 0.5
        known = torch.ones_like(depth, dtype=torch.bool)
        error = scale_invariant_error(factor * depth, depth, known, log_offset=0.0)
        assert float(error) == pytest.approx(0.15 * math.log(factor) ** 2, abs=1e-12)

    def test_it_is_its_formula_with_the_published_offset(self):
        random = np.random.default_rng(0)
        predicted, depth = random.uniform(0.1, 9, (2, 2, 5, 5))
        known = random.random((2, 5, 5)) < 0.7
        g = (np.log(predicted + 1e-3) - np.log(depth + 1e-3))[known]
        expected = np.mean(g**2) - 0.85 * np.mean(g) ** 2
        found = scale_invariant_error(*map(torch.from_numpy, (predicted, depth, known)))
        assert float(found) == pytest.approx(expected, rel=1e-9)

    def test_unknown_pixels_have_no_gradient_whatever_they_hold(self):
        predicted = torch.tensor([[[1.0, 2.0, 3.0]]], requires_grad=True)
        depth = torch.tensor([[[2.0, math.nan, 0.0]]])
        scale_invariant_error(predicted, depth, BINS.is_known(depth)).backward()
        assert predicted.grad is not None
        assert predicted.grad[0, 0, 0] != 0
        assert predicted.grad[0, 0, 1:].tolist() == [0.0, 0.0]

    def test_the_loss_adds_ten_of_it_to_the_entropy(self):
        """A map that decodes to c times the truth, exactly: 10 x 0.15 ln^2 c, plus the entropy of the bins."""
        protocol = DepthProtocol(bins=BINS, padding=PADDING)
        depth, factor = torch.full((1, *NYU_SIZE), 3.0), 1.5
        logits = logits_of(torch.full((1, *GRID), 3.0 * factor))
        truth = bin_loss(logits, BINS.index(torch.full((1, *GRID), 3.0)))
        g = math.log(3.0 * factor + 1e-3) - math.log(3.0 + 1e-3)
        assert float(protocol.loss(logits, depth) - truth) == pytest.approx(10 * 0.15 * g**2, rel=1e-3)


class TestPadding:
    def test_nyu_at_14_px_patches(self):
        assert PADDING.padded == (490, 644) == image_size(14)
        assert PADDING.before == (5, 2)
        assert image_size(16) == (480, 640)

    def test_zeros_lie_around_the_image_and_the_odd_one_behind_it(self):
        padding = Padding(size=(4, 5), multiple=7)
        padded = padding.pad(torch.ones(1, 3, 4, 5))
        assert padded.shape == (1, 3, 7, 7)
        inside = torch.zeros(7, 7)
        inside[1:5, 1:6] = 1
        assert torch.equal(padded[0, 0], inside)
        assert torch.equal(padding.pad_map(torch.ones(1, 4, 5, dtype=torch.int64), -1)[0], 2 * inside.long() - 1)

    @given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 20))
    def test_cutting_undoes_padding(self, height: int, width: int, multiple: int):
        padding = Padding(size=(height, width), multiple=multiple)
        padded_height, padded_width = padding.padded
        assert padded_height % multiple == padded_width % multiple == 0
        assert 0 <= padded_height - height < multiple
        image = torch.randn(1, 3, height, width)
        assert torch.equal(padding.to_image(padding.pad(image)[:, 0]), image[:, 0])

    def test_the_odd_row_is_below_and_the_odd_column_to_the_right(self):
        padding = Padding(size=(5, 9), multiple=4)
        assert (padding.padded, padding.before) == ((8, 12), (1, 1))
        assert padding.pad(torch.ones(1, 3, 5, 9))[0, 0].nonzero().amax(0).tolist() == [5, 9]

    @pytest.mark.parametrize("axis", [1, 2])
    def test_a_ramp_comes_back_without_shift(self, axis: int):
        """Cells hold the pixel coordinate of their middle; so must every pixel. Stretched, the rim is off."""
        n_cells, padded, before = GRID[axis - 1], PADDING.padded[axis - 1], PADDING.before[axis - 1]
        middles = (torch.arange(n_cells) + 0.5) * (padded / n_cells) - 0.5 - before
        grid = middles.view(1, -1, 1).expand(1, *GRID) if axis == 1 else middles.view(1, 1, -1).expand(1, *GRID)
        size = NYU_SIZE[axis - 1]
        wanted = torch.arange(float(size))

        def line(compat: bool) -> torch.Tensor:
            image = PADDING.to_image(grid, compat=compat)
            assert image.shape == (1, *NYU_SIZE)
            return image[0, :, 320] if axis == 1 else image[0, 240, :]

        torch.testing.assert_close(line(False), wanted, atol=1e-3, rtol=0)
        off = (line(True) - wanted).abs()
        assert off.max() > 0.6 * before
        assert off[size // 2] < 0.5

    def test_a_depth_ramp_through_bins_and_back(self):
        """Decoded from scores on the grid and brought to the image: the true depth, far better than one bin."""
        rows = (torch.arange(GRID[0]) + 0.5) * 3.5 - 0.5 - 5
        truth = 1 + torch.arange(480.0) / 100
        logits = logits_of((1 + rows / 100).view(1, -1, 1).expand(1, *GRID))
        found = DepthProtocol(bins=BINS, padding=PADDING).depth(logits)[0, :, 320]
        torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)
        stretched = DepthProtocol(bins=BINS, padding=PADDING, compat=True).depth(logits)[0, :, 320]
        assert (stretched - truth).abs().max() > 0.04


class TestError:
    def test_the_eigen_crop_of_a_full_map(self):
        counted = counted_pixels(torch.full((1, *NYU_SIZE), 3.0), BINS)
        assert int(counted.sum()) == 426 * 560 == 238_560
        rows, columns = counted[0].nonzero().unbind(1)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)

    def test_pixels_without_depth_or_out_of_range_do_not_count(self):
        depth = torch.full((1, *NYU_SIZE), 3.0)
        depth[0, 100, 100:105] = torch.tensor([0.0, math.nan, math.inf, 10.5, 0.0005])
        assert int(counted_pixels(depth, BINS).sum()) == 238_560 - 5

    def test_maps_of_another_size_are_refused(self):
        with pytest.raises(ValueError, match=r"\[240, 320\] px; the Eigen crop is defined for \[480, 640\]"):
            counted_pixels.__wrapped__(torch.ones(1, 240, 320), BINS)

    @pytest.mark.parametrize("error", [0.0, 0.25, -1.5])
    def test_a_constant_error_is_the_error(self, error: float):
        depth = torch.rand(2, *NYU_SIZE) * 5 + 2
        errors = SquaredErrors()
        errors.add(depth + error, depth, counted_pixels(depth, BINS))
        assert errors.rmse() == pytest.approx(abs(error), abs=1e-6)
        assert int(errors.n_pixels) == 2 * 238_560

    def test_errors_outside_the_crop_change_nothing_not_even_nan(self):
        depth = torch.full((1, *NYU_SIZE), 3.0)
        predicted = depth + 0.5
        predicted[:, :45] = math.nan
        predicted[:, :, 601:] = 1e9
        errors = SquaredErrors()
        errors.add(predicted, depth, counted_pixels(depth, BINS))
        assert errors.rmse() == pytest.approx(0.5)

    def test_it_pools_pixels_not_images(self):
        """One image with 1 counted pixel 3 m off, one with 3 pixels right: sqrt(9 / 4), not the mean of 3 and 0."""
        errors, other = SquaredErrors(), SquaredErrors()
        zero = torch.zeros(1, 1, 3)
        errors.add(zero + 3, zero, torch.tensor([[[True, False, False]]]))
        other.add(zero, zero, torch.ones(1, 1, 3, dtype=torch.bool))
        errors.merge(other)
        assert errors.rmse() == 1.5

    def test_nothing_counted_is_no_number(self):
        assert math.isnan(SquaredErrors().rmse())

    def test_the_metric_from_scores(self):
        """Everywhere 0.5 m too far, on maps with holes: 0.5."""
        depth = torch.full((3, *NYU_SIZE), 3.0)
        depth[:, 50:70] = 0
        metric = DepthMetric(DepthProtocol(bins=BINS, padding=PADDING))
        logits = logits_of(torch.full((3, *GRID), 3.5))
        metric.add(logits[:2], depth[:2])
        metric.add(logits[2:], depth[2:])
        assert metric.values()["RMSE (m)"] == pytest.approx(0.5, abs=1e-4)


def test_the_recipe_is_the_published_one():
    cpu, gpu = settings_on(torch.device("cpu")), settings_on(torch.device("cuda"))
    assert (gpu.n_epochs, gpu.batch_size, gpu.evaluation_batch_size, gpu.drop_last) == (25, 128, 8, False)
    assert (gpu.learning_rate, gpu.weight_decay, gpu.clip_norm, gpu.schedule) == (1e-3, 1e-3, None, "constant")
    assert (gpu.precision, cpu.precision) == ("float16", "float32")

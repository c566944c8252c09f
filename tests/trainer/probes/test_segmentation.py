"""Labels, loss and metric of segmentation: tables, hand cases, closed forms (F3, F4)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from trainer.probes.ade20k import SETTINGS, SegmentationMetric, image_size
from trainer.probes.ade20k_data import class_labels
from trainer.probes.segmentation_head import IGNORED, PatchReadout, segmentation_loss, to_pixels
from trainer.probes.segmentation_metrics import Confusion


class TestLabels:
    def test_every_value_of_a_byte(self):
        """0 -> 255, k -> k - 1 for 1 to 150; each value above is refused by its number."""
        for value in range(256):
            mask = np.full((1, 2), value, np.uint8)
            if value > 150:
                with pytest.raises(ValueError, match=f"value {value}; expected 0 .no class. and 1 to 150"):
                    class_labels(mask)
                continue
            labels = class_labels(mask)
            assert labels.dtype == np.uint8
            assert (labels == (IGNORED if value == 0 else value - 1)).all()

    def test_one_bad_pixel_refuses_the_mask(self):
        mask = np.ones((4, 4), np.uint8)
        mask[2, 1] = 151
        with pytest.raises(ValueError, match="151"):
            class_labels(mask)

    def test_the_mask_that_was_given_is_left_alone(self):
        mask = np.array([[0, 1]], np.uint8)
        class_labels(mask)
        assert mask.tolist() == [[0, 1]]


class TestConfusion:
    def test_two_classes_by_hand(self):
        """Labels 0 0 1 1 1, predictions 0 1 1 1 0: IoU 1/3 and 2/4, 3 of 5 right."""
        confusion = Confusion(2, ignore=IGNORED)
        confusion.add(torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 1]))
        assert confusion.counts.tolist() == [[1, 1], [1, 2]]
        assert confusion.iou().tolist() == [1 / 3, 2 / 4]
        assert confusion.mean_iou() == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-15)
        assert confusion.pixel_accuracy() == 3 / 5

    def test_ignored_pixels_are_in_no_cell(self):
        plain, with_ignored = Confusion(2, ignore=IGNORED), Confusion(2, ignore=IGNORED)
        plain.add(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        with_ignored.add(torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 0, IGNORED, IGNORED, 1]))
        assert torch.equal(plain.counts, with_ignored.counts)
        assert with_ignored.n_ignored == 2
        assert with_ignored.mean_iou() == plain.mean_iou() == with_ignored.mean_iou(compat=True)
        assert with_ignored.pixel_accuracy() == 2 / 3
        assert with_ignored.pixel_accuracy(compat=True) == 2 / 5, "published: ignored pixels count as wrong"

    def test_a_class_that_is_nowhere_is_left_out_and_one_that_is_only_predicted_counts_zero(self):
        confusion = Confusion(4, ignore=IGNORED)
        confusion.add(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0]))  # 0: 2/3; 2: predicted only; 1 and 3: nowhere
        iou = confusion.iou().tolist()
        assert iou[0] == 2 / 3
        assert iou[2] == 0.0
        assert math.isnan(iou[1])
        assert math.isnan(iou[3])
        assert confusion.mean_iou() == pytest.approx((2 / 3 + 0) / 2, abs=1e-15)
        assert confusion.mean_iou(compat=True) == pytest.approx((2 / 3) / 4, abs=1e-15), "published: they count 0"

    def test_nothing_counted_is_no_number(self):
        confusion = Confusion(2, ignore=IGNORED)
        assert math.isnan(confusion.mean_iou())
        assert math.isnan(confusion.pixel_accuracy())

    @given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**31))
    def test_batches_and_merging_change_nothing(self, n_classes: int, n_pixels: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, n_classes + 1, (n_pixels,), generator=draw)
        labels[labels == n_classes] = IGNORED
        predicted = torch.randint(0, n_classes, (n_pixels,), generator=draw)
        cut = int(torch.randint(0, n_pixels + 1, (1,), generator=draw))
        whole, left, right = (Confusion(n_classes, ignore=IGNORED) for _ in range(3))
        whole.add(predicted, labels)
        left.add(predicted[:cut], labels[:cut])
        right.add(predicted[cut:], labels[cut:])
        left.merge(right)
        assert torch.equal(whole.counts, left.counts)
        assert whole.n_ignored == left.n_ignored
        # Each intersection over union from its definition on sets of pixels.
        for number, iou in enumerate(whole.iou().tolist()):
            labelled, found = labels == number, (predicted == number) & (labels != IGNORED)
            union = int((labelled | found).sum())
            assert (math.isnan(iou) and not union) or iou == int((labelled & found).sum()) / union


class TestReadout:
    def test_scores_are_the_linear_map_of_each_patch_on_its_place(self):
        head = PatchReadout(5, 3)
        patches = torch.randn(2, 4, 6, 5)
        logits = head(patches)
        assert logits.shape == (2, 3, 4, 6)
        expected = head.linear.weight @ patches[1, 3, 2] + head.linear.bias
        torch.testing.assert_close(logits[1, :, 3, 2], expected)

    def test_enlarging_keeps_a_ramp_in_place(self):
        """Centre of patch c at side p lies at p c + (p - 1) / 2: a ramp over these is the ramp over pixels."""
        patch = 14
        centres = torch.arange(37) * patch + (patch - 1) / 2
        fine = to_pixels(centres.expand(1, 1, 37, 37), (37 * patch, 37 * patch))[0, 0]
        inner = slice(patch // 2, -patch // 2)
        torch.testing.assert_close(fine[100, inner], torch.arange(37.0 * patch)[inner], atol=1e-3, rtol=0)

    def test_loss_is_the_cross_entropy_of_labelled_pixels(self):
        logits = torch.randn(2, 3, 4, 4)
        labels = torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
        labels[0, :2] = IGNORED
        kept = labels != IGNORED
        expected = -logits.log_softmax(1).permute(0, 2, 3, 1)[kept].gather(1, labels[kept].long()[:, None]).mean()
        torch.testing.assert_close(segmentation_loss(logits, labels), expected)
        torch.testing.assert_close(
            segmentation_loss(logits, labels), functional.cross_entropy(logits, labels.long(), ignore_index=IGNORED)
        )

    def test_images_in_parts_are_all_at_once(self):
        """Nine images on a coarse grid, with their gradient, as one cross-entropy of all pixels has them."""
        coarse, labels = torch.randn(9, 3, 2, 2), torch.randint(0, 3, (9, 6, 6), dtype=torch.uint8)
        labels[:4, :3] = IGNORED
        ours, whole = coarse.clone().requires_grad_(), coarse.clone().requires_grad_()
        loss = segmentation_loss(ours, labels)
        expected = functional.cross_entropy(to_pixels(whole, (6, 6)), labels.long(), ignore_index=IGNORED)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, whole.grad)

    def test_ignored_pixels_have_no_gradient(self):
        logits = torch.randn(1, 3, 2, 2, requires_grad=True)
        segmentation_loss(logits, torch.tensor([[[0, IGNORED], [2, 1]]], dtype=torch.uint8)).backward()
        assert logits.grad is not None
        assert (logits.grad[0, :, 0, 1] == 0).all()
        assert (logits.grad[0, :, 1, 1] != 0).any()

    def test_a_batch_without_labels_has_loss_zero(self):
        logits = torch.randn(1, 3, 2, 2, requires_grad=True)
        loss = segmentation_loss(logits, torch.full((1, 2, 2), IGNORED, dtype=torch.uint8))
        loss.backward()
        assert loss == 0
        assert logits.grad is not None
        assert (logits.grad == 0).all()


def test_the_metric_enlarges_counts_and_ignores():
    """Scores for class 0 on the left, 1 on the right, at 2 x 2 patches; the right half has no labels."""
    logits = torch.zeros(5, 2, 2, 2)
    logits[:, 0, :, 0], logits[:, 1, :, 1] = 4.0, 4.0
    labels = torch.zeros(5, 8, 8, dtype=torch.uint8)
    labels[:, :, 4:] = IGNORED
    labels[:, 0, 0] = 1
    for compat in (False, True):
        metric = SegmentationMetric(compat=compat)
        metric.add(logits[:2], labels[:2])
        metric.add(logits[2:], labels[2:])
        assert metric.values()["mIoU"] == pytest.approx((31 / 32 + 0) / 2)
        assert metric.values()["pixel accuracy"] == pytest.approx(31 / (64 if compat else 32))


def test_the_recipe_is_the_published_one():
    assert image_size(14) == (518, 518)
    assert image_size(16) == (512, 512)
    assert image_size(1000) == (1000, 1000)
    assert (SETTINGS.n_epochs, SETTINGS.batch_size, SETTINGS.drop_last) == (10, 32, True)
    assert (SETTINGS.learning_rate, SETTINGS.weight_decay, SETTINGS.clip_norm) == (1e-3, 1e-2, 1.0)
    assert (SETTINGS.schedule, SETTINGS.warmup_iterations, SETTINGS.precision) == ("warmup_cosine", 100, "float32")

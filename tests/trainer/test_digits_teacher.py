"""The recipe of digits_vit, in miniature: it learns, it repeats itself, and its files are what load_teacher reads."""

from pathlib import Path

import pytest
import torch

from pipeline.digits import digits_split
from pipeline.teacher import load_teacher
from trainer import digits_teacher
from trainer.digits_teacher import DigitsTeacherConfig, augment, save_digits_teacher, train_digits_teacher

SHORT = DigitsTeacherConfig(n_epochs=24, batch_size=32, bfloat16=False)  # many CPUs take long over bfloat16


@pytest.mark.slow
def test_the_whole_recipe_reaches_97_percent() -> None:
    assert train_digits_teacher().val_accuracy >= 0.97


@pytest.fixture
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_teacher, "digits_split", lambda split: digits_split(split)[:32])


@pytest.mark.parametrize("bfloat16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_few_digits")
def test_the_same_seed_trains_the_same_weights_and_touches_no_other_generator(bfloat16: bool) -> None:
    config = DigitsTeacherConfig(n_epochs=2, batch_size=16, bfloat16=bfloat16)
    before = torch.random.get_rng_state()
    one, two = (train_digits_teacher(config, report=lambda _: None) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.mark.usefixtures("_few_digits")
def test_a_short_training_learns_and_its_files_can_be_loaded(tmp_path: Path) -> None:
    lines: list[str] = []
    one = train_digits_teacher(SHORT, report=lines.append)
    assert lines[-1] == f"digits_vit: 24 steps, held-out top-1 {100 * one.val_accuracy:.2f} %"
    assert float(lines[-2].split()[-1]) < 2.0  # guessing gives a loss of ln 10 = 2.3
    weights, head = save_digits_teacher(one, tmp_path)
    teacher = load_teacher("digits_vit", weights=str(weights), head=str(head))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    normed = one.model.forward_features(pixels)
    expected = one.head(torch.cat([normed[:, 0], normed[:, 5:].mean(1)], dim=1))
    assert torch.equal(teacher.logits(teacher.layer_states_list(pixels)[12]), expected)


def test_augmentation_moves_pixels_a_little_and_only_that() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(64, 3, 32, 32)
    image[:, :, 12:20, 12:20] = 1
    moved = augment(image, SHORT, generator)
    centre = (moved[:, 0].flatten(1) * torch.arange(1024.0)).sum(1) / moved[:, 0].flatten(1).sum(1)
    rows = centre / 32
    assert rows.std() > 0.3
    assert ((rows - 15.5).abs() < 32 * (SHORT.max_shift + 0.05) + 1).all()
    still = DigitsTeacherConfig(max_rotation_deg=0.0, max_shift=0.0, max_scale=0.0)
    torch.testing.assert_close(augment(image, still, generator), image, rtol=0, atol=1e-5)

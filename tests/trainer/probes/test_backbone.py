"""What a probe reads: the same from images and from a store, of a teacher and of a Raptor."""

from pathlib import Path

import pytest
import torch
from torch import nn

from infra.objects import FolderObjects
from pipeline.teacher import load_teacher
from storage_schemas import Span, open_store
from storage_schemas.reader import Store
from tests.trainer.probes.tiny_probes import backbone, seeded_block, trained_of
from tests.trainer.tiny import tiny_teacher, write_tiny
from trainer.probes.backbone import Backbone, check_store, misfits


def pixels_of(seed: int, n_samples: int = 18) -> torch.Tensor:
    """As write_tiny draws them."""
    return torch.randn(n_samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """float32, so that nothing is lost."""
    root = tmp_path_factory.mktemp("store")
    write_tiny(FolderObjects(root), tiny_teacher(), 18, seed=1)
    return open_store(str(root))


def test_a_teachers_tokens_are_its_normed_last_state() -> None:
    frozen, pixels = backbone(), pixels_of(1)
    states = frozen.teacher.layer_states(pixels)
    assert torch.equal(frozen.tokens(pixels), frozen.teacher.final_norm(states[:, -1]))


def test_an_exact_raptor_is_its_teacher() -> None:
    """With a teacher whose twelve blocks all do something, so that one left out would show."""
    digits = load_teacher("digits_vit")
    pixels = torch.randn(4, 3, digits.image_size, digits.image_size, generator=torch.Generator().manual_seed(0))
    whole = backbone(teacher=digits).tokens(pixels)
    assert torch.equal(backbone(teacher=digits, raptor=True).tokens(pixels), whole)
    assert not torch.allclose(digits.final_norm(digits.layer_states(pixels)[:, -2]), whole, atol=1e-2)


def test_a_raptor_rolls_out_from_the_embedding_through_all_its_blocks() -> None:
    digits = load_teacher("digits_vit")
    blocks: list[nn.Module] = [seeded_block(digits.dim, seed) for seed in range(2)]
    trained = trained_of(digits, (Span(0, 9), Span(9, 12)), blocks=blocks)
    pixels = torch.randn(2, 3, digits.image_size, digits.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = digits.layer_states(pixels)[:, 0]
        for layer in range(1, 13):
            x = blocks[layer > 9](x, layer)
        expected = digits.final_norm(x)
    assert torch.allclose(Backbone(teacher=digits, trained=trained).tokens(pixels), expected, atol=1e-6)


@pytest.mark.parametrize("raptor", [False, True])
def test_tokens_from_a_store_equal_tokens_from_images(store: Store, raptor: bool) -> None:
    frozen = backbone(raptor=raptor)
    assert frozen.stored_layer == (0 if raptor else 3)
    stored = torch.from_numpy(store.read(layers=[frozen.stored_layer])[:, 0])
    assert torch.equal(frozen.tokens_of(stored), frozen.tokens(pixels_of(1)))


def test_nothing_of_it_asks_for_gradients() -> None:
    teacher = tiny_teacher()
    block = seeded_block(teacher.dim).requires_grad_(True)
    frozen = Backbone(teacher=teacher, trained=trained_of(teacher, blocks=[block]))
    block.requires_grad_(True)
    assert not frozen.tokens(pixels_of(1, 2)).requires_grad


def test_names() -> None:
    assert backbone().name == "teacher fake_vit"
    assert backbone(raptor=True).name == "Raptor k=1 of fake_vit"


# ---------------------------------------------------------------- what does not fit


def test_a_fitting_run_has_no_problems() -> None:
    teacher = tiny_teacher()
    assert misfits(teacher, trained_of(teacher)) == []


def test_all_that_does_not_fit_is_listed_at_once() -> None:
    teacher = tiny_teacher()
    trained = trained_of(teacher, (Span(1, 2),))
    object.__setattr__(trained, "result", {"blocks": [{"dim": 768}]})
    problems = misfits(teacher, trained, "was trained on another teacher")
    assert len(problems) == 4
    for part in (
        "was trained on another teacher",
        "begins at state 1; a probe needs one that begins at state 0",
        "ends at state 2; a probe needs one that reaches state 3",
        "have 768 channels, fake_vit has 8",
    ):
        assert any(part in problem and "RUN=runs/exact" in problem for problem in problems), part


def test_a_store_without_the_state_that_is_read_is_named(tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 8, seed=1, layers=(0, 1))
    without_last = open_store(str(tmp_path))
    assert check_store(backbone(raptor=True), without_last) == []
    (problem,) = check_store(backbone(), without_last)
    assert "lacks layer 3, which teacher fake_vit is read from; it has 0, 1" in problem


@pytest.mark.parametrize("raptor", [False, True])
def test_a_store_of_another_teacher_of_the_same_shape_is_named(store: Store, raptor: bool) -> None:
    other = load_teacher("fake_vit", "random:5")
    frozen = backbone(raptor=raptor, teacher=other)
    (problem,) = check_store(frozen, store)
    assert f"holds states of a fake_vit whose weights have digest {tiny_teacher().core_digest[:16]}" in problem
    assert f"{frozen.name} has {other.core_digest[:16]}" in problem
    headless = load_teacher("fake_vit", "random:0")
    assert headless.weights_digest != tiny_teacher().weights_digest
    assert check_store(backbone(raptor=raptor, teacher=headless), store) == []


def test_a_store_of_other_shapes_is_named(tmp_path: Path) -> None:
    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 8, seed=1)
    wide = load_teacher("fake_vit", weights="random:0", image_size=32)
    (problem,) = check_store(Backbone(teacher=wide), open_store(str(tmp_path)))
    assert "8 channels on 4 x 4 patches; fake_vit has 8 on 8 x 8" in problem

"""One teacher at every image size: square or not, from a weights file, from a store's files, from a seed.

With few channels and blocks; `test_teacher_dinov2.py` has DINOv2's own numbers of them.
"""

from pathlib import Path

import pytest
import timm
import torch
from torch.nn.functional import interpolate
from torch.testing import assert_close

from infra.console import UserError
from pipeline import vit_models as module
from pipeline.config import ExtractConfig
from pipeline.positions import positions_before
from pipeline.settings import plan_stores
from pipeline.teacher import POSITIONS_FILE, Teacher, TeacherError, load_teacher, teacher_from_files
from tests.pipeline import meta_dinov2 as meta
from tests.pipeline.nano_vits import DEPTH, DIM
from tests.pipeline.nano_vits import PLAIN as TINY
from tests.pipeline.nano_vits import REGISTERS as NAME

OF_TIMM = "vit_tiny_patch16_224"  # whose weights it knows where to fetch


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "meta.pth"
    torch.save(meta.meta_state(DIM, DEPTH), path)
    return path


@pytest.fixture(scope="module")
def wide(weights: Path) -> Teacher:
    return load_teacher(NAME, weights=weights, image_size=(490, 644))


def metas_positions(rows: int, columns: int) -> torch.Tensor:
    """As Meta's models with registers resample them: bicubic, antialiased, to the exact grid, in float32."""
    own = meta.meta_state(DIM, DEPTH)["pos_embed"][0, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    new = interpolate(own, size=(rows, columns), mode="bicubic", antialias=True)
    return new.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)


def test_the_padded_images_of_nyuv2_are_35_by_46_patches(wide: Teacher) -> None:
    assert (wide.grid, wide.n_patches, wide.pixel_size) == ((35, 46), 1610, (490, 644))
    assert_close(wide.model.pos_embed, metas_positions(35, 46), rtol=0, atol=1e-6)


def test_rows_and_columns_are_not_exchanged(weights: Path) -> None:
    """One changed patch changes one token: the one in its row and column."""
    teacher = load_teacher(NAME, weights=weights, image_size=(28, 70))
    pixels = torch.zeros(1, 3, 28, 70)
    before = teacher.layer_states_list(pixels)[0]
    pixels[:, :, 14:28, 42:56] = 1
    changed = (teacher.layer_states_list(pixels)[0] != before).any(dim=2)[0]
    assert changed.nonzero().flatten().tolist() == [1 + 4 + 1 * 5 + 3]


def test_pixels_of_another_shape_are_refused(weights: Path) -> None:
    teacher = load_teacher(NAME, weights=weights, image_size=(28, 70))
    with pytest.raises(ValueError, match=r"pixels are \[70, 28\], expected \[28, 70\] \(height, width\)"):
        teacher.layer_states(torch.zeros(1, 3, 70, 28))
    with pytest.raises(TeacherError, match="loaded for images of 28 x 70 px, expected square ones"):
        _ = teacher.image_size


@pytest.mark.parametrize("size", [518, (28, 70)])
def test_a_stores_files_make_the_teacher_of_any_size_as_the_weights_file_does(
    size: int | tuple[int, int], weights: Path
) -> None:
    """The store's teacher saw 70 px; positions are resampled once, from the file's own, never from those at 70 px."""
    stored = load_teacher(NAME, weights=weights, image_size=70).to_files()
    again = teacher_from_files(stored, image_size=size)
    direct = load_teacher(NAME, weights=weights, image_size=size)
    assert torch.equal(again.model.pos_embed, direct.model.pos_embed)
    assert again.weights_digest == direct.weights_digest
    assert again.to_files() == direct.to_files()


def test_a_teacher_at_its_weights_own_size_needs_no_other_positions(weights: Path) -> None:
    teacher = load_teacher(NAME, weights=weights, image_size=518)
    assert teacher.positions is None
    assert POSITIONS_FILE not in teacher.to_files()
    smaller = teacher_from_files(teacher.to_files(), image_size=70)
    assert smaller.weights_digest == load_teacher(NAME, weights=weights, image_size=70).weights_digest
    assert smaller.image_size == 70
    assert smaller.preprocessing.resize_size == 80


def test_rectangles_go_through_files_too(weights: Path) -> None:
    teacher = load_teacher(NAME, weights=weights, image_size=(28, 70))
    again = teacher_from_files(teacher.to_files())
    pixels = torch.rand(2, 3, 28, 70)
    assert again.pixel_size == (28, 70)
    assert torch.equal(again.layer_states(pixels), teacher.layer_states(pixels))


def test_one_teacher_has_one_core_digest_at_every_size_with_and_without_head(weights: Path, tmp_path: Path) -> None:
    torch.save(meta.linear_head_state(DIM), tmp_path / "head.pth")
    small = load_teacher(NAME, weights=weights, image_size=70)
    headed = load_teacher(NAME, weights=weights, image_size=(28, 70), head=tmp_path / "head.pth")
    assert small.weights_digest != headed.weights_digest
    assert small.core_digest == headed.core_digest == teacher_from_files(small.to_files(), image_size=518).core_digest
    state = meta.meta_state(DIM, DEPTH)
    state["blocks.1.mlp.fc2.bias"] = state["blocks.1.mlp.fc2.bias"] + 1e-6
    torch.save(state, tmp_path / "other.pth")
    assert load_teacher(NAME, weights=tmp_path / "other.pth", image_size=70).core_digest != small.core_digest


def test_random_weights_are_the_same_teacher_at_every_size() -> None:
    small, own = load_teacher(TINY, "random:3", image_size=32), load_teacher(TINY, "random:3")
    assert small.core_digest == own.core_digest != load_teacher(TINY, "random:4", image_size=32).core_digest
    assert teacher_from_files(small.to_files(), image_size=224).weights_digest == own.weights_digest


def test_pretrained_weights_are_fetched_at_their_own_size_and_then_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def fetched(name: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        assert pretrained
        torch.manual_seed(5)
        return create(name, num_classes=num_classes)

    with torch.random.fork_rng(devices=[]):
        monkeypatch.setattr(module.timm, "create_model", fetched)
        monkeypatch.setattr(module, "_make_empty", lambda name: create(name, num_classes=0))
        model = fetched(OF_TIMM, True, 0)
        teacher = load_teacher(OF_TIMM, image_size=(32, 64))
    assert teacher.grid == (2, 4)
    assert teacher.positions is not None
    assert torch.equal(teacher.positions.reshape(196, -1), model.pos_embed[0, 1:])
    assert torch.equal(teacher.model.pos_embed[0, 0], model.pos_embed[0, 0])  # CLS has its own


def test_positions_are_kept_in_namings_that_only_timm_knows(tmp_path: Path) -> None:
    """OpenCLIP's "visual.trunk." prefix stands for them all; a second file under another name is no position."""
    state = load_teacher(TINY, "random:3").model.state_dict()
    assert state["pos_embed"].shape[1] == 197
    renamed = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    torch.save(renamed | {"visual.trunk.other.pos_embed": torch.zeros(1, 4, 4)}, tmp_path / "clip.pt")
    with pytest.raises(UserError):
        load_teacher(TINY, tmp_path / "clip.pt", image_size=32)
    torch.save(renamed, tmp_path / "clip.pt")
    small = load_teacher(TINY, tmp_path / "clip.pt", image_size=32)
    own = load_teacher(TINY, tmp_path / "clip.pt")
    assert teacher_from_files(small.to_files(), image_size=224).weights_digest == own.weights_digest


def test_positions_are_found_at_the_models_own_size() -> None:
    own, small = (load_teacher(TINY, "random:3", image_size=size).model for size in (224, 32))
    found = positions_before(own, small)
    assert found is not None
    assert torch.equal(found.reshape(196, -1), own.pos_embed[0, 1:])
    assert positions_before(load_teacher(TINY, "random:4").model, small) is None
    assert positions_before(own, own) is None


@pytest.mark.parametrize("name", ["digits_vit", "fake_vit"])
def test_built_in_teachers_see_other_sizes(name: str) -> None:
    own, wide = load_teacher(name), load_teacher(name, image_size=(16, 48))
    assert wide.grid == (4, 12)
    assert wide.core_digest == own.core_digest
    assert teacher_from_files(own.to_files(), image_size=(16, 48)).weights_digest == wide.weights_digest
    pixels = torch.rand(1, 3, 16, 48)
    assert torch.equal(teacher_from_files(wide.to_files()).layer_states(pixels), wide.layer_states(pixels))


def test_a_store_holds_squares_only() -> None:
    with pytest.raises(TeacherError, match="images of 16 x 48 px, expected square ones"):
        plan_stores(ExtractConfig(limit=4), load_teacher("digits_vit", image_size=(16, 48)))

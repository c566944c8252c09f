"""Equal to Meta's own code, given the same weights; made as tests/golden/PROVENANCE.md, "DINOv2", tells."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from pipeline.checkpoints import WeightsError
from pipeline.teacher import Teacher, load_teacher, teacher_from_files
from tests.pipeline import meta_dinov2 as meta
from tests.pipeline.nano_vits import REGISTERS

NAME = "vit_small_patch14_reg4_dinov2"
GOLDEN = np.load(meta.GOLDEN / "dinov2_states.npz", allow_pickle=False)
STRIDE = meta.CHANNEL_STRIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(meta.meta_state(), folder / "meta.pth")
    torch.save(meta.linear_head_state(), folder / "head.pth")
    return folder


@pytest.fixture(scope="module")
def small(folder: Path) -> Teacher:
    return load_teacher(NAME, weights=str(folder / "meta.pth"), image_size=70, head=str(folder / "head.pth"))


def test_states_are_metas_at_224_px(folder: Path) -> None:
    teacher = load_teacher(NAME, weights=str(folder / "meta.pth"))
    states = teacher.layer_states(meta.pixels(224))
    assert states.shape == (2, 13, 261, 384)
    assert (teacher.grid, teacher.n_registers, teacher.n_heads, teacher.image_size) == ((16, 16), 4, 6, 224)
    assert_close(meta.sample(states).numpy(), GOLDEN["states_224"], rtol=0, atol=1e-4)


def test_states_head_input_and_logits_are_metas_at_another_size(small: Teacher) -> None:
    states = small.layer_states(meta.pixels(70))
    assert_close(meta.sample(states).numpy(), GOLDEN["states_70"], rtol=0, atol=1e-4)
    head_input = small.head_input(small.final_norm(states[:, -1]))
    assert_close(head_input[:, ::STRIDE].numpy(), GOLDEN["head_input_70"], rtol=0, atol=1e-4)
    assert_close(small.logits(states[:, -1]).numpy(), GOLDEN["logits_70"], rtol=0, atol=1e-4)


def test_positions_are_used_verbatim_at_518_px_and_never_for_registers(folder: Path) -> None:
    state = meta.meta_state()
    model = load_teacher(NAME, weights=str(folder / "meta.pth"), image_size=518).model
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 1:])
    assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(model.reg_token, state["register_tokens"])


def test_registers_enter_the_first_block_as_learned(small: Teacher) -> None:
    layer_0 = small.layer_states_list(meta.pixels(70))[0]
    assert torch.equal(layer_0[:, 1:5], meta.meta_state()["register_tokens"].expand(2, -1, -1))


def test_one_changed_image_patch_changes_one_token(small: Teacher) -> None:
    pixels, row, column = meta.pixels(70), 3, 1
    before = small.layer_states_list(pixels)[0]
    pixels[:, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 1
    changed = (small.layer_states_list(pixels)[0] != before).any(dim=2)
    assert changed.nonzero()[:, 1].tolist() == [1 + 4 + 5 * row + column] * 2


@pytest.mark.parametrize("wrap", ["nested", "prefixed", "no mask token", "safetensors"])
def test_a_checkpoint_may_wrap_or_trim_the_weights(wrap: str, folder: Path, small: Teacher, tmp_path: Path) -> None:
    state = meta.meta_state()
    path = tmp_path / "weights.pth"
    if wrap == "nested":
        torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, path)
    elif wrap == "prefixed":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    elif wrap == "no mask token":
        torch.save({name: tensor for name, tensor in state.items() if name != "mask_token"}, path)
    else:
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    teacher = load_teacher(NAME, weights=str(path), image_size=70, head=str(folder / "head.pth"))
    assert teacher.weights_digest == small.weights_digest


def test_timm_names_are_read_as_well(small: Teacher, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "timm.safetensors"
    path.write_bytes(small.to_files()["weights.safetensors"])
    teacher = load_teacher(NAME, weights=str(path), image_size=70, head=str(folder / "head.pth"))
    assert teacher.weights_digest == small.weights_digest


def test_files_bring_back_the_same_teacher(small: Teacher) -> None:
    again = teacher_from_files(small.to_files())
    pixels = meta.pixels(70)
    assert again.to_files() == small.to_files()
    assert torch.equal(again.layer_states(pixels), small.layer_states(pixels))
    assert (again.name, again.preprocessing, again.head is not None) == (NAME, small.preprocessing, True)


def test_weights_of_another_model_are_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"do not fit {REGISTERS}: .* of another shape .*cls_token is \["):
        load_teacher(REGISTERS, weights=str(folder / "meta.pth"), image_size=70)
    with pytest.raises(WeightsError, match=r"patches of \[14, 14\] px, the teacher \[16, 16\]"):
        load_teacher("vit_small_patch16_224", weights=str(folder / "meta.pth"))
    shallow = {name: tensor for name, tensor in meta.meta_state().items() if not name.startswith("blocks.11.")}
    torch.save(shallow | {"surplus": torch.zeros(1)}, tmp_path / "shallow.pth")
    with pytest.raises(WeightsError, match=r"14 missing \(blocks\.11\.norm1\.weight, .*and 10 more\), 1 unexpected"):
        load_teacher(NAME, weights=str(tmp_path / "shallow.pth"), image_size=70)

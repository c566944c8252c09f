"""Any ViT's states by hooks, weights from anywhere, and a clear word when it cannot be."""

import inspect
import os
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from infra.console import UserError
from pipeline.checkpoints import WeightsError
from pipeline.fake import FakeViT
from pipeline.preprocess import decode_image, normalise
from pipeline.sources import DigitsSource
from pipeline.teacher import SHIPPED, Teacher, TeacherError, load_teacher, teacher_from_files
from tests.pipeline.nano_vits import PLAIN as NANO

TINY = "vit_tiny_patch16_224"


def random_pixels(teacher: Teacher, n_images: int = 2, seed: int = 0) -> torch.Tensor:
    size = teacher.image_size
    return torch.randn(n_images, 3, size, size, generator=torch.Generator().manual_seed(seed))


def digit_pixels(teacher: Teacher, n_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = DigitsSource("val")
    samples = source.listing()[:n_images]
    pixels = [decode_image(source.read(sample), teacher.preprocessing) for sample in samples]
    labels = torch.tensor([sample.label for sample in samples])
    return normalise(torch.from_numpy(np.stack(pixels)), teacher.preprocessing), labels


def test_layer_0_is_what_enters_the_first_block_and_layer_l_what_leaves_block_l() -> None:
    teacher = load_teacher("fake_vit")
    states = teacher.layer_states(random_pixels(teacher))
    assert states.shape == (2, 4, 1 + 2 + 16, 8)
    for layer in range(teacher.n_layers):
        assert_close(states[:, layer] - states[:, 0], torch.full_like(states[:, 0], layer * (layer + 1) / 2))


def test_each_patch_token_sees_its_own_square_in_row_order() -> None:
    teacher = load_teacher("fake_vit")
    pixels = random_pixels(teacher)
    before = teacher.layer_states_list(pixels)[0]
    for row in range(4):
        for column in range(4):
            changed = pixels.clone()
            changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
            differs = (teacher.layer_states_list(changed)[0] != before).any(dim=2)
            assert differs.nonzero()[:, 1].tolist() == [3 + 4 * row + column] * 2


# name, image size, has_cls, registers, grid: a CLS token, none, none but registers, a distillation token, rotary
FAMILIES = [
    (TINY, 32, True, 0, (2, 2)),
    ("deit_tiny_distilled_patch16_224", 32, True, 1, (2, 2)),
    ("vit_xsmall_patch16_clip_224", 32, True, 0, (2, 2)),
    ("vit_base_patch16_siglip_224", 32, False, 0, (2, 2)),
    ("vit_small_patch14_reg4_dinov2", 28, True, 4, (2, 2)),
    ("vit_small_patch16_dinov3", 48, True, 4, (3, 3)),
]


@pytest.mark.parametrize(("name", "size", "has_cls", "n_registers", "grid"), FAMILIES)
def test_families_of_vits(name: str, size: int, has_cls: bool, n_registers: int, grid: tuple[int, int]) -> None:
    teacher = load_teacher(name, weights="random:0", image_size=size)
    assert (teacher.has_cls, teacher.n_registers, teacher.grid) == (has_cls, n_registers, grid)
    pixels = random_pixels(teacher)
    states = teacher.layer_states_list(pixels)
    assert len(states) == teacher.n_layers == len(teacher.model.blocks) + 1
    assert states[0].shape == (2, teacher.n_prefix + teacher.n_patches, teacher.dim)
    with torch.no_grad():
        assert torch.equal(teacher.final_norm(states[-1]), teacher.model.forward_features(pixels))
        assert torch.equal(teacher.run_blocks(states[3], 3, teacher.n_layers - 1), states[-1])
        assert torch.equal(teacher.run_blocks(states[3], 3, 3), states[3])
        assert torch.equal(teacher.run_blocks(states[3], 3, 4), states[4])
    assert not any(torch.equal(one, next_one) for one, next_one in pairwise(states))


def test_a_layer_is_what_plain_timm_code_gives() -> None:
    teacher = load_teacher(NANO, weights="random:0", image_size=32)
    pixels = random_pixels(teacher)
    _, intermediates = teacher.model.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True)
    states = teacher.layer_states_list(pixels)
    for layer, (patches, prefix) in enumerate(intermediates, start=1):
        assert torch.equal(states[layer], torch.cat([prefix, patches], dim=1))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "mixer_s16_224"])
def test_what_is_no_plain_vit_is_refused_before_anything_is_fetched(name: str) -> None:
    with pytest.raises(TeacherError, match=r"is not a plain vision transformer: it lacks .*Expected one whose blocks"):
        load_teacher(name)


def test_blocks_that_carry_other_tokens_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"its blocks carry \[\(1, 196, 192\)\], expected \(1, 197, 192\)"):
        load_teacher("cait_xxs24_224", weights="random:0")


def test_an_unknown_name_gets_its_nearest_neighbours() -> None:
    with pytest.raises(TeacherError, match=r"the nearest names are .*vit_base_patch14_reg4_dinov2"):
        load_teacher("vit_base_patch14_dinov2_reg")
    with pytest.raises(TeacherError, match=r"the nearest names are vit_base_patch14_reg4_dinov2\.lvd142m"):
        load_teacher("vit_base_patch14_reg4_dinov2.lvd142")
    with pytest.raises(TeacherError, match="nearest names are digits_vit"):
        load_teacher("digit_vit")
    with pytest.raises(TeacherError, match="there is no teacher 'hf-hub:some/model'"):
        load_teacher("hf-hub:some/model", weights="random:0")


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(TeacherError, match="65 px is no multiple of vit_tiny_patch16_224's 16 px patches; try 64"):
        load_teacher(TINY, weights="random:0", image_size=65)
    with pytest.raises(TeacherError, match="compute is 'int8'; expected one of float32, tf32, bfloat16, float16"):
        load_teacher(TINY, weights="random:0", compute="int8")
    with pytest.raises(TeacherError, match="30 px is no multiple of digits_vit's 4 px patches; try 32"):
        load_teacher("digits_vit", image_size=(64, 30))
    with pytest.raises(WeightsError, match="asked for as random:0"):
        load_teacher(TINY, weights="random")
    teacher = load_teacher("fake_vit")
    with pytest.raises(ValueError, match=r"pixels are \[8, 8\], expected \[16, 16\] \(height, width\) for fake_vit"):
        teacher.layer_states(torch.zeros(1, 3, 8, 8))
    untyped = inspect.unwrap(Teacher.layer_states_list)  # as where nothing checks types
    expected = r"expected \[batch, 3, 16, 16\] for fake_vit"
    with pytest.raises(ValueError, match=rf"have shape \[3, 16, 16\], {expected}; one image .*: pixels\[None\]"):
        untyped(teacher, torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=rf"have shape \[2, 1, 16, 16\], {expected}$"):
        untyped(teacher, torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match=r"pixels are uint8, expected float32, as pipeline\.preprocess\.normalise"):
        untyped(teacher, torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot run from state 2 to 4; fake_vit has states 0 to 3"):
        teacher.run_blocks(torch.zeros(1, 19, 8), 2, 4)
    with pytest.raises(ValueError, match="without a head; give HEAD=file"):
        teacher.logits(torch.zeros(1, 19, 8))


def test_no_cls_no_head_input() -> None:
    teacher = load_teacher("vit_wee_patch16_reg1_gap_256", weights="random:0", image_size=16)
    assert (teacher.has_cls, teacher.n_registers) == (False, 1)
    with pytest.raises(ValueError, match="has no CLS token"):
        teacher.head_input(torch.zeros(1, 2, teacher.dim))


def test_unreachable_pretrained_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained:
            raise ConnectionError("network is unreachable")
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        TeacherError, match=r"could not be fetched \(ConnectionError: .*WEIGHTS=file .*WEIGHTS=random:0"
    ):
        load_teacher(TINY)
    with pytest.raises(TeacherError, match="there is no teacher"):
        load_teacher("vit_tiny_patch16_224_nothing")


def test_sizes_and_colours_are_the_models_own_with_224_px_for_dinov2() -> None:
    assert load_teacher("vit_small_patch14_reg4_dinov2", weights="random:0").image_size == 224
    clip = load_teacher("vit_xsmall_patch16_clip_224", weights="random:0")
    assert clip.preprocessing.to_dict() == {
        "image_size": 224,
        "resize_size": 256,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
    }


def test_random_weights_come_from_their_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    digests = [load_teacher(NANO, weights=f"random:{seed}", image_size=32).weights_digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_files_bring_back_the_same_teacher_and_are_the_same_each_time() -> None:
    teacher = load_teacher("digits_vit")
    files = teacher.to_files()
    assert sorted(files) == ["config.json", "head.safetensors", "weights.safetensors"]
    again = teacher_from_files(files)
    assert again.to_files() == files == load_teacher("digits_vit").to_files()
    pixels = random_pixels(teacher)
    assert torch.equal(again.layer_states(pixels), teacher.layer_states(pixels))
    assert teacher_from_files(files, compute="bfloat16").compute == "bfloat16"


def test_damaged_teacher_files_are_refused() -> None:
    files = load_teacher("fake_vit").to_files()
    other = load_teacher("fake_vit", weights="random:1").to_files()
    for broken, expected in [
        ({**files, "weights.safetensors": other["weights.safetensors"]}, "have digest .*, its config says"),
        ({**files, "weights.safetensors": files["weights.safetensors"][:-4]}, "cannot be used: SafetensorError"),
        ({**files, "config.json": b"{}"}, "cannot be used: KeyError"),
        ({**files, "config.json": b"\x80pickle"}, "cannot be used: UnicodeDecodeError"),
        ({"config.json": files["config.json"]}, "cannot be used: KeyError: 'weights.safetensors'"),
        ({**files, "config.json": files["config.json"].replace(b"fake_vit", b"resnet18")}, "cannot be used|no teacher"),
        ({**files, "config.json": files["config.json"].replace(b'_version":1', b'_version":9')}, "have format 9"),
    ]:
        with pytest.raises(TeacherError, match=expected):
            teacher_from_files(broken)


def test_the_digest_names_weights_and_head() -> None:
    teacher = load_teacher("digits_vit")
    state = teacher.model.state_dict()
    state["norm.bias"][3] += 1e-6
    changed = load_teacher("digits_vit", weights="random:0")
    changed.model.load_state_dict(state)
    headless = load_teacher("digits_vit", weights=str(SHIPPED / "digits_vit.safetensors"))
    digests = {t.weights_digest for t in (load_teacher("digits_vit"), changed, headless)}
    assert len(digests) == 3


class Trap:
    """Pickled, it would leave a mark wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_weight_files_that_are_none_are_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hook": Trap(tmp_path / "mark")}, tmp_path / "trap.pth")
    torch.save(FakeViT(), tmp_path / "module.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "weights.npz").write_bytes(b"")
    for name, expected in {
        "trap.pth": r"(?s)pickled code, which is never run here.*torch\.save\(m\.state_dict\(\)",
        "module.pth": "pickled code",
        "list.pth": "holds no state dict .*, but a list",
        "text.pth": r"is no whole \.pth file of weights.*copy it again",
        "text.safetensors": r"is no whole \.safetensors file of weights",
        "weights.npz": r"ends in \.npz; weights are read from",
        "missing.pth": r"there is no weights file .*missing\.pth",
        "memory://nowhere/weights.pth": "there is no weights file memory://nowhere/weights.pth",
        "nothing://bucket/weights.pth": "Protocol not known",
    }.items():
        path = name if "://" in name else str(tmp_path / name)
        with pytest.raises(UserError, match=expected):
            load_teacher(NANO, weights=path)
    assert not (tmp_path / "mark").exists()


def test_a_classifier_in_the_file_is_left_out(tmp_path: Path) -> None:
    full = timm.create_model("deit_tiny_distilled_patch16_224")
    torch.save({"model": full.state_dict()}, tmp_path / "deit.pth")
    teacher = load_teacher("deit_tiny_distilled_patch16_224", weights=str(tmp_path / "deit.pth"))
    assert torch.equal(teacher.model.dist_token, full.dist_token)
    assert torch.equal(teacher.model.blocks[11].mlp.fc2.weight, full.blocks[11].mlp.fc2.weight)


def test_an_incomplete_file_is_refused_even_where_timm_would_take_it(tmp_path: Path) -> None:
    state = timm.create_model(NANO).state_dict()
    del state["blocks.1.norm1.weight"]
    torch.save(state, tmp_path / "incomplete.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(blocks\.1\.norm1\.weight\)"):
        load_teacher(NANO, weights=str(tmp_path / "incomplete.pth"))


def test_a_head_may_come_under_any_prefix_and_must_fit(tmp_path: Path) -> None:
    weight, bias = torch.randn(10, 128), torch.randn(10)
    torch.save({"module.linear.weight": weight, "module.linear.bias": bias}, tmp_path / "head.pth")
    teacher = load_teacher("digits_vit", head=str(tmp_path / "head.pth"))
    assert teacher.head is not None
    assert torch.equal(teacher.head.weight, weight)
    assert torch.equal(teacher.head.bias, bias)
    torch.save({"weight": torch.randn(10, 64), "bias": bias}, tmp_path / "wide.pth")
    with pytest.raises(WeightsError, match=r"expected a weight of \(classes, 128\).*found weight \[10, 64\]"):
        load_teacher("digits_vit", head=str(tmp_path / "wide.pth"))
    torch.save({"weight": torch.randn(10, 5 * 64), "bias": bias}, tmp_path / "four_layers.pth")
    with pytest.raises(WeightsError, match=r"a head on 4 layers: .*reads 320 values.*give the file \.\.\._linear_head"):
        load_teacher("digits_vit", head=str(tmp_path / "four_layers.pth"))
    torch.save({"a.weight": weight, "b.weight": weight}, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="is no linear head: expected one weight"):
        load_teacher("digits_vit", head=str(tmp_path / "two.pth"))


@pytest.mark.parametrize(("compute", "tolerance"), [("tf32", 0.0), ("bfloat16", 0.05), ("float16", 0.01)])
def test_other_precisions_stay_near_and_states_stay_float32(compute: str, tolerance: float) -> None:
    exact = load_teacher("digits_vit")
    pixels, _ = digit_pixels(exact, 16)
    expected = exact.layer_states(pixels)
    found = load_teacher("digits_vit", compute=compute).layer_states(pixels)
    assert found.dtype == torch.float32
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt()
    assert error <= tolerance
    assert compute == "tf32" or error > 0  # on a CPU tf32 is float32


def test_states_depend_on_the_image_alone_not_on_its_batch() -> None:
    teacher = load_teacher("digits_vit")
    pixels, _ = digit_pixels(teacher, 16)
    together = teacher.layer_states(pixels)
    alone = torch.cat([teacher.layer_states(one[None]) for one in pixels])
    assert_close(alone, together, rtol=0, atol=2e-5)
    assert torch.equal(teacher.layer_states(pixels), together)


def test_threads_do_not_mix_their_states() -> None:
    teacher = load_teacher("digits_vit")
    pixels = [digit_pixels(teacher, 4)[0] + i for i in range(4)]
    expected = [teacher.layer_states(one) for one in pixels]
    found: dict[int, torch.Tensor] = {}

    inside = threading.Barrier(4, timeout=200)  # all four are in the middle of a pass at once, or this breaks

    def meet(*_: object) -> None:
        inside.wait()

    teacher.model.blocks[5].register_forward_hook(meet)

    def work(i: int) -> None:
        found[i] = teacher.layer_states(pixels[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_states_may_enter_a_graph_and_the_teacher_never_learns() -> None:
    teacher = load_teacher("digits_vit")
    x = teacher.layer_states_list(digit_pixels(teacher, 2)[0])[7].requires_grad_()
    teacher.logits(teacher.run_blocks(x, 7, 12)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


def test_the_shipped_digits_teacher_names_97_of_100_unseen_digits() -> None:
    teacher = load_teacher("digits_vit")
    assert (teacher.n_layers, teacher.dim, teacher.n_heads, teacher.n_registers, teacher.grid) == (13, 64, 2, 4, (8, 8))
    pixels, labels = digit_pixels(teacher, 359)
    states = teacher.layer_states_list(pixels)
    assert (teacher.logits(states[12]).argmax(1) == labels).float().mean() >= 0.97
    # its depth is used: without blocks 1 to 7 under half of that is left
    assert (teacher.logits(teacher.run_blocks(states[0], 7, 12)).argmax(1) == labels).float().mean() < 0.97 / 2


def test_shipped_files_are_small_and_float32() -> None:
    for path in (SHIPPED / "digits_vit.safetensors", SHIPPED / "digits_vit_head.safetensors"):
        assert path.stat().st_size < 3_000_000
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}

"""Equal to the published code, given the same weights; and its weights come in, or are refused with reasons.

How the goldens were made: tests/golden/PROVENANCE.md.
"""

import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from storage_schemas.spec import Span
from tests.trainer.published import GOLDEN, block_shapes, seeded, seeded_block, seeded_raptor
from trainer.block import Block
from trainer.checkpoint import WeightsError, import_reference, load_weights_file
from trainer.losses import cosine, mse, mse_cosine, token_weighted
from trainer.objectives import annealed_loss, rollout_loss, teacher_forced_loss
from trainer.optimizer import clip_and_step, make_optimizer, set_learning_rate
from trainer.raptor import Raptor, rollout
from trainer.schedules import learning_rate, teacher_forcing_ratio

NUMBERS = json.loads((GOLDEN / "published_numbers.json").read_text())
OUTPUTS = np.load(GOLDEN / "published_outputs.npz", allow_pickle=False)
LOSSES = {
    "mse": mse,
    "cosine": cosine,
    "mse_cosine": mse_cosine,
    "weighted_stage1": token_weighted(cls=0.34, registers=0.33, patches=0.33),
    "weighted_stage2": token_weighted(cls=0.45, registers=0.10, patches=0.45),
}
SIGN = {"cosine": -1.0}  # ours is the negative of theirs
RAPTOR3 = [Span(0, 7), Span(7, 10), Span(10, 12)]
LAYERS = torch.tensor([1, 5, 12])


def make_block(seed: int, dim: int, n_heads: int, *, swiglu: bool = True, depth_scaling: bool = True) -> Block:
    block = Block(dim, n_heads, swiglu=swiglu, depth_scaling=depth_scaling)
    block.load_state_dict(import_reference(seeded_block(seed, dim, swiglu=swiglu, depth_scaling=depth_scaling)))
    return block


def make_raptor(seed: int, dim: int, n_heads: int) -> Raptor:
    raptor = Raptor([Block(dim, n_heads) for _ in RAPTOR3], RAPTOR3)
    raptor.load_state_dict(import_reference(seeded_raptor(seed, dim, 3)))
    return raptor


def assert_equal_to_1e5(ours: Tensor, published: np.ndarray | Tensor) -> None:
    published = torch.as_tensor(published)
    assert ours.shape == published.shape
    assert (ours.detach() - published).abs().max() <= 1e-5 * published.abs().max()


# ---------------------------------------------------------------- outputs


def test_state_dict_of_theirs_gives_their_output():
    golden = load_file(GOLDEN / "published_block.safetensors")
    x, layer, output = (golden.pop(name) for name in ("input", "layer", "output"))
    block = Block(32, 4)
    block.load_state_dict(import_reference(golden))
    assert_equal_to_1e5(block(x, layer), output)


@pytest.mark.parametrize("swiglu", [True, False], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("depth_scaling", [True, False], ids=["depth", "plain"])
def test_block_output(swiglu, depth_scaling):
    block = make_block(110, 32, 4, swiglu=swiglu, depth_scaling=depth_scaling)
    name = f"block_{'swiglu' if swiglu else 'gelu'}_{'depth' if depth_scaling else 'plain'}"
    assert_equal_to_1e5(block(seeded(1, 3, 9, 32), LAYERS), OUTPUTS[name])


def test_block_output_at_vit_b_size():
    with torch.no_grad():
        output = make_block(120, 768, 12)(seeded(2, 2, 261, 768), torch.tensor([3, 12]))
    assert_equal_to_1e5(output[:, [0, 1, 4, 5, 260], ::8], OUTPUTS["block_vitb"])
    assert output.double().square().mean().item() == pytest.approx(NUMBERS["block_vitb_mean_square"], rel=1e-5)


def test_raptor_output_at_every_layer_and_rolled_out():
    raptor, x = make_raptor(130, 32, 4), seeded(1, 3, 9, 32)[:2]
    with torch.no_grad():
        for layer, published in enumerate(OUTPUTS["raptor3_steps"], start=1):
            assert_equal_to_1e5(raptor(x, layer), published)
        assert_equal_to_1e5(raptor.rollout(x, 0, 12)[:, 1:], OUTPUTS["raptor3_rollout"])
        block_states = rollout(raptor.blocks[0], x, 0, 7)
    assert_equal_to_1e5(block_states[:, 1:], OUTPUTS["raptor3_rollout"][:, :7])


def test_one_seed_gives_their_initial_weights():
    torch.manual_seed(7)
    weights = Block(32, 4).state_dict()
    theirs = {name: torch.zeros(shape) for name, shape in block_shapes(32).items()}
    ours_by_theirs = {name: weights[next(iter(_renamed(name, theirs)))] for name in theirs}
    assert set(ours_by_theirs) == set(NUMBERS["initial"])
    for name, (norm, *first) in NUMBERS["initial"].items():
        ours = ours_by_theirs[name].double()
        assert ours.norm().item() == pytest.approx(norm, rel=1e-5)
        assert ours.flatten()[:3].tolist() == pytest.approx(first, rel=1e-5)


def _renamed(name: str, theirs: dict[str, Tensor]) -> list[str]:
    """Our name of one of theirs: the one whose tensor is the same object."""
    return [ours for ours, value in import_reference(theirs).items() if value is theirs[name]]


# ---------------------------------------------------------------- losses and objectives


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name):
    ours = LOSSES[name](seeded(3, 3, 9, 32), seeded(4, 3, 9, 32)).item()
    assert ours == pytest.approx(SIGN.get(name, 1.0) * NUMBERS["loss"][name], rel=1e-5)


def assert_published_loss_and_gradient(case: str, name: str, model: nn.Module, loss: Tensor) -> None:
    golden, sign = NUMBERS["objective"][case], SIGN.get(name, 1.0)
    assert loss.item() == pytest.approx(sign * golden["loss"], rel=1e-5)
    loss.backward()
    norms = import_reference_names(golden["gradient_norms"])
    largest = max(norms.values())
    for parameter, p in model.named_parameters():
        assert p.grad.double().norm().item() == pytest.approx(norms[parameter], rel=1e-4, abs=1e-6 * largest)


def import_reference_names(values: dict[str, float]) -> dict[str, float]:
    """The same numbers under our names of the parameters."""
    dim = 32
    shaped = {}
    for name in values:
        base = name.split(".", 2)[2] if name.startswith("blocks.") else name
        shaped[name] = torch.full(block_shapes(dim)[base], float(values[name]), dtype=torch.float64)
    return {name: value.flatten()[0].item() for name, value in import_reference(shaped).items()}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("start", "n_steps"), [(0, 7), (7, 3)])
@pytest.mark.parametrize("objective", [teacher_forced_loss, rollout_loss])
def test_block_objective(objective, start, n_steps, name):
    block = make_block(140, 32, 4)
    loss = objective(block, seeded(5, 3, n_steps + 1, 9, 32), start, LOSSES[name])
    kind = "rollout" if objective is rollout_loss else "teacher_forced"
    assert_published_loss_and_gradient(f"block {start}-{start + n_steps} {name} {kind}", name, block, loss)


@pytest.mark.parametrize("name", LOSSES)
def test_raptor_objective(name):
    raptor = make_raptor(150, 32, 4)
    loss = rollout_loss(raptor, seeded(6, 2, 13, 9, 32), 0, LOSSES[name])
    assert_published_loss_and_gradient(f"raptor3 0-12 {name} rollout", name, raptor, loss)


# ---------------------------------------------------------------- training


def assert_published_training(case: str, model: nn.Module, ours: list[float]) -> None:
    golden = NUMBERS["training"][case]
    assert ours == pytest.approx(golden["losses"], rel=1e-6)
    norms = [p.detach().norm().item() for p in model.parameters()]
    assert sorted(norms) == pytest.approx(sorted(golden["parameter_norms"].values()), rel=1e-5)


def test_stage_1_training_step_by_step():
    """40 steps in float64: objective mix, AdamW, rates, clipping and their order, all at once."""
    block = make_block(160, 16, 2).double()
    optimizer, losses = make_optimizer(block, weight_decay=1e-2), []
    for step in range(40):
        states = seeded(1000 + step, 4, 4, 9, 16).double()
        loss = annealed_loss(block, states, 4, mse, teacher_forcing_ratio(step, anneal_steps=10))
        losses.append(loss.item())
        rate = learning_rate(step, peak=3e-3, final=1e-6, warmup_steps=8, total_steps=40, compat=True)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        loss.backward()
        clip_and_step(optimizer, max_norm=1.0)
    assert_published_training("stage1 block 4-7 annealed mse", block, losses)


def test_stage_2_training_step_by_step():
    raptor = make_raptor(170, 16, 2).double()
    optimizer, losses = make_optimizer(raptor, weight_decay=1e-2), []
    for step in range(12):
        loss = rollout_loss(raptor, seeded(1000 + step, 4, 13, 9, 16).double(), 0, LOSSES["weighted_stage2"])
        losses.append(loss.item())
        rate = learning_rate(step, peak=3e-3, final=1e-6, warmup_steps=8, total_steps=12, compat=True)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        loss.backward()
        clip_and_step(optimizer, max_norm=1.0)
    assert_published_training("stage2 raptor3 0-12 rollout weighted", raptor, losses)


# ---------------------------------------------------------------- import_reference


@pytest.mark.parametrize("n_blocks", [2, 3, 4])
def test_every_published_weight_of_a_raptor_arrives(n_blocks):
    theirs = seeded_raptor(0, 8, n_blocks)
    ours = import_reference(theirs)
    spans = [Span(i, i + 1) for i in range(n_blocks)]
    Raptor([Block(8, 2) for _ in spans], spans).load_state_dict(ours, strict=True)
    assert {id(v) for v in ours.values()} == {id(v) for v in theirs.values()}


def test_names_that_do_not_fit_are_all_listed():
    weights = seeded_raptor(0, 8, 4)
    weights = {name: value for name, value in weights.items() if not name.startswith("blocks.1.")}
    del weights["blocks.0.attn.in_proj_bias"], weights["blocks.2.t_proj.0.bias"]
    weights |= {"blocks.3.extra": torch.zeros(1), "head.weight": torch.zeros(1), "blocks.3.ls1.gamma": torch.zeros(9)}
    with pytest.raises(WeightsError) as error:
        import_reference(weights)
    assert sorted(error.value.problems) == [
        "'blocks.3.ls1.gamma' has shape (9,), expected (8,)",
        "missing block 1: no name begins with 'blocks.1.'",
        "missing name 'blocks.0.attn.in_proj_bias'",
        "missing name 'blocks.2.t_proj.0.bias'",
        "unknown name 'blocks.3.extra'",
        "unknown name 'head.weight'",
    ]
    assert all(problem in str(error.value) for problem in error.value.problems)
    assert pickle.loads(pickle.dumps(error.value)).problems == error.value.problems  # noqa: S301


def test_empty_and_foreign_dicts_are_refused():
    with pytest.raises(WeightsError, match=r"missing name 'norm1\.weight'"):
        import_reference({})
    with pytest.raises(WeightsError, match=r"unknown name 'attention_norm\.weight'"):
        import_reference(Block(8, 2).state_dict())
    with pytest.raises(WeightsError, match=r"'ls2\.gamma' holds a float, expected a tensor"):
        import_reference(seeded_block(0, 8) | {"ls2.gamma": 1.0})
    with pytest.raises(TypeError, match=r"not a Block: pass its \.state_dict\(\)"):
        inspect.unwrap(import_reference)(Block(8, 2))  # as where nothing checks types


@pytest.mark.parametrize("name", block_shapes(8))
def test_every_wrong_shape_is_named(name):
    weights = seeded_block(0, 8)
    with pytest.raises(WeightsError, match=name):
        import_reference(weights | {name: torch.zeros(5, 7, 3)})


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_state_dict_files_are_read(tmp_path: Path, name):
    weights = seeded_block(0, 8)
    if name.endswith("safetensors"):
        save_file(weights, tmp_path / name)
    else:
        torch.save(weights, tmp_path / name)
    loaded = load_weights_file(tmp_path / name)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module_is_refused_with_the_line_that_saves_its_weights(tmp_path: Path, zipped, monkeypatch):
    torch.save(nn.Linear(2, 2), tmp_path / "final step.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"a pickled torch\.nn\.modules\.linear\.Linear") as error:
        load_weights_file(tmp_path / "final step.pt")
    line = next(x for x in str(error.value).splitlines() if "python -c" in x)
    monkeypatch.chdir(tmp_path)
    exec(line.split('"')[1])  # what the reader is told to run
    assert load_weights_file("final step.state.pt").keys() == {"weight", "bias"}


def test_hostile_pickle_is_not_run(tmp_path: Path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Hostile()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="pickled code, which is never run here"):
        load_weights_file(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path):
    torch.save(seeded_block(0, 8), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, data in {
        "cut.pt": whole[:2000],
        "text.pt": b"hello world",
        "empty.pt": b"",
        "cut.safetensors": b"\x08",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match="copy it again"):
            load_weights_file(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list, expected a state dict"):
        load_weights_file(tmp_path / "list.pt")
    torch.save({"step": 3, "weight": torch.zeros(1)}, tmp_path / "mixed.pt")
    with pytest.raises(WeightsError, match="'step' holds a int, expected a tensor"):
        load_weights_file(tmp_path / "mixed.pt")
    with pytest.raises(WeightsError, match="there is no weights file"):
        load_weights_file(tmp_path / "absent.pt")

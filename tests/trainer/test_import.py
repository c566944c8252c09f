"""Published weights become a RUN: the same outputs, and everything that takes a RUN takes it."""

import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from infra.console import ExitCode, UserError
from infra.objects import open_objects
from infra.weights import WeightsError
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import Span
from tests.trainer.published import GOLDEN, seeded, seeded_block, seeded_raptor
from tests.trainer.tiny import CPU, tiny_config, write_tiny_pair
from trainer.__main__ import main
from trainer.data import open_training_data
from trainer.imported import identity_without_store, read_published, run_identity, write_run
from trainer.joint import Source, joint_weights, read_blocks
from trainer.raptor_teacher import raptor_teacher
from trainer.run_files import RunFiles
from trainer.table_sources import find_results
from trainer.trained import Trained, read_trained

OUTPUTS = np.load(GOLDEN / "published_outputs.npz", allow_pickle=False)
SPLIT = [Span(0, 7), Span(7, 10), Span(10, 12)]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """Of as many channels as the golden blocks, and with as many layers as the published Raptors."""
    own = load_teacher("fake_vit", "random:0")
    return dataclasses.replace(own, dim=32, _block_extras=own._block_extras * 4)


def as_run(file: Path, spans: list[Span], n_heads: int, run: Path, teacher: Teacher) -> Trained:
    imported, files = read_published(str(file), spans, n_heads), RunFiles(open_objects(str(run)))
    files.claim(run_identity(imported, identity_without_store(teacher), seed=130))
    write_run(imported, files, teacher, None, CPU)
    return read_trained(str(run))


def test_a_published_block_gives_the_published_outputs(tmp_path: Path, teacher: Teacher) -> None:
    golden = load_file(GOLDEN / "published_block.safetensors")
    x, layers, outputs = (golden.pop(name) for name in ("input", "layer", "output"))
    torch.save(golden, tmp_path / "block.pt")
    trained = as_run(tmp_path / "block.pt", [Span(0, 12)], 4, tmp_path / "run", teacher)
    found = trained.raptor(x, layers)
    assert (found - outputs).abs().max() <= 1e-5 * outputs.abs().max()
    assert (trained.seed, trained.teacher_digest) == (130, teacher.weights_digest)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_published_raptor_rolls_out_as_published(suffix: str, tmp_path: Path, teacher: Teacher) -> None:
    file = tmp_path / f"raptor3.{suffix}"
    state = seeded_raptor(130, 32, 3)
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    trained = as_run(file, SPLIT, 4, tmp_path / "run", teacher)
    found = trained.raptor.rollout(seeded(1, 3, 9, 32)[:2], 0, 12)[:, 1:].numpy()
    published = OUTPUTS["raptor3_rollout"]
    assert np.abs(found - published).max() <= 1e-5 * np.abs(published).max()
    assert trained.spans == tuple(SPLIT)


def test_blocks_without_depth_scaling_and_with_gelu_are_told_by_their_weights(tmp_path: Path) -> None:
    torch.save(seeded_block(110, 32, swiglu=False, depth_scaling=False), tmp_path / "plain.pt")
    [block] = read_published(str(tmp_path / "plain.pt"), [Span(0, 3)], 4).blocks
    assert (block.arguments["swiglu"], block.arguments["depth_scaling"]) == (False, False)
    found = block(seeded(1, 3, 9, 32), torch.tensor([1, 5, 12])).numpy()
    assert np.abs(found - OUTPUTS["block_gelu_plain"]).max() <= 1e-5 * np.abs(found).max()


def test_one_head_per_64_channels_as_published(tmp_path: Path) -> None:
    torch.save(seeded_block(1, 128), tmp_path / "wide.pt")
    assert read_published(str(tmp_path / "wide.pt"), [Span(0, 3)]).blocks[0].arguments["n_heads"] == 2
    torch.save(seeded_block(1, 32), tmp_path / "narrow.pt")
    with pytest.raises(UserError, match=r"blocks of 32 channels, and the number of their heads.*Give HEADS=n"):
        read_published(str(tmp_path / "narrow.pt"), [Span(0, 3)])
    with pytest.raises(UserError, match="HEADS=5: a block of 32 channels cannot have 5 heads"):
        read_published(str(tmp_path / "narrow.pt"), [Span(0, 3)], 5)


# ---------------------------------------------------------------- through the door


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of fake_vit's states (8 channels, states 0 to 3), and published files of blocks of 8 channels."""
    folder = tmp_path_factory.mktemp("import")
    write_tiny_pair(folder / "store")
    torch.save(seeded_raptor(5, 8, 2), folder / "raptor2.pt")
    torch.save(seeded_block(5, 8), folder / "first.pt")
    torch.save(seeded_block(6, 8), folder / "second.pt")
    return folder


def typed(folder: Path, file: str, blocks: str, run: Path, **more: object) -> list[str]:
    flags = {"from": folder / file, "blocks": blocks, "run": run, "heads": 2, "device": "cpu", **more}
    return ["import", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def test_an_imported_raptor_is_validated_extracted_and_listed(folder: Path, tmp_path: Path, capsys) -> None:
    command = typed(folder, "raptor2.pt", "0-2,2-3", tmp_path / "run", store=folder / "store", seed=1001)
    assert main(command) == ExitCode.OK
    said = capsys.readouterr().out
    assert "2 blocks for fake_vit, spans 0-2, 2-3" in said
    assert "validated: accuracy " in said
    trained, data = read_trained(str(tmp_path / "run")), open_training_data(str(folder / "store"), "0-3")
    assert data.teacher is not None
    assert trained.teacher_digest == data.teacher.weights_digest
    assert trained.result["imported"]["file"] == "raptor2.pt"
    assert str(folder) not in json.dumps({**trained.config, **trained.result})
    pixels = torch.randn(2, 3, 16, 16)
    expected = trained.raptor.rollout(data.teacher.embed(pixels), 0, 3)
    assert torch.equal(raptor_teacher(str(tmp_path / "run")).layer_states(pixels), expected)
    [found] = find_results([str(tmp_path)]).runs
    assert (found.model.spans, found.model.seed, found.model.imported) == (("0-2", "2-3"), 1001, True)
    torch.save(seeded_raptor(7, 8, 2), tmp_path / "other.pt")
    command = typed(tmp_path, "other.pt", "0-2,2-3", tmp_path / "b", store=folder / "store", seed=1002)
    assert main(command) == ExitCode.OK
    assert len({run.model.key for run in find_results([str(tmp_path)]).runs}) == 1  # one variant, two seeds
    capsys.readouterr()
    assert main(command) == ExitCode.OK
    assert "there is nothing to do" in capsys.readouterr().out


def test_imported_blocks_begin_stage_2(folder: Path, tmp_path: Path) -> None:
    for file, blocks in (("first.pt", "0-2"), ("second.pt", "2-3")):
        assert main(typed(folder, file, blocks, tmp_path / blocks, store=folder / "store")) == ExitCode.OK
    data = open_training_data(str(folder / "store"), "0-2,2-3", variable="BLOCKS")
    config = tiny_config(spans=data.spans)
    sources = [Source(span=span, location=str(tmp_path / str(span)), command="") for span in data.spans]
    weights = joint_weights(read_blocks(sources, config, data))
    assert torch.equal(weights["blocks.1.mlp.contract.bias"], seeded_block(6, 8)["mlp.2.bias"])


def test_a_teacher_alone_will_do(folder: Path, tmp_path: Path) -> None:
    command = typed(folder, "raptor2.pt", "0-2,2-3", tmp_path / "run", teacher="fake_vit", weights="random:0")
    assert main(command) == ExitCode.OK
    trained = read_trained(str(tmp_path / "run"))
    assert trained.teacher_digest == load_teacher("fake_vit", "random:0").weights_digest
    assert trained.result["validation"] is None
    assert raptor_teacher(str(tmp_path / "run")).head is None


def test_a_raptor_of_a_timm_vit_is_a_teacher_at_any_size(tmp_path: Path) -> None:
    torch.save(seeded_raptor(5, 64, 2), tmp_path / "raptor2.pt")
    assert main(typed(tmp_path, "raptor2.pt", "0-7,7-12", tmp_path / "run", teacher="digits_vit")) == ExitCode.OK
    trained = read_trained(str(tmp_path / "run"))
    for size in (32, (16, 48)):
        own = load_teacher("digits_vit", image_size=size)
        pixels = torch.randn(2, 3, *own.pixel_size, generator=torch.Generator().manual_seed(0))
        raptor = raptor_teacher(str(tmp_path / "run"), image_size=size)
        states = raptor.layer_states(pixels)
        assert torch.equal(states, trained.raptor.rollout(own.layer_states(pixels)[:, 0], 0, 12))
        assert torch.equal(raptor.logits(states[:, -1]), own.logits(states[:, -1]))
        assert raptor.taught_by == own.core_digest


def test_other_weights_or_spans_in_that_run_are_refused(folder: Path, tmp_path: Path) -> None:
    assert main(typed(folder, "first.pt", "0-2", tmp_path / "run", teacher="fake_vit")) == ExitCode.OK
    with pytest.raises(UserError, match=r"holds another run:\n  imported.sha256"):
        main(typed(folder, "second.pt", "0-2", tmp_path / "run", teacher="fake_vit"))
    with pytest.raises(UserError, match=r"holds another run:\n  train.spans"):
        main(typed(folder, "first.pt", "0-3", tmp_path / "run", teacher="fake_vit"))


REFUSED = {
    "no teacher": ({"file": "first.pt", "blocks": "0-2"}, "give either STORE, which holds the teacher"),
    "two teachers": ({"store": "s", "teacher": "fake_vit"}, "give either STORE"),
    "no spans": ({"blocks": "", "teacher": "fake_vit"}, "BLOCKS is missing"),
    "no span": ({"blocks": "7", "teacher": "fake_vit"}, r"BLOCKS=7: .*Expected a-b for each block"),
    "a gap": ({"blocks": "0-1,2-3", "teacher": "fake_vit"}, "the next one must begin at state 1"),
    "too few spans": ({"blocks": "0-3", "teacher": "fake_vit"}, "holds 2 blocks, BLOCKS names 1.*BLOCKS=0-7,7-12"),
    "too deep": ({"blocks": "0-2,2-12", "teacher": "fake_vit"}, "reaches state 12, fake_vit has states 0 to 3"),
    "other channels": ({"teacher": "digits_vit"}, "blocks have 8 channels, digits_vit has 64"),
    "no file": ({"file": "nothing.pt", "teacher": "fake_vit"}, "there is no weights file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(case: str, folder: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    values = {"file": "raptor2.pt", "blocks": "0-2,2-3", "run": tmp_path / "run"} | changes
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        main(typed(folder, **values))
    assert not (tmp_path / "run" / "config.json").exists()


def test_all_that_is_typed_wrong_is_listed_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes((folder / "first.pt").read_bytes()[:100])
    wrong = {"store": tmp_path / "none", "seed": -1, "heads": 0, "device": "abacus"}
    with pytest.raises(UserError) as caught:
        main(typed(tmp_path, "cut.pt", "0-2,3-4", tmp_path / "run", **wrong))
    expected = (
        "make import cannot start:",
        "HEADS=0: expected 1 or more",
        "SEED=-1: expected 0 or more",
        "BLOCKS=0-2,3-4 is not one stretch",
        "DEVICE=abacus is not a device",
        "cut.pt is no whole .pt file",
        f"STORE={tmp_path}/none",
    )
    assert [words for words in expected if words not in str(caught.value)] == []
    assert "make raptor" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_heads_are_other_weights(folder: Path, tmp_path: Path) -> None:
    """Their number is not in the file: one that was given wrong at first must not pass for what is there."""
    command = typed(folder, "first.pt", "0-2", tmp_path / "run", teacher="fake_vit")
    assert main(command) == ExitCode.OK
    with pytest.raises(UserError, match=r"train\.n_heads: the run has 2, this command asks for 4"):
        main([*command, "--heads", "4"])


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("was_run"),))


def test_pickled_modules_are_refused_with_the_line_that_mends_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(2, 2), "whole.pt")
    with pytest.raises(UserError, match=r"never run here(.|\n)*torch\.save\(m\.state_dict\(\)"):
        main(typed(tmp_path, "whole.pt", "0-2", tmp_path / "run", teacher="fake_vit"))
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"evil\.pt holds a pickle of protocol 4"):
        main(typed(tmp_path, "evil.pt", "0-2", tmp_path / "run", teacher="fake_vit"))
    assert not Path("was_run").exists()


HOSTILE = {
    "a list": lambda state: list(state.values()),
    "a surplus name": lambda state: state | {"blocks": torch.zeros(1)},
    "a missing name": lambda state: {name: value for name, value in state.items() if name != "ls1.gamma"},
    "a wrong shape": lambda state: state | {"mlp.2.bias": torch.zeros(9)},
    "text": lambda state: state | {"ls1.gamma": "1e-5"},
    "few numbers that claim to be many": lambda state: state | {"ls1.gamma": torch.zeros(1).expand(8)},
    "a block far off": lambda state: {f"blocks.9999.{name}": value for name, value in state.items()},
    "nothing": lambda state: {},
    "NaN": lambda state: state | {"ls1.gamma": torch.full((8,), torch.nan)},
    "integers": lambda state: {name: value.long() for name, value in state.items()},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_state_dicts_are_refused(case: str, tmp_path: Path) -> None:
    torch.save(HOSTILE[case](seeded_block(1, 8)), tmp_path / "hostile.pt")
    with pytest.raises(WeightsError):
        read_published(str(tmp_path / "hostile.pt"), [Span(0, 2)], 2)

"""What a person reads: commands that work as they are printed, columns that stay apart, memory that is stated."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from infra.console import human_bytes
from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import Span, open_store
from tests.trainer.tiny import CPU, tiny_config, tiny_data, tiny_teacher, write_tiny
from trainer.data import TrainingData, open_training_data
from trainer.recipes import imagenet_stage1
from trainer.report import _next_commands, _numbers, _other_span, finished_report, start_report
from trainer.run_files import RunFiles
from trainer.stream import LayerSliceStream
from trainer.train import make_model

REPO = Path(__file__).parents[2]
RESULT = {
    "final_loss": 0.5,
    "weights_key": "block.safetensors",
    "weights_nbytes": 1000,
    "baselines": None,
    "validation": {
        "n_samples": 18,
        "loss": 0.5,
        "r2": {"cls": [-123456.7, 0.5], "patches": [1.0, -99.9999], "all": [0.25, -1e30]},
        "reference_r2": [-1e7, 1.0],
        "epsilon": [12345678.9, 0.001234567],
        "layers": [1, 2],
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return tiny_data(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize(
    ("span", "layers", "expected"),
    [
        (Span(0, 7), range(13), Span(7, 12)),
        (Span(7, 10), range(13), Span(10, 12)),
        (Span(10, 12), range(13), Span(0, 10)),
        (Span(0, 12), range(13), None),
        (Span(0, 2), (0, 1, 2, 3, 6, 7), Span(2, 3)),  # as far as there is no gap
        (Span(0, 3), (0, 1, 2, 3, 6, 7), None),
        (Span(6, 7), (0, 1, 4, 5, 6, 7), Span(4, 6)),
    ],
)
def test_next_span(span: Span, layers: range, expected: Span | None) -> None:
    assert _other_span(span, tuple(layers)) == expected


@pytest.mark.parametrize("block", ["0-2", "2-3", "0-3"])
def test_printed_command_can_be_typed(data: TrainingData, block: str) -> None:
    """Its target is in the Makefile, its span is one that training takes, and STORE is the one that was typed."""
    store = data.train.location.removesuffix("/train")
    variables = {"STORE": store, "SEED": "3"}
    run = RunFiles(FolderObjects(f"{store}/a run/0-2"))
    look, follow = _next_commands(Span.parse(block), data.train, run, variables)
    assert shlex.split(look)[-2:] == ["--logdir", f"{store}/a run"]
    make, target, *settings = shlex.split(follow.removeprefix("next"))
    assert make == "make"
    assert re.search(rf"^{target}: ", (REPO / "Makefile").read_text(), re.MULTILINE)
    given = dict(setting.split("=", 1) for setting in settings)
    if block == "0-3":
        assert (target, given) == ("inspect", {"STORE": store})
    else:
        assert target == "train"
        assert given == {"STORE": store, "SEED": "3", "BLOCK": {"0-2": "2-3", "2-3": "0-2"}[block]}
        assert open_training_data(given["STORE"], given["BLOCK"]).span == Span.parse(given["BLOCK"])


def test_default_store_is_not_repeated(data: TrainingData) -> None:
    assert _next_commands(Span(0, 2), data.train, RunFiles(FolderObjects("run")), {}) == [
        "look at it  .venv/bin/tensorboard --logdir .",
        "next        make train BLOCK=2-3",
    ]


def test_columns_stay_apart(data: TrainingData) -> None:
    """R2 far below zero is what an untrained block has."""
    report = finished_report(tiny_config(), data, RunFiles(MemoryObjects()), RESULT)
    for name in ("cls", "patches", "all", "as published", "epsilon"):
        line = next(line for line in report.splitlines() if line.startswith(name))
        assert len(line.removeprefix(name).split()) == 2, line
    assert _numbers([-1e30, 0.5]).split() == ["-1e+30", "0.500"]


def test_start_says_what_memory_the_streams_take(data: TrainingData) -> None:
    config = tiny_config(lanes=64)
    said = start_report(config, data, RunFiles(MemoryObjects()), CPU)
    assert data.train.n_valid == 41
    stated = []
    for store, lanes in ((data.train, 64), (data.validation, 8)):
        with LayerSliceStream(store, config.span, batch_size=16, lanes=lanes) as stream:
            stated.append(human_bytes(stream.memory_nbytes))
    assert f"from the store: {stated[0]}, and {stated[1]} more while validating" in said


def test_heads_divide_the_channels() -> None:
    objects = MemoryObjects()
    write_tiny(objects, tiny_teacher(), 9, seed=0)
    spec = open_store(objects).spec
    for dim, n_heads in ((32, 1), (64, 1), (200, 2), (384, 6), (768, 12), (1000, 10), (1024, 16)):
        wide = dataclasses.replace(spec, dim=dim)
        config = imagenet_stage1(Span(0, 2), wide, 3)
        assert config.n_heads == n_heads
    make_model(imagenet_stage1(Span(0, 2), dataclasses.replace(spec, dim=200), 3), dataclasses.replace(spec, dim=200))

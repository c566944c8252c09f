"""A Raptor is a teacher: its own states, in a store like any other, from nothing but its RUN."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from analysis.__main__ import main as analysis_main
from infra.console import ExitCode, UserError
from infra.objects import open_objects
from pipeline.__main__ import main as pipeline_main
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.preprocess import Preprocessing, decode_image, normalise
from pipeline.run_config import RunConfig
from pipeline.sources import open_sources
from pipeline.teacher import Teacher, TeacherError, load_teacher, teacher_from_files
from storage_schemas import Span, open_store
from storage_schemas.digest import content_digest
from tests.trainer.tiny import CPU, tiny_config, tiny_teacher, write_tiny
from trainer.__main__ import main as trainer_main
from trainer.data import open_training_data
from trainer.raptor_teacher import RaptorTeacher, raptor_teacher, read_ends
from trainer.run_files import RunFiles
from trainer.train import train
from trainer.trained import read_trained

N_IMAGES = 16
PLAIN = RunConfig(no_ray=True, device="cpu")


def config_for(store: Path, teacher: str, **changes: object) -> ExtractConfig:
    values = {"precision": "float32", "limit": N_IMAGES, "samples_per_shard": 8, "samples_per_chunk": 4}
    return ExtractConfig(store=str(store), teacher=teacher, **(values | {"micro_batch": 4} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of fake_vit's states of digits, a RUN of two blocks over its whole depth, and a store of the Raptor's."""
    folder = tmp_path_factory.mktemp("raptor")
    torch.manual_seed(0)
    torch.save({"weight": torch.randn(10, 16), "bias": torch.randn(10)}, folder / "head.pth")
    extract(config_for(folder / "store", "fake_vit", weights="random:0", head=str(folder / "head.pth")), PLAIN)
    make_run(folder / "store", folder / "run", "0-2,2-3")
    assert extract(config_for(folder / "states", f"run:{folder / 'run'}"), PLAIN)[0].complete
    return folder


def make_run(store: Path, run: Path, spans: str) -> None:
    data = open_training_data(str(store), spans, variable="BLOCKS")
    config = tiny_config(spans=data.spans, n_steps=4, teacher_forcing_steps=0)
    files = RunFiles(open_objects(str(run)))
    files.claim({"train": config.to_json(), "data": data.identity})
    assert train(config, data, files, machine=CPU) is not None


@pytest.fixture(scope="module")
def teacher(folder: Path) -> RaptorTeacher:
    return raptor_teacher(str(folder / "run"))


def some_pixels(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_states_are_the_rollout_of_the_teachers_state_0_to_the_last_bit(folder: Path, teacher: RaptorTeacher) -> None:
    own = load_teacher("fake_vit", "random:0")
    states = teacher.layer_states(some_pixels())
    expected = read_trained(str(folder / "run")).raptor.rollout(own.layer_states(some_pixels())[:, 0], 0, 3)
    assert torch.equal(states, expected)
    assert not torch.equal(states[:, 1], states[:, 0])
    assert torch.equal(teacher.embed(some_pixels()), own.embed(some_pixels()))
    assert torch.equal(teacher.run_blocks(states[:, 1], 1, 3), expected[:, 3])


def test_final_norm_and_head_are_the_teachers(folder: Path, teacher: RaptorTeacher) -> None:
    own = load_teacher("fake_vit", "random:0", head=folder / "head.pth")
    last = torch.randn(2, 19, 8)
    assert torch.equal(teacher.logits(last), own.logits(last))


def test_the_store_holds_the_rollout_of_every_image(folder: Path, teacher: RaptorTeacher) -> None:
    """Straight from the images, by the Raptor alone: no teacher code between."""
    store, source = open_store(str(folder / "states" / "val")), open_sources("digits")["val"]
    assert store.spec.teacher == "run:run"
    assert store.spec.teacher_weights_digest == teacher.weights_digest
    assert store.verify() == []
    preprocessing = Preprocessing.from_dict(dict(store.spec.preprocessing))
    own = load_teacher("fake_vit", "random:0")
    names = store.samples["sample_id"].to_pylist()
    listed = {sample.sample_id: sample for sample in source.listing()}
    images = [decode_image(source.read(listed[name]), preprocessing) for name in names]
    raptor = read_trained(str(folder / "run")).raptor
    for first in range(0, N_IMAGES, 4):  # micro-batches of four, as the extraction's
        pixels = normalise(torch.from_numpy(np.stack(images[first : first + 4])), preprocessing)
        expected = raptor.rollout(own.layer_states(pixels)[:, 0], 0, 3)
        found = store.read(layers=[0, 1, 2, 3], samples=range(first, first + 4), tokens="all")
        assert_array_equal(found, expected.numpy())


def test_a_run_keeps_its_teachers_ends_and_no_blocks_of_it(folder: Path) -> None:
    ends = read_ends(RunFiles(open_objects(str(folder / "run"))))
    own = load_teacher("fake_vit", "random:0")
    assert ends is not None
    assert ends.core_digest == own.core_digest
    assert set(ends.weights) == {n for n in own.model.state_dict() if not n.startswith("blocks.")}
    assert ends.head is not None


def test_files_bring_back_the_same_raptor_without_its_run(teacher: RaptorTeacher) -> None:
    files = teacher.to_files()
    again = teacher_from_files(files)
    assert isinstance(again, RaptorTeacher)
    assert again.to_files() == files
    assert torch.equal(again.layer_states(some_pixels()), teacher.layer_states(some_pixels()))
    assert again.taught_by == load_teacher("fake_vit", "random:0").core_digest


def test_each_block_is_in_the_files_once(teacher: RaptorTeacher) -> None:
    n_ends = sum(p.numel() for n, p in teacher.model.state_dict().items() if not n.startswith("blocks."))
    n_blocks = sum(p.numel() for p in teacher.raptor.parameters())
    assert sum(tensor.numel() for tensor in teacher.model.state_dict().values()) == n_ends + n_blocks


def test_damaged_files_are_refused(teacher: RaptorTeacher) -> None:
    files = teacher.to_files()
    config = json.loads(files["config.json"])
    for changes in ({"spans": ["0-2"]}, {"blocks": [{"dim": 8}] * 2}, {"weights_digest": "0" * 64}, {"spans": 7}):
        with pytest.raises(TeacherError, match=r"the teacher's (files cannot be used|weights have digest)"):
            teacher_from_files({**files, "config.json": json.dumps(config | changes).encode()})
    with pytest.raises(UserError, match="of the kind 'os', and there are run here"):
        teacher_from_files({**files, "config.json": json.dumps(config | {"kind": "os"}).encode()})
    with pytest.raises(TeacherError, match="cannot be used"):
        teacher_from_files({"config.json": files["config.json"]})


def test_a_raptor_sees_other_image_sizes(folder: Path) -> None:
    wide = raptor_teacher(str(folder / "run"), image_size=(16, 32))
    own = load_teacher("fake_vit", "random:0", image_size=(16, 32))
    pixels = torch.randn(2, 3, 16, 32)
    expected = wide.raptor.rollout(own.layer_states(pixels)[:, 0], 0, 3)
    assert torch.equal(wide.layer_states(pixels), expected)
    assert wide.taught_by == own.core_digest


def test_runs_that_cannot_be_teachers_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    make_run(folder / "store", tmp_path / "half", "1-2")
    with pytest.raises(UserError, match=r"begins at state 1.*\n.*ends at state 2; fake_vit has states 0 to 3"):
        raptor_teacher(str(tmp_path / "half"))
    with pytest.raises(UserError, match="holds no finished run"):
        raptor_teacher(str(tmp_path / "nothing"))
    make_run(folder / "store", tmp_path / "whole", "0-3")
    raptor_teacher(str(tmp_path / "whole"))
    (tmp_path / "whole" / "teacher" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"weights.safetensors is not what was written.*Delete"):
        raptor_teacher(str(tmp_path / "whole"))
    for file in (tmp_path / "whole" / "teacher").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"does not keep the ends of its teacher .*run the command that"):
        raptor_teacher(str(tmp_path / "whole"))
    with pytest.raises(UserError, match="has its own weights"):
        load_teacher(f"run:{folder / 'run'}", weights="random:0")


def test_the_door_extracts_runs_only_and_the_other_door_does_too(folder: Path, tmp_path: Path, capsys) -> None:
    typed = ["--limit", str(N_IMAGES), "--precision", "float32", "--samples-per-shard", "8", "--samples-per-chunk", "4"]
    typed += ["--micro-batch", "4", "--no-ray", "--device", "cpu", "--store", str(tmp_path / "again")]
    assert trainer_main(["extract", "--teacher", f"run:{folder / 'run'}", *typed]) == ExitCode.OK
    for split in ("train", "val"):
        again, first = (open_objects(str(place / split)) for place in (tmp_path / "again", folder / "states"))
        assert content_digest(again) == content_digest(first)
    with pytest.raises(UserError, match="TEACHER=fake_vit is no run"):
        trainer_main(["extract", "--teacher", "fake_vit", *typed])


def test_verify_recomputes_and_repairs_from_the_stores_own_files(folder: Path, tmp_path: Path, capsys) -> None:
    """The same variables, without the RUN."""
    shutil.copytree(folder / "states", tmp_path / "s")
    typed = ["verify", "--store", str(tmp_path / "s"), "--images", "digits", "--no-ray", "--device", "cpu"]
    assert pipeline_main([*typed, "--recompute", "8"]) == ExitCode.OK
    assert "17 of 17 arrays kept in float32 are equal to the last bit" in capsys.readouterr().out
    damaged = tmp_path / "s" / "val" / "layer_02" / "patches" / "c" / "1" / "0" / "0"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-9] + b"x" + before[-8:])
    assert pipeline_main(typed) == ExitCode.PROBLEMS
    assert pipeline_main([*typed, "--repair"]) == ExitCode.OK
    assert damaged.read_bytes() == before


def test_damaged_teacher_files_are_mended_from_the_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "states", tmp_path / "s")
    weights = tmp_path / "s" / "val" / "teacher" / "weights.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + b"?")
    typed = ["verify", "--store", str(tmp_path / "s"), "--images", "digits", "--no-ray", "--device", "cpu", "--repair"]
    assert pipeline_main([*typed, "--teacher", f"run:{folder / 'run'}"]) == ExitCode.OK
    assert weights.read_bytes() == before


def test_phases_and_training_run_on_a_raptors_store(folder: Path, tmp_path: Path, capsys) -> None:
    assert analysis_main(["phases", "--store", str(folder / "states"), "--k", "1", "--out", str(tmp_path / "p")]) == 0
    assert "BLOCKS=" in capsys.readouterr().out
    make_run(folder / "states", tmp_path / "pupil", "0-1,1-3")
    pupil = raptor_teacher(str(tmp_path / "pupil"))
    grandparent = load_teacher("fake_vit", "random:0")
    assert pupil.taught_by == raptor_teacher(str(folder / "run")).core_digest != grandparent.core_digest
    assert torch.equal(pupil.embed(some_pixels()), grandparent.embed(some_pixels()))
    assert pupil.raptor.spans == (Span(0, 1), Span(1, 3))


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen]:
    typed = ["--images", "digits", "--teacher", f"run:{folder / 'run'}", "--store", str(tmp_path / "store")]
    typed += ["--samples-per-shard", "8", "--samples-per-chunk", "4", "--micro-batch", "1", "--precision", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "extract", *typed, "--limit", "120", "--no-ray", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_killed_extraction_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path, job: subprocess.Popen) -> None:
    commits = tmp_path / "store" / "train" / "commits"
    deadline = time.monotonic() + 120
    while not (commits.is_dir() and len(list(commits.glob("*.json"))) >= 3):
        assert job.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert len(list(commits.glob("*.json"))) < 15
    changes = {"limit": 120, "micro_batch": 1}
    config = config_for(tmp_path / "store", f"run:{folder / 'run'}", **changes)
    results = extract(config, PLAIN)
    assert results[0].n_before >= 24
    extract(dataclasses.replace(config, store=str(tmp_path / "undisturbed")), PLAIN)
    for split in ("train", "val"):
        one, other = (open_objects(str(tmp_path / name / split)) for name in ("store", "undisturbed"))
        assert content_digest(one) == content_digest(other)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_through_ray_the_bytes_are_the_same(folder: Path, tmp_path: Path) -> None:
    """Workers read the Raptor from the store, never from the RUN."""
    run = RunConfig(workers=1, device="cpu")
    assert extract(config_for(tmp_path / "store", f"run:{folder / 'run'}"), run)[0].complete
    for split in ("train", "val"):
        one, other = (open_objects(str(place / split)) for place in (tmp_path / "store", folder / "states"))
        assert content_digest(one) == content_digest(other)


def test_a_teacher_that_was_given_no_head_has_none(folder: Path, tmp_path: Path) -> None:
    headless = load_teacher("fake_vit", "random:0")
    write_tiny(open_objects(str(tmp_path / "store")), tiny_teacher(), 12, 0, teacher_files=headless.to_files())
    make_run(tmp_path / "store", tmp_path / "run", "0-3")
    bare: Teacher = raptor_teacher(str(tmp_path / "run"))
    assert bare.head is None
    assert raptor_teacher(str(tmp_path / "run"), head=str(folder / "head.pth")).head is not None

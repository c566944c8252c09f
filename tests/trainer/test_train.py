"""The loop: what it logs, how it weighs, when it stops, and that it learns."""

import dataclasses
import json
import math
import sys
from typing import Any

import pytest
import torch

from infra.console import ExitCode, Progress, UserError
from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import Span, open_store
from tests.trainer.tiny import CPU, tiny_config, tiny_data, tiny_teacher, write_tiny
from trainer.block import Block
from trainer.config import TokenWeights, TrainConfig
from trainer.data import TrainingData
from trainer.feed import Feed
from trainer.losses import TokenWeighted, mse
from trainer.machine import Machine
from trainer.meter import DivergedError, Meter
from trainer.objectives import annealed_loss
from trainer.order import random64
from trainer.recipes import RECIPES, digits_stage1, imagenet_stage1, recipe_for
from trainer.run_files import RunFiles
from trainer.train import learning_rate_at, make_loss, make_model, train
from trainer.validation import ValidationSet, validate
from trainer.workers import Workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return tiny_data(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def lines(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = RunFiles(FolderObjects(tmp_path_factory.mktemp("run")))
    train(tiny_config(), data, run, machine=CPU)
    assert list((tmp_path_factory.getbasetemp()).glob("run*/tensorboard/events*"))
    return run.read_metrics()


# ---------------------------------------------------------------- what is logged


def test_metrics_have_one_line_per_interval_and_validation(lines: list[dict[str, Any]]) -> None:
    assert [(line["step"], "validation" in line) for line in lines] == [
        (0, True),
        (4, True),
        (5, False),
        (8, True),
        (10, False),
        (12, False),
        (12, True),
    ]
    for line in lines:
        if "validation" in line:
            assert line["validation"]["n_samples"] == (18 if line["step"] == 12 else 10)
            assert set(line["validation"]["r2"]) == {"cls", "registers", "patches", "all"}
        else:
            assert set(line) == {
                *("step", "loss", "gradient_norm", "learning_rate", "forcing", "samples_per_s", "loader_wait")
            }


def test_logged_values_are_those_of_the_steps(data: TrainingData, lines: list[dict[str, Any]]) -> None:
    """Written out again without the loop: the same batches, loss, clipping and AdamW give the logged means."""
    config = tiny_config()
    model = make_model(config, data.train.spec)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
    noise = torch.Generator().manual_seed(config.seed)
    losses, norms, sizes = [], [], []
    with Feed(data.train, config, CPU, Workers.alone()) as feed:
        for step in range(5):
            share = feed.next_share()
            states = share.states
            forcing = 1 - step / config.teacher_forcing_steps
            key = int(torch.randint(2**63 - 1, (), generator=noise))
            seeds = [int(word) % 2**63 for word in random64(key, share.sample_index)]
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            loss = annealed_loss(model, states, 0, mse, forcing, config.noise, draws)
            optimizer.zero_grad()
            (loss * len(states) / 16).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.param_groups[0]["lr"] = learning_rate_at(config, step)
            optimizer.step()
            losses.append(loss.item())
            sizes.append(len(states))
    assert sizes == [16, 16, 9, 16, 16]  # 41 samples a pass
    logged = next(line for line in lines if line["step"] == 5)
    assert logged["loss"] == pytest.approx(sum(a * b for a, b in zip(losses, sizes)) / sum(sizes), rel=1e-6)
    assert logged["gradient_norm"] == pytest.approx(sum(norms) / 5, rel=1e-5)
    assert logged["forcing"] == 1 - 4 / 6
    assert logged["learning_rate"] == learning_rate_at(config, 4)


def test_tensorboard_shows_the_same(data: TrainingData, tmp_path) -> None:
    """Also after a resume: values that the dead run had written beyond its checkpoint are purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFiles(FolderObjects(tmp_path))
    asked = 0

    def die_at_eleven() -> bool:
        nonlocal asked
        asked += 1
        if asked == 11:
            raise InterruptedError
        return False

    with pytest.raises(InterruptedError):
        train(tiny_config(), data, run, machine=CPU, stop=die_at_eleven)
    train(tiny_config(), data, run, machine=CPU)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged = [(line["step"], line["loss"]) for line in run.read_metrics() if "loss" in line]
    assert [step for step, _ in shown] == [5, 10, 12]
    assert [value for _, value in shown] == pytest.approx([value for _, value in logged], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/accuracy")] == [0, 4, 8, 12]
    assert "r2_patches/layer_02" in events.Tags()["scalars"]


# ---------------------------------------------------------------- the loop


def test_it_learns_what_the_teacher_does(data: TrainingData) -> None:
    """fake_vit's blocks add 1 and 2: within 120 steps nearly all of the variance is explained, rolled out."""
    run = RunFiles(MemoryObjects())
    config = tiny_config(n_steps=120, noise=0.0, teacher_forcing_steps=30, log_every=40, validate_every=120)
    result = train(config, data, run, machine=CPU)
    assert result is not None
    before = run.read_metrics()[0]["validation"]
    assert max(before["r2"]["patches"]) < 0
    assert min(result.validation.r2["patches"]) > 0.8
    assert result.final_loss < before["loss"] / 50


def test_weights_of_a_finished_run_make_the_same_block(data: TrainingData) -> None:
    run = RunFiles(MemoryObjects())
    result = train(tiny_config(), data, run, machine=CPU)
    assert result is not None
    written = run.read_result()
    assert written is not None
    block = Block(**written["blocks"][0])
    block.load_state_dict(run.read_weights())
    saved = run.newest_checkpoint()
    assert saved is not None
    for name, value in block.state_dict().items():
        assert torch.equal(value, saved.tensors["model"][name])


def test_short_last_batch_weighs_by_its_samples(data: TrainingData) -> None:
    """B9: 41 samples in batches of 40. The published loop gave the last one, of one sample, a full step."""
    norms = {}
    for batch_size in (40, 41):
        run = RunFiles(MemoryObjects())
        # no warm-up and a rate of 0: every step sees the same weights
        still = {"peak_learning_rate": 0.0, "final_learning_rate": 0.0, "noise": 0.0, "warmup_steps": 0}
        config = tiny_config(batch_size=batch_size, n_steps=2 if batch_size == 40 else 1, log_every=1, **still)
        train(config, data, run, machine=CPU)
        norms[batch_size] = [line["gradient_norm"] for line in run.read_metrics() if "loss" in line]
    whole, one = norms[40]
    assert one < whole / 10
    assert norms[41][0] == pytest.approx(whole, rel=0.1)


def test_no_wait_for_the_device_between_logging_intervals(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are read from the device when a line of metrics or a checkpoint is written, and not at other steps."""
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _original=original, **kwargs):
            # AdamW on CPUs reads its own step counters, which are no matter of ours
            if "/trainer/" in sys._getframe(1).f_code.co_filename:
                reads.append(1)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    config = tiny_config(log_every=1000, validate_every=1000, checkpoint_every=1000)
    counts = []

    def count() -> bool:
        counts.append(len(reads))
        return len(counts) == 9

    assert train(config, data, RunFiles(MemoryObjects()), machine=CPU, stop=count) is None
    assert counts[0] == counts[8]
    assert len(reads) > counts[8]  # the checkpoint did


def test_diverging_training_stops_with_the_step_and_keeps_its_checkpoint(data: TrainingData) -> None:
    run = RunFiles(MemoryObjects())
    config = tiny_config(peak_learning_rate=1e30, warmup_steps=0, checkpoint_every=1, log_every=4)
    with pytest.raises(DivergedError, match=r"by step [23] the loss has become (nan|inf)") as caught:
        train(config, data, run, machine=CPU)
    assert caught.value.exit_code == ExitCode.WOULD_COME_AGAIN  # by which BLOCK=all knows not to begin again
    assert run.read_result() is None
    saved = run.newest_checkpoint()
    assert saved is not None
    assert all(map(math.isfinite, saved.state["meter"]["losses"]))


def test_initial_weights_depend_on_the_seed_alone(data: TrainingData) -> None:
    spec = data.train.spec
    torch.manual_seed(3)
    first = make_model(tiny_config(), spec).state_dict()
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2)), "the caller's random state was touched"
    again, other = make_model(tiny_config(), spec).state_dict(), make_model(tiny_config(seed=1), spec).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_bfloat16_training_matches_float32_at_first(data: TrainingData) -> None:
    """D13: the same run in both precisions; losses stay within one per cent over the first interval."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = RunFiles(MemoryObjects())
        train(tiny_config(precision=precision), data, run, machine=CPU)
        losses[precision] = next(line["loss"] for line in run.read_metrics() if line["step"] == 5)
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_training_matches_the_cpus(data: TrainingData, tmp_path, compiled: bool) -> None:
    """float32 and without noise, whose generator differs: the same losses up to the order of sums."""
    losses = {}
    for machine in (CPU, Machine(device=torch.device("cuda"), compile=compiled)):
        run = RunFiles(MemoryObjects())
        there = tiny_data(tmp_path / machine.device.type, device=machine.device)
        assert train(tiny_config(noise=0.0), there, run, machine=machine) is not None
        losses[machine.device.type] = [line["loss"] for line in run.read_metrics() if "loss" in line]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.gpu
def test_gpu_training_resumes_between_lines_of_metrics(tmp_path) -> None:
    machine = Machine(device=torch.device("cuda"), compile=False)
    data, run = tiny_data(tmp_path, device=machine.device), RunFiles(MemoryObjects())
    config = tiny_config(log_every=5, checkpoint_every=1)
    asked = 0

    def stop_after_seven() -> bool:
        nonlocal asked
        asked += 1
        return asked == 7

    assert train(config, data, run, machine=machine, stop=stop_after_seven) is None
    assert train(config, data, run, machine=machine) is not None
    assert [line["step"] for line in run.read_metrics() if "loss" in line] == [5, 10, 12]


def test_restored_losses_stay_on_the_host_whatever_the_device(data: TrainingData) -> None:
    """A checkpoint between two lines of metrics; "meta" stands for a device whose values lie elsewhere."""
    config = tiny_config()
    with Feed(data.train, config, CPU, Workers.alone()) as feed:
        before, after = (Meter(feed, Workers.alone(), torch.device("cpu")) for _ in range(2))
        for step, value in enumerate((0.1, 0.7), 1):
            before.add(step, torch.tensor(value), torch.tensor(2 * value), 16)
        with torch.device("meta"):
            after.load_state_dict(json.loads(json.dumps(before.state_dict())))
            assert after.state_dict() == before.state_dict()
        for meter in (before, after):
            meter.add(3, torch.tensor(1.0), torch.tensor(3.0), 9)
        assert after.state_dict() == before.state_dict()
        assert after.take()[0] == before.take()[0]
        assert after.state_dict() == {"losses": [], "norms": [], "sizes": []}


def test_progress_says_when_it_validates(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step too: on ImageNet that takes minutes."""
    seen: list[str] = []
    status = ""

    def remember(_: Progress, text: str) -> None:
        nonlocal status
        status = text

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(status)
        return validate(*args, **kwargs)

    monkeypatch.setattr(Progress, "status", remember)
    monkeypatch.setattr("trainer.judge.validate", watched)
    train(tiny_config(n_steps=5, warmup_steps=0), data, RunFiles(MemoryObjects()), machine=CPU)
    assert seen == ["validating"] * 3  # steps 0, 4 and 5


def test_validation_uses_few_lanes(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = []

    def watched(model: Any, sets: ValidationSet, *args: Any, **kwargs: Any) -> Any:
        lanes.append(sets.lanes)
        return validate(model, sets, *args, **kwargs)

    monkeypatch.setattr("trainer.judge.validate", watched)
    for config in (tiny_config(n_steps=2, lanes=64), tiny_config(n_steps=2, lanes=4)):
        train(config, data, RunFiles(MemoryObjects()), machine=CPU)
    assert lanes == [8, 8, 4, 4]


# ---------------------------------------------------------------- configs and recipes


def test_config_lists_every_problem() -> None:
    with pytest.raises(UserError) as caught:
        tiny_config(batch_size=0, n_steps=1, warmup_steps=2, clip_norm=0.0)
    message = str(caught.value)
    for part in (
        "batch_size is 0, expected a whole number, 1 or more",
        "warmup_steps is 2, expected at most",
        "clip_norm is 0.0",
    ):
        assert part in message


def test_config_checks_kinds_and_names_too() -> None:
    config = tiny_config()
    # fmt: off
    wrong = {"batch_size": 2.5, "n_steps": "9", "seed": True, "noise": math.nan, "precision": "float64",
             "loss": "huber", "lanes": -1}
    # fmt: on
    for name, value in wrong.items():
        object.__setattr__(config, name, value)  # as if built where nothing checks types, unlike in these tests
    with pytest.raises(UserError) as caught:
        config.__post_init__()
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "seed is True, expected a whole number, 0 or more",
        "n_steps is '9', expected a whole number, 1 or more",
        "batch_size is 2.5, expected a whole number, 1 or more",
        "lanes is -1, expected a whole number, 1 or more",
        "noise is nan, expected 0 or more",
        "precision is 'float64', expected float32 or bfloat16",
        "loss is 'huber', expected mse, cosine, mse_cosine or weights of token kinds",
    ]
    with pytest.raises(UserError, match=r"loss weighs registers by -0.5, expected 0 or more"):
        tiny_config(loss=TokenWeights(cls=1.0, registers=-0.5, patches=1.0))


@pytest.mark.parametrize("loss", ["mse", TokenWeights(cls=0.34, registers=0.33, patches=0.33)])
def test_config_survives_json(loss: Any) -> None:
    import json

    config = tiny_config(loss=loss)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_token_weights_know_the_teachers_tokens(data: TrainingData) -> None:
    loss = make_loss(tiny_config(loss=TokenWeights(cls=1.0, registers=2.0, patches=3.0)), data.train.spec)
    assert loss == TokenWeighted(cls=1.0, registers=2.0, patches=3.0, n_registers=2, has_cls=True)


def test_imagenet_recipe_has_the_published_values(data: TrainingData) -> None:
    """seeds.md 1.7 to 1.9."""
    import dataclasses

    spec = dataclasses.replace(data.train.spec, dim=768)
    config = imagenet_stage1(Span(0, 7), spec, 12, seed=100)
    assert (config.n_heads, config.loss, config.noise, config.seed) == (12, "mse", 0.0, 100)
    assert (config.n_steps, config.warmup_steps, config.teacher_forcing_steps) == (312_500, 10_000, 78_125)
    assert (config.batch_size, config.peak_learning_rate, config.final_learning_rate) == (64, 3e-4, 1e-6)
    assert (config.weight_decay, config.clip_norm) == (1e-4, 1.0)
    assert (config.log_every, config.validate_every, config.validation_samples) == (100, 5_000, 2_048)
    for span in (Span(10, 12), Span(7, 12)):
        assert imagenet_stage1(span, spec, 12).loss == TokenWeights(cls=0.34, registers=0.33, patches=0.33)
    for span in (Span(7, 10), Span(0, 4), Span(4, 7)):
        assert imagenet_stage1(span, spec, 12).loss == "mse"
    assert learning_rate_at(config, 0) == pytest.approx(3.0003e-8, rel=1e-4)


def test_shorter_runs_scale_their_phases(data: TrainingData) -> None:
    pairs = Span(0, 1), Span(1, 2)
    for recipe, spans in [(r, Span(0, 2)) for r in RECIPES[1].values()] + [(r, pairs) for r in RECIPES[2].values()]:
        full, short = recipe(spans, data.train.spec, 3), recipe(spans, data.train.spec, 3, n_steps=400)
        for phase in ("warmup_steps", "teacher_forcing_steps"):
            assert getattr(short, phase) / 400 == pytest.approx(getattr(full, phase) / full.n_steps, abs=1 / 400)


def test_recipe_follows_the_store() -> None:
    objects = MemoryObjects()
    write_tiny(objects, tiny_teacher(), 9, seed=0)
    spec = open_store(objects).spec
    for teacher, dim, expected in (
        (spec.teacher, 64, "imagenet"),
        ("digits_vit", 64, "digits"),
        ("run:raptor-0-7-12-seed0", 64, "digits"),  # the states of a Raptor of digits_vit
        ("run:raptor-0-7-12-seed0", 768, "imagenet"),
        ("vit_base_patch14_reg4_dinov2.lvd142m", 768, "imagenet"),
    ):
        for stage in (1, 2):
            assert recipe_for(dataclasses.replace(spec, teacher=teacher, dim=dim), stage) == f"{expected}_stage{stage}"
    assert digits_stage1(Span(0, 7), open_store(objects).spec, 12).n_heads == 2

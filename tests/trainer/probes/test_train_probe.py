"""The one probe trainer: what it computes, that it repeats itself, that it resumes."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from infra.console import JobError, Progress, UserError
from infra.objects import FolderObjects, MemoryObjects
from storage_schemas import open_store
from tests.trainer.probes.tiny_probes import FormulaImages, backbone, settings, task, trained_of
from tests.trainer.tiny import N_CLASSES, tiny_teacher, write_tiny
from trainer.probes import features as features_module
from trainer.probes.backbone import Backbone
from trainer.probes.classification import Top1
from trainer.probes.features import Features, augmentation_seed
from trainer.probes.probe_files import ProbeFiles
from trainer.probes.results import ProbeResult
from trainer.probes.schedule import probe_learning_rate
from trainer.probes.task import Task
from trainer.probes.train_probe import Probe, _Training, best_epoch, epoch_order, iterations_per_epoch, train_probe


def snapshot(objects: MemoryObjects) -> dict[str, bytes]:
    return {info.key: bytes(objects.get(info.key)) for info in objects.list()}


def run(
    made: Task, frozen: Backbone, *, seed: int = 0, stop: Callable[[], bool] = lambda: False
) -> tuple[ProbeResult, dict[str, bytes], int]:
    """Train to the end, however often it is stopped: the result, the files, and how often."""
    objects, n_stops = MemoryObjects(), 0
    probe = Probe(task=made, backbone=frozen, seed=seed)
    files = ProbeFiles(objects)
    files.claim(probe.identity())
    while (result := train_probe(probe, files, stop=stop, checkpoint_s=0.0)) is None:
        n_stops += 1
    return result, snapshot(objects), n_stops


def head_inputs(frozen: Backbone, images: FormulaImages) -> tuple[Tensor, Tensor]:
    """All features and labels without augmentation, by the shortest way."""
    from pipeline.preprocess import normalise

    loaded = [images.load(index, None) for index in range(len(images))]
    pixels = normalise(torch.stack([p for p, _ in loaded]), frozen.teacher.preprocessing)
    return frozen.teacher.head_input(frozen.tokens(pixels)), torch.stack([label for _, label in loaded])


# ---------------------------------------------------------------- F1: what a readout is


@pytest.mark.parametrize("raptor", [False, True])
def test_the_teachers_own_head_reaches_exactly_what_its_logits_reach(raptor: bool) -> None:
    """Epoch 0 of a readout that begins with the teacher's head: the teacher's own accuracy, to the sample."""
    frozen, images = backbone(raptor=raptor), FormulaImages(40, offset=1000)
    assert frozen.teacher.head is not None
    result, _, _ = run(task(frozen, evaluation=images, head=frozen.teacher.head, n_epochs=1), frozen)
    from pipeline.preprocess import normalise

    pixels = normalise(torch.stack([images.load(i, None)[0] for i in range(40)]), frozen.teacher.preprocessing)
    labels = torch.tensor([int(images.load(i, None)[1]) for i in range(40)])
    named = frozen.teacher.logits(frozen.teacher.layer_states(pixels)[:, -1]).argmax(-1)
    assert result.initial == int((named == labels).sum()) / 40
    assert 0 < result.initial < 1


def test_two_steps_equal_steps_by_hand() -> None:
    """[CLS; mean of patches], softmax, cross-entropy, clipping at 1 and AdamW, each written out in float64."""
    frozen = backbone()
    images = FormulaImages(16)
    stored, labels = head_inputs(frozen, images)
    tokens = frozen.teacher.final_norm(
        frozen.teacher.layer_states(
            torch.stack([images.load(i, None)[0] for i in range(16)]).float().div(255).sub(0.5).div(0.25)
        )[:, -1]
    )
    assert torch.allclose(stored, torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1), atol=1e-5)

    made = task(frozen, train=images, n_epochs=1, learning_rate=0.1, weight_decay=0.05, clip_norm=0.2)
    made = Task(**{**vars(made), "features": lambda tokens: stored_features(tokens)})
    drawn: list[Tensor] = []

    def stored_features(tokens: Tensor) -> Tensor:
        found = frozen.teacher.head_input(tokens)
        drawn.append(found.double())
        return found

    probe = Probe(task=made, backbone=frozen, seed=3)
    objects = MemoryObjects()
    train_probe(probe, ProbeFiles(objects), checkpoint_s=1e9)
    from safetensors.torch import load

    found = load(bytes(objects.get("head.safetensors")))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        initial = nn.Linear(16, 3)
    values = {"weight": initial.weight.detach().double(), "bias": initial.bias.detach().double()}
    moments = {name: (torch.zeros_like(v), torch.zeros_like(v)) for name, v in values.items()}
    order = epoch_order(16, 3, 1)
    steps = [x for x in drawn if len(x) == 8][:2]  # the 21 images of the evaluation come in another size
    for step, x in enumerate(steps):
        y = functional.one_hot(labels[order[step * 8 : step * 8 + 8]], 3).double()
        error = (torch.softmax(x @ values["weight"].T + values["bias"], -1) - y) / 8
        gradients = {"weight": error.T @ x, "bias": error.sum(0)}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert norm > 0.2, "this must be clipped, or the test shows nothing of it"
        rate = probe_learning_rate(step, base=0.1, schedule="warmup_cosine", n_iterations=2, warmup_iterations=4)
        for name, gradient in gradients.items():
            g = gradient * (0.2 / (norm + 1e-6))
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            values[name] = values[name] * (1 - rate * 0.05) - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    for name, value in values.items():
        assert torch.allclose(found[name].double(), value, atol=2e-6), name


def test_top1_by_hand() -> None:
    metric = Top1()
    metric.add(torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]]), torch.tensor([1, 1]))
    metric.add(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([2]))
    assert metric.values() == {"top-1": 2 / 3}


# ---------------------------------------------------------------- epochs, and which of them is reported (F11)


def test_it_learns_and_every_epoch_is_on_record() -> None:
    result, files, _ = run(task(backbone(), n_epochs=4, learning_rate=0.05), backbone())
    values = [epoch["top-1"] for epoch in result.history]
    assert len(values) == 5
    assert result.initial == values[0]
    assert result.last == values[-1] > 0.6 > result.initial
    assert result.best == max(values)
    assert result.best_chosen_on_reported_samples is True
    assert set(files) == {"config.json", "head.safetensors", "best_head.safetensors", "result.json"}


def test_the_epoch_before_training_counts() -> None:
    """A readout that begins right and is then driven away by a huge rate: the best one is epoch 0."""
    frozen = backbone()
    good, files, _ = run(task(frozen, n_epochs=4, learning_rate=0.05), frozen)
    from safetensors.torch import load

    head = nn.Linear(16, 3)
    head.load_state_dict(load(files["head.safetensors"]))
    labels = FormulaImages(30, offset=1)  # the same images, each given the next one's name
    result, spoilt, _ = run(task(frozen, train=labels_moved(labels), head=head, n_epochs=2, learning_rate=3.0), frozen)
    assert result.initial == good.last
    assert (result.best, result.best_epoch) == (result.initial, 0)
    assert result.last < result.best
    assert spoilt["best_head.safetensors"] == files["head.safetensors"] != spoilt["head.safetensors"]


def labels_moved(images: FormulaImages) -> FormulaImages:
    """The same images under wrong names."""
    right = images.load

    def load(index: int, draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
        pixels, label = right(index, draw)
        return pixels, (label + 1) % 3

    images.load = load  # type: ignore[method-assign]
    return images


def test_best_epoch_takes_the_first_of_equals_and_knows_what_better_means() -> None:
    assert best_epoch([0.1, 0.3, 0.3, 0.2], higher_is_better=True) == 1
    assert best_epoch([0.5, 0.2, 0.2, 0.9], higher_is_better=False) == 1
    assert best_epoch([0.5], higher_is_better=False) == 0


def test_what_fills_no_batch_is_left_out_only_if_the_recipe_says_so() -> None:
    assert iterations_per_epoch(1_281_167, 512, drop_last=True) == 2_502
    assert iterations_per_epoch(20_210, 32, drop_last=True) == 631
    assert iterations_per_epoch(50_688, 128, drop_last=False) == 396
    assert iterations_per_epoch(30, 8, drop_last=False) == 4
    images = FormulaImages(30)
    frozen = backbone()
    run(task(frozen, train=images, n_epochs=2), frozen)
    assert len(images.drawn) == 2 * 24
    images.drawn.clear()
    run(task(frozen, train=images, n_epochs=2, drop_last=False), frozen)
    assert sorted(index for index, _ in images.drawn) == sorted(list(range(30)) * 2)


def test_fewer_samples_than_a_batch_are_refused() -> None:
    frozen = backbone()
    with pytest.raises(UserError, match=r"7 training samples, fewer than the 8 of a batch.*BATCH_SIZE=7"):
        run(task(frozen, train=FormulaImages(7)), frozen)


def test_a_loss_that_is_no_number_ends_it() -> None:
    frozen = backbone()
    made = task(frozen)
    made = Task(**{**vars(made), "loss": lambda output, target: output.sum() * float("nan")})
    with pytest.raises(JobError, match=r"the loss is nan by iteration 3.*LEARNING_RATE"):
        run(made, frozen)


# ---------------------------------------------------------------- the same again


def test_a_seed_fixes_everything() -> None:
    frozen = backbone()
    results = [run(task(frozen), frozen, seed=seed)[:2] for seed in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0][1]["head.safetensors"] != results[2][1]["head.safetensors"]


@pytest.mark.parametrize("augmented_images", [True, False])
def test_stopped_after_every_iteration_it_ends_with_the_same_bytes(augmented_images: bool, tmp_path: Path) -> None:
    frozen = backbone()
    train = None
    if not augmented_images:
        write_tiny(FolderObjects(tmp_path), tiny_teacher(), 30, seed=1)
        train = open_store(str(tmp_path))
    whole, files, n_stops = run(task(frozen, train=train), frozen)
    assert n_stops == 0
    pieces, pieced_files, n_stops = run(task(frozen, train=train), frozen, stop=lambda: True)
    assert n_stops == 9  # 3 epochs of 3 iterations
    assert pieces == whole
    assert pieced_files == files


def test_restored_losses_stay_on_the_host_whatever_the_device() -> None:
    """Stopped between two looks at the loss; "meta" stands for a device whose values lie elsewhere."""
    frozen = backbone()
    before, after = (_Training(Probe(task=task(frozen), backbone=frozen, seed=0)) for _ in range(2))
    next(before.rest_of_epoch())
    saved = copy.deepcopy(before.checkpoint())  # as read from a file: it shares no memory with what goes on
    with torch.device("meta"):
        after.load(saved)
        assert after.checkpoint().state == before.checkpoint().state
    assert len(before.checkpoint().state["losses"]) == 1
    for training in (before, after):
        for _ in training.rest_of_epoch():
            pass
    assert after.checkpoint().state == before.checkpoint().state
    assert len(after.checkpoint().state["losses"]) == 3
    with Progress(total=24, unit="samples", label="probe") as progress:
        after.look(progress)
    assert after.checkpoint().state["losses"] == []


def test_an_epoch_visits_every_sample_once_in_its_own_order() -> None:
    orders = [epoch_order(100, 0, epoch).tolist() for epoch in (1, 2)] + [epoch_order(100, 1, 1).tolist()]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_augmentation_depends_on_seed_epoch_and_sample_alone() -> None:
    """Not on the threads, nor on the order in which samples come."""
    frozen = backbone()
    made = task(frozen)

    def drawn(order: list[int], epoch: int, seed: int = 0) -> dict[int, int]:
        images = FormulaImages(12, side=16)
        source = Features(images, made, frozen, seed=seed, augmented=True)
        list(source.batches(order, 5, epoch))
        return dict(images.drawn)

    forward = drawn(list(range(12)), 1)
    assert drawn(list(range(12))[::-1], 1) == forward
    assert drawn(list(range(12)), 2) != forward != drawn(list(range(12)), 1, seed=1)
    assert len({augmentation_seed(s, e, i) for s in range(5) for e in range(5) for i in range(40)}) == 1000


# ---------------------------------------------------------------- where features come from


def test_features_from_a_store_equal_features_from_images(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    write_tiny(FolderObjects(tmp_path), teacher, 18, seed=1)
    store = open_store(str(tmp_path))
    pixels = torch.randn(18, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # as write_tiny drew them
    for raptor in (False, True):
        frozen = backbone(raptor=raptor)
        source = Features(store, task(frozen), frozen, seed=0, augmented=True)
        (batch,) = source.batches(range(18), 18, 1)
        assert torch.allclose(batch[0], teacher.head_input(frozen.tokens(pixels)), atol=1e-6)
        assert batch[1].tolist() == store.samples["label"].to_pylist()
        assert batch[1].max() < N_CLASSES


def test_bad_images_of_a_store_take_no_part(tmp_path: Path) -> None:
    from trainer.data import first_samples

    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 18, seed=1)
    frozen = backbone()
    some = first_samples(open_store(str(tmp_path)), 5)
    source = Features(some, task(frozen), frozen, seed=0, augmented=False)
    assert len(source) == 5
    (batch,) = source.batches([4, 0], 8, 0)
    assert batch[1].tolist() == [some.samples["label"].to_pylist()[i] for i in (4, 0)]


def test_evaluation_images_are_read_once_if_their_features_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = backbone()
    counted = CountedImages(21, offset=1000)
    kept, files, _ = run(task(frozen, evaluation=counted), frozen)
    assert counted.n_loads == 21
    monkeypatch.setattr(features_module, "KEEP_NBYTES", 100)
    counted.n_loads = 0
    streamed, streamed_files, _ = run(task(frozen, evaluation=counted), frozen)
    assert counted.n_loads >= 4 * 21
    assert streamed.history == kept.history
    assert streamed_files["head.safetensors"] == files["head.safetensors"]


class CountedImages(FormulaImages):
    n_loads = 0

    def load(self, index: int, draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
        self.n_loads += 1
        return super().load(index, draw)


def test_features_of_a_store_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(FolderObjects(tmp_path), tiny_teacher(), 18, seed=1)
    frozen = backbone()
    monkeypatch.setattr(features_module.os, "sysconf", lambda name: 30)
    source = Features(open_store(str(tmp_path)), task(frozen), frozen, seed=0, augmented=False)
    with pytest.raises(UserError, match=r"18 samples take 1\.3 kB, more than half of the 900 B"):
        next(iter(source.batches([0], 1, 0)))


def test_an_image_that_cannot_be_used_ends_it_with_its_name() -> None:
    class Broken(FormulaImages):
        def load(self, index: int, draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
            if index == 13:
                raise UserError("sample 13 is no image")
            return super().load(index, draw)

    frozen = backbone()
    with pytest.raises(UserError, match="sample 13 is no image"):
        run(task(frozen, train=Broken(30)), frozen)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32(precision: str) -> None:
    frozen = backbone()
    exact, _, _ = run(task(frozen, learning_rate=0.05), frozen)
    rounded, _, _ = run(task(frozen, learning_rate=0.05, precision=precision), frozen)
    assert abs(rounded.last - exact.last) <= 2 / 21


# ---------------------------------------------------------------- what a result says


def test_a_result_says_what_was_probed() -> None:
    frozen = Backbone(teacher=tiny_teacher(), trained=trained_of(tiny_teacher()))
    result, _, _ = run(task(frozen, n_epochs=1), frozen, seed=5)
    assert (result.what, result.label, result.spans, result.run) == ("raptor", "Raptor k=1", ["0-3"], "runs/exact")
    assert (result.seed, result.model_seed, result.run_weights) == (5, 7, "0" * 64)
    assert (result.teacher, result.teacher_weights) == ("fake_vit", tiny_teacher().core_digest)
    assert (result.n_train, result.n_evaluation) == (30, 21)
    assert result.settings["batch_size"] == 8
    assert result.data["train"] == {"formula": [30, 3, 0]}
    assert result.teacher_head is None
    teacher, _, _ = run(task(backbone(), n_epochs=1), backbone())
    assert (teacher.what, teacher.label, teacher.spans, teacher.run) == ("teacher", "fake_vit", [], None)
    assert teacher.model_seed is None


def test_settings_that_make_no_sense_are_listed_at_once() -> None:
    with pytest.raises(UserError) as caught:
        settings(n_epochs=0, learning_rate=-1.0, clip_norm=0.0, schedule="step", precision="int8")
    for part in (
        "n_epochs is 0; expected at least 1",
        "learning_rate is -1.0; expected a number above 0",
        "clip_norm is 0.0; expected a number above 0",
        "schedule is 'step'; expected one of warmup_cosine, constant",
        "precision is 'int8'; expected one of float32, bfloat16, float16",
    ):
        assert part in str(caught.value)

"""D10 and D11: validation accuracy and R2, against closed forms and the teacher itself."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infra.objects import MemoryObjects
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import Span, Store, open_store
from tests.trainer.tiny import CPU, tiny_teacher, with_head, write_tiny
from trainer.block import Block
from trainer.losses import mse
from trainer.raptor import Raptor
from trainer.validation import ValidationSet, _batches, measure_baselines, reference_r2, validate

SPAN = Span(0, 3)


def make_set(store: Store, teacher: Teacher | None, batch_size: int = 8) -> ValidationSet:
    return ValidationSet(store=store, teacher=teacher, batch_size=batch_size, lanes=4)


@pytest.fixture(scope="module")
def adding() -> tuple[Teacher, Store]:
    """fake_vit: teacher block l adds l to every value."""
    teacher, objects = tiny_teacher(), MemoryObjects()
    write_tiny(objects, teacher, 21, seed=0)
    return teacher, open_store(objects)


@pytest.fixture(scope="module")
def real() -> tuple[Teacher, Store]:
    """digits_vit with random weights: twelve true blocks."""
    teacher, objects = with_head(load_teacher("digits_vit", weights="random:0")), MemoryObjects()
    write_tiny(objects, teacher, 30, seed=0)
    return teacher, open_store(objects)


def off_by(error: float):
    """The teacher of `adding`, but for an error that each step adds."""
    return lambda x, layer: x + layer + error


# ---------------------------------------------------------------- D11


def test_perfect_model_has_r2_one_and_epsilon_zero(adding: tuple[Teacher, Store]) -> None:
    teacher, store = adding
    found = validate(off_by(0.0), make_set(store, teacher), SPAN, mse, machine=CPU)
    assert (found.n_samples, found.layers) == (21, [1, 2, 3])
    assert set(found.r2) == {"cls", "registers", "patches", "all"}
    for kind in ("registers", "patches", "all"):
        assert found.r2[kind] == pytest.approx([1, 1, 1], abs=1e-9)
    assert found.epsilon == pytest.approx([0, 0, 0], abs=1e-4)
    assert found.loss == pytest.approx(0, abs=1e-10)


def test_r2_is_about_the_teachers_mean_per_channel(adding: tuple[Teacher, Store]) -> None:
    """Each step adds an error of 0.25, so that layer l is off by 0.25 l everywhere; the truth's variance is numpy's."""
    teacher, store = adding
    found = validate(off_by(0.25), make_set(store, teacher), SPAN, mse, machine=CPU)
    truth = store.read(layers=[1, 2, 3]).astype(np.float64)
    for kind, tokens in {"registers": slice(1, 3), "patches": slice(3, None), "all": slice(None)}.items():
        part = truth[:, :, tokens]
        variance = part.transpose(1, 0, 2, 3).reshape(3, -1, part.shape[-1]).var(axis=1).mean(axis=1)
        expected = [1 - (0.25 * layer) ** 2 / variance[i] for i, layer in enumerate((1, 2, 3))]
        assert found.r2[kind] == pytest.approx(expected, rel=1e-5)
    n_values = truth.shape[2] * truth.shape[3]
    assert found.epsilon == pytest.approx([0.25 * layer * n_values**0.5 for layer in (1, 2, 3)], rel=1e-5)
    assert found.loss == pytest.approx(np.mean([(0.25 * layer) ** 2 for layer in (1, 2, 3)]), rel=1e-5)


def test_mean_of_the_teacher_has_r2_zero(adding: tuple[Teacher, Store]) -> None:
    """The best constant prediction per channel; a token kind's own mean is needed to reach it."""
    teacher, store = adding
    patches = torch.from_numpy(store.read(layers=[1, 2, 3], tokens="patches"))
    means = patches.mean(dim=(0, 2))

    def constant(x: Tensor, layer: int) -> Tensor:
        return means[layer - 1].expand_as(x)

    found = validate(constant, make_set(store, teacher), SPAN, mse, machine=CPU)
    assert found.r2["patches"] == pytest.approx([0, 0, 0], abs=1e-5)
    assert all(value < 0 for value in found.r2["registers"])


def test_a_kind_without_variance(adding: tuple[Teacher, Store]) -> None:
    """fake_vit's CLS is the same for all images: R2 is 1 where it is met exactly, else 0, never infinite."""
    teacher, store = adding
    cls = torch.from_numpy(store.read(layers=[1, 2, 3], samples=[0]))[0]

    def exact(x: Tensor, layer: int) -> Tensor:
        return cls[layer - 1].expand_as(x)

    assert validate(exact, make_set(store, teacher), SPAN, mse, machine=CPU).r2["cls"] == [1.0, 1.0, 1.0]
    assert validate(off_by(0.25), make_set(store, teacher), SPAN, mse, machine=CPU).r2["cls"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 64])
def test_streamed_r2_equals_that_of_all_samples_at_once(adding: tuple[Teacher, Store], batch_size: int) -> None:
    teacher, store = adding
    at_once = validate(off_by(0.3), make_set(store, teacher, 21), SPAN, mse, machine=CPU)
    streamed = validate(off_by(0.3), make_set(store, teacher, batch_size), SPAN, mse, machine=CPU)
    for kind, values in at_once.r2.items():
        assert streamed.r2[kind] == pytest.approx(values, rel=1e-6, abs=1e-9)
    assert streamed.epsilon == pytest.approx(at_once.epsilon, rel=1e-6)
    assert streamed.accuracy == at_once.accuracy


def test_reference_r2_divides_by_the_predictions_variance_about_one_mean() -> None:
    """Where the two differ: truth (0, 2), prediction (0, 4): error 2, the truth's variance 1, the prediction's 4."""
    truth, predicted = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1), torch.tensor([0.0, 4.0]).view(2, 1, 1, 1)
    assert reference_r2(predicted, truth).item() == pytest.approx(1 - 2 / 4, rel=1e-5)  # ours: 1 - 2 / 1 = -1
    # two channels with means 0 and 10, predicted as exactly these means: ours 0, the published one nearly 1
    truth = torch.tensor([[-1.0, 9.0], [1.0, 11.0]]).view(2, 1, 1, 2)
    predicted = torch.tensor([0.0, 10.0]).expand(2, 1, 1, 2)
    assert reference_r2(predicted, truth).item() == pytest.approx(1 - 1 / 25, rel=1e-5)


def test_reference_r2_of_a_constant_has_the_published_guard() -> None:
    """A prediction without variance is divided by 1e-6 alone, as published."""
    truth, predicted = torch.tensor([0.001, -0.001]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    assert reference_r2(predicted, truth).item() == pytest.approx(1 - 1e-6 / 1e-6, abs=1e-5)


def test_reference_r2_equals_its_formula(adding: tuple[Teacher, Store]) -> None:
    """Of a model whose states vary more than the teacher's, so that it matters whose variance is below."""
    teacher, store = adding
    found = validate(lambda x, layer: 1.5 * x + layer, make_set(store, teacher, 64), SPAN, mse, machine=CPU)
    truth = store.read(layers=[0, 1, 2, 3]).astype(np.float64)
    made = truth[:, 0]
    for i, layer in enumerate((1, 2, 3)):
        made = 1.5 * made + layer
        error = ((made - truth[:, layer]) ** 2).mean()
        expected = 1 - error / (made.var() + 1e-6)
        assert found.reference_r2[i] == pytest.approx(expected, rel=1e-5)
        assert abs(expected - (1 - error / (truth[:, layer].var() + 1e-6))) > 0.01, "the two are told apart"


# ---------------------------------------------------------------- D10


def test_teachers_own_blocks_reproduce_its_accuracy_exactly(real: tuple[Teacher, Store]) -> None:
    """The student is the teacher: its roll-out through remaining blocks, norm and head names what the teacher names."""
    teacher, store = real
    labels = store.samples["label"].to_numpy()
    last = torch.from_numpy(store.read(layers=[12])[:, 0])
    own = (teacher.logits(last).argmax(-1).numpy() == labels).mean()
    assert 0 < own < 1

    def student(x: Tensor, layer: int) -> Tensor:
        return teacher.run_blocks(x, layer - 1, layer)

    for span in (Span(0, 7), Span(3, 4), Span(5, 12)):
        found = validate(student, make_set(store, teacher), span, mse, machine=CPU)
        assert found.accuracy == own
        assert found.r2["all"] == pytest.approx([1.0] * len(found.layers), abs=1e-6)
        baselines = measure_baselines(student, make_set(store, teacher), span, machine=CPU)
        assert baselines is not None
        assert (baselines.teacher, baselines.untrained) == (own, own)


def test_accuracy_counts_right_names(real: tuple[Teacher, Store]) -> None:
    """A student that always ends in one image's state is right as often as that image's name comes up."""
    teacher, store = real
    labels = store.samples["label"].to_numpy()
    state = torch.from_numpy(store.read(layers=[4], samples=[2]))[0, 0]
    name = teacher.logits(teacher.run_blocks(state[None], 4, 12)).argmax(-1).item()
    found = validate(lambda x, layer: state.expand_as(x), make_set(store, teacher), Span(2, 4), mse, machine=CPU)
    assert found.accuracy == (labels == name).mean()


def test_baselines_skip_the_blocks_of_the_span(real: tuple[Teacher, Store]) -> None:
    teacher, store = real
    labels = store.samples["label"].to_numpy()
    start = torch.from_numpy(store.read(layers=[2])[:, 0])
    skipped = teacher.logits(teacher.run_blocks(start, 9, 12)).argmax(-1).numpy()
    untrained = Block(64, 2)
    rolled = Raptor([untrained], [Span(2, 9)]).rollout(start, 2, 9)[:, -1].detach()
    named = teacher.logits(teacher.run_blocks(rolled, 9, 12)).argmax(-1).numpy()
    found = measure_baselines(untrained, make_set(store, teacher), Span(2, 9), machine=CPU)
    assert found is not None
    assert found.skipping == (skipped == labels).mean()
    assert found.untrained == (named == labels).mean()


def test_without_a_head_there_is_no_accuracy(adding: tuple[Teacher, Store]) -> None:
    headless, store = load_teacher("fake_vit", weights="random:0"), adding[1]
    for teacher in (headless, None):
        found = validate(off_by(0.0), make_set(store, teacher), SPAN, mse, machine=CPU)
        assert found.accuracy is None
        assert measure_baselines(nn.Identity(), make_set(store, teacher), SPAN, machine=CPU) is None


def test_bfloat16_validation_is_near_float32(real: tuple[Teacher, Store]) -> None:
    teacher, store = real
    torch.manual_seed(0)
    block = Block(64, 2, layer_scale_init=0.1)
    exact = validate(block, make_set(store, teacher), Span(0, 4), mse, machine=CPU)
    rounded = validate(block, make_set(store, teacher), Span(0, 4), mse, machine=CPU, precision="bfloat16")
    assert rounded.epsilon != exact.epsilon
    assert rounded.epsilon == pytest.approx(exact.epsilon, rel=1e-2)


def test_batches_leave_the_callers_gradients_alone(adding: tuple[Teacher, Store]) -> None:
    """Also while a loop over them is under way, or was left in the middle."""
    teacher, store = adding
    batches = _batches(make_set(store, teacher), SPAN, CPU)
    next(batches)
    assert torch.is_grad_enabled()
    batches.close()

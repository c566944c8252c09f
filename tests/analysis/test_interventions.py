"""Disturbed models: contraction at its known rate, swaps among tied blocks to the last bit."""

import numpy as np
import pytest
import torch

from analysis.interventions import run_order, swapped_orders, token_kinds, track_perturbation
from analysis.model_runs import self_correction
from pipeline.teacher import load_teacher

KINDS = {"all": slice(None)}
GROUPS = [[0, 1, 2], [3, 4], [5]]


class Map:
    """A model whose every block is one function."""

    def __init__(self, step, n_blocks: int = 4) -> None:
        self.step, self.n_layers = step, n_blocks + 1

    def run_blocks(self, x, start: int, stop: int):
        for _ in range(start, stop):
            x = self.step(x)
        return x


def directions(*shape: int) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(shape))
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("rho", [0.5, 0.9, 1.3])
@pytest.mark.parametrize("epsilon", [0.01, 0.2])
def test_a_contraction_has_its_rate(rho, epsilon):
    """x -> x* + rho (x - x*): a push at right angles to x* leaves an angle whose tangent shrinks by rho a step."""
    target = directions(3, 2, 16)
    found = track_perturbation(
        Map(lambda x: target + rho * (x - target)), target, 1, epsilon=epsilon, kinds=KINDS, tangential=True
    )
    assert found.start == 1
    np.testing.assert_allclose(found.angles["all"], np.arctan(epsilon * rho ** np.arange(4)), rtol=1e-9)
    assert found.ratio("all") == pytest.approx(np.arctan(epsilon * rho**3) / np.arctan(epsilon))


def test_a_clean_path_that_is_given_is_the_one_that_would_be_run():
    target = directions(3, 2, 16)
    step = lambda x: target + 0.5 * (x - target)  # noqa: E731
    x = directions(3, 2, 16) + 1
    path = [x, step(x), step(step(x)), step(step(step(x)))]
    both = [
        track_perturbation(Map(step), x, 1, epsilon=0.1, kinds=KINDS, clean=clean).angles["all"]
        for clean in (None, path)
    ]
    np.testing.assert_array_equal(both[0], both[1])


def test_blocks_that_do_nothing_keep_the_angle_and_no_push_has_none():
    x = directions(2, 3, 8)
    found = track_perturbation(Map(lambda x: x), x, 0, epsilon=0.1, kinds=KINDS)
    assert found.ratio("all") == pytest.approx(1)
    none = track_perturbation(Map(lambda x: 2 * x), x, 0, epsilon=0.0, kinds=KINDS)
    np.testing.assert_array_equal(none.angles["all"], 0)
    assert np.isnan(none.ratio("all"))


def test_a_push_has_its_length_at_every_token_and_its_seed():
    lengths = torch.tensor([1.0, 100.0])[None, :, None]
    x = directions(5, 2, 400) * lengths
    kinds = {"small": slice(0, 1), "large": slice(1, 2)}
    found = track_perturbation(Map(lambda x: x), x, 0, epsilon=0.05, kinds=kinds)
    # in 400 channels nearly all of a Gaussian push lies at right angles
    np.testing.assert_allclose([found.angles[kind][0] for kind in kinds], np.arctan(0.05), rtol=0.02)
    again = track_perturbation(Map(lambda x: x), x, 0, epsilon=0.05, kinds=kinds)
    other = track_perturbation(Map(lambda x: x), x, 0, epsilon=0.05, kinds=kinds, seed=1)
    assert found.angles["small"][0] == again.angles["small"][0] != other.angles["small"][0]


@pytest.mark.parametrize(("start", "epsilon"), [(-1, 0.1), (4, 0.1), (0, -0.1)])
def test_pushes_that_cannot_be_are_refused(start, epsilon):
    with pytest.raises(ValueError, match="a state from 0 to 3"):
        track_perturbation(Map(lambda x: x), directions(1, 1, 4), start, epsilon=epsilon, kinds=KINDS)


@pytest.mark.parametrize(
    ("has_cls", "n_registers", "n_patches"), [(True, 4, 256), (True, 0, 9), (False, 0, 4), (False, 2, 4)]
)
def test_kinds_part_the_tokens(has_cls, n_registers, n_patches):
    found = token_kinds(has_cls=has_cls, n_registers=n_registers, n_patches=n_patches)
    tokens = np.arange(int(has_cls) + n_registers + n_patches)
    np.testing.assert_array_equal(np.concatenate([tokens[where] for where in found.values()]), tokens)
    assert ("cls" in found, "registers" in found) == (has_cls, n_registers > 0)
    assert len(tokens[found["patches"]]) == n_patches


@pytest.mark.parametrize("n_swapped", [1, 2, 3])
def test_swaps_stay_in_the_phase_or_leave_it(n_swapped):
    group_of = {block: i for i, group in enumerate(GROUPS) for block in group}
    for where in ("intra", "inter"):
        orders = list(swapped_orders(GROUPS, n_swapped, where, n_draws=50, seed=3))
        assert len(orders) == 50
        for order in orders:
            moved = [(place, block) for place, block in enumerate(order) if place != block]
            assert len(moved) == n_swapped
            assert all((group_of[place] == group_of[block]) == (where == "intra") for place, block in moved)
        assert orders == list(swapped_orders(GROUPS, n_swapped, where, n_draws=50, seed=3))
    assert {o[5] for o in swapped_orders(GROUPS, 1, "intra", n_draws=99)} == {5}  # it is alone in its phase


def test_swaps_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="6 layers to swap; 5 have another block for a swap intra"):
        list(swapped_orders(GROUPS, 6, "intra", n_draws=1))
    with pytest.raises(ValueError, match="0 have another block for a swap inter"):
        list(swapped_orders([[0, 1]], 1, "inter", n_draws=1))


def test_tied_blocks_may_be_swapped_and_others_not():
    """A ViT whose blocks are equal within each phase: a swap within changes no bit, one across does (E7)."""
    teacher = load_teacher("fake_vit", weights="random:0")
    blocks = teacher.model.blocks
    groups = [[0], list(range(1, len(blocks)))]
    for block in groups[1][1:]:
        blocks[block].load_state_dict(blocks[groups[1][0]].state_dict())
    side = teacher.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, side, side))).float()
    x = teacher.embed(pixels)
    clean = run_order(teacher, x, tuple(range(len(blocks))))
    assert torch.equal(clean, teacher.layer_states_list(pixels)[-1])
    for order in swapped_orders(groups, 1, "intra", n_draws=5):
        assert torch.equal(run_order(teacher, x, order), clean)
    for order in swapped_orders(groups, 1, "inter", n_draws=5):
        assert not torch.allclose(run_order(teacher, x, order), clean)
    with pytest.raises(ValueError, match="the model has 0 to"):
        run_order(teacher, x, (0, len(blocks)))


def test_a_report_pushes_every_state_by_each_published_size():
    teacher = load_teacher("digits_vit")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 69, 64), dtype=np.float32))
    found = self_correction(teacher, x, seed=0)
    assert sorted((one.start, one.epsilon) for one in found) == [
        (i, e) for i in range(12) for e in (0.01, 0.05, 0.1, 0.2)
    ]

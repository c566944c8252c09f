"""The step benchmark compares equal things, and reports them."""

import pytest
import torch

from benchmarks import step
from benchmarks.reference_step import ReferenceBlock, make_reference_optimizer, reference_loss, reference_step
from trainer.block import Block
from trainer.checkpoint import import_reference
from trainer.losses import mse
from trainer.objectives import annealed_loss
from trainer.optimizer import clip_and_step, make_optimizer


def test_reference_block_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in ReferenceBlock(768, 12).parameters()) == 9_490_976


@pytest.mark.parametrize("forcing", [0.0, 0.5, 1.0])
def test_reference_step_learns_what_ours_learns(forcing):
    torch.manual_seed(3)
    reference = ReferenceBlock(32, 2)
    torch.nn.init.constant_(reference.ls1.gamma, 0.3)
    torch.nn.init.constant_(reference.ls2.gamma, 0.3)
    ours = Block(32, 2)
    ours.load_state_dict(import_reference(reference.state_dict()))
    optimizers = make_reference_optimizer(reference), make_optimizer(ours)
    states = torch.randn(2, 4, 9, 32)
    for _ in range(3):
        loss = annealed_loss(ours, states, 4, mse, forcing)
        loss.backward()
        clip_and_step(optimizers[1], 1.0)
        optimizers[1].zero_grad(set_to_none=True)
        found = reference_step(reference, optimizers[0], states, 4, forcing)
        assert found == pytest.approx(loss.item(), rel=1e-4)
    assert reference_loss(reference, states, 4, forcing).item() < loss.item()


def test_flop_of_a_vit_b_block():
    assert step.block_flop(768, 261) == pytest.approx(5.14e9, rel=1e-3)  # seeds.md 1.5


def test_run_times_every_variant_in_both_objectives():
    result = step.run(step.QUICK)
    assert [(row["objective"], row["step"]) for row in result.rows] == [
        (mode, name) for mode in step.MODES for name in (step.REFERENCE, "ours, float32", "ours, bfloat16")
    ]
    assert all(row["samples/s"] > 0 for row in result.rows)
    assert result.rows[0]["times the reference"] == 1.0


def test_unequal_losses_stop_the_benchmark():
    def variant(name: str, loss: float) -> step.Variant:
        return step.Variant(
            name=name, n_calls=lambda _: 1, loss=lambda _: torch.tensor(loss), step=lambda _: None, tolerance=0.01
        )

    step.check_losses([variant("reference", 1.0), variant("ours", 1.005)], 0.5)
    with pytest.raises(AssertionError, match=r"ours: first loss 1\.5"):
        step.check_losses([variant("reference", 1.0), variant("ours", 1.5)], 0.5)

"""The learning rate of a probe (F2)."""

import pytest
import torch

from trainer.probes.schedule import probe_learning_rate


@pytest.mark.parametrize("base", [1e-4, 1e-3])
def test_the_three_published_values(base: float) -> None:
    """1 % of base at iteration 0, base at 100, 1 % again at the end of the 37,530 iterations of the ImageNet probe."""

    def rate(iteration: int) -> float:
        return probe_learning_rate(iteration, base=base, schedule="warmup_cosine", n_iterations=37_530)

    assert rate(0) == pytest.approx(0.01 * base, rel=1e-12)
    assert rate(100) == pytest.approx(base, rel=1e-12)
    assert rate(37_529) == pytest.approx(0.01 * base, rel=1e-6)
    assert rate(37_530) == pytest.approx(0.01 * base, rel=1e-12)
    assert rate(50) == pytest.approx((0.01 + 0.99 / 2) * base, rel=1e-12)
    assert rate(100 + (37_530 - 100) // 2) == pytest.approx((0.01 + 0.99 / 2) * base, rel=1e-12)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize(("n_iterations", "warmup"), [(300, 100), (37, 5), (101, 100)])
def test_it_is_what_torchs_schedulers_give(n_iterations: int, warmup: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_iterations - warmup, eta_min=1e-5),
        ],
        milestones=[warmup],
    )
    for iteration in range(n_iterations):
        ours = probe_learning_rate(
            iteration, base=1e-3, schedule="warmup_cosine", n_iterations=n_iterations, warmup_iterations=warmup
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), iteration
        optimizer.step()
        schedule.step()


def test_constant_is_constant() -> None:
    rates = {probe_learning_rate(i, base=0.5, schedule="constant", n_iterations=9) for i in range(9)}
    assert rates == {0.5}


def test_a_warm_up_longer_than_the_training_is_cut_off() -> None:
    rates = [probe_learning_rate(i, base=1.0, schedule="warmup_cosine", n_iterations=10) for i in range(10)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.01 + 0.99 * 0.09)


@pytest.mark.parametrize(("iteration", "schedule"), [(-1, "constant"), (0, "cosine")])
def test_what_makes_no_sense_is_refused(iteration: int, schedule: str) -> None:
    with pytest.raises(ValueError, match=rf"iteration {iteration} of schedule '{schedule}'"):
        probe_learning_rate(iteration, base=1.0, schedule=schedule, n_iterations=10)

"""How fast a block learns: our training step for one span against a step in the published style."""

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import PeakMemory, bfloat16_instructions, this_machine
from benchmarks.reference_step import ReferenceBlock, make_reference_optimizer, reference_loss, reference_step
from benchmarks.report import Cell, Goal, Result
from benchmarks.rounds import Rates, measure, run_rounds
from benchmarks.stream_data import make_spec
from storage_schemas.spec import Span
from trainer.arithmetic import block_flop, n_block_calls, stated_peak
from trainer.block import Block
from trainer.checkpoint import import_reference
from trainer.config import Precision
from trainer.feed import Share
from trainer.gradient import Gradient, take_step
from trainer.losses import mse
from trainer.machine import Machine
from trainer.optimizer import make_optimizer
from trainer.recipes import imagenet_stage1
from trainer.workers import Workers

SPAN = Span(0, 7)
REFERENCE = "reference style, float32"
MODES = {"roll-out": 0.0, "half way": 0.5}  # three quarters of a published run are pure roll-out

NOTES = (
    "One step: loss over the whole span, gradients, clipping to norm 1, AdamW; ours is the function of the training "
    "loop. States are on the device already, random, float32. `half way` weighs teacher forcing and roll-out by one "
    "half each, `roll-out` is the second part of a run alone. Ours computes the first transition once for both, so "
    "half way it calls the block 13 times where the reference does 14 transitions.",
    "Before timing, every variant's first loss is held against the reference style's with the same weights.",
    "TFLOP/s counts the products of the block's linear layers and attention, forward once and backward twice, for the "
    "calls that the variant makes. MFU is that over the GPU's dense bfloat16 peak as its vendor states it; on a CPU, "
    "over what one product of the MLP's shape reaches here, alone, in the variant's precision, measured just before.",
    "Peak GB is the memory of a step over what is held between steps; on a CPU, of this process.",
)
GOAL_ON_GPU, GOAL_ON_CPU = 5.0, 3.0  # times the reference style, bfloat16, where the processor has products for it


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """Sizes of this benchmark.

    Attributes:
        span: States of the block.
        dim, n_heads, n_tokens: Of the teacher; ViT-B/14 with 4 registers at 224 px.
        batch_size: Samples of a step; None takes 64 on a GPU and 2 elsewhere.
        n_rounds: Every variant runs once in each.
        least_s: A variant's steps are repeated for at least so long in a round.
    """

    span: Span = SPAN
    dim: int = 768
    n_heads: int = 12
    n_tokens: int = 261
    batch_size: int | None = None
    n_rounds: int = 3
    least_s: float = 2.0


QUICK = StepBenchmark(span=Span(0, 3), dim=32, n_heads=2, n_tokens=9, batch_size=2, n_rounds=1, least_s=0.0)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a step.

    Attributes:
        name: In the table.
        n_calls: Block calls per sample of a step, by mode.
        loss: The loss of the current weights at a teacher-forcing weight.
        step: Takes one step, without waiting for the device if it need not.
        tolerance: Relative difference allowed between its first loss and the reference style's.
        precision: Of its products.
    """

    name: str
    n_calls: Callable[[float], int]
    loss: Callable[[float], Tensor]
    step: Callable[[float], Any]
    tolerance: float
    precision: str = "float32"


def run(config: StepBenchmark) -> Result:
    """Make the variants, check their losses, time all in turn."""
    machine = Machine.found()
    batch_size = config.batch_size or (64 if machine.device.type == "cuda" else 2)
    torch.manual_seed(0)
    reference = ReferenceBlock(config.dim, config.n_heads).to(machine.device)
    nn.init.constant_(reference.ls1.gamma, 0.1)  # as in a trained block: at 1e-5 no loss would show a wrong branch
    nn.init.constant_(reference.ls2.gamma, 0.1)
    # Layers near each other: among unrelated ones, no loss would tell one small branch from another.
    first = torch.randn(batch_size, 1, config.n_tokens, config.dim, device=machine.device)
    states = first + 0.05 * torch.randn(batch_size, config.span.n_states, *first.shape[2:], device=machine.device)
    variants = make_variants(config, machine, reference, states)
    losses = {mode: check_losses(variants, forcing) for mode, forcing in MODES.items()}
    attainable = attainable_flop(config, machine, batch_size)
    peaks = {(v.name, mode): _peak_memory(v, forcing, machine) for v in variants for mode, forcing in MODES.items()}
    n_at_once = 10 if machine.device.type == "cuda" else 1

    def some_steps(variant: Variant, forcing: float) -> int:
        for _ in range(n_at_once):
            variant.step(forcing)
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        return n_at_once * batch_size

    rates = {}
    for mode, forcing in MODES.items():
        steps = {v.name: (lambda v=v, forcing=forcing: some_steps(v, forcing)) for v in variants}
        for name, rate in run_rounds(steps, n_rounds=config.n_rounds, least_s=config.least_s).items():
            rates[name, mode] = rate
    return _result(config, machine, batch_size, variants, rates, peaks, losses, attainable)


def make_variants(config: StepBenchmark, machine: Machine, reference: ReferenceBlock, states: Tensor) -> list[Variant]:
    """The reference style and ours, in float32 and bfloat16; on a GPU also compiled. All begin with equal weights."""
    n_steps, start = config.span.n_states - 1, config.span.start
    optimizer = make_reference_optimizer(reference)
    variants = [
        Variant(
            name=REFERENCE,
            n_calls=lambda forcing: 2 * n_steps if forcing else n_steps,
            loss=lambda forcing: reference_loss(reference, states, start, forcing).detach(),
            step=lambda forcing: reference_step(reference, optimizer, states, start, forcing),
            tolerance=0.0,
        )
    ]
    weights = import_reference(reference.state_dict())
    for precision in get_args(Precision):
        for compiled in (False, True) if machine.device.type == "cuda" else (False,):
            block = Block(config.dim, config.n_heads).to(machine.device)
            block.load_state_dict(weights)
            name = f"ours, {precision}{', compiled' if compiled else ''}"
            variants.append(_ours(name, block, states, config, machine, precision, compiled))
    return variants


def _ours(
    name: str,
    block: Block,
    states: Tensor,
    config: StepBenchmark,
    machine: Machine,
    precision: Precision,
    compiled: bool,
) -> Variant:
    optimizer = make_optimizer(block)
    recipe = dataclasses.replace(
        imagenet_stage1(config.span, make_spec(len(states), config.span), last_layer=12),
        batch_size=len(states),
        precision=precision,
    )
    alone = Workers.alone()
    gradient = Gradient(block, recipe, mse, dataclasses.replace(machine, compile=compiled), alone)
    share = Share(states=states, sample_index=np.arange(len(states)), n_batch=len(states))
    n_steps = config.span.n_states - 1

    def loss(forcing: float) -> Tensor:
        found = gradient.add(share, forcing, noise_key=0)
        optimizer.zero_grad(set_to_none=True)
        return found

    def step(forcing: float) -> None:
        take_step(gradient, optimizer, share, forcing, noise_key=0)

    tolerance = 1e-4 if precision == "float32" else 2e-2
    return Variant(
        name=name,
        n_calls=lambda forcing: n_block_calls(n_steps, forcing),
        loss=loss,
        step=step,
        tolerance=tolerance,
        precision=precision,
    )


def check_losses(variants: list[Variant], forcing: float) -> dict[str, float]:
    """First losses by variant; the reference style comes first.

    Raises:
        AssertionError: One differs from the reference style's by more than its arithmetic explains.
    """
    losses = {variant.name: float(variant.loss(forcing)) for variant in variants}
    expected = losses[variants[0].name]
    for variant in variants:
        difference = abs(losses[variant.name] - expected) / expected
        if difference > variant.tolerance:
            raise AssertionError(f"{variant.name}: first loss {losses[variant.name]}, the reference has {expected}")
    return losses


def attainable_flop(config: StepBenchmark, machine: Machine, batch_size: int) -> dict[str, float]:
    """Floating-point operations per second to compare with, by precision.

    Of a GPU, what its vendor states for bfloat16, where we know it; of a CPU, what a product of the MLP's shape reaches
    in this process.
    """
    if machine.device.type == "cuda":
        stated = stated_peak(this_machine().gpu or "")
        return {} if stated is None else dict.fromkeys(("float32", "bfloat16"), stated)
    found = {}
    for precision in ("float32", "bfloat16"):
        x = torch.randn(batch_size * config.n_tokens, config.dim, dtype=getattr(torch, precision))
        multiply = partial(torch.mm, x, torch.randn(config.dim, 8 * config.dim, dtype=x.dtype))
        multiply()
        rows_per_s = measure(lambda multiply=multiply: len(multiply()), config.least_s / 4)  # type: ignore[misc]
        found[precision] = 2.0 * rows_per_s * config.dim * 8 * config.dim
    return found


def _peak_memory(variant: Variant, forcing: float, machine: Machine) -> float:
    """Peak memory over what is held between steps, in GB, of one step after one that warms up."""
    variant.step(forcing)
    if machine.device.type != "cuda":
        with PeakMemory() as peak:
            variant.step(forcing)
        return peak.nbytes / 1e9
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    variant.step(forcing)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e9


def _result(
    config: StepBenchmark,
    machine: Machine,
    batch_size: int,
    variants: list[Variant],
    rates: dict[tuple[str, str], Rates],
    peaks: dict[tuple[str, str], float],
    losses: dict[str, dict[str, float]],
    attainable: dict[str, float],
) -> Result:
    facts = this_machine()
    rows: list[dict[str, Cell]] = []
    for mode, forcing in MODES.items():
        base = rates[REFERENCE, mode].median
        for variant in variants:
            rate = rates[variant.name, mode]
            flop_per_s = rate.median * 3 * variant.n_calls(forcing) * block_flop(config.dim, config.n_tokens)
            rows.append(
                {
                    "objective": mode,
                    "step": variant.name,
                    "samples/s": rate.median,
                    "rounds": rate.spread,
                    "times the reference": rate.median / base,
                    "TFLOP/s": flop_per_s / 1e12,
                    "MFU": flop_per_s / attainable[variant.precision] if attainable else None,
                    "peak GB": peaks[variant.name, mode],
                }
            )

    def times(name: str, mode: str) -> float:
        return rates[name, mode].median / rates[REFERENCE, mode].median

    on_gpu, instructions = machine.device.type == "cuda", bfloat16_instructions()
    goals = [
        Goal(what=f"ours in float32 / reference style, {mode}", found=times("ours, float32", mode), at_least=1.0)
        for mode in MODES
    ]
    if on_gpu or instructions:
        best = "ours, bfloat16, compiled" if on_gpu else "ours, bfloat16"
        at_least = GOAL_ON_GPU if on_gpu else GOAL_ON_CPU
        goals += [
            Goal(what=f"{best} / reference style, {mode}", found=times(best, mode), at_least=at_least) for mode in MODES
        ]
    has = "none" if not instructions else ", ".join(instructions)
    about_cpu = f"Instructions of this CPU that multiply bfloat16 numbers: {has}." + (
        "" if instructions else " Without them bfloat16 has no goal here: torch converts its operands back and forth."
    )
    return Result(
        name="step",
        title=f"Training step of one block, span {config.span}, {config.dim} channels, {config.n_tokens} tokens, "
        f"batch {batch_size}, on {facts.gpu or 'the CPU'}",
        machine=facts,
        settings={**asdict(config), "span": str(config.span), "batch_size": batch_size},
        rows=rows,
        goals=goals if config.dim == 768 else (),
        notes=NOTES if on_gpu else (*NOTES, about_cpu),
        details={
            "samples_per_s": {f"{name}, {mode}": rate.per_s for (name, mode), rate in rates.items()},
            "first_losses": losses,
            "attainable_flop_per_s": attainable,
        },
    )

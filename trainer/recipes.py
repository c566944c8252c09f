"""Recipes: functions that return a whole TrainConfig. The command line picks one and a few locations."""

import dataclasses
from collections.abc import Callable, Sequence

from storage_schemas import Span, StoreSpec
from trainer.config import TokenWeights, TrainConfig

_STAGE1_TO_THE_END = TokenWeights(cls=0.34, registers=0.33, patches=0.33)  # of spans that reach the last layer
_DIGITS_DIM = 64
_STAGE2 = TokenWeights(cls=0.45, registers=0.10, patches=0.45)

Recipe = Callable[..., TrainConfig]
"""Of stage 1: recipe(span, spec, last_layer, seed=..., n_steps=...): spec is the store's, last_layer the teacher's.
Of stage 2: the same with all spans in the place of one.
"""


def digits_stage1(span: Span, spec: StoreSpec, last_layer: int, *, seed: int = 0, n_steps: int = 600) -> TrainConfig:
    """Stage 1 on the built-in digits and digits_vit, the teacher that ships: 64 channels, 12 teacher blocks.

    Expect, for span 0-7 rolled out through the remaining teacher blocks, 98.6, 99.2 and 98.6 % (seeds 0, 1, 2) of the
    teacher's 99.4 % top-1 on the 359 held-out digits; an untrained block and skipping blocks 1 to 7 both leave 27 %.
    R2 of layer 7: 0.96 over all tokens. 600 steps of 32, 13 passes: about four minutes in one thread of a busy
    machine, less on two idle cores.

    The published values but for these: a peak learning rate of 4e-3 (the block has 70 thousand parameters, not 9.5
    million) and batches of 32. As published, a span that reaches the last layer weighs token kinds equally; in others
    that gave better CLS and lower accuracy (docs/decisions/030-digits-recipe.md). For blocks that go on to stage 2,
    STEPS=200 is enough (docs/decisions/060-digits-raptor.md).

        make extract && make train BLOCK=0-7
    """
    return TrainConfig(
        recipe="digits_stage1",
        spans=(span,),
        seed=seed,
        n_heads=2,
        depth_scaling=True,
        loss=_STAGE1_TO_THE_END if span.stop == last_layer else "mse",
        noise=0.0,
        n_steps=n_steps,
        batch_size=32,
        lanes=64,
        peak_learning_rate=4e-3,
        final_learning_rate=1e-6,
        warmup_steps=n_steps // 30,
        teacher_forcing_steps=n_steps // 4,
        teacher_forcing_minimum=0.0,
        weight_decay=1e-4,
        clip_norm=1.0,
        precision="float32",
        log_every=20,
        validate_every=100,
        validation_samples=512,
        checkpoint_every=100,
    )


def digits_stage2(
    spans: Sequence[Span], spec: StoreSpec, last_layer: int, *, seed: int = 0, n_steps: int = 300
) -> TrainConfig:
    """Stage 2 on the built-in digits: the blocks of digits_stage1, trained together over the whole depth.

    Expect, of the teacher's 99.4 % top-1 on the 359 held-out digits, by its own head on the rolled-out last state,
    97.9, 98.8 and 99.2 % (± 0.7, 0.3, 0.5 over seeds 0, 1, 2) with one, two and three blocks cut by phases, each
    trained alone for 200 steps of 16 before; without this stage 93.8, 96.7 and 96.3 %. R2 of layer 12 of CLS,
    registers and patches with three: 0.97, 0.96, 0.94. 65 s of CPU time, and as much for stage 1 of all blocks
    (docs/decisions/060-digits-raptor.md).

    The published weights of token kinds; batches of 16, whose steps cost half of what those of 32 do on CPUs.

        make train BLOCK=all BLOCKS=0-3,3-7,7-12 STEPS=200 && make raptor BLOCKS=0-3,3-7,7-12

    That trains the blocks on batches of 32, twice the samples of the figures above.
    """
    return dataclasses.replace(
        digits_stage1(spans[0], spec, last_layer, seed=seed, n_steps=n_steps),
        recipe="digits_stage2",
        spans=tuple(spans),
        loss=_STAGE2,
        batch_size=16,
        teacher_forcing_steps=0,
    )


def imagenet_stage1(
    span: Span, spec: StoreSpec, last_layer: int, *, seed: int = 100, n_steps: int = 312_500
) -> TrainConfig:
    """Stage 1 with the paper's values: one block of a Raptor of DINOv2 ViT-B/14 on the ImageNet-1k train split.

    arXiv:2512.19941; KempnerInstitute/raptor:raptor/runs (seeds.md 1.7 to 1.9). Published seeds: 100, 106, 112 for
    span 0-7, 101, 107, 113 for 7-10, 104, 110, 116 for 10-12. Spans that reach the last layer weigh CLS, registers and
    patches by 0.34, 0.33, 0.33; the others use the plain mean squared error.

    312,500 steps of 64 samples are 15.6 passes over 1,281,167 samples: 64 TB of float16 states for span 0-7. Their
    own step, float32 on one H100, took a day or more; ours was not yet timed on ImageNet. Expect, once three blocks
    (0-7, 7-10, 10-12) have gone through stage 2, 98 % of the teacher's ImageNet accuracy, as published.

        make train BLOCK=0-7 STORE=/data/imagenet
    """
    return TrainConfig(
        recipe="imagenet_stage1",
        spans=(span,),
        seed=seed,
        n_heads=_n_heads(spec.dim),
        depth_scaling=True,
        loss=_STAGE1_TO_THE_END if span.stop == last_layer else "mse",
        noise=0.0,
        n_steps=n_steps,
        batch_size=64,
        lanes=64,
        peak_learning_rate=3e-4,
        final_learning_rate=1e-6,
        warmup_steps=n_steps * 4 // 125,  # 10,000 of 312,500
        teacher_forcing_steps=n_steps // 4,
        teacher_forcing_minimum=0.0,
        weight_decay=1e-4,
        clip_norm=1.0,
        precision="bfloat16",  # published: float32
        log_every=100,
        validate_every=5_000,
        validation_samples=2_048,
        checkpoint_every=5_000,
    )


def imagenet_stage2(
    spans: Sequence[Span], spec: StoreSpec, last_layer: int, *, seed: int = 1101, n_steps: int = 312_500
) -> TrainConfig:
    """Stage 2 with the paper's values: the blocks of imagenet_stage1 as one Raptor, rolled out over the whole depth.

    arXiv:2512.19941; KempnerInstitute/raptor:raptor/runs (seeds.md 1.9). Roll-out alone, CLS, registers and patches
    weighed by 0.45, 0.10, 0.45, a fresh AdamW and the whole schedule of stage 1 once more. `trainer.published_runs` has
    the seeds and which blocks each Raptor was made of; REPLICA=1, 2 or 3 chooses them.

    312,500 steps of 64 samples read all states of the store 15.6 times (104 TB in float16), and their arithmetic is
    3.7 EFLOP for ViT-B/14: published, up to 3 days on one H100 in float32; ours was not yet timed on ImageNet. Expect,
    as published, ImageNet top-1 of 81.2, 83.0 and 83.2 % by a linear probe for 2, 3 and 4 blocks, of the teacher's
    84.5; with the head that came with the teacher 82.4 % for three blocks, of which stage 2 brings 5.7 points.

        make train BLOCK=all BLOCKS=0-7,7-10,10-12 REPLICA=1 STORE=/data/imagenet
        make raptor BLOCKS=0-7,7-10,10-12 REPLICA=1 STORE=/data/imagenet
    """
    return dataclasses.replace(
        imagenet_stage1(spans[0], spec, last_layer, seed=seed, n_steps=n_steps),
        recipe="imagenet_stage2",
        spans=tuple(spans),
        loss=_STAGE2,
        teacher_forcing_steps=0,
    )


def _n_heads(dim: int) -> int:
    """One per 64 channels, as published; where that does not divide them, the next smaller number that does."""
    return next(n for n in range(max(1, dim // 64), 0, -1) if dim % n == 0)


RECIPES: dict[int, dict[str, Recipe]] = {
    1: {"digits_stage1": digits_stage1, "imagenet_stage1": imagenet_stage1},
    2: {"digits_stage2": digits_stage2, "imagenet_stage2": imagenet_stage2},
}
"""By stage and name."""


def recipe_for(spec: StoreSpec, stage: int = 1) -> str:
    """Name of the recipe that fits a store: the digits' own for digits_vit and for its Raptors, else the paper's.

    The store of a Raptor names its run in the place of an architecture; one of digits_vit is known by its channels,
    which the digits' learning rate was chosen for.
    """
    of_digits = spec.teacher == "digits_vit" or (spec.teacher.startswith("run:") and spec.dim == _DIGITS_DIM)
    return f"{'digits' if of_digits else 'imagenet'}_stage{stage}"

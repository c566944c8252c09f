"""From finished stage-1 runs to what stage 2 begins with, or a message that lists all that is wrong with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infra.console import UserError
from infra.objects import open_objects
from storage_schemas import Span
from trainer.block import Block
from trainer.config import TrainConfig
from trainer.data import TrainingData
from trainer.run_files import RunFiles, differences
from trainer.trained import Trained, read_trained


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the block of a span comes from.

    Attributes:
        span: Of the block.
        location: Its RUN.
        command: What trains it, for messages.
    """

    span: Span
    location: str
    command: str


def read_blocks(
    sources: Sequence[Source], config: TrainConfig, data: TrainingData, *, other_store: bool = False
) -> list[Trained]:
    """The stage-1 blocks that a joint training begins with, in the order of its spans.

    Args:
        sources: One for each of the config's spans.
        config: Of the joint training.
        data: What it reads.
        other_store: Take blocks that were trained on another store too.

    Raises:
        UserError: Lists every run that is missing, unfinished or does not fit, and what to do.
    """
    blocks, problems = [], []
    for source in sources:
        try:
            block = _read(source)
        except UserError as error:
            problems.append(str(error))
            continue
        blocks.append(block)
        problems += _misfits(block, source, config, data, other_store)
    if problems:
        raise UserError("\n  ".join(["make raptor cannot start:", *problems]))
    return blocks


def joint_weights(blocks: Sequence[Trained]) -> dict[str, Tensor]:
    """Their weights as the model of a joint training names them."""
    if len(blocks) == 1:  # of which `make_model` makes a block
        return dict(blocks[0].raptor.blocks[0].state_dict())
    return {
        f"blocks.{index}.{name}": value
        for index, block in enumerate(blocks)
        for name, value in block.raptor.blocks[0].state_dict().items()
    }


def blocks_identity(blocks: Sequence[Trained]) -> list[dict[str, Any]]:
    """What of them belongs to the identity of the joint run, as JSON values; not where they lay."""
    return [{"span": str(block.spans[0]), "seed": block.seed, "sha256": block.weights_digest} for block in blocks]


def _read(source: Source) -> Trained:
    run = RunFiles(open_objects(source.location))
    config = run.read_config()
    if config is None:
        raise UserError(f"block {source.span}: {source.location} holds no run: {source.command}")
    if run.read_result() is None:
        at = f"saved at step {run.saved_step():,} of {_n_steps(config)}"
        raise UserError(f"block {source.span}: {source.location} is not finished ({at}): {source.command}")
    return read_trained(source.location)


def _n_steps(config: dict[str, Any]) -> str:
    n_steps = config.get("train", {}).get("n_steps")
    return f"{n_steps:,}" if isinstance(n_steps, int) else "?"


def _misfits(
    block: Trained, source: Source, config: TrainConfig, data: TrainingData, other_store: bool
) -> Iterator[str]:
    """Why a finished run is not the block of this joint training."""
    where = f"block {source.span}: {source.location}"
    if block.spans != (source.span,):
        found = ", ".join(map(str, block.spans))
        yield f"{where} is of {found}: give a run of {source.span} in its place; RUNS= has the order of BLOCKS="
        return
    asked = Block(data.train.spec.dim, config.n_heads, depth_scaling=config.depth_scaling).arguments
    for text in differences(block.result["blocks"][0], asked):
        yield f"{where} has another shape: {text}: {source.command}"
    theirs, ours = str(block.config["data"]["train"]), str(data.identity["train"])
    if theirs == ours:
        return
    if not other_store:
        yield (
            f"{where} was trained on another store ({theirs:.16}) than {data.train.location} ({ours:.16}): "
            f"{source.command}, or, where both hold the same images, OTHER_STORE=1"
        )
    if block.teacher_digest != (teacher := str(data.identity["teacher"])):
        yield (
            f"{where} was trained on another teacher or with another HEAD ({block.teacher_digest:.16}) than this "
            f"command finds in {data.train.location} ({teacher:.16})"
        )

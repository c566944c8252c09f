"""Published weights as a finished RUN, that probes, tables, stage 2 and extraction take like one trained here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from infra.console import UserError
from pipeline.teacher import Teacher
from storage_schemas import Span
from storage_schemas.documents import sha256
from trainer import losses
from trainer.block import Block
from trainer.checkpoint import import_reference, load_weights_file
from trainer.data import TrainingData
from trainer.machine import Machine
from trainer.raptor import Raptor
from trainer.raptor_teacher import save_ends
from trainer.run_files import RunFiles
from trainer.validation import ValidationSet, validate

RECIPE = "imported"
CHANNELS_PER_HEAD = 64  # of published blocks; the number of heads is not in the weights
#: How the published Raptors of so many blocks divide ViT-B's twelve, by their thresholds.
PUBLISHED_SPANS = {2: "0-7,7-12", 3: "0-7,7-10,10-12", 4: "0-4,4-7,7-10,10-12"}
_BATCH_SIZE, _LANES = 64, 8


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Weights from elsewhere, checked.

    Attributes:
        model: A Block for one span, a Raptor for several.
        spans: One per block.
        about: Where they come from, as JSON values: the file's name, not its place, and a digest of the weights.
    """

    model: Block | Raptor
    spans: tuple[Span, ...]
    about: Mapping[str, Any]

    @property
    def blocks(self) -> Sequence[Block]:
        found = self.model.blocks if isinstance(self.model, Raptor) else [self.model]
        return [block for block in found if isinstance(block, Block)]


def read_published(location: str, spans: Sequence[Span], n_heads: int | None = None) -> Imported:
    """A published stage-1 block or Raptor from a file.

    Args:
        location: Of the state dict: as for `trainer.checkpoint.load_weights_file`.
        spans: One per block, in order.
        n_heads: Of each block; None is one per 64 channels, as published.

    Raises:
        UserError: The file cannot be read, or holds pickled code, or other weights; the spans do not fit its blocks.
    """
    weights = import_reference(load_weights_file(location))
    parts = _by_block(weights)
    if len(parts) != len(spans):
        known = PUBLISHED_SPANS.get(len(parts))
        held = "1 block" if len(parts) == 1 else f"{len(parts)} blocks"
        example = f"; as published, BLOCKS={known}" if known else ", such as BLOCKS=0-7"
        raise UserError(f"{location} holds {held}, BLOCKS names {len(spans)}: give one span for each{example}")
    blocks = [_make_block(part, location, n_heads) for part in parts]
    for block, part in zip(blocks, parts):
        block.load_state_dict(part)
    model = blocks[0] if len(blocks) == 1 else Raptor(blocks, spans)
    digest = sha256(tensors_to_bytes({name: value.contiguous() for name, value in weights.items()}))
    about = {"file": PurePosixPath(location).name, "sha256": digest}
    return Imported(model=model.eval().requires_grad_(False), spans=tuple(spans), about=about)


def check_fits(imported: Imported, teacher: Teacher) -> None:
    """Refuse blocks that cannot run on this teacher's states.

    Raises:
        UserError: Lists why.
    """
    dim, last = imported.blocks[0].dim, teacher.n_layers - 1
    problems = []
    if dim != teacher.dim:
        problems.append(f"its blocks have {dim} channels, {teacher.name} has {teacher.dim}: give their teacher")
    if imported.spans[-1].stop > last:
        problems.append(f"BLOCKS reaches state {imported.spans[-1].stop}, {teacher.name} has states 0 to {last}")
    if problems:
        raise UserError("\n  ".join([f"{imported.about['file']} does not fit:", *problems]))


def run_identity(imported: Imported, data: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What the RUN is claimed for: as for a training, with the weights in the place of its settings."""
    train = {
        "recipe": RECIPE,
        "seed": seed,
        "spans": [str(span) for span in imported.spans],
        "n_heads": imported.blocks[0].arguments["n_heads"],  # not in the weights: given, and maybe given wrong at first
    }
    return {"train": train, "data": dict(data), "imported": {"sha256": imported.about["sha256"]}}


def identity_without_store(teacher: Teacher) -> dict[str, Any]:
    """What is known of the data of a training if only its teacher is."""
    return {"train": "unknown", "validation": "unknown", "teacher": teacher.weights_digest}


def write_run(
    imported: Imported, run: RunFiles, teacher: Teacher, data: TrainingData | None, machine: Machine
) -> dict[str, Any]:
    """Write teacher, weights and result of a RUN that was claimed; returns what the result says.

    Args:
        data: A store to validate on; None for none.
    """
    model = imported.model.to(machine.device)
    validation = None
    if data is not None:
        stored = ValidationSet(store=data.validation, teacher=teacher, batch_size=_BATCH_SIZE, lanes=_LANES)
        span = Span(imported.spans[0].start, imported.spans[-1].stop)
        validation = asdict(validate(model, stored, span, losses.mse, machine=machine, precision="float32"))
    result = {
        "validation": validation,
        "baselines": None,
        "final_loss": None,
        "blocks": [block.arguments for block in imported.blocks],
        "spans": [str(span) for span in imported.spans],
        "teacher": teacher.name,
        "teacher_weights": teacher.core_digest,
        "last_layer": teacher.n_layers - 1,
        "imported": dict(imported.about),
    }
    save_ends(run, teacher)
    run.finish({name: value.cpu() for name, value in model.state_dict().items()}, result)
    return result


def _by_block(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    if not any(name.startswith("blocks.") for name in weights):
        return [dict(weights)]
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in weights.items():
        _, index, rest = name.split(".", 2)
        parts.setdefault(int(index), {})[rest] = value
    return [parts[index] for index in sorted(parts)]


def _make_block(part: Mapping[str, Tensor], location: str, n_heads: int | None) -> Block:
    """A block of the shape that weights have; `import_reference` has seen that one has it."""
    dim, hidden = part["mlp.contract.weight"].shape
    if n_heads is None and dim % CHANNELS_PER_HEAD:
        raise UserError(
            f"{location} has blocks of {dim} channels, and the number of their heads is not in the weights; published "
            f"ones have one per {CHANNELS_PER_HEAD} channels. Give HEADS=n"
        )
    try:
        return Block(
            dim,
            dim // CHANNELS_PER_HEAD if n_heads is None else n_heads,
            mlp_ratio=hidden / dim,
            depth_scaling="depth.enter.weight" in part,
            swiglu=part["mlp.expand.weight"].shape[0] == 2 * hidden,
        )
    except ValueError as error:
        raise UserError(f"HEADS={n_heads}: {error}") from error

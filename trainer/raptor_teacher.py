"""A Raptor as a teacher: the embedding, final norm and head of the teacher it was trained on, its blocks between.

So its own states can be extracted, verified and repaired like any teacher's, and trained on, probed and analysed. State
0 is the teacher's; every later one is rolled out from the prediction before it.

A run keeps the ends of its teacher beside its weights, below teacher/: everything but the teacher blocks, which the
Raptor replaces. For ViT-B/14 that is 9 MB and 6 of a head, not 343. So a RUN alone is enough to extract and to probe,
at any image size.

This module is the kind "run" of `pipeline.teacher_kinds`: `load_teacher("run:<RUN>")` and the files of a store made
with it lead here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from infra.console import UserError
from infra.objects import open_objects
from pipeline.checkpoints import make_linear, read_linear_head
from pipeline.preprocess import Preprocessing
from pipeline.teacher import (
    CONFIG_FILE,
    HEAD_FILE,
    POSITIONS_FILE,
    WEIGHTS_FILE,
    Loaded,
    Teacher,
    TeacherError,
    assemble,
    make_skeleton,
    resize,
    weights_digest_of,
)
from storage_schemas import Span
from storage_schemas.documents import sha256
from trainer.block import Block
from trainer.raptor import Raptor
from trainer.run_files import RunFiles
from trainer.trained import Trained, read_trained

KIND = "run"
PREFIX = f"{KIND}:"
_ENDS = "ends"
_FORMAT_VERSION = 1
_BLOCKS = "blocks."
_TIED_FILES = (WEIGHTS_FILE, HEAD_FILE, POSITIONS_FILE)


# ---------------------------------------------------------------- the model


class Step(nn.Module):
    """What stands in the place of one teacher block: a block of the Raptor, for one target layer.

    Args:
        block: Shared by all steps of its span.
        layer: Target layer.
        owns: Whether the block's weights are named as this step's. One step of a span does, so that each weight is
            saved, counted and moved once.
    """

    def __init__(self, block: Block, layer: int, *, owns: bool) -> None:
        super().__init__()
        self._tied = (block,)  # in a tuple torch does not see it
        if owns:
            self.block = block
        self.layer = layer
        self.n_heads = int(block.arguments["n_heads"])

    def forward(self, x: Float[Tensor, "batch token dim"], *_: Any, **__: Any) -> Float[Tensor, "batch token dim"]:
        """State `layer` from state `layer - 1`. What a teacher's blocks are given beside (rotary tables) is ignored."""
        return self._tied[0](x, self.layer)


def make_steps(raptor: Raptor) -> nn.Sequential:
    """A Raptor as the blocks of a ViT, one for each layer after 0."""
    starts = [span.start for span in raptor.spans]
    steps = []
    for layer in range(1, raptor.span.stop + 1):
        block = raptor.blocks[raptor.block_index(layer)]
        assert isinstance(block, Block)
        steps.append(Step(block, layer, owns=layer - 1 in starts))
    return nn.Sequential(*steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class RaptorTeacher(Teacher):
    """A teacher whose blocks are a Raptor's.

    Attributes:
        architecture: Whose embedding, norm and head it has: a name for `pipeline.teacher.make_skeleton`.
        raptor: Its blocks.
        taught_by: core_digest of the teacher that the Raptor was trained on.
    """

    architecture: str
    raptor: Raptor = field(repr=False)
    taught_by: str

    def to_files(self) -> dict[str, bytes]:
        """As Teacher.to_files; each block of the Raptor is in them once."""
        files = super().to_files()
        config = {
            **json.loads(files[CONFIG_FILE]),
            "kind": KIND,
            "architecture": self.architecture,
            "taught_by": self.taught_by,
            "blocks": [block.arguments for block in self.raptor.blocks],
            "spans": [str(span) for span in self.raptor.spans],
        }
        return {**files, CONFIG_FILE: _document(config)}


# ---------------------------------------------------------------- the ends of a teacher, in a RUN


def ends_files(teacher: Teacher) -> dict[str, bytes]:
    """Everything of a teacher but its blocks, as small files: what a RUN keeps of it below teacher/."""
    ends = {name: tensor for name, tensor in teacher.model.state_dict().items() if not name.startswith(_BLOCKS)}
    files = {
        WEIGHTS_FILE: tensors_to_bytes({name: tensor.contiguous().cpu() for name, tensor in ends.items()}),
        **teacher.side_files(),
    }
    config = {
        "format_version": _FORMAT_VERSION,
        "kind": _ENDS,
        "name": teacher.name,
        "architecture": teacher.architecture if isinstance(teacher, RaptorTeacher) else teacher.name,
        "compute": teacher.compute,
        "preprocessing": teacher.preprocessing.to_dict(),
        "pixel_size": list(teacher.pixel_size),
        "n_layers": teacher.n_layers,
        "core_digest": teacher.core_digest,
        "weights_digest": teacher.weights_digest,
        "sha256": {name: sha256(data) for name, data in files.items()},
    }
    return {**files, CONFIG_FILE: _document(config)}


def save_ends(run: RunFiles, teacher: Teacher | None) -> None:
    """Keep the ends of its teacher in a RUN, if there is a teacher."""
    if teacher is not None:
        run.write_teacher_files(ends_files(teacher))


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What a RUN keeps of its teacher.

    Attributes:
        config: What `ends_files` wrote.
        weights: Of the model, but for its blocks.
        head: If it had one.
        positions: As Teacher.positions.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    head: nn.Linear | None
    positions: Tensor | None

    @property
    def core_digest(self) -> str:
        """Of the whole teacher (`Teacher.core_digest`): the same at every image size, with and without a head."""
        return str(self.config["core_digest"])


def read_ends(run: RunFiles) -> Ends | None:
    """What a RUN keeps of its teacher; None if it keeps nothing.

    Raises:
        UserError: The files are damaged.
    """
    files = run.read_teacher_files()
    if not files:
        return None
    try:
        config = json.loads(files[CONFIG_FILE])
        if (config["format_version"], config["kind"]) != (_FORMAT_VERSION, _ENDS):
            raise ValueError(f"they are of format {config['format_version']}, kind {config['kind']}")
        changed = [name for name in _TIED_FILES if _digest_of(files, name) != config["sha256"].get(name)]
        if changed:
            raise ValueError(f"{', '.join(changed)} is not what was written")
        return Ends(
            config=config,
            weights=tensors_from_bytes(files[WEIGHTS_FILE]),
            head=make_linear(**tensors_from_bytes(files[HEAD_FILE])) if HEAD_FILE in files else None,
            positions=tensors_from_bytes(files[POSITIONS_FILE])["positions"] if POSITIONS_FILE in files else None,
        )
    except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{run.location}: the files of its teacher cannot be used ({type(error).__name__}: {error}). Delete "
            f"{run.location}/teacher and run the same training command again, which writes them anew"
        ) from error


# ---------------------------------------------------------------- making one


def raptor_teacher(
    location: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    head: str | None = None,
    device: torch.device | str = "cpu",
    compute: str | None = None,
) -> RaptorTeacher:
    """The Raptor of a finished RUN as a teacher, from nothing but the RUN.

    Args:
        location: A RUN: a folder or s3://bucket/prefix.
        image_size: As for pipeline.teacher.load_teacher; None is that of the images it was trained on.
        head: File with a linear classifier of 2 dim values, in the place of the teacher's own.
        device: Where it shall run.
        compute: One of pipeline.teacher.COMPUTES; None is the teacher's.

    Raises:
        UserError: There is no finished run; its spans are not the whole depth of its teacher; or the RUN does not keep
            its teacher's ends.
    """
    trained = read_trained(location)
    ends = read_ends(RunFiles(open_objects(location)))
    problems = _depth_problems(trained, ends)
    if problems:
        raise UserError("\n  ".join([f"{location} cannot be a teacher:", *problems]))
    assert ends is not None
    config = ends.config
    try:
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        loaded = _loaded(config, preprocessing, trained.raptor, ends.weights, ends.positions)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # load_state_dict raises RuntimeError
        raise UserError(f"{location}: its weights and its teacher's do not fit each other ({error})") from error
    linear = ends.head if head is None else read_linear_head(head, 2 * loaded.model.embed_dim)
    return _assembled(
        f"{PREFIX}{run_name(location)}", loaded, trained.raptor, linear, config["architecture"], ends.core_digest,
        image_size=image_size, device=device, compute=compute or config["compute"],
    )  # fmt: skip


def load(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    head: str | None = None,
    device: torch.device | str = "cpu",
    compute: str | None = None,
) -> RaptorTeacher:
    """`raptor_teacher` of "run:<RUN>"."""
    location = name.removeprefix(PREFIX)
    return raptor_teacher(location, image_size=image_size, head=head, device=device, compute=compute)


def from_files(
    files: Mapping[str, bytes],
    device: torch.device | str = "cpu",
    compute: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> RaptorTeacher:
    """The Raptor that `RaptorTeacher.to_files` described; else as pipeline.teacher.teacher_from_files.

    Raises:
        TeacherError: A file is missing or damaged, or the weights are not the ones the config names.
    """
    try:
        config = json.loads(files[CONFIG_FILE])
        if config["format_version"] != _FORMAT_VERSION:
            raise TeacherError(
                f"teacher files have format {config['format_version']}, this code reads {_FORMAT_VERSION}"
            )
        spans = [Span.parse(text) for text in config["spans"]]
        raptor = Raptor([Block(**arguments) for arguments in config["blocks"]], spans)
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        positions = tensors_from_bytes(files[POSITIONS_FILE])["positions"] if POSITIONS_FILE in files else None
        weights = tensors_from_bytes(files[WEIGHTS_FILE])
        loaded = _loaded(config, preprocessing, raptor, weights, positions)
        head = make_linear(**tensors_from_bytes(files[HEAD_FILE])) if HEAD_FILE in files else None
        name, expected = str(config["name"]), config["weights_digest"]
        about = config["architecture"], config["taught_by"]
        compute = compute or config["compute"]
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise TeacherError(f"the teacher's files cannot be used: {type(error).__name__}: {error}") from error
    found = weights_digest_of(loaded.model, head)
    if found != expected:
        raise TeacherError(f"the teacher's weights have digest {found}, its config says {expected}")
    return _assembled(name, loaded, raptor, head, *about, image_size=image_size, device=device, compute=compute)


def run_name(location: str) -> str:
    """Last part of a RUN's location."""
    return PurePosixPath(location.rstrip("/")).name


def _loaded(
    config: Mapping[str, Any],
    preprocessing: Preprocessing,
    raptor: Raptor,
    weights: Mapping[str, Tensor],
    positions: Tensor | None,
) -> Loaded:
    """The architecture with the Raptor for its blocks, and the weights of its ends, or of all of it."""
    side = preprocessing.image_size
    height, width = config.get("pixel_size", (side, side))
    model = make_skeleton(config["architecture"], (height, width))
    model.blocks = make_steps(raptor)
    blocks = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_BLOCKS)}
    model.load_state_dict({**blocks, **weights})
    return Loaded(model=model, preprocessing=preprocessing, pixel_size=(height, width), positions=positions)


def _assembled(
    name: str,
    loaded: Loaded,
    raptor: Raptor,
    head: nn.Linear | None,
    architecture: str,
    taught_by: str,
    *,
    image_size: int | tuple[int, int] | None,
    device: torch.device | str,
    compute: str,
) -> RaptorTeacher:
    if image_size is not None:
        loaded = resize(name, loaded, (image_size, image_size) if isinstance(image_size, int) else image_size)
    teacher = assemble(name, loaded, head, device, compute)
    fields = {name: getattr(teacher, name) for name in Teacher.__dataclass_fields__}
    return RaptorTeacher(**fields, architecture=architecture, raptor=raptor, taught_by=taught_by)


def _depth_problems(trained: Trained, ends: Ends | None) -> list[str]:
    span = trained.raptor.span
    problems = [f"it begins at state {span.start}; expected state 0, the embedding"] if span.start else []
    if ends is None:
        problems.append(
            "it does not keep the ends of its teacher (teacher/config.json): run the command that trained it again, "
            "which adds them to a finished run; an imported one needs STORE= or TEACHER="
        )
    elif span.stop != ends.config["n_layers"] - 1:
        problems.append(
            f"it ends at state {span.stop}; {ends.config['name']} has states 0 to {ends.config['n_layers'] - 1}: train "
            "the other spans too, and join them with make raptor"
        )
    return problems


def _digest_of(files: Mapping[str, bytes], name: str) -> str | None:
    return sha256(files[name]) if name in files else None


def _document(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

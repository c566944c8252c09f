"""The teacher: a frozen vision transformer and every state of its residual stream, by name or from its files.

What others need of it is named here: the model's architectures and weights are in `pipeline.vit_models`, what it
computes in `pipeline.vit`.
"""

import json
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file as load_safetensors_file
from torch import nn

from pipeline.checkpoints import make_linear, read_linear_head
from pipeline.preprocessing import Preprocessing
from pipeline.teacher_kinds import find_kind, kind_of
from pipeline.vit import (
    COMPUTES,
    CONFIG_FILE,
    FILES_VERSION,
    HEAD_FILE,
    POSITIONS_FILE,
    WEIGHTS_FILE,
    Teacher,
)
from pipeline.vit_models import (
    SHIPPED,
    Loaded,
    Model,
    TeacherError,
    both,
    grid_of,
    heads_of,
    load_model,
    make_skeleton,
    resize,
)
from pipeline.vit_states import StateRecorder
from pipeline.weights_digest import weights_digest_of

__all__ = [
    "COMPUTES",
    "CONFIG_FILE",
    "HEAD_FILE",
    "POSITIONS_FILE",
    "SHIPPED",
    "WEIGHTS_FILE",
    "Loaded",
    "Model",
    "Teacher",
    "TeacherError",
    "assemble",
    "load_teacher",
    "make_skeleton",
    "resize",
    "teacher_from_files",
    "weights_digest_of",
]


def load_teacher(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    head: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    compute: str = "float32",
) -> Teacher:
    """Make a teacher.

    Args:
        name: A timm ViT, such as "vit_base_patch14_reg4_dinov2.lvd142m"; the built-in "digits_vit"; or, of a kind that
            another package adds (pipeline.teacher_kinds), the kind and a place, such as "run:data/runs/name".
        weights: None for timm's pretrained ones (for digits_vit: the shipped ones, with their head); "random:<seed>";
            or a local .safetensors, .pth, .pt or .bin file in timm's or Meta's naming.
        image_size: px, side of a square or (height, width), each a multiple of the patch side; None is the model's own
            size, except 224 where that is 518. Positions are resampled (bicubic, antialiased) from the grid that the
            weights have, in one step, and used as they are where that is the grid: 518 px for DINOv2.
        head: A file with a linear classifier of 2 dim values.
        device: For example "cpu" or "cuda:0".
        compute: One of COMPUTES.

    Raises:
        TeacherError: Unknown name (the nearest are listed), not a ViT, an unusable size or compute, or pretrained
            weights that could not be fetched.
        WeightsError: The weights or head file cannot be used; names what does not fit.
    """
    if compute not in COMPUTES:
        raise TeacherError(f"compute is {compute!r}; expected one of {', '.join(COMPUTES)}")
    weights = None if weights is None else os.fspath(weights)
    head = None if head is None else os.fspath(head)
    if (kind := kind_of(name)) is not None:
        if weights is not None:
            raise TeacherError(f"{name} has its own weights; WEIGHTS={weights} cannot be given with it")
        return find_kind(kind).load(name, image_size=image_size, head=head, device=device, compute=compute)
    loaded = load_model(name, weights, image_size)
    model = loaded.model
    linear = read_linear_head(head, 2 * model.embed_dim) if head is not None else None
    if linear is None and name == "digits_vit" and weights is None:
        linear = make_linear(**load_safetensors_file(SHIPPED / "digits_vit_head.safetensors"))
    return assemble(name, loaded, linear, device, compute)


def teacher_from_files(
    files: Mapping[str, bytes],
    device: str | torch.device = "cpu",
    compute: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Teacher:
    """The teacher that `Teacher.to_files` described: the same weights to the bit, with no network.

    Args:
        files: By name; others than these are left alone.
        device: Where it shall run.
        compute: Overrides the recorded one.
        image_size: px, as for load_teacher; None is the recorded one. Positions are resampled from the originals, which
            are among the files if the recorded size had needed other ones.

    Raises:
        TeacherError: A file is missing or damaged, or the weights are not the ones the config names.
    """
    try:
        config = json.loads(files[CONFIG_FILE])
        if config.get("kind") is not None:
            kind = find_kind(str(config["kind"]))
            return kind.from_files(files, device=device, compute=compute, image_size=image_size)
        if config["format_version"] != FILES_VERSION:
            raise TeacherError(f"teacher files have format {config['format_version']}, this code reads {FILES_VERSION}")
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        name, recorded = config["name"], config["compute"]
        pixel_size = both(config.get("pixel_size", preprocessing.image_size))
        model = make_skeleton(name, pixel_size)
        model.load_state_dict(load_safetensors(files[WEIGHTS_FILE]))
        positions = load_safetensors(files[POSITIONS_FILE])["positions"] if POSITIONS_FILE in files else None
        head = make_linear(**load_safetensors(files[HEAD_FILE])) if HEAD_FILE in files else None
        expected = config["weights_digest"]
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise TeacherError(f"the teacher's files cannot be used: {type(error).__name__}: {error}") from error
    found = weights_digest_of(model, head)
    if found != expected:
        raise TeacherError(f"the teacher's weights have digest {found}, its config says {expected}")
    loaded = Loaded(model=model, preprocessing=preprocessing, pixel_size=pixel_size, positions=positions)
    if image_size is not None:
        loaded = resize(name, loaded, both(image_size))
    return assemble(name, loaded, head, device, compute or recorded)


def assemble(name: str, loaded: Loaded, head: nn.Linear | None, device: str | torch.device, compute: str) -> Teacher:
    """Freeze, move, and look at one forward pass: what the blocks are given, and that all states have one shape."""
    device = torch.device(device)
    model = loaded.model.requires_grad_(False).eval().to(device)
    recorder = StateRecorder(model)
    with torch.no_grad(), recorder.recording() as record:
        model.forward_features(torch.zeros(1, 3, *loaded.pixel_size, device=device))
    has_cls = getattr(model, "cls_token", None) is not None
    grid = grid_of(model)
    n_prefix = int(model.num_prefix_tokens)
    shapes = {tuple(getattr(state, "shape", ())) for state in record.states}
    expected = (1, n_prefix + grid[0] * grid[1], model.embed_dim)
    if shapes != {expected} or len(record.extras) != len(model.blocks):
        raise TeacherError(
            f"{name} is not a plain vision transformer: its blocks carry {sorted(shapes)}, expected {expected} "
            "(batch, token, dim) after every one"
        )
    n_heads = heads_of(model)
    assert n_heads is not None
    return Teacher(
        name=name,
        model=model,
        head=head.to(device) if head is not None else None,
        preprocessing=loaded.preprocessing,
        compute=compute,
        device=device,
        dim=expected[-1],
        n_heads=n_heads,
        grid=grid,
        pixel_size=loaded.pixel_size,
        positions=loaded.positions,
        has_cls=has_cls,
        n_registers=n_prefix - int(has_cls),
        _block_extras=tuple(record.extras),
        _recorder=recorder,
    )

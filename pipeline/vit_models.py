"""Architectures and weights of vision transformers, before they are anybody's teacher.

Weights come from timm, from a file in timm's or in Meta's naming, or from a seed. timm's own checkpoint filter converts
names and resamples position embeddings to the teacher's grid: bicubic with antialiasing, as Meta does for its models
with registers (for those without, Meta's hub entries do not antialias; timm does, and so do we).
"""

import difflib
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.console import UserError
from pipeline.checkpoints import WeightsError, explain_mismatch, read_state_dict
from pipeline.digits import DIGITS_PREPROCESSING, make_digits_vit
from pipeline.fake import FAKE_PREPROCESSING, make_fake_vit
from pipeline.light_timm import timm
from pipeline.positions import Positions, original_positions, positions_before, positions_of, resize_model
from pipeline.preprocessing import Preprocessing, resize_size_for

SHIPPED = Path(__file__).parent / "weights"

# A timm ViT. As an nn.Module, each of its attributes would be "Tensor | Module" to a type checker.
Model = Any

# DINOv2 ends its training at 518 px; the reference, and Meta's linear heads, use it at 224.
_DEFAULT_SIZES = {518: 224}


class TeacherError(UserError):
    """A teacher cannot be made as asked: unknown name, not a ViT, wrong size, unreachable or unfitting weights."""


@dataclass(frozen=True, kw_only=True)
class _BuiltIn:
    """An architecture of our own, made with random weights; its images have one size."""

    make: Callable[[], Model]
    preprocessing: Preprocessing


_BUILT_IN: Mapping[str, _BuiltIn] = {
    "digits_vit": _BuiltIn(make=make_digits_vit, preprocessing=DIGITS_PREPROCESSING),
    "fake_vit": _BuiltIn(make=make_fake_vit, preprocessing=FAKE_PREPROCESSING),
}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its weights, and what is known of it before it runs; the attributes are Teacher's."""

    model: Model
    preprocessing: Preprocessing
    pixel_size: tuple[int, int]
    positions: Positions | None = None


def resize(name: str, loaded: Loaded, pixel_size: tuple[int, int]) -> Loaded:
    """The model for images of another size; it is changed in place. The squares it crops change with it.

    Raises:
        TeacherError: The size does not fit its patches, or it cannot change it.
    """
    if pixel_size == loaded.pixel_size:
        return loaded
    _require_whole_patches(name, loaded.model, pixel_size)
    if not hasattr(loaded.model, "set_input_size"):
        height, width = loaded.pixel_size
        raise TeacherError(f"{name} sees images of {height} x {width} px only; give weights of it for another size")
    positions = loaded.positions if loaded.positions is not None else positions_of(loaded.model)
    resize_model(loaded.model, pixel_size, positions)
    side = min(pixel_size)
    preprocessing = replace(loaded.preprocessing, image_size=side, resize_size=resize_size_for(side))
    kept = None if positions is None or tuple(positions.shape[:2]) == grid_of(loaded.model) else positions
    return Loaded(model=loaded.model, preprocessing=preprocessing, pixel_size=pixel_size, positions=kept)


def load_model(name: str, weights: str | None, image_size: int | tuple[int, int] | None) -> Loaded:
    """The model with its weights; arguments and errors as for `pipeline.teacher.load_teacher`."""
    if name in _BUILT_IN:
        loaded = _load_built_in(name, weights)
        return loaded if image_size is None else resize(name, loaded, both(image_size))
    empty = _make_empty(name)
    _require_vit(name, empty)
    config = empty.pretrained_cfg
    pixel_size = _pixel_size_of(name, empty, image_size)
    preprocessing = _preprocessing_of(empty, min(pixel_size))
    seed = None if weights is None else _random_seed(weights)
    if weights is None or seed is not None:
        # At its own size, where its positions are; but some models cannot be resized once they are made.
        own = both(empty.patch_embed.img_size) if hasattr(empty, "set_input_size") else pixel_size
        size: dict[str, Any] = {} if hasattr(empty, "set_input_size") else {"img_size": pixel_size}
        make = functools.partial(timm.create_model, name, num_classes=0, **size)
        model: Model = _fetch_pretrained(name, make) if seed is None else _with_seed(seed, make)
        loaded = Loaded(model=model, preprocessing=preprocessing, pixel_size=own)
        return replace(resize(name, loaded, pixel_size), preprocessing=preprocessing)
    state = _drop_classifier(read_state_dict(weights), config.get("classifier"))
    _require_patch_size(weights, state, empty)
    # timm lets a checkpoint with another number of classes be incomplete; without a classifier to adapt it is strict.
    overlay = {"state_dict": state, "classifier": None, "source": "", "custom_load": False}
    try:
        make = functools.partial(timm.create_model, name, pretrained=True, num_classes=0)
        model = make(pretrained_cfg_overlay=dict(overlay), img_size=pixel_size)
        positions = original_positions(state, model)
        if positions is None and pixel_size != (own := both(empty.patch_embed.img_size)):
            # a file in a naming that only timm's filter knows: are they those that it has at the model's own size?
            positions = positions_before(make(pretrained_cfg_overlay=dict(overlay), img_size=own), model)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise WeightsError(
            f"weights {weights} do not fit {name}: {explain_mismatch(error)}. They belong to another model: name "
            "theirs with TEACHER=, or give other WEIGHTS"
        ) from error
    model.pretrained_cfg.pop("state_dict", None)  # else the file's tensors live as long as the teacher
    return Loaded(model=model, preprocessing=preprocessing, pixel_size=pixel_size, positions=positions)


def _load_built_in(name: str, weights: str | None) -> Loaded:
    built_in = _BUILT_IN[name]
    seed = _random_seed(weights) if weights is not None else None
    if weights is None and name == "fake_vit":
        seed = 0
    if seed is not None:
        model = _with_seed(seed, built_in.make)
    else:
        path = weights if weights is not None else str(SHIPPED / f"{name}.safetensors")
        model = built_in.make()
        try:
            model.load_state_dict(read_state_dict(path))
        except RuntimeError as error:
            raise WeightsError(f"weights {path} do not fit {name}: {explain_mismatch(error)}") from error
    preprocessing = built_in.preprocessing
    return Loaded(model=model, preprocessing=preprocessing, pixel_size=both(preprocessing.image_size))


def make_skeleton(name: str, pixel_size: tuple[int, int]) -> Model:
    """The architecture for images of this height and width, its values to be overwritten."""
    if name in _BUILT_IN:
        model = _BUILT_IN[name].make()
        if pixel_size != both(_BUILT_IN[name].preprocessing.image_size):
            resize_model(model, pixel_size)
        return model
    _require_known(name)
    return timm.create_model(name, num_classes=0, img_size=pixel_size)


def _make_empty(name: str) -> Model:
    """The architecture without memory or values, to look at before anything is fetched."""
    _require_known(name)
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def _require_known(name: str) -> None:
    if timm.is_model(name) and (name.count(".") == 0 or name in timm.list_models(pretrained=True)):
        return
    names = [*_BUILT_IN, *timm.list_models(), *timm.list_models(pretrained=True)]
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"the nearest names are {', '.join(close)}" if close else "timm.list_models() has the names"
    raise TeacherError(f"there is no teacher {name!r}; {hint}")


def _require_vit(name: str, model: Model) -> None:
    lacks = [
        what
        for what, there in {
            "blocks": isinstance(getattr(model, "blocks", None), nn.Sequential | nn.ModuleList),
            "a patch grid": getattr(getattr(model, "patch_embed", None), "grid_size", None) is not None,
            "a count of prefix tokens": hasattr(model, "num_prefix_tokens"),
            "a final norm": hasattr(model, "norm"),
            "attention heads": heads_of(model) is not None,
        }.items()
        if not there
    ]
    if lacks:
        raise TeacherError(
            f"{name} ({type(model).__name__}) is not a plain vision transformer: it lacks {', '.join(lacks)}. "
            "Expected one whose blocks all carry the same tokens, such as vit_small_patch14_reg4_dinov2"
        )


def _require_patch_size(path: str, state: Mapping[str, torch.Tensor], model: Model) -> None:
    """timm would stretch the patch embedding of a model with other patches, and say nothing."""
    expected = tuple(model.patch_embed.patch_size)
    for name, tensor in state.items():
        if name.endswith("patch_embed.proj.weight") and tensor.ndim == 4 and tuple(tensor.shape[2:]) != expected:
            raise WeightsError(
                f"weights {path} have patches of {list(tensor.shape[2:])} px, the teacher {list(expected)}"
            )


def heads_of(model: Model) -> int | None:
    """Attention heads of its blocks; None if they do not say."""
    first = (getattr(model, "blocks", None) or [None])[0]
    return getattr(first, "n_heads", None) or getattr(getattr(first, "attn", None), "num_heads", None)


def _pixel_size_of(name: str, model: Model, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if image_size is None:
        own = model.pretrained_cfg["input_size"][-1]
        image_size = _DEFAULT_SIZES.get(own, own)
    pixel_size = both(image_size)
    _require_whole_patches(name, model, pixel_size)
    return pixel_size


def _require_whole_patches(name: str, model: Model, pixel_size: tuple[int, int]) -> None:
    for side, patch in zip(pixel_size, model.patch_embed.patch_size):
        if side < patch or side % patch:
            nearest = max(patch, round(side / patch) * patch)
            raise TeacherError(f"image size {side} px is no multiple of {name}'s {patch} px patches; try {nearest}")


def _preprocessing_of(model: Model, image_size: int) -> Preprocessing:
    config = model.pretrained_cfg
    return Preprocessing(
        image_size=image_size,
        resize_size=resize_size_for(image_size),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def both(size: Any) -> tuple[int, int]:
    """Height and width, from either or from the side of a square."""
    if isinstance(size, int):
        return (size, size)
    height, width = size
    return (int(height), int(width))


def grid_of(model: Model) -> tuple[int, int]:
    """Rows and columns of its patches."""
    rows, columns = model.patch_embed.grid_size
    return (int(rows), int(columns))


def _fetch_pretrained(name: str, make: Callable[..., Model]) -> Model:
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise TeacherError(f"timm has no pretrained weights for {name}; give WEIGHTS=file or WEIGHTS=random:0")
    try:
        return make(pretrained=True)
    except Exception as error:  # a dozen libraries' network errors, which share no base class
        raise TeacherError(
            f"the pretrained weights of {name} could not be fetched ({type(error).__name__}: {error}). Give "
            "WEIGHTS=file with weights in timm's or Meta's naming, or WEIGHTS=random:0 to go on with random ones"
        ) from error


def _drop_classifier(
    state: dict[str, torch.Tensor], classifier: str | tuple[str, ...] | None
) -> dict[str, torch.Tensor]:
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    kept = {k: v for k, v in state.items() if not any(k in (f"{name}.weight", f"{name}.bias") for name in names)}
    if "register_tokens" in kept and "mask_token" not in kept:
        kept["mask_token"] = torch.zeros(0)  # the mark by which timm knows Meta's naming; it drops the token itself
    return kept


def _random_seed(weights: str) -> int | None:
    if not weights.startswith("random"):
        return None
    found = re.fullmatch(r"random:(\d+)", weights)
    if not found:
        raise WeightsError(f"weights {weights!r} name no seed; random weights are asked for as random:0")
    return int(found[1])


def _with_seed(seed: int, make: Callable[[], Model]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()

"""The teacher: a frozen vision transformer and every state of its residual stream.

Any timm ViT works: states are taken by hooks on its blocks, so that whatever comes before them (registers, CLIP's norm,
DeiT's distillation token, absent CLS tokens) is as timm has it. Layer 0 is what enters the first block, layer l what
leaves block l; the final norm belongs to no layer (FORMAT.md, "Layers").

Weights come from timm, from a file in timm's or in Meta's naming, or from a seed. timm's own checkpoint filter converts
names and resamples position embeddings to the teacher's grid: bicubic with antialiasing, as Meta does for its models
with registers (for those without, Meta's hub entries do not antialias; timm does, and so do we).
"""

import difflib
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float32, UInt8
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file as load_safetensors_file
from safetensors.torch import save as save_safetensors
from torch import nn

from infra.console import UserError
from pipeline.checkpoints import WeightsError, explain_mismatch, make_linear, read_linear_head, read_state_dict
from pipeline.digits import DIGITS_PREPROCESSING, make_digits_vit
from pipeline.fake import FAKE_PREPROCESSING, make_fake_vit
from pipeline.positions import Positions, original_positions, positions_before, positions_of, resize_model
from pipeline.preprocess import Preprocessing, resize_size_for
from pipeline.teacher_kinds import find_kind, kind_of

#: What the blocks compute in. States leave as float32 whatever it is; in the half precisions the residual stream
#: itself stays float32 (autocast), only products are rounded.
COMPUTES = ("float32", "tf32", "bfloat16", "float16")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"
HEAD_FILE = "head.safetensors"
POSITIONS_FILE = "positions.safetensors"

SHIPPED = Path(__file__).parent / "weights"

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FILES_VERSION = 1

# Weights that depend on the image size.
_OF_THE_GRID = ("pos_embed",)

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A frozen ViT in eval mode. Its methods may be called from several threads; on a GPU they then take turns.

    Attributes:
        name: timm's name, with its tag if it was given with one, or a built-in name.
        model: The ViT without classifier.
        head: Linear classifier of [final-norm CLS; mean of final-norm patches], if there is one.
        preprocessing: How images become the pixels it expects. A teacher of rectangles shares mean and std with it; its
            crop is the largest square within.
        compute: One of COMPUTES.
        device: Where it runs.
        dim: Channels of the residual stream.
        n_heads: Attention heads of a block.
        grid: Rows and columns of patches.
        pixel_size: Height and width of the images it sees, px.
        positions: Of patches, as the weights had them before they were resampled to `grid`; None if they were not.
        has_cls: Whether token 0 is a CLS token.
        n_registers: Further tokens before the patches: registers, or DeiT's distillation token.
    """

    name: str
    model: Model
    head: nn.Linear | None
    preprocessing: Preprocessing
    compute: str
    device: torch.device
    dim: int
    n_heads: int
    grid: tuple[int, int]
    pixel_size: tuple[int, int]
    positions: Positions | None
    has_cls: bool
    n_registers: int
    _block_extras: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = field(repr=False)
    _recorder: "_Recorder" = field(repr=False)
    _device_turn: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def image_size(self) -> int:
        """Side of the square images it sees, px.

        Raises:
            TeacherError: It sees others; pixel_size has their height and width.
        """
        height, width = self.pixel_size
        if height != width:
            raise TeacherError(f"{self.name} was loaded for images of {height} x {width} px, expected square ones")
        return height

    @property
    def n_layers(self) -> int:
        """States of the residual stream: one more than there are teacher blocks."""
        return len(self._block_extras) + 1

    @property
    def n_patches(self) -> int:
        """Patch tokens: rows times columns."""
        return self.grid[0] * self.grid[1]

    @property
    def n_prefix(self) -> int:
        """Tokens before the first patch."""
        return int(self.has_cls) + self.n_registers

    @functools.cached_property
    def weights_digest(self) -> str:
        """sha256, in hex, over sorted names, dtypes, shapes and bytes of all weights, the head's included."""
        return weights_digest_of(self.model, self.head)

    @functools.cached_property
    def core_digest(self) -> str:
        """sha256, in hex, over all weights but position embeddings and head: the same at every image size.

        Two teachers with one core digest are one teacher, loaded for images of different sizes, or with and without a
        head; their weights digests differ then. So a Raptor trained on states at 224 px knows its teacher at 518 px.
        """
        return _digest({n: tensor for n, tensor in self.model.state_dict().items() if n not in _OF_THE_GRID})

    def layer_states(
        self, pixels: Float32[torch.Tensor, "batch 3 height width"]
    ) -> Float32[torch.Tensor, "batch layer token dim"]:
        """All states of the residual stream, stacked; see layer_states_list, which copies less."""
        return torch.stack(self.layer_states_list(pixels), dim=1)

    def layer_states_list(
        self, pixels: Float32[torch.Tensor, "batch 3 height width"]
    ) -> list[Float32[torch.Tensor, "batch token dim"]]:
        """All states of the residual stream, layer 0 first, each float32 on the teacher's device.

        Made without gradients, and not in inference mode, so that a trainer may feed them to a graph.

        Args:
            pixels: Normalised (pipeline.preprocess.normalise), of the teacher's image size; moved to its device.

        Raises:
            ValueError: The pixels have another size.
        """
        return self._record(pixels, embed_only=False)

    def embed(self, pixels: Float32[torch.Tensor, "batch 3 height width"]) -> Float32[torch.Tensor, "batch token dim"]:
        """State 0, without running any teacher block; else as layer_states_list."""
        return self._record(pixels, embed_only=True)[0]

    def _record(self, pixels: torch.Tensor, *, embed_only: bool) -> list[torch.Tensor]:
        if pixels.shape[2:] != self.pixel_size:
            raise ValueError(
                f"pixels are {list(pixels.shape[2:])}, expected {list(self.pixel_size)} (height, width) for {self.name}"
            )
        recording = self._recorder.recording(embed_only=embed_only)
        with torch.no_grad(), self._precision(), recording as record, suppress(_Embedded):
            self.model.forward_features(pixels.to(self.device, non_blocking=True))
        return [state.float() for state in record.states]

    def run_blocks(
        self, x: Float32[torch.Tensor, "batch token dim"], start: int, stop: int
    ) -> Float32[torch.Tensor, "batch token dim"]:
        """State `stop` from state `start`, by teacher blocks start + 1 to stop. Gradients flow to x if it wants them.

        Raises:
            ValueError: Not 0 <= start <= stop < n_layers.
        """
        if not 0 <= start <= stop < self.n_layers:
            raise ValueError(
                f"cannot run from state {start} to {stop}; {self.name} has states 0 to {self.n_layers - 1}"
            )
        with self._precision():
            for block, (args, kwargs) in list(zip(self.model.blocks, self._block_extras))[start:stop]:
                x = block(x, *args, **kwargs)
        return x.float()

    def final_norm(self, x: Float32[torch.Tensor, "batch token dim"]) -> Float32[torch.Tensor, "batch token dim"]:
        """The norm after the last block, which belongs to no layer."""
        norm = self.model.norm
        if isinstance(norm, nn.Identity):  # models that pool before they norm keep it under another name
            norm = getattr(self.model, "fc_norm", norm)
        return norm(x).float()

    def head_input(self, normed: Float32[torch.Tensor, "batch token dim"]) -> Float32[torch.Tensor, "batch features"]:
        """[final-norm CLS; mean of final-norm patches], 2 dim values: what the linear heads read.

        Args:
            normed: Tokens after final_norm.

        Raises:
            ValueError: The teacher has no CLS token.
        """
        if not self.has_cls:
            raise ValueError(f"{self.name} has no CLS token, so it has no head input")
        return torch.cat([normed[:, 0], normed[:, self.n_prefix :].mean(dim=1)], dim=-1)

    def logits(self, last: Float32[torch.Tensor, "batch token dim"]) -> Float32[torch.Tensor, "batch class"]:
        """Class scores from the state of the last layer, before the final norm.

        Raises:
            ValueError: The teacher has no head.
        """
        if self.head is None:
            raise ValueError(f"{self.name} was loaded without a head; give HEAD=file")
        return self.head(self.head_input(self.final_norm(last)))

    def to_files(self) -> dict[str, bytes]:
        """Everything needed to make this teacher again, as small files: a pure function of its weights and settings."""
        config = {
            "format_version": _FILES_VERSION,
            "name": self.name,
            "compute": self.compute,
            "preprocessing": self.preprocessing.to_dict(),
            "weights_digest": self.weights_digest,
        }
        if self.pixel_size != (self.preprocessing.image_size,) * 2:
            config["pixel_size"] = list(self.pixel_size)
        files = {
            CONFIG_FILE: json.dumps(config, sort_keys=True, separators=(",", ":")).encode(),
            WEIGHTS_FILE: _save(self.model),
        }
        return files | self.side_files()

    def side_files(self) -> dict[str, bytes]:
        """Those of `to_files` beside config and weights: the head and the original positions, where there are any."""
        files = {}
        if self.head is not None:
            files[HEAD_FILE] = _save(self.head)
        if self.positions is not None:
            files[POSITIONS_FILE] = save_safetensors({"positions": self.positions.contiguous()})
        return files

    @contextmanager
    def _precision(self) -> Iterator[None]:
        half = _HALF.get(self.compute)
        autocast = torch.autocast(self.device.type, dtype=half) if half is not None else nullcontext()
        if self.device.type != "cuda":
            with autocast:
                yield
            return
        with self._device_turn, autocast, _cuda_tf32(self.compute == "tf32"):  # the TF32 switch is the process's
            yield


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
    loaded = _load_model(name, weights, image_size)
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
        if config["format_version"] != _FILES_VERSION:
            raise TeacherError(
                f"teacher files have format {config['format_version']}, this code reads {_FILES_VERSION}"
            )
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        name, recorded = config["name"], config["compute"]
        pixel_size = _both(config.get("pixel_size", preprocessing.image_size))
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
        loaded = resize(name, loaded, _both(image_size))
    return assemble(name, loaded, head, device, compute or recorded)


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
    kept = None if positions is None or tuple(positions.shape[:2]) == _grid_of(loaded.model) else positions
    return Loaded(model=loaded.model, preprocessing=preprocessing, pixel_size=pixel_size, positions=kept)


def _load_model(name: str, weights: str | None, image_size: int | tuple[int, int] | None) -> Loaded:
    if name in _BUILT_IN:
        loaded = _load_built_in(name, weights)
        return loaded if image_size is None else resize(name, loaded, _both(image_size))
    empty = _make_empty(name)
    _require_vit(name, empty)
    config = empty.pretrained_cfg
    pixel_size = _pixel_size_of(name, empty, image_size)
    preprocessing = _preprocessing_of(empty, min(pixel_size))
    seed = None if weights is None else _random_seed(weights)
    if weights is None or seed is not None:
        # At its own size, where its positions are; but some models cannot be resized once they are made.
        own = _both(empty.patch_embed.img_size) if hasattr(empty, "set_input_size") else pixel_size
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
        if positions is None and pixel_size != (own := _both(empty.patch_embed.img_size)):
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
    return Loaded(model=model, preprocessing=preprocessing, pixel_size=_both(preprocessing.image_size))


def make_skeleton(name: str, pixel_size: tuple[int, int]) -> Model:
    """The architecture for images of this height and width, its values to be overwritten."""
    if name in _BUILT_IN:
        model = _BUILT_IN[name].make()
        if pixel_size != _both(_BUILT_IN[name].preprocessing.image_size):
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
            "attention heads": _heads_of(model) is not None,
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


def _heads_of(model: Model) -> int | None:
    first = (getattr(model, "blocks", None) or [None])[0]
    return getattr(first, "n_heads", None) or getattr(getattr(first, "attn", None), "num_heads", None)


def _pixel_size_of(name: str, model: Model, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if image_size is None:
        own = model.pretrained_cfg["input_size"][-1]
        image_size = _DEFAULT_SIZES.get(own, own)
    pixel_size = _both(image_size)
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


def _both(size: Any) -> tuple[int, int]:
    """Height and width, from either or from the side of a square."""
    if isinstance(size, int):
        return (size, size)
    height, width = size
    return (int(height), int(width))


def _grid_of(model: Model) -> tuple[int, int]:
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


def assemble(name: str, loaded: Loaded, head: nn.Linear | None, device: str | torch.device, compute: str) -> Teacher:
    """Freeze, move, and look at one forward pass: what the blocks are given, and that all states have one shape."""
    device = torch.device(device)
    model = loaded.model.requires_grad_(False).eval().to(device)
    recorder = _Recorder(model)
    with torch.no_grad(), recorder.recording() as record:
        model.forward_features(torch.zeros(1, 3, *loaded.pixel_size, device=device))
    has_cls = getattr(model, "cls_token", None) is not None
    grid = _grid_of(model)
    n_prefix = int(model.num_prefix_tokens)
    shapes = {tuple(getattr(state, "shape", ())) for state in record.states}
    expected = (1, n_prefix + grid[0] * grid[1], model.embed_dim)
    if shapes != {expected} or len(record.extras) != len(model.blocks):
        raise TeacherError(
            f"{name} is not a plain vision transformer: its blocks carry {sorted(shapes)}, expected {expected} "
            "(batch, token, dim) after every one"
        )
    n_heads = _heads_of(model)
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


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What one forward pass showed: the states, and what each block was given beside its tokens (rotary tables)."""

    embed_only: bool = False
    states: list[Any] = field(default_factory=list)
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class _Embedded(Exception):
    """State 0 is there, and no more was asked for."""


class _Recorder:
    """Hooks on a model's blocks that note states for the threads that asked, each for itself."""

    def __init__(self, model: Model) -> None:
        self._here = threading.local()
        for block in model.blocks:
            block.register_forward_pre_hook(self._before, with_kwargs=True)
            block.register_forward_hook(self._after)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record: _Record | None = getattr(self._here, "record", None)
        if record is not None:
            if not record.states:
                record.states.append(args[0])
                if record.embed_only:
                    raise _Embedded
            record.extras.append((args[1:], kwargs))

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record: _Record | None = getattr(self._here, "record", None)
        if record is not None:
            record.states.append(output)

    @contextmanager
    def recording(self, *, embed_only: bool = False) -> Iterator[_Record]:
        """Note the states of the forward pass that this thread makes meanwhile; with embed_only it ends at the first
        block."""
        self._here.record = record = _Record(embed_only=embed_only)
        try:
            yield record
        finally:
            self._here.record = None


@contextmanager
def _cuda_tf32(allowed: bool) -> Iterator[None]:
    """Products in TF32 or in true float32, for a while. cuDNN's convolutions use TF32 unless they are told not to."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32, cudnn.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def weights_digest_of(model: Model, head: nn.Linear | None) -> str:
    """As Teacher.weights_digest."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if head is not None:
        state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return _digest(state)


def _save(module: nn.Module) -> bytes:
    return save_safetensors({name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()})


def _digest(state: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        sha.update(_bytes_of(tensor).numpy().data)
    return sha.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> UInt8[torch.Tensor, "byte"]:
    return tensor.reshape(-1).view(torch.uint8)

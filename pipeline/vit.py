"""The frozen vision transformer that a teacher is: what it computes, and the small files that describe it.

Any timm ViT works: states are taken by hooks on its blocks, so that whatever comes before them (registers, CLIP's norm,
DeiT's distillation token, absent CLS tokens) is as timm has it. Layer 0 is what enters the first block, layer l what
leaves block l; the final norm belongs to no layer (FORMAT.md, "Layers").
"""

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float32
from safetensors.torch import save as save_safetensors
from torch import nn

from pipeline.positions import Positions
from pipeline.preprocessing import Preprocessing
from pipeline.vit_models import Model, TeacherError
from pipeline.vit_states import Embedded, StateRecorder
from pipeline.weights_digest import core_digest_of, to_safetensors, weights_digest_of

#: What the blocks compute in. States leave as float32 whatever it is; in the half precisions the residual stream
#: itself stays float32 (autocast), only products are rounded.
COMPUTES = ("float32", "tf32", "bfloat16", "float16")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"
HEAD_FILE = "head.safetensors"
POSITIONS_FILE = "positions.safetensors"

FILES_VERSION = 1

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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
    _recorder: StateRecorder = field(repr=False)
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
        return core_digest_of(self.model)

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
            ValueError: The pixels have another shape, size or type.
        """
        return self._record(pixels, embed_only=False)

    def embed(self, pixels: Float32[torch.Tensor, "batch 3 height width"]) -> Float32[torch.Tensor, "batch token dim"]:
        """State 0, without running any teacher block; else as layer_states_list."""
        return self._record(pixels, embed_only=True)[0]

    def _record(self, pixels: torch.Tensor, *, embed_only: bool) -> list[torch.Tensor]:
        self._check_pixels(pixels)
        recording = self._recorder.recording(embed_only=embed_only)
        with torch.no_grad(), self._precision(), recording as record, suppress(Embedded):
            self.model.forward_features(pixels.to(self.device, non_blocking=True))
        return [state.float() for state in record.states]

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            one = "; one image is a batch of one: pixels[None]" if pixels.ndim == 3 else ""
            raise ValueError(
                f"pixels have shape {list(pixels.shape)}, expected [batch, 3, {self.pixel_size[0]}, "
                f"{self.pixel_size[1]}] for {self.name}{one}"
            )
        if pixels.shape[2:] != self.pixel_size:
            raise ValueError(
                f"pixels are {list(pixels.shape[2:])}, expected {list(self.pixel_size)} (height, width) for {self.name}"
            )
        if pixels.dtype != torch.float32:
            raise ValueError(
                f"pixels are {str(pixels.dtype).removeprefix('torch.')}, expected float32, as "
                "pipeline.preprocess.normalise makes them of 0 to 255"
            )

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
            "format_version": FILES_VERSION,
            "name": self.name,
            "compute": self.compute,
            "preprocessing": self.preprocessing.to_dict(),
            "weights_digest": self.weights_digest,
        }
        if self.pixel_size != (self.preprocessing.image_size,) * 2:
            config["pixel_size"] = list(self.pixel_size)
        files = {
            CONFIG_FILE: json.dumps(config, sort_keys=True, separators=(",", ":")).encode(),
            WEIGHTS_FILE: to_safetensors(self.model),
        }
        return files | self.side_files()

    def side_files(self) -> dict[str, bytes]:
        """Those of `to_files` beside config and weights: the head and the original positions, where there are any."""
        files = {}
        if self.head is not None:
            files[HEAD_FILE] = to_safetensors(self.head)
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

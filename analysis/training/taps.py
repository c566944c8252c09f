"""The fifteen places at which the Transformer Geometry Observatory looks at a ViT, and the images that it looks with.

Source: Kapil, Upla 2026; names as in their records (github KaustubhKapil/Transformer_Geometry_Observatory_Part-1).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from analysis.spectra import CovarianceAccumulator, SpectralScalars
from infra.console import UserError

#: Seeds of the two fixed choices of images, and how many are taken.
SPECTRA_SEED, N_SPECTRA = 2025, 1_000
PATHS_SEED, N_PATHS = 2026, 100


def tap_names(n_blocks: int) -> list[str]:
    """In order of depth: patch embedding, tokens with positions, each block, CLS after the final norm."""
    blocks = [f"Layer_{i:02d}_Block{i:02d}" for i in range(1, n_blocks + 1)]
    return ["Layer_00_PatchEmbed", "Layer_00_PosEmbed", *blocks, f"Layer_{n_blocks + 1:02d}_CLS_Final"]


def tap_title(name: str) -> str:
    """For people: PatchEmbed, PosEmbed, block 1, ..., CLS final."""
    last = name.split("_", 2)[-1]
    return f"block {int(last[5:])}" if last.startswith("Block") else last.replace("_", " ").replace("Final", "final")


def fixed_subset(n_available: int, n_wanted: int, seed: int) -> Int64[np.ndarray, " image"]:
    """The first n_wanted of a seeded permutation, all where there are no more; the same for every checkpoint.

    Two choices with different seeds may share images: with 1,000 and 100 of 5,000, about 20 of the 100 do.
    """
    return np.random.default_rng(seed).permutation(n_available)[:n_wanted]


def tap_states(
    model: Any, pixels: Float32[torch.Tensor, "image 3 height width"]
) -> dict[str, Float32[torch.Tensor, "image token dim"]]:
    """What leaves (PosEmbed: what has entered the dropout after the positions) each tap, for one batch.

    Args:
        model: A timm ViT with CLS token, in eval mode.
        pixels: Normalised, on its device.

    Returns:
        By `tap_names`. PatchEmbed has the patches only, CLS_Final one token, the others every token.

    Raises:
        UserError: The model lacks one of the places.
    """
    lacks = [
        place
        for place in ("patch_embed", "pos_drop", "blocks", "norm", "cls_token")
        if getattr(model, place, None) is None
    ]
    if lacks:
        raise UserError(
            f"{type(model).__name__} has no {', '.join(lacks)}: its taps cannot be read. Expected a timm ViT"
        )
    names = tap_names(len(model.blocks))
    found: dict[str, torch.Tensor] = {}

    def leaves(name: str, tokens: slice = slice(None)) -> Any:
        def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            found[name] = output.flatten(1, -2)[:, tokens].float()

        return note

    def enters(_module: Any, inputs: Sequence[torch.Tensor]) -> None:
        found[names[1]] = inputs[0].float()

    with ExitStack() as hooks, torch.no_grad():
        for module, hook in [
            (model.patch_embed, leaves(names[0])),
            *((block, leaves(name)) for block, name in zip(model.blocks, names[2:-1], strict=True)),
            (model.norm, leaves(names[-1], slice(0, 1))),
        ]:
            hooks.callback(module.register_forward_hook(hook).remove)
        hooks.callback(model.pos_drop.register_forward_pre_hook(enters).remove)
        model.forward_features(pixels)
    return {name: found[name] for name in names}


class TapSpectra:
    """Covariance at every tap, of all tokens of all images as rows, in float64: 8 tap dim (dim + 1) bytes."""

    def __init__(self, names: Sequence[str], dim: int) -> None:
        self._sums = {name: CovarianceAccumulator(1, dim) for name in names}

    def update(self, states: dict[str, Float32[torch.Tensor, "image token dim"]]) -> None:
        """Count images."""
        for name, sums in self._sums.items():
            sums.update(states[name][:, None].cpu().numpy())

    def merge(self, other: "TapSpectra") -> None:
        """Count what another has counted."""
        for name, sums in self._sums.items():
            sums.merge(other._sums[name])

    def scalars(self) -> dict[str, SpectralScalars]:
        return {name: sums.result().scalars()[0] for name, sums in self._sums.items()}

    def singular_values(self, n: int) -> dict[str, Float64[np.ndarray, " direction"]]:
        """The first n of the centred data over sqrt(rows - 1), descending; fewer where there are fewer channels."""
        return {name: np.sqrt(sums.result().eigenvalues()[0, :n]) for name, sums in self._sums.items()}

    def n_vectors(self) -> dict[str, int]:
        """Rows of each covariance: CLS_Final has one for an image, the others one for each token."""
        return {name: sums.n for name, sums in self._sums.items()}

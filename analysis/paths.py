"""Paths of single images over the sphere, and the same dynamics after the teacher's final norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64

from analysis.accumulate import unit_vectors
from analysis.dynamics import Dynamics, DynamicsAccumulator
from analysis.interventions import token_kinds
from analysis.pass_over import batches
from analysis.training.paths import fit_plane
from pipeline.teacher import Teacher
from storage_schemas import Store

_BATCH_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Directions of some images on the plane in which the final directions of all spread most.

    Attributes:
        points: Coordinates of each state's direction.
        labels: Class of each image.
        explained: Share of the spread of final directions that lies in each of the two axes.
    """

    points: Float64[np.ndarray, "image layer 2"]
    labels: Int64[np.ndarray, " image"]
    explained: Float64[np.ndarray, " 2"]


def project_paths(
    states: Float[np.ndarray, "row layer dim"],
    labels: Int64[np.ndarray, " row"],
    *,
    n_classes: int = 5,
    n_each: int = 8,
) -> Paths:
    """Project u(x_l) of some images of some classes on the first two principal directions of all u(x_L).

    Args:
        states: One token of each image, at all layers.
        labels: Classes; below 0 for none.
        n_classes: Those with most images; of equals the first.
        n_each: Images of each, the first ones.

    Raises:
        ValueError: Fewer than three rows or two channels, so that there is no plane; states without direction.
    """
    if len(states) < 3 or states.shape[2] < 2:
        raise ValueError(f"states {states.shape}; a plane of final directions needs 3 rows and 2 channels or more")
    counts = np.bincount(labels[labels >= 0], minlength=1)
    chosen = [int(one) for one in np.argsort(-counts, kind="stable")[:n_classes] if counts[one]]
    rows = np.concatenate([np.flatnonzero(labels == one)[:n_each] for one in chosen] or [np.arange(0)])
    final = unit_vectors(states[:, -1:])[0][:, 0]
    middle = final.mean(axis=0)
    _, spread, axes = np.linalg.svd(final - middle, full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])[:, None]  # one sign of two
    total = (spread**2).sum()
    units = unit_vectors(states[rows])[0] if len(rows) else np.empty((0, *states.shape[1:]))
    return Paths(
        points=(units - middle) @ axes.T,
        labels=labels[rows],
        explained=spread[:2] ** 2 / total if total > 0 else np.full(2, np.nan),
    )


@dataclass(frozen=True, kw_only=True)
class BothDynamics:
    """Dynamics of the same states by token kind, as they are and after the teacher's final norm."""

    raw: Mapping[str, Dynamics]
    normed: Mapping[str, Dynamics]


def normed_dynamics(teacher: Teacher, store: Store, rows: Int64[np.ndarray, " row"]) -> BothDynamics:
    """Dynamics of states that the teacher's final norm was applied to, at every layer, and of the same without it.

    A few channels of raw states outgrow all others; a norm takes them to one scale before directions are compared.

    Args:
        teacher: Of the store.
        store: With all tokens.
        rows: Images; a chunk of them is held at a time.

    Raises:
        StoreError, ObjectError: As `Store.read`.
    """
    kinds = token_kinds(has_cls=teacher.has_cls, n_registers=teacher.n_registers, n_patches=teacher.n_patches)
    raw, after = ({kind: DynamicsAccumulator(store.layers) for kind in kinds} for _ in range(2))
    for run in batches(store.spec, rows, _BATCH_ROWS):
        for states in store.read(None, run, "all"):
            with torch.no_grad():
                normed = teacher.final_norm(torch.from_numpy(states).to(teacher.device)).cpu().numpy()
            for kind, tokens in kinds.items():
                raw[kind].update(states[None, :, tokens])
                after[kind].update(normed[None, :, tokens])
    return BothDynamics(
        raw={kind: part.result() for kind, part in raw.items()},
        normed={kind: part.result() for kind, part in after.items()},
    )


@dataclass(frozen=True, kw_only=True)
class TokenPaths:
    """Ways of single tokens through depth, each the mean over images, on the plane in which their states spread most.

    Attributes:
        points: By token: (layer, 2), in the states' units.
        explained: Share of the variance of all these states, image by image, along each of the two axes.
        n_images: That the means are over.
    """

    points: Mapping[str, Float64[np.ndarray, "layer 2"]]
    explained: Float64[np.ndarray, " 2"]
    n_images: int


def shown_patches(n_patches: int) -> list[int]:
    """Patches, from 0, at the places of the tokens 10, 50 and 100 of 197 whose ways the Geometry Observatory draws."""
    return sorted({place * n_patches // 196 for place in (9, 49, 99)})


def token_paths(states: Mapping[str, Float[np.ndarray, "image layer dim"]]) -> TokenPaths:
    """Mean ways on the first two principal directions of all states, over tokens, images and layers.

    Source: Transformer Geometry Observatory (Kapil, Upla 2026); its PCA is randomised, this one exact.

    Args:
        states: By token, of the same images.

    Raises:
        ValueError: As `fit_plane`: fewer than three states, or all of them the same.
    """
    plane = fit_plane(np.stack(list(states.values())))
    return TokenPaths(
        points={name: plane.project(of_token.mean(axis=0, dtype=np.float64)) for name, of_token in states.items()},
        explained=plane.explained,
        n_images=len(next(iter(states.values()))),
    )


def read_tokens(store: Store, rows: Int64[np.ndarray, " row"]) -> dict[str, Float32[np.ndarray, "image layer dim"]]:
    """CLS, where there is one, and a few patches of some images at all layers; patches of 16 images are held at a time.

    Raises:
        StoreError, ObjectError: As `Store.read`.
    """
    places = shown_patches(store.spec.n_patches)
    read = [store.read(None, run, "patches")[:, :, places] for run in batches(store.spec, rows, _BATCH_ROWS)]
    patches = np.concatenate(read)
    cls = {"CLS": store.read(None, rows, "cls")[:, :, 0]} if store.spec.has_cls else {}
    return cls | {f"patch {place + 1}": patches[:, :, i] for i, place in enumerate(places)}


def rises_as_s(values: Sequence[float] | Float[np.ndarray, " layer"]) -> bool:
    """Whether a curve rises at every step, slowly at both ends: its steepest step is neither the first nor the last."""
    steps = np.diff(np.asarray(values, dtype=np.float64))
    return bool((steps >= 0).all() and 0 < steps.argmax() < len(steps) - 1)

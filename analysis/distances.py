"""How far the layers of a teacher are from one another, measured over the images of a store.

Only the CLS and patch-mean states are read, never the patches: 6 kB per image and layer of ViT-B, 1/130 of its bytes.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from infra.console import UserError
from infra.objects import ObjectError
from storage_schemas import Store
from storage_schemas.errors import SchemaError
from storage_schemas.keys import TEACHER_PREFIX
from storage_schemas.spec import Kind

#: Token kinds that count, as in the reference; a teacher without CLS token has one of them.
KINDS: tuple[Kind, ...] = ("cls", "patch_mean")
#: The reference stops once it has seen this many images.
N_IMAGES = 10_000

_WINDOW_NBYTES = 16 * 2**20  # of float64 states, the unit of reading; it holds one chunk at least
_WEIGHTS_KEY = f"{TEACHER_PREFIX}weights.safetensors"
_MOST_HEADER_NBYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class LayerDistances:
    """Mean over images of 1 - cosine between the states of two layers, for each pair of layers.

    Attributes:
        layers: Of the rows.
        kinds: Token kinds, of the first axis of `by_kind`.
        by_kind: In [0, 2], symmetric, zero diagonal.
        standard_error: Of `distance`, from its spread over the images; infinite for one image.
        n_images: How many images they are of.
    """

    layers: tuple[int, ...]
    kinds: tuple[Kind, ...]
    by_kind: Float64[np.ndarray, "kind layer layer"]
    standard_error: Float64[np.ndarray, "layer layer"]
    n_images: int

    @property
    def distance(self) -> Float64[np.ndarray, "layer layer"]:
        """Mean over the kinds: what is cut into phases."""
        return self.by_kind.mean(axis=0)


def cosine_distances(states: Float[np.ndarray, "*batch layer dim"]) -> Float64[np.ndarray, "*batch layer layer"]:
    """1 - cosine between each two layers' states, in float64; zero between a layer and itself.

    Source: KempnerInstitute/raptor, max-cut notebook: 1 - clamp(cosine, -1, 1) with norms of at least 1e-8.
    """
    wide = states.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-8)
    distances = 1 - np.clip(wide @ np.swapaxes(wide, -1, -2), -1, 1)
    diagonal = np.arange(states.shape[-2])
    distances[..., diagonal, diagonal] = 0
    return (distances + np.swapaxes(distances, -1, -2)) / 2


def layer_distances(
    store: Store,
    layers: Sequence[int] | None = None,
    limit: int | None = N_IMAGES,
    *,
    progress: Callable[[int], None] | None = None,
) -> LayerDistances:
    """Measure the distances between layers on the valid images of a store.

    Reads whole chunks of the small kinds, each once, and holds a window of them: at most 16 MiB in float64, or one
    chunk. Sums run in float64 in the order of the store, so that a window's size changes nothing but the last digits.

    Args:
        store: Finished or not; what is committed counts.
        layers: Rows of the matrix; None for all but layer 0, which no teacher block has produced.
        limit: Only the first so many valid images, a random choice, as stores are in shuffled order; None for all.
        progress: Told the number of images after each window.

    Raises:
        UserError: The store has no valid image; or states that are zero, and so have no direction: names the layers.
        StoreError, ObjectError: As `Store.read`.
    """
    chosen = tuple(layer for layer in store.layers if layer > 0) if layers is None else tuple(layers)
    kinds = tuple(kind for kind in KINDS if kind in store.spec.token_kinds)
    rows = np.flatnonzero(store.valid)[:limit]
    if not len(rows):
        raise UserError(f"{store.location} has no image to measure distances on: make extract")
    shape = (len(chosen), len(chosen))
    sums, squares = np.zeros((len(kinds), *shape)), np.zeros(shape)
    zeros: dict[tuple[Kind, int], int] = {}
    for window in _windows(store, rows, len(chosen)):
        of_images = np.zeros((len(window), *shape))
        for i, kind in enumerate(kinds):
            states = store.read(chosen, window, kind)[:, :, 0]
            _note_zeros(zeros, kind, chosen, states)
            distances = cosine_distances(states)
            sums[i] += distances.sum(axis=0)
            of_images += distances / len(kinds)
        squares += (of_images**2).sum(axis=0)
        if progress is not None:
            progress(len(window))
    _raise_for_zeros(store, zeros)
    n = len(rows)
    spread = np.maximum(squares / n - (sums.mean(axis=0) / n) ** 2, 0)
    return LayerDistances(
        layers=chosen,
        kinds=kinds,
        by_kind=sums / n,
        standard_error=np.sqrt(spread / (n - 1)) if n > 1 else np.full(shape, np.inf),
        n_images=n,
    )


def teacher_depth(store: Store) -> int | None:
    """Blocks of the store's teacher, so its last layer; None where the store has no teacher with numbered blocks.

    Reads the names at the head of the weights file, not the weights.

    Raises:
        SchemaError: That head is damaged.
    """
    if _WEIGHTS_KEY not in store.document.documents:
        return None
    try:
        size = bytearray(8)
        store.objects.read_into(_WEIGHTS_KEY, 0, memoryview(size))
        head = bytearray(min(int.from_bytes(size, "little"), _MOST_HEADER_NBYTES))
        store.objects.read_into(_WEIGHTS_KEY, len(size), memoryview(head))
        names = list(json.loads(head))
    except (ObjectError, ValueError, RecursionError, TypeError) as error:
        hint = f"See all that is: make verify STORE={store.location}"
        raise SchemaError(store.location, [f"{_WEIGHTS_KEY} is damaged: {error}. {hint}"]) from error
    blocks = {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    return max(blocks) + 1 if blocks else None


def _windows(store: Store, rows: Int64[np.ndarray, " row"], n_layers: int) -> Iterator[Int64[np.ndarray, " row"]]:
    """Rows in runs of whole chunks that fit the window; no chunk is in two of them."""
    per_chunk = store.spec.samples_per_chunk
    n_chunks = max(1, _WINDOW_NBYTES // (8 * per_chunk * n_layers * store.spec.dim))
    window_of = rows // (per_chunk * n_chunks)
    yield from np.split(rows, np.flatnonzero(np.diff(window_of)) + 1)


def _note_zeros(
    zeros: dict[tuple[Kind, int], int], kind: Kind, layers: Sequence[int], states: Float[np.ndarray, "row layer dim"]
) -> None:
    for layer, n in zip(layers, (~states.any(axis=-1)).sum(axis=0).tolist()):
        if n:
            zeros[kind, layer] = zeros.get((kind, layer), 0) + n


def _raise_for_zeros(store: Store, zeros: dict[tuple[Kind, int], int]) -> None:
    if zeros:
        found = [f"layer {layer}, {kind}: of {n:,} images" for (kind, layer), n in sorted(zeros.items())]
        title = f"{store.location} holds states that are zero in all channels, so that they have no direction:"
        raise UserError("\n  ".join([title, *found, "Distances between layers cannot be measured with them"]))

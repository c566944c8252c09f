"""What a teacher sees, measured on its store: which images and layers each part reads, and what it costs.

Images are not needed: sub-layers, gradients and ablations start from state 0, and the pixels of patches come back from
it (analysis/vision/embedding.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64

from analysis.measure import class_numbers
from analysis.pass_over import batches
from analysis.similarity import LEAST_ROWS, Cka, CkaAccumulator
from analysis.vision.embedding import SeenPixels, seen_pixels
from analysis.vision.localisation import Localisation, LocalisationAccumulator
from analysis.vision.probes import few_shots, probe
from analysis.vision.taps import tap_names, update_sub_layers
from infra.console import UserError
from pipeline.teacher import Teacher
from storage_schemas import Store

#: Rows of a batch of CKA here, where kernels are of many tokens; Raghu et al. saw no difference down to 128.
TAP_ROWS = 128
LOCAL_ROWS = 256
N_SHOTS = 10
#: Patches that are probed one by one, evenly over the grid.
MOST_PATCHES = 64
N_SHUFFLES = 10

_READ_ROWS = 64
_PROBES_AT_ONCE = 8  # of thousands of classes the scores of all would be gigabytes

Progress = Callable[[int], None] | None


def sub_layer_cka(store: Store, teacher: Teacher, limit: int, progress: Progress = None) -> Cka:
    """Minibatch CKA between all sub-layers, on the first images.

    Args:
        store: With state 0.
        teacher: The store's.
        limit: Images.
        progress: Told 1 after each block of each batch.

    Raises:
        UserError: Blocks of another kind.
    """
    sums = CkaAccumulator(len(tap_names(teacher.n_layers - 1)))
    for rows in local_batches(store, limit, TAP_ROWS):
        x = torch.from_numpy(store.read([0], rows, "all")[:, 0])
        update_sub_layers(sums, teacher, x, progress=progress)
    return sums.result()


def local_batches(store: Store, limit: int, batch_rows: int) -> list[Int64[np.ndarray, " row"]]:
    """The first images in batches that the unbiased HSIC is defined for.

    Raises:
        UserError: There is none.
    """
    rows = np.flatnonzero(store.valid)[:limit]
    found = [run for run in batches(store.spec, rows, batch_rows) if len(run) >= LEAST_ROWS]
    if not found:
        raise UserError(f"{store.location} has no {LEAST_ROWS} valid images within {batch_rows} rows")
    return found


@dataclass(frozen=True, kw_only=True)
class Localised:
    """Localisation of a store's patches at every layer.

    Attributes:
        by_layer: By layer number.
        grid: Rows and columns of patches.
        n_seen: Directions of a patch's values that came back from state 0.
        n_values: Of all.
    """

    by_layer: Mapping[int, Localisation]
    grid: tuple[int, int]
    n_seen: int
    n_values: int


def localise(store: Store, teacher: Teacher, limit: int, progress: Progress = None) -> Localised:
    """CKA between each patch token, at every layer, and the pixels of each patch.

    Reads the patches of all layers of the first images, one layer of a batch at a time.

    Args:
        store: With state 0.
        teacher: The store's.
        limit: Images.
        progress: Told 1 after each layer of each batch.

    Raises:
        UserError: The embedding does not give pixels back, or they are the same in all images.
    """
    n = store.spec.n_patches
    sums = {layer: LocalisationAccumulator(n, n) for layer in store.layers}
    pixels: SeenPixels | None = None
    for rows in local_batches(store, limit, LOCAL_ROWS):
        for layer in store.layers:
            patches = store.read([layer], rows, "patches")[:, 0]
            if layer == 0:
                pixels = seen_pixels(teacher, patches)
            assert pixels is not None, "layers are ascending, from 0"
            sums[layer].update(patches, pixels.values)
            if progress is not None:
                progress(1)
    by_layer = {layer: one.result() for layer, one in sums.items()}
    assert pixels is not None, "there is a batch"
    if not np.isfinite(by_layer[0].cka).any():
        raise UserError(f"the pixels of {store.location} are the same in all images")
    return Localised(
        by_layer=by_layer,
        grid=teacher.grid,
        n_seen=pixels.n_seen,
        n_values=pixels.values.shape[-1],
    )


@dataclass(frozen=True, kw_only=True)
class LayerProbes:
    """Accuracy of ridge probes by layer.

    Attributes:
        layers: Rows of all arrays.
        pooled: Accuracy of means of tokens, and of CLS, by name: (layer,).
        registers: Of each register by itself: (layer, register).
        patches: Of some patches, each by itself: (layer, patch).
        places: Which patches these are: (patch,) numbers, row by row of the grid.
        grid: Rows and columns of patches.
        shuffled: Of the mean of all tokens, fitted to labels that were shuffled anew for each draw: (layer, draw). One
            draw may be lucky: where classes lie apart, it gives each of them some class or other.
        chance: Share of the most frequent class among the images that were tested on.
        n_fit: Images that were fitted; as many were tuned on, at most.
        least_shots: Fitted images of the class that has fewest.
        n_test: Images that were tested on.
        tested_on: Where these come from.
    """

    layers: tuple[int, ...]
    pooled: Mapping[str, Float64[np.ndarray, " layer"]]
    registers: Float64[np.ndarray, "layer register"]
    patches: Float64[np.ndarray, "layer patch"]
    places: Int64[np.ndarray, " patch"]
    grid: tuple[int, int]
    shuffled: Float64[np.ndarray, "layer draw"]
    chance: float
    n_fit: int
    least_shots: int
    n_test: int
    tested_on: str


def probe_layers(
    store: Store, val: Store | None, limit: int, *, seed: int, n_shots: int = N_SHOTS, progress: Progress = None
) -> LayerProbes:
    """Ridge probes of every token and mean of tokens, at every layer.

    Args:
        store: Images to fit and to tune on.
        val: Images to test on; None for those of the store that were neither fitted nor tuned on.
        limit: Images of each at most: where that is not 2 n_shots for every class, all have fewer.
        seed: Of the shuffled labels.
        n_shots: Images of each class that are fitted, and as many that are tuned on.
        progress: Told 1 after each layer.

    Raises:
        UserError: Too few labelled images.
    """
    numbers, n_classes = class_numbers(store)
    labelled = np.flatnonzero(store.valid & (numbers >= 0))
    n_each = min(n_shots, max(1, limit // (2 * max(1, n_classes))))
    rows = labelled[_first_of_each(numbers[labelled], 2 * n_each)][:limit]
    try:
        shots = few_shots(numbers[rows], n_each)
    except ValueError as error:
        raise UserError(f"{store.location}: {error}") from error
    if val is None:
        test, test_labels = store, numbers
        where = np.setdiff1d(labelled, rows[np.concatenate([shots.fit, shots.tune])])[:limit]
    else:
        test, test_labels = val, _same_classes(val, store)
        where = np.flatnonzero(val.valid & (test_labels >= 0))[:limit]
    if not len(where):
        raise UserError(f"{store.location}: no labelled image is left to test on")
    taken = np.concatenate([shots.fit, shots.tune])
    order = np.argsort(taken)
    read = rows[taken[order]]
    places = _some_patches(store)
    inside = type(shots)(fit=np.searchsorted(read, rows[shots.fit]), tune=np.searchsorted(read, rows[shots.tune]))
    labels, of_test = numbers[read], test_labels[where]
    random = np.random.default_rng(seed)
    shuffles = [random.permutation(labels) for _ in range(N_SHUFFLES)]
    accuracies, control = [], []
    for layer in store.layers:
        fitted, names = _representations(store, layer, read, places)
        tested, _ = _representations(test, layer, where, places)
        few = [slice(i, i + _PROBES_AT_ONCE) for i in range(0, len(names), _PROBES_AT_ONCE)]  # each is by itself
        probed = [probe(fitted[:, some], labels, inside, tested[:, some], of_test, n_classes) for some in few]
        accuracies.append(np.concatenate([one.accuracy for one in probed]))
        means = [one[:, [names.index("mean of all")]] for one in (fitted, tested)]
        control.append([probe(means[0], one, inside, means[1], of_test, n_classes).accuracy[0] for one in shuffles])
        if progress is not None:
            progress(1)
    table = np.stack(accuracies)
    of = {kind: [i for i, name in enumerate(names) if name.split()[0] == kind] for kind in ("register", "patch")}
    return LayerProbes(
        layers=store.layers,
        pooled={name: table[:, i] for i, name in enumerate(names) if i not in [*of["register"], *of["patch"]]},
        registers=table[:, of["register"]],
        patches=table[:, of["patch"]],
        places=places,
        grid=store.spec.grid,
        shuffled=np.array(control),
        chance=float(np.bincount(of_test).max() / len(of_test)),
        n_fit=len(shots.fit),
        least_shots=int(np.bincount(numbers[rows[shots.fit]], minlength=n_classes).min()),
        n_test=len(where),
        tested_on=test.location,
    )


def _first_of_each(numbers: Int64[np.ndarray, " row"], n: int) -> Int64[np.ndarray, " chosen"]:
    """The first n rows of each class, ascending."""
    by_class = np.argsort(numbers, kind="stable")
    ordered = numbers[by_class]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    return np.sort(by_class[place < n])


def _same_classes(val: Store, train: Store) -> Int64[np.ndarray, " sample"]:
    """Classes of val by the numbers of train's; -1 where train has none such."""
    (mine, _), theirs = class_numbers(train), train.samples["label"].to_pylist()
    number_of = {label: int(number) for label, number in zip(theirs, mine) if number >= 0}
    return np.array([number_of.get(label, -1) for label in val.samples["label"].to_pylist()])


def _some_patches(store: Store) -> Int64[np.ndarray, " patch"]:
    n = store.spec.n_patches
    return np.unique(np.linspace(0, n - 1, min(n, MOST_PATCHES)).round().astype(np.int64))


def _representations(
    store: Store, layer: int, rows: Sequence[int] | Int64[np.ndarray, " row"], places: Int64[np.ndarray, " patch"]
) -> tuple[Float32[np.ndarray, "row probe dim"], list[str]]:
    """Single tokens and means of tokens; all tokens are held for a few rows at a time."""
    spec = store.spec
    n_prefix = int(spec.has_cls) + spec.n_registers
    names = [*(["cls"] if spec.has_cls else []), *(f"register {i + 1}" for i in range(spec.n_registers))]
    single = [*range(n_prefix), *(n_prefix + places)]
    parts: list[Float[np.ndarray, "row probe dim"]] = []
    for start in range(0, len(rows), _READ_ROWS):
        states = store.read([layer], rows[start : start + _READ_ROWS], "all")[:, 0]
        means = [states.mean(axis=1), *([states[:, 1:].mean(axis=1)] if spec.has_cls else [])]
        parts.append(np.concatenate([states[:, single], np.stack(means, axis=1)], axis=1))
    # Raghu et al.'s mean of all but the first token leaves out CLS; without CLS it would leave out a patch.
    pooled = ["mean of all", *(["mean of all but the first"] if spec.has_cls else [])]
    return np.concatenate(parts), [*names, *(f"patch {p}" for p in places), *pooled]

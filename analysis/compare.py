"""A model of the same depth beside a store: its own path from state 0, compared layer by layer with the stored states.

For a Raptor the stored states are its teacher's. Rolling out needs all tokens of state 0 and nothing else of the
store's patches; what is compared are the kinds with one token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64

from analysis.accumulate import Moments, MomentsAccumulator, unit_vectors
from analysis.dynamics import Dynamics, DynamicsAccumulator
from analysis.interventions import Blocks, token_kinds
from analysis.pass_over import ONE_TOKEN, batches
from analysis.similarity import CkaAccumulator
from infra.console import UserError
from storage_schemas import Store

#: Rows that roll out together; 205 MB a state of ViT-B/14.
BATCH_ROWS = 256


_ROWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against the states of a store.

    Attributes:
        layers: Of both.
        n_images: How many.
        cka: Rows are layers of the store, columns of the model; kinds joined.
        cosines: Between the model's state and the stored one at the same layer, by kind: (layer,).
        dynamics: Of the model, by kind.
    """

    layers: tuple[int, ...]
    n_images: int
    cka: Float64[np.ndarray, "layer layer"]
    cosines: Mapping[str, Moments]
    dynamics: Mapping[str, Dynamics]


def rolled_out(
    model: Blocks, x: Float32[torch.Tensor, "row token dim"], kinds: Mapping[str, slice]
) -> dict[str, Float32[np.ndarray, "row layer dim"]]:
    """Mean over the tokens of each kind, of every state from x on, each made from the one before it."""
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    with torch.no_grad():
        for layer in range(model.n_layers):
            if layer:
                x = model.run_blocks(x, layer - 1, layer)
            for kind, tokens in kinds.items():
                found[kind].append(x[:, tokens].mean(dim=1).cpu().numpy())
    return {kind: np.stack(states, axis=1) for kind, states in found.items()}


def compare_with_store(
    model: Blocks,
    store: Store,
    *,
    limit: int,
    device: torch.device | str = "cpu",
    batch_rows: int = BATCH_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Roll the model out from the stored states 0 and compare every later state.

    Args:
        model: With as many states as the store has layers.
        store: Complete in depth.
        limit: Only the first so many valid images.
        device: Where the model runs.
        batch_rows: Whose states 0 are held together, and of a batch of CKA.
        progress: Told the number of images after each batch.

    Raises:
        UserError: Another depth, or fewer than 4 images.
    """
    rows = np.flatnonzero(store.valid)[:limit]
    if model.n_layers != len(store.layers) or store.layers != tuple(range(model.n_layers)):
        raise UserError(f"the model has states 0 to {model.n_layers - 1}, {store.location} has {store.layers}")
    if len(rows) < 4:
        raise UserError(f"{len(rows)} images to compare on; the unbiased HSIC needs 4 or more")
    spec = store.spec
    where = token_kinds(has_cls=spec.has_cls, n_registers=spec.n_registers, n_patches=spec.n_patches)
    kinds: dict[str, slice] = {
        kind: where["patches" if kind == "patch_mean" else kind] for kind in ONE_TOKEN if kind in spec.token_kinds
    }
    cka = CkaAccumulator(2 * model.n_layers)
    cosines = {kind: MomentsAccumulator(model.n_layers) for kind in kinds}
    dynamics = {kind: DynamicsAccumulator(store.layers) for kind in kinds}
    for run in batches(spec, rows, batch_rows):
        x = torch.from_numpy(store.read([0], run, "all")[:, 0]).to(device)
        parts = [rolled_out(model, part, kinds) for part in x.split(_ROWS_AT_ONCE)]
        theirs = {kind: np.concatenate([part[kind] for part in parts]) for kind in kinds}
        ours = {kind: store.read(None, run, kind)[:, :, 0] for kind in kinds}
        cka.update(*(np.concatenate([one[kind] for kind in kinds], axis=-1) for one in (ours, theirs)))
        for kind in kinds:
            products = unit_vectors(ours[kind])[0] * unit_vectors(theirs[kind])[0]
            cosines[kind].update(products.sum(axis=-1).clip(-1, 1))
            dynamics[kind].update(theirs[kind][:, :, None])
        if progress is not None:
            progress(len(run))
    found = cka.result()
    return Comparison(
        layers=store.layers,
        n_images=len(rows),
        cka=found.values[: model.n_layers, model.n_layers :],
        cosines={kind: part.result() for kind, part in cosines.items()},
        dynamics={kind: part.result() for kind, part in dynamics.items()},
    )

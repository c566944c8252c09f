"""The layers of a model that is in no store: hidden states made here, and how alike they are."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float

from analysis.gallery.encoders import Alike, AlikeAccumulator
from analysis.interventions import Blocks
from analysis.pass_over import BATCH_ROWS


def by_kind(
    states: Float[np.ndarray, "row layer token dim"], kinds: Mapping[str, slice]
) -> dict[str, Float[np.ndarray, "row layer token dim"]]:
    """Hidden states cut into kinds of tokens, and the mean of the patches."""
    found = {kind: states[:, :, tokens] for kind, tokens in kinds.items()}
    if "patches" in found:
        found["patch_mean"] = found["patches"].mean(axis=2, keepdims=True)
    return found


@torch.no_grad()
def model_alike(
    model: Blocks,
    x: Float[torch.Tensor, "row token dim"],
    kinds: Mapping[str, slice],
    *,
    batch_rows: int = BATCH_ROWS,
) -> Alike:
    """Of any model whose blocks run one by one: a teacher, a Raptor, or one that is not in a store at all.

    Args:
        model: Depth is taken from it.
        x: State 0.
        kinds: Where the tokens of each kind lie.
        batch_rows: Of a minibatch; all states of its rows are in memory.
    """
    sums = AlikeAccumulator(range(model.n_layers))
    for part in x.split(batch_rows):
        states = [part]
        for layer in range(model.n_layers - 1):
            states.append(model.run_blocks(states[-1], layer, layer + 1))
        sums.update(by_kind(torch.stack(states, dim=1).cpu().numpy(), kinds))
    return sums.result()

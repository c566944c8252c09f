"""What the sections of a report that run models hold at most, beside weights and libraries."""

from analysis.vision.measure import LOCAL_ROWS, MOST_PATCHES, TAP_ROWS
from analysis.vision.receptive_field import FIELD_ROWS
from storage_schemas.spec import StoreSpec

#: States that a block keeps for its gradient, an MLP of four times the width included; and attention matrices.
_GRAPH_STATES, _GRAPH_ATTENTIONS = 24, 2
#: States of a block's sub-layers: seven, of which one is four times as wide; that one once more while parts are joined,
#: and what enters the block.
_TAPPED_STATES = 16


def models_nbytes(spec: StoreSpec, n_blocks: int, n_heads: int, limit: int, probed: int) -> int:
    """Bytes of the largest section, with the states 0 that all share: 2.6 GB for ViT-B/14 and 64 images.

    Args:
        spec: Of the store.
        n_blocks: Of the teacher, of which the store may hold the first layers alone.
        n_heads: Of each.
        limit: Images where models run.
        probed: Images that probes are fitted to and tuned on, and as many that they are tested on.
    """
    state = 4 * spec.n_tokens * spec.dim
    attention = 4 * n_heads * spec.n_tokens**2
    fields = FIELD_ROWS * n_blocks * (_GRAPH_STATES * state + _GRAPH_ATTENTIONS * attention)
    sub_layers = TAP_ROWS * _TAPPED_STATES * state
    # Patches as read and decoded, their pixels in float64, kernels of tokens and pixels.
    localisation = 4 * LOCAL_ROWS * state + 16 * spec.n_patches * LOCAL_ROWS**2
    n_probes = spec.n_tokens - spec.n_patches + min(spec.n_patches, MOST_PATCHES) + 2
    probes = 3 * 4 * probed * n_probes * spec.dim  # those to test on, to fit, and one of them while parts are joined
    return 3 * limit * state + max(fields, sub_layers, localisation, probes)

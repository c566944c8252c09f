"""Images that a store's teacher was not trained on, for whatever counts how often its head is right."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from infra.console import say
from infra.objects import ObjectError
from storage_schemas import Store, open_store
from storage_schemas.errors import StoreError
from storage_schemas.find import find_stores


def sibling_val(store: Store) -> Store | None:
    """The store val beside a store train, if it holds the same teacher's states; None if there is none to test on."""
    folder, _, name = store.location.rpartition("/")
    if name != "train":
        return None
    try:
        place = find_stores(folder).get("val")
        val = None if place is None else open_store(place)
    except (StoreError, ObjectError) as error:
        say(f"{folder}/val is left aside: {error}")
        return None
    if val is None or not val.n_valid:
        return None
    same = ("teacher_weights_digest", "layers", "dim", "grid", "n_registers", "has_cls")
    if any(getattr(val.spec, name) != getattr(store.spec, name) for name in same):
        say(f"{val.location} is left aside: it holds states of another teacher or of other layers")
        return None
    return val


@dataclass(frozen=True, kw_only=True)
class HeadImages:
    """Images for a teacher's own head.

    Attributes:
        x: State 0.
        labels: -1 for none; all are -1 where neither store has labels.
        place: The store that they are of.
        text: What they are to the teacher, as a section says it.
    """

    x: Float32[Tensor, "row token dim"]
    labels: Int64[np.ndarray, " row"]
    place: str
    text: str


def head_images(store: Store, val: Store | None, limit: int) -> HeadImages:
    """The first images with a label of val, else of the store; the first of the store where none has a label.

    Args:
        store: With state 0.
        val: See `sibling_val`.
        limit: Images.

    Raises:
        StoreError, ObjectError: As `Store.read`.
    """
    for source in (val, store):
        labels = _labels(source) if source is not None else np.empty(0, np.int64)
        rows = np.flatnonzero(labels >= 0)[:limit]
        if source is not None and len(rows):
            break
    else:
        source, labels, rows = store, _labels(store), np.flatnonzero(store.valid)[:limit]
    x = torch.from_numpy(source.read([0], rows, "all")[:, 0])
    if source is val:
        text = f"Accuracy on held-out images, of {source.location}."
    elif source.location.rpartition("/")[2] == "train":
        text = "Accuracy on training images, which the teacher and its head may have learned: there is no val beside."
    else:
        text = f"Accuracy on images of {source.location}, which the teacher and its head may have learned."
    return HeadImages(x=x, labels=labels[rows], place=source.location, text=text)


def _labels(store: Store) -> Int64[np.ndarray, " sample"]:
    """Of valid samples; -1 for others and where there is none."""
    labels = np.array([-1 if one is None else one for one in store.samples["label"].to_pylist()], dtype=np.int64)
    return np.where(store.valid, labels, -1)

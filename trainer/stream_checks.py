"""What a stream is made from and continued with, checked before anything is read."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from storage_schemas.errors import NotCommittedError, SchemaError
from storage_schemas.reader import Store
from storage_schemas.spec import Span
from trainer.ring import stream_kinds


def check_numbers(least: int, **numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")


def check_state(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError for what `state_dict` would have written and is not there, or is no number."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the stream state lacks {', '.join(missing)}; give what state_dict() returned, whole")
    check_numbers(0, **{name: state[name] for name in ("seed", "epoch", "batch")})
    shards = state["shards"]
    if shards is not None and not (isinstance(shards, Sequence) and all(isinstance(s, int) for s in shards)):
        raise ValueError(f"shards of the stream state are {shards!r}; expected a list of whole numbers, or None")


def check_kinds(store: object, span: object) -> None:
    if not isinstance(store, Store):
        raise TypeError(f"store is {type(store).__name__}, expected a Store: give open_store({_shown(store)})")
    if not isinstance(span, Span):
        raise TypeError(f"span is {type(span).__name__}, expected a Span: give Span(0, 7) or Span.parse('0-7')")


def _shown(store: object) -> str:
    return repr(os.fspath(store)) if isinstance(store, str | os.PathLike) else "path"


def check_span(store: Store, span: Span) -> None:
    missing = [layer for layer in span.states if layer not in store.layers]
    if missing:
        raise SchemaError(
            f"BLOCK={span}",
            [
                f"{store.location} has no layer {', '.join(map(str, missing))}; it has "
                f"{', '.join(map(str, store.layers))}. Choose a span within them"
            ],
        )
    assert stream_kinds(store.spec)


def frozen_shards(store: Store, partial: bool, shards: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shards that take part; None where that is all of them by right."""
    committed = store.committed
    if shards is not None:
        if not partial:
            raise ValueError("shards were given for a whole pass; give partial=True with them")
        missing = [s for s in shards if not (0 <= s < len(committed) and committed[s])]
        if missing:
            raise NotCommittedError(
                f"{store.location}: shards {', '.join(map(str, missing[:10]))} are not committed, but the pass was "
                "begun with them. Mend the store (make verify REPAIR=1) or begin another run"
            )
        return tuple(sorted(shards))
    if committed.all():
        return None
    if not partial:
        raise NotCommittedError(
            f"{store.location} is not finished: {int(committed.sum())} of {len(committed)} shards are committed. Run "
            "the same make extract again, or use what is there: PARTIAL=1"
        )
    return tuple(np.flatnonzero(committed).tolist())


def valid_in(store: Store, shards: Sequence[int] | None) -> np.ndarray:
    if shards is None:
        return store.valid
    valid = np.zeros(store.n_samples, bool)
    for shard in shards:
        rows = store.spec.shard_samples(shard)
        valid[rows.start : rows.stop] = store.valid[rows.start : rows.stop]
    return valid

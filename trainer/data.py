"""From STORE and BLOCK, as a person types them, to stores that can be trained on, or a message that lists all that is
wrong with them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from infra.console import UserError
from infra.objects import ObjectError
from pipeline.checkpoints import read_linear_head
from pipeline.teacher import Teacher, teacher_from_files
from storage_schemas import Span, Store, open_store
from storage_schemas.errors import SchemaError, StoreError
from storage_schemas.find import find_stores
from storage_schemas.spec import differences
from trainer.order import random64
from trainer.raptor import span_problems

TRAIN, VAL = "train", "val"
HOLD_OUT_SHARE = 0.02
_ALL = "all"
# The same hold-out for every seed and span, so that blocks of one store can be compared and joined without leakage.
_HOLD_OUT_KEY = 20_260


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What one run reads.

    Attributes:
        spans: One per block, in order; each begins where the one before it stops.
        train: Its valid samples are trained on.
        validation: Its valid samples, and no others, are validated on.
        teacher: From the store's own files; None where it has none.
        validated_on: In words: "val", or "a hold-out of 2 % of the chunks".
        identity: What of this belongs to the run's config, as JSON values.
    """

    spans: tuple[Span, ...]
    train: Store
    validation: Store
    teacher: Teacher | None
    validated_on: str
    identity: dict[str, Any]

    @property
    def span(self) -> Span:
        """All states that take part."""
        return Span(self.spans[0].start, self.spans[-1].stop)


def open_training_data(
    location: str,
    blocks: str | None,
    *,
    variable: str = "BLOCK",
    joined: bool = True,
    head: str | None = None,
    partial: bool = False,
    frozen: Mapping[str, Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
    known_problems: Sequence[str] = (),
) -> TrainingData:
    """Open STORE and check that a block, or several together, can be trained on it.

    Args:
        location: A store, or a folder with stores train and val.
        blocks: Such as "0-7", or "0-7,7-10,10-12" for several; both ends are states. None: there are none, which is
            among the known problems; whatever else is wrong is still found.
        variable: What the person typed the blocks as, for messages: BLOCK, of one block, or BLOCKS.
        joined: Whether several are trained together, so that each must begin where the one before it stops.
        head: File with a linear classifier, in the place of the teacher's own.
        partial: Train on an unfinished store, with the shards that are there.
        frozen: With partial, exactly these shards of train and val, by split: those that the run began with.
        device: Of the teacher.
        known_problems: What is wrong with the command already, to be listed with what is found here.

    Raises:
        UserError: Lists every problem, each with the valid range or the next step.
    """
    problems = list(known_problems)
    train, val = _open_stores(location, problems)
    teacher = _load_teacher(train, head, device, problems) if train else None
    target = "raptor" if variable == "BLOCKS" and joined else "train"
    spans = _parse_spans(blocks, variable, target, train, teacher, problems)
    if joined:
        problems += [f"{variable}={blocks}: {problem}" for problem in (span_problems(spans) if spans else ())]
    chosen = {TRAIN: (frozen or {}).get(TRAIN), VAL: (frozen or {}).get(VAL)}
    for split, store in ((TRAIN, train), (VAL, val)):
        if store is not None:
            problems += _unfinished(store, partial, chosen[split]) or _without_samples(store, chosen[split])
    if train is not None and val is not None:
        problems += _foreign_val(train, val)
    if problems or train is None:
        raise UserError("\n  ".join([f"make {target} cannot start:", *problems]))
    shards = _frozen(train, chosen[TRAIN]) if partial else None
    val_shards = _frozen(val, chosen[VAL]) if partial and val is not None else None
    usable = train.valid & _in_shards(train, shards)
    if val is not None:
        validation, taking, validated_on = with_samples(val, _in_shards(val, val_shards)), usable, VAL
    else:
        taking, held = split_hold_out(train, usable)
        validation, validated_on = (
            with_samples(train, held),
            f"a hold-out of {100 * HOLD_OUT_SHARE:.0f} % of the chunks",
        )
    identity = {
        "train": train.document.digest,
        "validation": val.document.digest if val is not None else validated_on,
        "shards": _ALL if shards is None else list(shards),
        "validation_shards": _ALL if val_shards is None else list(val_shards),
        "teacher": "none" if teacher is None else teacher.weights_digest,  # with the head's
    }
    return TrainingData(
        spans=spans,
        train=with_samples(train, taking),
        validation=validation,
        teacher=teacher,
        validated_on=validated_on,
        identity=identity,
    )


def frozen_shards(identity: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shards that a run began with, from its identity: by split, where it began with some of them only."""
    by_split = {TRAIN: identity["shards"], VAL: identity["validation_shards"]}
    return {split: list(shards) for split, shards in by_split.items() if shards != _ALL}


def with_samples(store: Store, chosen: Bool[np.ndarray, " sample"]) -> Store:
    """The same store with only the chosen ones of its valid samples."""
    table = dataclasses.replace(store.table, valid=store.valid & chosen)
    return Store(store.objects, store.document, table, store.damaged_commits)


def first_samples(store: Store, n: int) -> Store:
    """The same store with only its first n valid samples; a random choice, as stores are in shuffled order."""
    chosen = np.zeros(store.n_samples, bool)
    chosen[np.flatnonzero(store.valid)[:n]] = True
    return with_samples(store, chosen)


def split_hold_out(
    store: Store, usable: Bool[np.ndarray, " sample"]
) -> tuple[Bool[np.ndarray, " sample"], Bool[np.ndarray, " sample"]]:
    """Samples to train on and samples held out: 2 % of the chunks, at least one, drawn once and for all.

    Whole chunks, because a chunk is fetched whole: validation then reads no byte of the training set.

    Raises:
        UserError: Fewer than two chunks have usable samples.
    """
    per_chunk = store.spec.samples_per_chunk
    chunks = np.unique(np.flatnonzero(usable) // per_chunk)
    if len(chunks) < 2:
        raise UserError(
            f"{store.location} has {len(chunks)} chunk with samples, so none can be held out for validation: "
            "give a folder with stores train and val, or a store with more samples"
        )
    n_held = max(1, round(HOLD_OUT_SHARE * len(chunks)))
    drawn = chunks[np.argsort(random64(_HOLD_OUT_KEY, chunks), kind="stable")[:n_held]]
    held = usable & np.isin(np.arange(store.n_samples) // per_chunk, drawn)
    return usable & ~held, held


def _open_stores(location: str, problems: list[str]) -> tuple[Store | None, Store | None]:
    """The store itself, or train and val below it; a problem for each that cannot be opened."""
    try:
        found = {split: open_store(place) for split, place in find_stores(location).items()}
    except (StoreError, ObjectError) as error:
        problems.append(f"STORE={location}: {error}")
        return None, None
    train = found.get("", found.get(TRAIN))
    if train is None:
        problems.append(f"STORE={location} has a store {VAL} but none called {TRAIN}: make extract")
    return train, found.get(VAL)


def _load_teacher(store: Store, head: str | None, device: torch.device | str, problems: list[str]) -> Teacher | None:
    try:
        files = store.read_teacher_files()
        teacher = teacher_from_files(files, device=device) if files else None
        if head is None:
            return teacher
        if teacher is None:
            problems.append(f"HEAD={head}: {store.location} holds no teacher whose last layers could feed it")
            return None
        linear = read_linear_head(head, 2 * teacher.dim).to(device).requires_grad_(False)
        return dataclasses.replace(teacher, head=linear)
    except (StoreError, ObjectError, UserError) as error:
        problems.append(str(error))
        return None


def _parse_spans(
    text: str | None, variable: str, target: str, store: Store | None, teacher: Teacher | None, problems: list[str]
) -> tuple[Span, ...]:
    """The spans of BLOCK or BLOCKS; what is wrong with them goes to the problems."""
    several = "BLOCKS=0-7,7-10,10-12"
    example = "make train BLOCK=0-7" if variable == "BLOCK" else f"make {target} {several}"
    if (variable, target) == ("BLOCKS", "train"):
        example = f"make train BLOCK=all {several}"
    last = None
    if text is None:
        return ()
    if store is None:
        allowed = "a-b with 0 <= a < b, both ends states of the teacher"
    else:
        last = teacher.n_layers - 1 if teacher is not None else store.layers[-1]
        allowed = f"a-b with 0 <= a < b <= {last}: {store.spec.teacher} has states 0 to {last}"
    if not text:
        problems.append(f"{variable} is missing: give {allowed}. For example: {example}")
        return ()
    spans: list[Span] = []
    for part in text.split(",") if variable == "BLOCKS" else [text]:
        try:
            spans.append(Span.parse(part.strip()))
        except SchemaError:
            problems.append(f"{variable}={text}: expected {allowed}. For example: {example}")
            return ()
    if store is None or last is None:
        return tuple(spans)
    states = sorted({layer for span in spans for layer in span.states})
    if states[-1] > last:
        problems.append(f"{variable}={text}: expected {allowed}")
    elif missing := [layer for layer in states if layer not in store.layers]:
        problems.append(
            f"{variable}={text}: {store.location} lacks layers {_listed(missing)}; it has {_listed(store.layers)}. "
            f"Choose {'a span' if variable == 'BLOCK' else 'spans'} within them, or extract the others"
        )
    return tuple(spans)


def _unfinished(store: Store, partial: bool, frozen_shards: Sequence[int] | None) -> list[str]:
    committed = store.committed
    if partial and frozen_shards is not None:
        lost = [shard for shard in frozen_shards if shard >= len(committed) or not committed[shard]]
        return (
            [f"{store.location}: the run began with shards {_listed(lost)}, which are gone: make verify"]
            if lost
            else []
        )
    if partial:
        return [] if committed.any() else [f"{store.location} has no finished shard yet: make extract"]
    if committed.all():
        return []
    return [
        f"{store.location} is not finished: {int(committed.sum()):,} of {len(committed):,} shards are there. "
        "Run the same make extract again, or train on what is there: PARTIAL=1"
    ]


def _without_samples(store: Store, frozen_shards: Sequence[int] | None) -> list[str]:
    if (store.valid & _in_shards(store, frozen_shards)).any():
        return []
    n_read = int(store.committed.sum())
    return [
        f"{store.location} has no sample to use: the images of all {n_read:,} shards that are there were bad. "
        f"See which and why: make inspect STORE={store.location}"
    ]


def _foreign_val(train: Store, val: Store) -> list[str]:
    """Fields in which train and val must agree to be states of one teacher."""
    same = ("layers", "dim", "has_cls", "n_registers", "grid", "teacher", "teacher_weights_digest")
    aligned = dataclasses.replace(val.spec, **{f: getattr(train.spec, f) for f in same})
    return [
        f"{val.location} is not of the same teacher and layers as {train.location}: {text}"
        for text in differences(val.spec, aligned)
    ]


def _frozen(store: Store, frozen_shards: Sequence[int] | None) -> tuple[int, ...] | None:
    if frozen_shards is not None:
        return tuple(frozen_shards)
    return None if store.is_complete else tuple(np.flatnonzero(store.committed).tolist())


def _in_shards(store: Store, shards: Sequence[int] | None) -> Bool[np.ndarray, " sample"]:
    if shards is None:
        return np.ones(store.n_samples, bool)
    return np.isin(np.arange(store.n_samples) // store.spec.samples_per_shard, shards)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (" ..." if len(numbers) > 20 else "")

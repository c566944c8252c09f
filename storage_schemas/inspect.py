"""What a store holds, as text. Reads commits, statistics and head inputs, never the states themselves."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as tensors_from_bytes

from infra.console import human_bytes
from infra.objects import ObjectError
from storage_schemas.codecs import kind_dtype, kind_shape, raw_chunk_nbytes
from storage_schemas.errors import SchemaError, StoreError
from storage_schemas.indices import layer_ranges, layer_runs
from storage_schemas.keys import array_kind, sharded_array_paths
from storage_schemas.reader import Store
from storage_schemas.spec import FORMAT_VERSION, HEAD_INPUT, StoreSpec

HEAD_FILE = "head.safetensors"
_N_NAMED = 10
_ROWS_AT_ONCE = 8192


def describe_store(store: Store) -> str:
    """Everything `inspect` prints about one store: what it is, what is there, what the values look like."""
    sections = [
        ("", lambda: _identity_lines(store)),
        ("bad images", lambda: _bad_image_lines(store)),
        ("", lambda: _array_lines(store)),
        ("norms", lambda: _norm_lines(store)),
        ("error", lambda: _fidelity_lines(store)),
        ("teacher", lambda: _accuracy_lines(store)),
    ]
    lines = [store.location]
    for name, make in sections:
        lines += [f"  {line}" if line else "" for line in _lines_or_reason(name, make)]
    return "\n".join(lines)


def _lines_or_reason(name: str, make: Callable[[], list[str]]) -> list[str]:
    """The lines, or in their place why they cannot be had: a damaged store is when one wants to see the rest."""
    try:
        return make()
    except (StoreError, ObjectError) as error:
        return [f"{name:<12} cannot be shown: {error}"]


def next_command(stores: Sequence[Store], root: str | os.PathLike[str]) -> str:
    """The one line that says what to type next, for a store or for the stores train and val below `root`."""
    if any(store.damaged_commits for store in stores):
        return f"Next: make verify STORE={root} IMAGES=<as extracted> REPAIR=1"
    if not all(store.is_complete for store in stores):
        return "Next: the same make extract again, to finish it"
    run = next((run for run in layer_runs(stores[0].layers) if len(run) > 1), None)  # a span needs every state within
    if run is None:
        return f"Next: make verify STORE={root}"
    return f"Next: make train BLOCK={run[0]}-{min(run[0] + 7, run[-1])} STORE={root}"


def teacher_accuracy(store: Store) -> float | None:
    """Share of the valid samples that the teacher's own head gets right, from head_input alone.

    Returns:
        None where the store has no head, no head inputs or no valid sample.

    Raises:
        SchemaError: The head does not fit the head inputs.
        ChecksumError: Head, labels or head inputs are not what was committed.
    """
    rows = np.flatnonzero(store.valid)
    if not store.spec.has_head_input or not len(rows) or f"teacher/{HEAD_FILE}" not in store.document.documents:
        return None
    weight, bias = _read_head(store)
    labels, n_right = store.samples["label"].to_numpy()[rows], 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        logits = store.read_head_input(rows[part]) @ weight.T + bias
        n_right += int((logits.argmax(axis=1) == labels[part]).sum())
    return n_right / len(rows)


def accuracy_line(store: Store) -> str | None:
    """The teacher's accuracy in words, with what makes it doubtful; None as for `teacher_accuracy`."""
    accuracy = teacher_accuracy(store)
    if accuracy is None:
        return None
    n_known = len(_read_head(store)[1])
    labels = store.samples["label"].to_numpy()[store.valid]
    n_here = len(np.unique(labels))
    if labels.max() >= n_known or labels.min() < 0:
        return (
            f"the teacher's head knows {n_known:,} classes, but labels go to {labels.max():,}: it is of other classes"
        )
    line = f"the teacher's head gets {accuracy:.2%} of these images right"
    if n_here < n_known and labels.max() < n_known - 1:
        return f"{line} (it knows {n_known:,} classes, here are {n_here:,}: are they numbered alike?)"
    return line


def _read_head(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Weight (classes, 2 dim) and bias (classes) of the teacher's head."""
    place = f"teacher/{HEAD_FILE}"
    try:
        head = tensors_from_bytes(store.read_document(place))
        weight, bias = head["weight"], head["bias"]
    except (SafetensorError, KeyError) as error:
        raise SchemaError(place, [f"is not a linear head: {error}"]) from error
    if weight.shape != (len(bias), 2 * store.spec.dim):
        raise SchemaError(place, [f"maps {weight.shape}, expected (classes, {2 * store.spec.dim})"])
    return weight, bias


def token_norms(store: Store) -> np.ndarray:
    """(layer, kind): root mean square norm of a token's state, from the statistics; NaN where nothing was seen."""
    statistics = store.statistics
    return np.sqrt((statistics.variance + statistics.mean**2).sum(axis=-1))


def stored_nbytes(store: Store, kind: str) -> tuple[int, int]:
    """(raw, stored) bytes of the committed chunks of one kind over all layers."""
    raw = stored = 0
    for path in sharded_array_paths(store.spec):
        if array_kind(path) == kind:
            nbytes = store.table.chunks[path][:, 1]
            raw += int((nbytes >= 0).sum()) * raw_chunk_nbytes(store.spec, kind)
            stored += int(nbytes[nbytes >= 0].sum())
    return raw, stored


def _identity_lines(store: Store) -> list[str]:
    spec = store.spec
    n_shards = int(store.committed.sum())
    codec = spec.codec if spec.shuffle == "none" else f"{spec.codec} with {spec.shuffle} shuffle"
    lines = [
        f"teacher      {spec.teacher}, weights {spec.teacher_weights_digest[:16]}, computed in {spec.compute}",
        f"samples      {spec.n_samples:,} planned, {store.n_committed:,} committed "
        f"({n_shards:,} of {spec.n_shards:,} shards), {store.n_valid:,} valid",
        f"layers       {layer_ranges(spec.layers)}; {spec.n_tokens} tokens of {spec.dim} channels: {_tokens(spec)}",
        f"stored as    {spec.backend}, patches in {spec.precision}, codec {codec}, "
        f"{spec.samples_per_shard} samples a shard, {spec.samples_per_chunk} a chunk",
        f"order        seed {spec.order_seed}, source {spec.source_digest[:16]}; "
        f"identity {store.document.digest[:16]}, format version {FORMAT_VERSION}",
    ]
    lines += [f"damaged      {key}: {what}" for key, what in sorted(store.damaged_commits.items())[:_N_NAMED]]
    more = len(store.damaged_commits) - _N_NAMED
    return [*lines, f"             and {more:,} more damaged commits"] if more > 0 else lines


def _tokens(spec: StoreSpec) -> str:
    parts = ["CLS"] if spec.has_cls else []
    parts += [f"{spec.n_registers} registers"] if spec.n_registers else []
    return " + ".join([*parts, f"{spec.grid[0]} x {spec.grid[1]} patches"])


def _bad_image_lines(store: Store) -> list[str]:
    bad = sorted(store.table.bad_images.items())
    if not bad:
        return []
    names = store.samples["sample_id"]
    lines = [f"bad images   {len(bad):,}; their rows are invalid"]
    lines += [f"             {names[index].as_py()}: {code}" for index, code in bad[:_N_NAMED]]
    return [*lines, f"             and {len(bad) - _N_NAMED:,} more"] if len(bad) > _N_NAMED else lines


def _array_lines(store: Store) -> list[str]:
    spec = store.spec
    kinds = [*spec.array_kinds, *([HEAD_INPUT] if spec.has_head_input else [])]
    rows = [["kind", "shape of one sample", "dtype", "arrays", "stored", "ratio"]]
    for kind in kinds:
        raw, stored = stored_nbytes(store, kind)
        rows.append(
            [
                kind,
                " x ".join(map(str, kind_shape(spec, kind))),
                spec.precision if kind == "patches" else kind_dtype(spec, kind).name,
                "1" if kind == HEAD_INPUT else str(len(spec.layers)),
                human_bytes(stored),
                f"{raw / stored:.2f}" if stored else "-",
            ]
        )
    return ["", *table(rows), f"in all {human_bytes(store.table.stored_nbytes)} in {_n_objects(store):,} data objects"]


def _n_objects(store: Store) -> int:
    return int(store.committed.sum()) * (len(sharded_array_paths(store.spec)) + 1)


def _norm_lines(store: Store) -> list[str]:
    if not store.n_valid:
        return []
    kinds = store.spec.token_kinds
    rows = [["layer", *kinds]]
    for layer, norms in zip(store.layers, token_norms(store)):
        rows.append([str(layer), *(f"{norm:.4g}" for norm in norms)])
    return ["", "root mean square norm of a token's state", *table(rows)]


def _fidelity_lines(store: Store) -> list[str]:
    """The error of each array that was rounded, over all shards, and the worst of them."""
    fidelity = store.fidelity
    if not fidelity:
        return []
    rows = [["array", "relative MSE", "R2", "largest error"]]
    rows += [[path, f"{f.relative_mse:.2e}", f"{f.r2:.8f}", f"{f.worst:.3g}"] for path, f in fidelity.items()]
    worst = max(fidelity, key=lambda path: fidelity[path].relative_mse)
    layer, kind = int(worst[6:8]), array_kind(worst)
    return [
        "",
        f"stored in {store.spec.precision} against float32, over all shards; the other arrays are exact",
        *table(rows),
        f"worst: {kind} of layer {layer}, relative MSE {fidelity[worst].relative_mse:.2e}",
    ]


def _accuracy_lines(store: Store) -> list[str]:
    line = accuracy_line(store)
    return [] if line is None else [line]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]

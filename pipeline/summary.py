"""What an extraction says when it ends: sizes, speed, problems, and the next command to type."""

import shlex
from collections.abc import Sequence

from infra.console import human_bytes, human_duration, human_rate
from pipeline.extract import ExtractResult
from storage_schemas.inspect import accuracy_line, next_command
from storage_schemas.reader import Store, open_store

_N_NAMED = 10
_DEFAULT_STORE = "data/stores/digits"


def summarise(results: Sequence[ExtractResult], root: str) -> str:
    """The closing lines of `make extract`."""
    lines = [line for result in results for line in _store_lines(result)]
    if any(result.quarantined or not result.complete for result in results):
        lines.append("The same command goes on from here.")
        return "\n".join(lines)
    place = shlex.quote(root)
    if any(result.planned.split in ("", "train") for result in results):
        stores = [open_store(result.planned.location) for result in results]
        lines.append(next_command(stores, place).removesuffix(f" STORE={_DEFAULT_STORE}"))
    else:  # a store of val alone is nothing to train on
        lines.append(f"Next: make inspect STORE={place}")
    return "\n".join(lines)


def _store_lines(result: ExtractResult) -> list[str]:
    if result.interrupted and not result.n_done and not result.n_before:
        return [f"{result.planned.location}: not begun"]
    store = open_store(result.planned.location)
    spec = store.spec
    head = (
        f"{store.location}: {store.n_valid:,} of {store.n_samples:,} images, "
        f"{len(spec.layers)} layers x {spec.n_tokens} tokens x {spec.dim} channels, "
        f"{human_bytes(store.table.stored_nbytes)}"
    )
    lines = [head]
    if not result.n_done and result.complete:
        lines.append("  complete already: nothing was done")
    elif result.n_done:
        rate = result.n_done / result.wall_s
        lines.append(
            f"  {result.n_done:,} images in {human_duration(result.wall_s)}, {human_rate(rate)} images/s, "
            f"{human_bytes(result.nbytes / result.wall_s)}/s written"
            + (f"; {result.n_before:,} were there before" if result.n_before else "")
        )
        if result.verdict:
            lines.append(f"  {result.verdict}")
    worst = max(store.table.fidelity.items(), key=lambda item: item[1].relative_mse, default=None)
    if worst is not None:
        path, fidelity = worst
        lines.append(
            f"  {spec.precision} against float32: R2 {fidelity.r2:.7f}, relative MSE {fidelity.relative_mse:.1e} "
            f"at worst ({path})"
        )
    lines += _accuracy_lines(store)
    lines += _bad_image_lines(result)
    lines += [f"  shard {outcome.shard} was given up: {outcome.cause}" for outcome in result.quarantined]
    if not result.complete:
        lines.append(f"  {spec.n_samples - store.n_committed:,} images are still to do")
    return lines


def _bad_image_lines(result: ExtractResult) -> list[str]:
    bad = result.bad_images
    if not bad:
        return []
    shown = [f"    {name}: {code}" for _, name, code in bad[:_N_NAMED]]
    more = [f"    and {len(bad) - _N_NAMED} more (store.samples names all)"] if len(bad) > _N_NAMED else []
    return [f"  {len(bad)} images did not decode; their rows are invalid:", *shown, *more]


def _accuracy_lines(store: Store) -> list[str]:
    line = accuracy_line(store)
    return [] if line is None else [f"  {line}"]

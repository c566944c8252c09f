"""What an extraction says when it ends: sizes, speed, problems, and the next command to type."""

import shlex
from collections import Counter
from collections.abc import Sequence

from infra.console import counted, human_bytes, human_duration, human_rate
from pipeline.job import ExtractResult
from pipeline.shard_writer import counted_requests
from storage_schemas.inspect import accuracy_line, next_command
from storage_schemas.reader import Store, open_store

_N_NAMED = 10
_DEFAULT_STORE = "data/stores/digits"


def summarise(results: Sequence[ExtractResult], root: str) -> str:
    """The closing lines of `make extract`."""
    stores = [None if _not_begun(result) else open_store(result.planned.location) for result in results]
    lines = [line for result, store in zip(results, stores) for line in _store_lines(result, store)]
    if any(result.quarantined or not result.complete for result in results):
        lines.append("The same command goes on from here.")
        return "\n".join(lines)
    place = shlex.quote(root)
    if any(result.planned.split in ("", "train") for result in results):
        lines.append(
            next_command([store for store in stores if store is not None], place).removesuffix(
                f" STORE={_DEFAULT_STORE}"
            )
        )
    else:  # a store of val alone is nothing to train on
        lines.append(f"Next: make inspect STORE={place}")
    return "\n".join(lines)


def _not_begun(result: ExtractResult) -> bool:
    return result.interrupted and not result.n_done and not result.n_before and not result.n_by_others


def _store_lines(result: ExtractResult, store: Store | None) -> list[str]:
    if store is None:
        return [f"{result.planned.location}: not begun"]
    spec = store.spec
    head = (
        f"{store.location}: {store.n_valid:,} of {store.n_samples:,} images, "
        f"{counted(len(spec.layers), 'layer')} x {spec.n_tokens} tokens x {spec.dim} channels, "
        f"{human_bytes(store.table.stored_nbytes)}"
    )
    lines = [head]
    if result.n_shards_by_others:
        lines.append(f"  {counted(len(result.reports), 'shard')} by this job, {result.n_shards_by_others:,} by others")
    if not result.n_done and not result.n_by_others and result.complete:
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
    lines += _fault_lines(result.faults)
    lines += _request_lines(result.requests + counted_requests(store.objects))
    if not result.complete:
        lines.append(f"  {spec.n_samples - store.n_committed:,} images are still to do")
    return lines


def _request_lines(n: Counter[str]) -> list[str]:
    if not n:
        return []
    return [
        f"  S3: {n['put']:,} PUT, {n['get'] + n['head']:,} GET and HEAD, {n['list']:,} LIST, {n['delete']:,} DELETE; "
        f"{human_bytes(n['bytes_out'])} out, {human_bytes(n['bytes_in'])} in"
    ]


def _fault_lines(faults: Counter[str]) -> list[str]:
    if not faults:
        return []
    found = ", ".join(f"{n:,} {name}" for name, n in faults.most_common())
    return [f"  requests that failed and were made again: {found}"]


def _bad_image_lines(result: ExtractResult) -> list[str]:
    bad = result.bad_images
    if not bad:
        return []
    shown = [f"    {name}: {code}" for _, name, code in bad[:_N_NAMED]]
    more = [f"    and {len(bad) - _N_NAMED} more (store.samples names all)"] if len(bad) > _N_NAMED else []
    rows = "its row is" if len(bad) == 1 else "their rows are"
    return [f"  {counted(len(bad), 'image')} did not decode; {rows} invalid:", *shown, *more]


def _accuracy_lines(store: Store) -> list[str]:
    line = accuracy_line(store)
    return [] if line is None else [f"  {line}"]

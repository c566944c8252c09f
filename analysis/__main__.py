"""`python -m analysis`: the door to the analyses. It puts together what was typed, the store and what is saved."""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro

from analysis.demo import demo_command
from analysis.distances import N_IMAGES, LayerDistances, layer_distances, teacher_depth
from analysis.figures import phases_figure
from analysis.gallery.gallery_command import gallery_command
from analysis.partitions import spans_text
from analysis.phase_report import Phases, find_phases, phases_json, phases_table
from analysis.phases import DEFAULT_OBJECTIVE, MAX_CUT_LAYERS, MIN_SIZE, OBJECTIVES, partition_problems
from analysis.places import DEFAULT_STORE, committed_text, make_command, open_out, open_train, store_name
from analysis.positions.positions_command import positions_command
from analysis.report_command import report_command
from analysis.training.curves_command import curves_command
from analysis.training.study_command import study_command
from analysis.vision.skips_command import skips_command
from infra.console import ExitCode, JobError, Progress, UserError, leave, run_door, say
from infra.objects import (
    ObjectError,
    Objects,
)
from infra.s3_settings import use_endpoint
from storage_schemas import Store
from storage_schemas.errors import StoreError

DEFAULT_OUT = "data/phases"


def phases_command(
    *,
    store: str = DEFAULT_STORE,
    k: int | None = None,
    epsilon: float | None = None,
    objective: str = DEFAULT_OBJECTIVE,
    out: str = "",
    limit: int = N_IMAGES,
    endpoint_url: str | None = None,
) -> int:
    """Cut the depth of a store's teacher into spans, one for each block of a Raptor. Reads no patches.

    Prints the spans as a line BLOCKS=, with what random partitions score; saves matrix, figure and JSON.

    Args:
        store: A store, or a folder with the stores train and val, of which train is read; local or s3://bucket/prefix.
        k: Number of blocks: the best contiguous spans by the objective.
        epsilon: Threshold of the max-cut recursion, as a share of the total distance, from 0 to 1; without k its
            clusters become the spans. The reference has 0.20, 0.10 and 0.09 for 2, 3 and 4 blocks of DINOv2 ViT-B.
        objective: normalised_association, cut, cut_per_layer or mean_distance.
        out: Folder or s3://bucket/prefix for what is saved; empty: data/phases/<store>.
        limit: Only the first so many images of the store's shuffled order.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    place = out or default_out(store)
    problems = _setting_problems(k, epsilon, objective, limit)
    saved = open_out(place, store, problems)
    source = open_train(store, problems)
    depth = 0 if source is None else _find_depth(source, problems)
    if source is not None:
        problems += _depth_problems(source, depth, k, epsilon) + _image_problems(source, limit)
    if problems or source is None or saved is None:
        raise UserError("\n  ".join(["make phases cannot start:", *problems]))
    measured = _measure(source, depth, limit)
    try:
        phases = find_phases(measured.distance, k, epsilon, objective)
    except ValueError as error:  # an objective that is not defined on these distances
        raise UserError(str(error)) from error
    typed = {
        "K": k,
        "EPSILON": epsilon,
        "OBJECTIVE": objective if objective != DEFAULT_OBJECTIVE else None,
        "STORE": store if store != DEFAULT_STORE else None,
        "OUT": out or None,
        "LIMIT": limit if limit != N_IMAGES else None,
    }
    command = make_command("phases", typed)
    name = _file_name(phases, epsilon)
    _save(saved, name, source, measured, phases, command)
    print(_report(source, measured, phases))
    print(f"\nsaved  {place}/: distance.npz, {name}.png, {name}.json")
    return _print_blocks(phases, store, endpoint_url)


def default_out(store: str) -> str:
    """data/phases/<store>."""
    return f"{DEFAULT_OUT}/{store_name(store)}"


def _setting_problems(k: int | None, epsilon: float | None, objective: str, limit: int) -> list[str]:
    problems = []
    if k is None and epsilon is None:
        problems.append("K is missing: give the number of blocks, or EPSILON. For example: make phases K=3")
    if k is not None and k < 1:
        problems.append(f"K={k}: expected 1 or more blocks")
    if epsilon is not None and not 0 <= epsilon < 1:
        problems.append(f"EPSILON={epsilon}: expected a share of the total distance, from 0 to below 1, such as 0.1")
    if objective not in OBJECTIVES:
        problems.append(f"OBJECTIVE={objective}: expected one of {', '.join(OBJECTIVES)}")
    if limit < 2:
        problems.append(f"LIMIT={limit}: expected 2 or more images")
    return problems


def _find_depth(store: Store, problems: list[str]) -> int:
    """The last layer of the store's teacher; where the store has no teacher, the last that it holds."""
    try:
        return teacher_depth(store) or store.layers[-1]
    except StoreError as error:
        problems.append(str(error))
        return store.layers[-1]


def _depth_problems(store: Store, depth: int, k: int | None, epsilon: float | None) -> list[str]:
    problems = []
    if missing := [layer for layer in range(1, depth + 1) if layer not in store.layers]:
        problems.append(
            f"{store.location} lacks layers {', '.join(map(str, missing))}; phases need all of 1 to {depth}, the depth "
            f"of {store.spec.teacher}: make extract without LAYERS, into another STORE"
        )
    if k is not None and k >= 1:
        problems += [f"K={k}: {text}" for text in partition_problems(depth, k, DEFAULT_OBJECTIVE)]
    if epsilon is not None and depth > MAX_CUT_LAYERS:
        problems.append(
            f"EPSILON={epsilon}: {store.spec.teacher} has {depth} layers; the recursion's exact cuts are searched for "
            f"at most {MAX_CUT_LAYERS}. Give K"
        )
    if k is None and depth < 2 * MIN_SIZE:
        problems.append(f"{store.spec.teacher} has {depth} layers; fewer than {2 * MIN_SIZE} are not cut")
    return problems


def _image_problems(store: Store, limit: int) -> list[str]:
    if store.damaged_commits:
        first = min(store.damaged_commits)
        return [
            f"{store.location} has {len(store.damaged_commits)} damaged commits, {first}: "
            f"{store.damaged_commits[first]}. Mend it: make verify STORE={store.location} IMAGES=<as extracted> "
            "REPAIR=1"
        ]
    if store.n_valid < 2:
        return [f"{store.location} has {store.n_valid} valid images, expected 2 or more: make extract"]
    return []


def _measure(store: Store, depth: int, limit: int) -> LayerDistances:
    committed_text(store, "phases")
    total = min(limit, store.n_valid)
    with Progress(total=total, unit="images", label="distances between layers") as progress:
        measured = layer_distances(store, range(1, depth + 1), limit, progress=progress.advance)
    if measured.distance.max() < 1e-12:
        raise UserError(f"{store.location}: states are the same at all layers, in direction: there is nothing to cut")
    if measured.standard_error.max() * math.sqrt(total) < 1e-7:
        raise UserError(f"{store.location}: states are the same for all {total:,} images: one tells nothing of others")
    return measured


def _file_name(phases: Phases, epsilon: float | None) -> str:
    """Of what is saved, so that another K or objective replaces nothing."""
    name = f"epsilon{epsilon:g}" if phases.by_epsilon else f"k{len(phases.chosen.groups)}"
    return name if phases.objective == DEFAULT_OBJECTIVE else f"{name}-{phases.objective}"


def _save(out: Objects, name: str, store: Store, measured: LayerDistances, phases: Phases, command: str) -> None:
    arrays = {
        "distance": measured.distance,
        "standard_error": measured.standard_error,
        "layers": np.asarray(measured.layers),
        **dict(zip(measured.kinds, measured.by_kind)),
    }
    matrix = io.BytesIO()
    np.savez(matrix, **arrays)
    origin = {
        "command": command,
        "store": store.location,
        "store_digest": store.document.digest,
        "teacher": store.spec.teacher,
    }
    document: dict[str, Any] = {**origin, **phases_json(phases, measured)}
    figure = phases_figure(
        measured.distance,
        phases.chosen.groups,
        title=f"{store.spec.teacher}: distance between layers",
        caption=f"{measured.n_images:,} images of {store.location}; {' and '.join(measured.kinds)}, no final norm; "
        f"standard error at most {measured.standard_error.max():.4f}\n{command}",
        score_name=phases.objective,
        score=phases.chosen.score,
        controls={kind: [one.score for one in found] for kind, found in phases.controls.items() if found},
    )
    out.put("distance.npz", matrix.getvalue())
    out.put(f"{name}.png", figure)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in document.items()]
    out.put(f"{name}.json", ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _report(store: Store, measured: LayerDistances, phases: Phases) -> str:
    return "\n".join(
        [
            f"phases of {store.spec.teacher}: layers 1 to {measured.layers[-1]} over {measured.n_images:,} images of "
            f"{store.location}",
            f"distance: mean of 1 - cosine, {' and '.join(measured.kinds)}; standard error at most "
            f"{measured.standard_error.max():.4f}",
            "",
            phases_table(phases),
        ]
    )


def _print_blocks(phases: Phases, store: str, endpoint_url: str | None) -> int:
    spans = spans_text(phases.chosen.groups)
    if "|" in spans:
        n_blocks = len(phases.chosen.groups)
        say(f"the clusters {spans} are not contiguous, so there is no BLOCKS= for them: give K={n_blocks}")
        return ExitCode.PROBLEMS
    print(f"BLOCKS={spans}")
    # BLOCKS even though it finds what was just saved: there may be others beside it, or OUT was elsewhere.
    typed = {
        "BLOCK": "all",
        "BLOCKS": spans,
        "STORE": store if store != DEFAULT_STORE else None,
        "ENDPOINT_URL": endpoint_url,
    }
    print(f"next  {make_command('train', typed)}")
    return ExitCode.OK


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, or the given arguments, and do it."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {
                "phases": phases_command,
                "report": report_command,
                "demo": demo_command,
                "curves": curves_command,
                "study": study_command,
                "positions": positions_command,
                "gallery": gallery_command,
                "skips": skips_command,
            },
            prog="python -m analysis",
            args=arguments,
            description="Questions asked of a store, a teacher or a Raptor.",
        )
    except ObjectError as error:
        raise JobError(str(error)) from error


if __name__ == "__main__":
    leave(run_door(main))

"""`make report`: one HTML page of everything that is asked of a store, and its tables as CSV."""

from analysis.dynamics_report import dynamics_section
from analysis.measure import class_numbers, measure_nbytes, measure_store
from analysis.page import PAGE, Origin, Section, save_page
from analysis.partitions import MIN_SIZE
from analysis.phase_report import Phases, find_phases
from analysis.phases import DEFAULT_OBJECTIVE
from analysis.places import (
    DEFAULT_STORE,
    committed_text,
    flags_text,
    make_command,
    open_out,
    open_train,
    store_name,
)
from analysis.report import overview_section, similarity_section
from analysis.similarity import LEAST_ROWS
from analysis.spectra_report import spectra_section
from analysis.sums import Findings
from infra.cluster import cluster_address
from infra.console import Progress, UserError, human_bytes, say
from infra.s3_settings import use_endpoint
from storage_schemas import Store

DEFAULT_OUT = "data/reports"
LIMIT = 10_240  # ten batches of CKA
WIDE_LIMIT = 1_000
MODEL_LIMIT = 64


def report_command(
    *,
    store: str = DEFAULT_STORE,
    run: str = "",
    out: str = "",
    k: int = 3,
    limit: int = LIMIT,
    wide_limit: int = WIDE_LIMIT,
    model_limit: int = MODEL_LIMIT,
    seed: int = 0,
    device: str = "cpu",
    ray_address: str | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Phases, similarity, dynamics and spectra of a store's layers, as one HTML page with figures and tables.

    Where the store holds its teacher, also its self-correction and layer swaps; with RUN a Raptor beside it.

    Reads each chunk that it needs once; from patches and registers only the first WIDE_LIMIT images.

    Args:
        store: A store, or a folder with the stores train and val, of which train is read; local or s3://bucket/prefix.
        run: A finished RUN of a Raptor of the whole depth, trained on this store's teacher.
        out: Folder or s3://bucket/prefix for report.html and tables/*.csv; empty: data/reports/<store>.
        k: Number of phases.
        limit: Only the first so many images of the store's shuffled order, of CLS and patch means.
        wide_limit: The same of registers and patches.
        model_limit: The same where the teacher or the Raptor runs.
        seed: Of pushes and swaps.
        device: Where they run: cpu, cuda or cuda:0.
        ray_address: A Ray cluster, host:6379, whose machines share the pass over the store; None is RAY_ADDRESS, or
            this machine alone. The store is on S3 or in a folder that all machines see.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    from analysis.report_models import depth_text, load_models, model_sections  # torch and timm take seconds to import
    from analysis.report_paths import path_sections

    use_endpoint(endpoint_url)
    place = out or f"{DEFAULT_OUT}/{store_name(store)}"
    problems = _setting_problems(k, limit, wide_limit, model_limit)
    cluster = cluster_address(ray_address)
    saved = open_out(place, store, problems)
    source = open_train(store, problems)
    if source is not None:
        problems += _store_problems(source, k)
    models = {} if source is None else load_models(source, run, device, problems)
    if problems or source is None or saved is None:
        raise UserError("\n  ".join(["make report cannot start:", *problems]))
    typed = {
        "STORE": store if store != DEFAULT_STORE else None,
        "RUN": run or None,
        "OUT": out or None,
        "K": k if k != 3 else None,
        "LIMIT": limit if limit != LIMIT else None,
        "SEED": seed or None,
        "DEVICE": device if device != "cpu" else None,
        "RAY_ADDRESS": ray_address,
        "ENDPOINT_URL": endpoint_url,
        "ARGS": flags_text({"wide-limit": (wide_limit, WIDE_LIMIT), "model-limit": (model_limit, MODEL_LIMIT)}),
    }
    command = make_command("report", typed)
    committed = committed_text(source, "a report")
    found = _measure(source, limit, wide_limit, cluster)
    sections, facts, phases = _store_sections(source, found, k, command)
    facts |= {} if committed is None else {"unfinished": committed}
    facts |= {} if (depth := depth_text(source, models)) is None else {"depth": depth}
    sections += path_sections(source, found, phases, limit, command)
    sections += model_sections(source, models, phases, model_limit, seed, command)
    said = save_page(saved, f"{source.spec.teacher} on {source.location}", facts, sections)
    print(f"saved  {place}/{PAGE}: {said}, also as {place}/tables/*.csv")
    return 0


def _store_sections(
    store: Store, found: Findings, k: int, command: str
) -> tuple[list[Section], dict[str, str], Phases]:
    try:
        phases = find_phases(found.distance[1:, 1:], k, None, DEFAULT_OBJECTIVE)
    except ValueError as error:  # an objective that is not defined on these distances
        raise UserError(str(error)) from error
    data = f"{store.location} ({store.spec.teacher})"
    origin = Origin(data=data, n_images=found.n_images, seed=None, command=command)
    wide = f"{found.n_images_wide:,} for registers and patches"
    origin_all = Origin(data=f"{data}, {wide}", n_images=found.n_images, seed=None, command=command)
    sections = [
        overview_section(found, phases, origin_all),
        similarity_section(found, phases, origin_all),
        dynamics_section(found, phases, origin_all),
        spectra_section(found, phases, origin_all),
    ]
    facts = {
        "store": store.location,
        "teacher": store.spec.teacher,
        "layers": f"{found.layers[0]} to {found.layers[-1]}; 0 is what enters the first block, no final norm",
        "images": f"{found.n_images:,} of {store.n_valid:,}; {wide}",
        "tokens": ", ".join(store.spec.token_kinds),
        "precision of patches": store.spec.precision,
        "store digest": store.document.digest[:16],
        "command": origin.command,
    }
    return sections, facts, phases


def _measure(store: Store, limit: int, wide_limit: int, cluster: str | None) -> Findings:
    memory = measure_nbytes(store.spec, class_numbers(store)[1])
    say(f"one pass over {store.location}: at most {human_bytes(memory)} of memory for states and sums")
    if cluster is not None:
        from analysis.pass_ray import measure_on_ray  # ray takes a second to import

        return measure_on_ray(store, cluster, limit=limit, wide_limit=wide_limit)
    with Progress(total=min(limit, store.n_valid), unit="images", label="analyses") as progress:
        return measure_store(store, limit=limit, wide_limit=wide_limit, progress=progress.advance)


def _setting_problems(k: int, limit: int, wide_limit: int, model_limit: int) -> list[str]:
    problems = []
    if k < 1:
        problems.append(f"K={k}: expected 1 or more phases")
    for name, value in (("LIMIT", limit), ("--wide-limit", wide_limit), ("--model-limit", model_limit)):
        if value < LEAST_ROWS:
            problems.append(f"{name}={value}: expected {LEAST_ROWS} or more images, as the unbiased HSIC needs them")
    return problems


def _store_problems(store: Store, k: int) -> list[str]:
    problems = []
    if store.damaged_commits:
        problems.append(f"{store.location} has {len(store.damaged_commits)} damaged commits: make verify says which")
    if store.n_valid < LEAST_ROWS:
        problems.append(
            f"{store.location} has {store.n_valid} valid images, expected {LEAST_ROWS} or more: make extract"
        )
    if store.layers != tuple(range(len(store.layers))) or len(store.layers) < 1 + MIN_SIZE:
        listed = ", ".join(map(str, store.layers))
        problems.append(
            f"{store.location} holds layers {listed}; a report needs layers 0 to {MIN_SIZE} or more, none left out: "
            "make extract"
        )
    elif (len(store.layers) - 1) // MIN_SIZE < k:
        most = (len(store.layers) - 1) // MIN_SIZE
        problems.append(
            f"K={k}: layers 1 to {store.layers[-1]} are cut into at most {most} phases of {MIN_SIZE}: give K={most}"
        )
    return problems

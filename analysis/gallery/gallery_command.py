"""`make gallery`: the layers of several encoders side by side, as one HTML page with tables as CSV."""

import numpy as np
from jaxtyping import Float64

from analysis.page import PAGE, Origin, save_page
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
from analysis.similarity import LEAST_ROWS
from infra.console import Progress, UserError, say
from infra.s3_settings import use_endpoint
from storage_schemas import Store

DEFAULT_OUT = "data/gallery"
LIMIT, WIDE_LIMIT = 2_048, 256


def gallery_command(
    *,
    stores: tuple[str, ...] = (DEFAULT_STORE,),
    out: str = DEFAULT_OUT,
    k: int = 3,
    limit: int = LIMIT,
    wide_limit: int = WIDE_LIMIT,
    endpoint_url: str | None = None,
) -> int:
    """Cosines and CKA between the layers of several encoders, with their phases, and between the encoders.

    Depth, width and token kinds may differ. Encoders are compared with each other where their stores hold the same
    images in the same order, as stores of one source do.

    Args:
        stores: Stores, or folders with the stores train and val, of which train is read; local or s3://bucket/prefix.
        out: Folder or s3://bucket/prefix for report.html and tables/*.csv.
        k: Number of phases.
        limit: Only the first so many images of each store, of CLS and patch means.
        wide_limit: The same of registers and patches.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    from analysis.gallery.encoders import cka_between, pairs_of, same_images, store_alike
    from analysis.gallery.sections import Encoder, between_section, encoders_section, maps_section

    use_endpoint(endpoint_url)
    problems = [
        f"{name}={value}: expected {least} or more"
        for name, value, least in (("LIMIT", limit, LEAST_ROWS), ("--wide-limit", wide_limit, 1), ("K", k, 1))
        if value < least
    ]
    if not stores:
        problems.append('STORES is empty: give stores with blanks between, STORES="data/stores/a data/stores/b"')
    saved = open_out(out, stores[0] if stores else DEFAULT_STORE, problems)
    opened = [source for store in stores if (source := open_train(store, problems)) is not None]
    problems += [problem for source in opened for problem in _store_problems(source)]
    if problems or saved is None:
        raise UserError("\n  ".join(["make gallery cannot start:", *problems]))
    sources = dict(zip(_names(stores), opened, strict=True))
    typed = {
        "STORES": " ".join(stores),
        "OUT": out if out != DEFAULT_OUT else None,
        "K": k if k != 3 else None,
        "LIMIT": limit if limit != LIMIT else None,
        "ENDPOINT_URL": endpoint_url,
        "ARGS": flags_text({"wide-limit": (wide_limit, WIDE_LIMIT)}),
    }
    command = make_command("gallery", typed)
    unfinished = {name: text for name, one in sources.items() if (text := committed_text(one, "a gallery")) is not None}
    found = {}
    for name, source in sources.items():
        n_images = min(limit, source.n_valid)
        with Progress(total=n_images, unit="images", label=name) as progress:
            alike = store_alike(source, limit=limit, wide_limit=wide_limit, progress=progress.advance)
        data = (
            f"{source.location} ({source.spec.teacher}), {min(wide_limit, source.n_valid):,} for registers and patches"
        )
        found[name] = Encoder(
            teacher=source.spec.teacher,
            location=source.location,
            dim=source.spec.dim,
            alike=alike,
            phases=_phases(alike.distance, source.layers, k),
            origin=Origin(data=data, n_images=n_images, seed=None, command=command),
        )
    between, origins, left_out = {}, {}, []
    for first, second in pairs_of(list(sources)):
        one, other = sources[first], sources[second]
        rows = same_images([one, other], limit)
        try:
            with Progress(total=len(rows), unit="images", label=f"{first} and {second}") as progress:
                between[first, second] = cka_between(one, other, rows, progress=progress.advance)
        except UserError as error:
            left_out.append(f"{first} and {second} are not compared: {error}.")
            say(left_out[-1])
            continue
        data = f"{one.location} and {other.location}"
        origins[first, second] = Origin(data=data, n_images=len(rows), seed=None, command=command)
    everything = Origin(
        data=", ".join(source.location for source in sources.values()),
        n_images=sum(one.origin.n_images for one in found.values()),
        seed=None,
        command=command,
    )
    sections = [encoders_section(found, everything), maps_section(found, everything)]
    if between or left_out:
        sections.append(between_section(between, found, origins, left_out))
    facts = {"encoders": ", ".join(found), "phases": str(k), "command": command}
    facts |= {f"unfinished, {name}": text for name, text in unfinished.items()}
    said = save_page(saved, "Layers of several encoders", facts, sections)
    print(f"saved  {out}/{PAGE}: {said}, also as {out}/tables/*.csv")
    return 0


def _names(stores: tuple[str, ...]) -> list[str]:
    """Short and different: the stores' own, and a number where two have one name."""
    names = [store_name(store) for store in stores]
    return [name if names.count(name) == 1 else f"{name}-{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def _store_problems(store: Store) -> list[str]:
    problems = []
    if store.damaged_commits:
        problems.append(f"{store.location} has {len(store.damaged_commits)} damaged commits: make verify says which")
    if store.n_valid < LEAST_ROWS:
        problems.append(
            f"{store.location} has {store.n_valid} valid images, expected {LEAST_ROWS} or more: make extract"
        )
    if len(store.layers) < 2:
        problems.append(f"{store.location} holds {len(store.layers)} layer; similarity over depth needs 2 or more")
    return problems


def _phases(distance: Float64[np.ndarray, "layer layer"], layers: tuple[int, ...], k: int) -> Phases | None:
    inner = distance[1:, 1:]
    if layers != tuple(range(len(layers))) or len(inner) < k * MIN_SIZE:
        return None
    try:
        return find_phases(inner, k, None, DEFAULT_OBJECTIVE)
    except ValueError as error:  # an objective that is not defined on these distances
        say(f"no phases: {error}")
        return None

"""The part of a report that reads single tokens of some images again: their paths, and depth as a linear system."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from analysis.linear_depth import LinearSpan, linear_span, linear_windows
from analysis.measure import class_numbers
from analysis.page import Origin, Section
from analysis.partitions import segments_of
from analysis.pass_over import ONE_TOKEN
from analysis.paths import Paths, normed_dynamics, project_paths, read_tokens, token_paths
from analysis.paths_report import WINDOW, linear_section, normed_section, paths_section, token_paths_section
from analysis.phase_report import Phases
from analysis.report import phase_cuts
from analysis.sums import Findings
from infra.console import Progress, say
from pipeline.teacher import Teacher
from storage_schemas import Store

#: Images whose tokens are held, one kind at a time: 164 MB of ViT-B/14, and as much again where they are float64.
PATH_LIMIT = 4_096
#: Images whose ways are averaged, as published.
TOKEN_LIMIT = 100


def path_sections(store: Store, found: Findings, phases: Phases, limit: int, command: str) -> list[Section]:
    """Paths of CLS by class, and linear operators along depth of the one-token kinds.

    Raises:
        StoreError, ObjectError: As `Store.read`.
    """
    rows = np.flatnonzero(store.valid)[: min(limit, PATH_LIMIT)]
    origin = Origin(data=f"{store.location} ({store.spec.teacher})", n_images=len(rows), seed=None, command=command)
    kinds = [kind for kind in ONE_TOKEN if kind in store.spec.token_kinds]
    spans = segments_of(phases.chosen.groups) or []
    length = min(WINDOW, len(store.layers) - 1)
    sections: list[Section] = []
    windows: dict[str, Sequence[LinearSpan]] = {}
    of_phases: dict[str, list[LinearSpan]] = {}
    with Progress(total=len(kinds), unit="kinds", label="paths") as progress:
        for kind in kinds:
            states = store.read(None, rows, kind)[:, :, 0]
            if kind == kinds[0] and len(rows) > 2:
                paths = named_paths(project_paths(states, class_numbers(store)[0][rows]), store)
                sections = [paths_section(kind, paths, found.dynamics, found.basins, found.layers, origin)]
            fitted, tested = np.array_split(states, 2)
            windows[kind] = linear_windows(fitted, tested, length)
            of_phases[kind] = [linear_span(fitted, tested, start, stop) for start, stop in spans]
            progress.advance()
    return [*sections, *_token_paths(store, rows[:TOKEN_LIMIT], command), linear_section(windows, of_phases, origin)]


def _token_paths(store: Store, rows: Int64[np.ndarray, " row"], command: str) -> list[Section]:
    origin = Origin(data=f"{store.location} ({store.spec.teacher})", n_images=len(rows), seed=None, command=command)
    try:
        return [token_paths_section(token_paths(read_tokens(store, rows)), store.layers, origin)]
    except ValueError as error:  # states that are all the same
        say(f"no paths of tokens: {error}")
        return []


def named_paths(paths: Paths, store: Store) -> Paths:
    """With the labels that the store has in the place of numbers of classes."""
    labels, numbers = store.samples["label"].to_pylist(), class_numbers(store)[0]
    label_of = {int(number): label for number, label in zip(numbers, labels) if number >= 0}
    return replace(paths, labels=np.array([label_of[int(number)] for number in paths.labels], dtype=np.int64))


def final_norm_section(teacher: Teacher, store: Store, phases: Phases, limit: int, command: str) -> Section:
    """Dynamics of the first images' states after the teacher's final norm."""
    rows = np.flatnonzero(store.valid)[:limit]
    origin = Origin(data=f"{store.location} ({teacher.name})", n_images=len(rows), seed=None, command=command)
    return normed_section(normed_dynamics(teacher, store, rows), store.layers, phase_cuts(phases), origin)

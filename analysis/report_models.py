"""The part of a report that runs models: the store's teacher, and the Raptor of a RUN.

Apart from the rest, since it imports torch and timm.
"""

from collections.abc import Mapping

import numpy as np
import torch

from analysis.attention import look
from analysis.attention_report import attention_section
from analysis.compare import compare_with_store
from analysis.interventions import token_kinds
from analysis.model_memory import models_nbytes
from analysis.model_report import raptor_section, self_correction_section, swap_section
from analysis.model_runs import N_DRAWS, N_SWAPPED, self_correction, swap_accuracies
from analysis.page import Origin, Section
from analysis.phase_report import Phases
from analysis.positions.map_section import map_section, position_maps
from analysis.report_paths import final_norm_section
from analysis.vision.held_out import head_images, sibling_val
from analysis.vision.report import PROBES, vision_sections
from infra.console import Progress, UserError, human_bytes, say
from infra.objects import ObjectError
from pipeline.positions import positions_of
from pipeline.teacher import Teacher, teacher_from_files
from storage_schemas import Store
from storage_schemas.errors import StoreError
from trainer.machine import Machine, torch_threads
from trainer.raptor_teacher import RaptorTeacher, raptor_teacher

COMPARE_LIMIT = 1_024
TEACHER, RAPTOR = "teacher", "Raptor"


def depth_text(store: Store, models: Mapping[str, Teacher]) -> str | None:
    """That a store ends before its teacher does, as a page says it; None where it does not, or is not known to."""
    if TEACHER not in models or models[TEACHER].n_layers == len(store.layers):
        return None
    last, depth = store.layers[-1], models[TEACHER].n_layers - 1
    return (
        f"the store ends at layer {last} of {depth}: last layers and final directions are those of layer {last}, "
        "except in sections that run the teacher"
    )


def model_sections(
    store: Store, models: Mapping[str, Teacher], phases: Phases, limit: int, seed: int, command: str
) -> list[Section]:
    """Of the teacher, and of a Raptor if there is one, on the first images of the store."""
    if not models:
        say(f"{store.location} holds no teacher: no self-correction, layer swap or Raptor")
        return []
    teacher = models[TEACHER]
    memory = models_nbytes(store.spec, teacher.n_layers - 1, teacher.n_heads, limit, PROBES * limit)
    say(f"the models run: at most {human_bytes(memory)} of memory beside their weights")
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads(teacher.dim))  # a second one costs small models many times their work
    try:
        return _sections(store, models, phases, limit, seed, command)
    finally:
        torch.set_num_threads(before)


def _sections(
    store: Store, models: Mapping[str, Teacher], phases: Phases, limit: int, seed: int, command: str
) -> list[Section]:
    rows = np.flatnonzero(store.valid)[:limit]
    x = torch.from_numpy(store.read([0], rows, "all")[:, 0])
    origin = Origin(data=f"{store.location} ({', '.join(models)})", n_images=len(rows), seed=seed, command=command)
    sections = []
    if RAPTOR in models:
        total = min(COMPARE_LIMIT, store.n_valid)
        raptor = models[RAPTOR]
        with Progress(total=total, unit="images", label="Raptor") as progress:
            compared = compare_with_store(
                raptor, store, limit=COMPARE_LIMIT, device=raptor.device, progress=progress.advance
            )
        beside = Origin(data=f"{store.location} and {raptor.name}", n_images=total, seed=None, command=command)
        sections.append(raptor_section(raptor.name, compared, beside))
    sections.append(final_norm_section(models[TEACHER], store, phases, limit, command))
    sections += attention_sections(models[TEACHER], x, origin)
    val = sibling_val(store)
    sections += vision_sections(store, models[TEACHER], val, limit, seed, command)
    sections += _positions(models[TEACHER], store.location, seed, command)
    with Progress(total=len(x) * len(models), unit="images", label="self-correction") as progress:
        tracked = {
            name: self_correction(model, x.to(model.device), seed=seed, progress=progress.advance)
            for name, model in models.items()
        }
    sections.append(self_correction_section(tracked, origin))
    teacher = models[TEACHER]
    images = head_images(store, val, limit)
    if teacher.head is None or (images.labels < 0).all():
        say("no layer swap: the teacher has no head, or the images no labels")
        return sections
    n_swaps = len(N_SWAPPED) * N_DRAWS * 2 + 1
    with Progress(total=n_swaps, unit="models", label="layer swap") as progress:
        swaps = swap_accuracies(
            teacher,
            images.x.to(teacher.device),
            images.labels,
            phases.chosen.groups,
            seed=seed,
            progress=progress.advance,
        )
    n_images = int((images.labels >= 0).sum())
    of_images = Origin(data=f"{images.place} ({teacher.name})", n_images=n_images, seed=seed, command=command)
    return [*sections, swap_section(swaps, images.text, of_images)]


def attention_sections(teacher: Teacher, x: torch.Tensor, origin: Origin) -> list[Section]:
    """What the teacher's blocks look at; none, with a line that says why, where that cannot be measured."""
    kinds = token_kinds(has_cls=teacher.has_cls, n_registers=teacher.n_registers, n_patches=teacher.n_patches)
    try:
        with Progress(total=len(x), unit="images", label="attention") as progress:
            return [attention_section(look(teacher, x, kinds, progress=progress.advance), origin)]
    except UserError as error:  # attention of another form, or without distances; the rest of the report does without
        say(f"no attention distances: {error}")
        return []


def _positions(teacher: Teacher, location: str, seed: int, command: str) -> list[Section]:
    """Of the position embeddings as the weights have them, before they were resampled to the images' grid."""
    own = teacher.positions if teacher.positions is not None else positions_of(teacher.model)
    if own is None:
        say(f"no map of positions: {teacher.name} adds no position embeddings to its patches")
        return []
    data = f"{location}: weights of {teacher.name} alone"
    try:
        found = position_maps(own.numpy(), seed=seed)
    except ValueError as error:  # embeddings that are all the same
        say(f"no map of positions of {teacher.name}: {error}")
        return []
    return [map_section(found, Origin(data=data, n_images=0, seed=seed, command=command))]


def load_models(store: Store, run: str, device: str, problems: list[str]) -> dict[str, Teacher]:
    """The store's teacher, and the Raptor of a RUN; none where the store has no teacher, or there are problems."""
    models: dict[str, Teacher] = {}
    try:
        Machine.found(device)
        files = store.read_teacher_files()
        if files:
            models[TEACHER] = teacher_from_files(files, device=device)
        if run:
            models[RAPTOR] = raptor_teacher(run, device=device)
    except (StoreError, ObjectError, UserError) as error:
        problems.append(str(error))
        return {}
    if RAPTOR in models and TEACHER not in models:
        problems.append(f"RUN={run}: {store.location} holds no teacher to compare a Raptor with")
    elif isinstance(raptor := models.get(RAPTOR), RaptorTeacher):
        taught_by = raptor.taught_by
        if taught_by != models[TEACHER].core_digest:
            problems.append(
                f"RUN={run} was trained on a teacher with digest {taught_by[:16]}, {store.location} was made by one "
                f"with {models[TEACHER].core_digest[:16]}: give the store that it was trained on"
            )
        if len(store.layers) != raptor.n_layers:
            problems.append(
                f"RUN={run} has states 0 to {raptor.n_layers - 1}, {store.location} holds {len(store.layers)} layers: "
                "give a store of all layers"
            )
    return models

"""The part of a report that shows what the store's teacher sees."""

from collections.abc import Callable

import numpy as np
import torch

from analysis.interventions import token_kinds
from analysis.page import Origin, Section
from analysis.vision.field_section import field_section
from analysis.vision.held_out import head_images
from analysis.vision.measure import LOCAL_ROWS, TAP_ROWS, local_batches, localise, probe_layers, sub_layer_cka
from analysis.vision.probe_section import probe_section
from analysis.vision.receptive_field import teacher_fields
from analysis.vision.sections import localisation_section, skip_section, sub_layer_section
from analysis.vision.skips import ablate_skips
from infra.console import Progress, UserError, say
from pipeline.teacher import Teacher
from storage_schemas import Store

# Images, as multiples of those of the other parts that run models.
_LAYERS, PROBES, _SKIPS, _FIELDS = 8, 16, 2, 0.5
_N_DRAWS = 1


def vision_sections(
    store: Store, teacher: Teacher, val: Store | None, limit: int, seed: int, command: str
) -> list[Section]:
    """Sub-layers, localisation, probes, receptive fields and ablated skips; those that the teacher allows.

    Args:
        store: With all layers from 0.
        teacher: The store's.
        val: Images that it was not trained on, for probes and accuracies; None if there are none.
        limit: Images where models run: 8 times as many for sub-layers and localisation, 16 times for probes (of each
            store), twice for ablated skips, half for receptive fields.
        seed: Of channels and shuffled labels.
        command: That makes the report.
    """
    n_images = min(_LAYERS * limit, store.n_valid)
    data = f"{store.location} ({teacher.name})"

    def origin(n: int, of: str = data, drawn: bool = False) -> Origin:
        return Origin(data=of, n_images=n, seed=seed if drawn else None, command=command)

    def sub_layers() -> Section:
        n_batches = len(local_batches(store, n_images, TAP_ROWS))
        with Progress(total=n_batches * (teacher.n_layers - 1), unit="blocks", label="sub-layers") as progress:
            found = sub_layer_cka(store, teacher, n_images, progress=progress.advance)
        return sub_layer_section(found, teacher.n_layers - 1, origin(found.n_rows))

    def localisation() -> Section:
        total = len(local_batches(store, n_images, LOCAL_ROWS)) * len(store.layers)
        with Progress(total=total, unit="layers", label="localisation") as progress:
            found = localise(store, teacher, n_images, progress=progress.advance)
        n_rows = found.by_layer[0].n_rows  # not those of too short batches
        return localisation_section(found, origin(n_rows), has_cls=teacher.has_cls)

    def probes() -> Section:
        with Progress(total=len(store.layers), unit="layers", label="probes") as progress:
            found = probe_layers(store, val, PROBES * limit, seed=seed, progress=progress.advance)
        return probe_section(found, origin(found.n_fit + found.n_test, f"{data}, tested on {found.tested_on}", True))

    def fields() -> Section:
        rows = np.flatnonzero(store.valid)[: max(1, int(_FIELDS * limit))]
        x = torch.from_numpy(store.read([0], rows, "all")[:, 0])
        with Progress(total=len(x), unit="images", label="receptive fields") as progress:
            found = teacher_fields(teacher, x, n_draws=_N_DRAWS, seed=seed, progress=progress.advance)
        return field_section(found, origin(len(x), drawn=True))

    def skips() -> Section:
        images = head_images(store, val, _SKIPS * limit)
        kinds = token_kinds(has_cls=teacher.has_cls, n_registers=teacher.n_registers, n_patches=teacher.n_patches)
        compared = {kind: tokens for kind, tokens in kinds.items() if kind != "registers"}
        with Progress(total=teacher.n_layers, unit="models", label="without skips") as progress:
            found = ablate_skips(teacher, images.x, images.labels, compared, progress=progress.advance)
        return skip_section(found, images.text, origin(len(images.x), f"{images.place} ({teacher.name})"))

    parts = {
        "sub-layers": sub_layers,
        "localisation": localisation,
        "probes": probes,
        "receptive fields": fields,
        "ablation of skips": skips,
    }
    return [section for name, part in parts.items() if (section := section_or_line(name, part)) is not None]


def section_or_line(name: str, part: Callable[[], Section]) -> Section | None:
    """A section, or None and a line that says why there is none."""
    try:
        return part()
    except UserError as error:  # a teacher of another build; the rest of the report does without
        say(f"no {name}: {error}")
        return None

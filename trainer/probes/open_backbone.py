"""From RUN, TEACHER, WEIGHTS and STORE, as a person types them, to the frozen model of a probe."""

import dataclasses
from dataclasses import dataclass

import torch

from infra.console import UserError, say
from infra.objects import ObjectError, open_objects
from pipeline.checkpoints import read_linear_head
from pipeline.teacher import Teacher, load_teacher, teacher_from_files
from storage_schemas import open_store
from storage_schemas.errors import StoreError
from storage_schemas.find import find_stores
from trainer.probes.backbone import Backbone, misfits
from trainer.probes.task import TaskKind
from trainer.raptor_teacher import Ends, RaptorTeacher, raptor_teacher, read_ends
from trainer.run_files import RunFiles
from trainer.trained import Trained, read_trained

_UNKNOWN = "none"  # what a run says of its teacher if its store held none


@dataclass(frozen=True, kw_only=True)
class Places:
    """What was typed; None for what was not.

    Attributes:
        run: RUN: a finished Raptor.
        teacher: TEACHER: a timm name, or a built-in one.
        weights: WEIGHTS: of the teacher.
        store: STORE, or the task's default: it holds the teacher where neither TEACHER nor WEIGHTS was typed.
        head: HEAD: a run that keeps nothing of its teacher, and was trained with a head, knows the teacher by both.
        compute: COMPUTE, of the teacher's blocks; None: as the store's, else float32.
    """

    run: str | None
    teacher: str | None
    weights: str | None
    store: str | None
    head: str | None
    compute: str | None


def open_backbone(places: Places, kind: TaskKind, device: torch.device, problems: list[str]) -> Backbone | None:
    """The frozen model of a probe; what is wrong goes to the problems, and None comes back if it cannot be had.

    Where there are problems already, weights that would have to be fetched are not: the teacher is made without them,
    to see what else is wrong.
    """
    n_known = len(problems)
    trained, ends = _open_run(places.run, device, problems)
    hollow = bool(problems) and _fetches(places)
    if hollow:
        places, trained = dataclasses.replace(places, weights="random:0"), None
    if trained is None and places.run is not None:
        places = dataclasses.replace(places, run=None)  # what else is wrong?
    try:
        small, teacher = _open_teacher(places, kind, ends, device)
        if trained is None:
            return None if hollow or len(problems) > n_known else Backbone(teacher=teacher)
        found = misfits(teacher, trained, _identity_problem(trained, ends, small, teacher, places.head))
    except (UserError, StoreError, ObjectError) as error:
        problems.append(str(error))
        return None
    problems += found
    return None if found else Backbone(teacher=teacher, trained=trained)


def _fetches(places: Places) -> bool:
    """Whether the teacher's weights come from elsewhere."""
    if places.teacher is None or ":" in places.teacher:  # a kind and a place, such as run:<RUN>
        return False
    return places.weights is None or "://" in places.weights


def _open_run(location: str | None, device: torch.device, problems: list[str]) -> tuple[Trained | None, Ends | None]:
    """The Raptor, and what its run keeps of its teacher."""
    if location is None:
        return None, None
    try:
        return read_trained(location, device=device), read_ends(RunFiles(open_objects(location)))
    except (UserError, ObjectError) as error:
        problems.append(f"RUN={location}: {error}")
        return None, None


def _identity_problem(
    trained: Trained, ends: Ends | None, small: Teacher, teacher: Teacher, head: str | None
) -> str | None:
    """Why this is not the teacher that the run was trained on; None if it is, or if the run does not say.

    Raises:
        WeightsError: The head cannot be read.
    """
    if ends is not None:
        # A RaptorTeacher lends its embedding and norm: it comes from this run, or from the store of a Raptor.
        digest = teacher.taught_by if isinstance(teacher, RaptorTeacher) else teacher.core_digest
        known, found = ends.core_digest, [digest]
    elif trained.teacher_digest == _UNKNOWN:
        say(f"{trained.location} does not say what teacher it was trained on; {teacher.name} is taken for it")
        return None
    else:
        known, found = trained.teacher_digest, sorted(_digests(small, head))
    if known in found:
        return None
    return (
        f"was trained on a teacher whose weights have digest {known[:16]}; this {teacher.name} has "
        f"{' or '.join(digest[:16] for digest in found)}. Give the STORE, or TEACHER and WEIGHTS, it was trained on"
        f"{'' if ends is not None else ', and the same HEAD if it was trained with one'}"
    )


def _open_teacher(places: Places, kind: TaskKind, ends: Ends | None, device: torch.device) -> tuple[Teacher, Teacher]:
    """The teacher at the size that runs were trained at, and at the size that the task needs.

    It comes from TEACHER and WEIGHTS, else from STORE, else from what the run keeps of it.

    Raises:
        UserError, StoreError, ObjectError: It cannot be had.
    """
    compute = places.compute
    if places.teacher is not None and places.store is not None and kind.image_size is not None:
        raise UserError(
            f"STORE={places.store} would not be read: TASK={kind.name} has images of its own, and TEACHER names the "
            "teacher. Leave one of the two out"
        )
    if places.teacher is not None:
        name, weights = places.teacher, places.weights
        small = load_teacher(name, weights, device=device, compute=compute or "float32")
        size = _size_for(kind, small)
        if size is None:
            return small, small
        return small, load_teacher(name, weights, image_size=size, device=device, compute=small.compute)
    if places.weights is not None:
        raise UserError(f"WEIGHTS={places.weights} was given without TEACHER, the name of the model that they fit")
    if places.run is not None and ends is not None and places.store is None:
        small = raptor_teacher(places.run, device=device, compute=compute)
        size = _size_for(kind, small)
        if size is None:
            return small, small
        return small, raptor_teacher(places.run, image_size=size, device=device, compute=compute)
    if places.store is None:
        raise UserError("TEACHER is missing: give its name (and WEIGHTS), or a STORE that holds it")
    try:
        files = _teacher_files(places.store)
    except (StoreError, ObjectError) as error:
        raise UserError(f"STORE={places.store}: {error}") from error
    small = teacher_from_files(files, device=device, compute=compute)
    size = _size_for(kind, small)
    if size is None:
        return small, small
    return small, teacher_from_files(files, device=device, compute=compute, image_size=size)


def _size_for(kind: TaskKind, teacher: Teacher) -> tuple[int, int] | None:
    """The image size that a task needs, if it is another one than the teacher's."""
    size = None if kind.image_size is None else kind.image_size(teacher.model.patch_embed.patch_size[0])
    return None if size == teacher.pixel_size else size


def _teacher_files(location: str) -> dict[str, bytes]:
    stores = find_stores(location)
    store = open_store(stores.get("", stores.get("train", next(iter(stores.values())))))
    files = store.read_teacher_files()
    if not files:
        raise UserError(f"STORE={location} holds no teacher: give TEACHER and WEIGHTS, those it was made with")
    return files


def _digests(teacher: Teacher, head: str | None) -> frozenset[str]:
    """By which a run may know these weights: with the teacher's own head, with HEAD, or with none.

    Raises:
        WeightsError: The head cannot be read.
    """
    heads = [teacher.head, None]
    if head is not None:
        heads.append(read_linear_head(head, 2 * teacher.dim).to(teacher.device))
    return frozenset(dataclasses.replace(teacher, head=one).weights_digest for one in heads)

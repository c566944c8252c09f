"""The frozen thing that a probe reads: a teacher, or a Raptor between a teacher's embedding and its final norm."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from infra.objects import ObjectError
from pipeline.teacher import Teacher, TeacherError, teacher_from_files
from storage_schemas import Store
from storage_schemas.errors import StoreError
from trainer.raptor_teacher import RaptorTeacher
from trainer.trained import Trained


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """Tokens of the last state, after the teacher's final norm; nothing of it is trained.

    Attributes:
        teacher: Of the embedding (state 0) and the final norm; without `trained` also of all between.
        trained: A Raptor that takes state 0 to the last one; None reads the teacher itself.
    """

    teacher: Teacher
    trained: Trained | None = None

    @property
    def last_layer(self) -> int:
        """Number of the state that is read."""
        return self.teacher.n_layers - 1

    @property
    def stored_layer(self) -> int:
        """Which stored state the tokens are made from: 0 for a Raptor, the last for a teacher."""
        return self.last_layer if self.trained is None else 0

    @property
    def name(self) -> str:
        """For people: "teacher digits_vit", "Raptor k=3 of digits_vit"."""
        if self.trained is None:
            return f"teacher {self.teacher_name}"
        return f"Raptor k={len(self.trained.spans)} of {self.teacher_name}"

    @property
    def teacher_name(self) -> str:
        """Name of the teacher that `trained` stands for, also where it was made from what a RUN keeps of it."""
        if self.trained is not None and isinstance(self.teacher, RaptorTeacher):
            return self.teacher.architecture
        return self.teacher.name

    @property
    def teacher_digest(self) -> str:
        """core_digest of that teacher: the same at every image size and with every head."""
        if self.trained is not None and isinstance(self.teacher, RaptorTeacher):
            return self.teacher.taught_by
        return self.teacher.core_digest

    def tokens(self, pixels: Float32[Tensor, "batch 3 height width"]) -> Float32[Tensor, "batch token dim"]:
        """Final-norm tokens of images.

        Args:
            pixels: Normalised, of the teacher's image size; moved to its device.

        Raises:
            ValueError: The pixels have another size.
        """
        if self.trained is not None:
            return self.tokens_of(self.teacher.embed(pixels))
        return self.tokens_of(self.teacher.layer_states_list(pixels)[-1])

    def tokens_of(self, state: Float32[Tensor, "batch token dim"]) -> Float32[Tensor, "batch token dim"]:
        """Final-norm tokens from state `stored_layer`, as a store holds it, on the teacher's device."""
        with torch.no_grad():
            if self.trained is not None:
                raptor = self.trained.raptor
                for layer in range(1, self.last_layer + 1):
                    state = raptor(state, layer)
            return self.teacher.final_norm(state.float())


def check_store(backbone: Backbone, store: Store) -> list[str]:
    """Why this backbone cannot read its states from this store."""
    spec, teacher = store.spec, backbone.teacher
    problems = []
    asked = (teacher.dim, teacher.grid, teacher.has_cls, teacher.n_registers)
    if (spec.dim, spec.grid, spec.has_cls, spec.n_registers) != asked:
        problems.append(
            f"{store.location} has states of {spec.dim} channels on {spec.grid[0]} x {spec.grid[1]} patches; "
            f"{teacher.name} has {teacher.dim} on {teacher.grid[0]} x {teacher.grid[1]}"
        )
    else:
        problems += _foreign_teacher(backbone, store)
    if backbone.stored_layer not in store.layers:
        problems.append(
            f"{store.location} lacks layer {backbone.stored_layer}, which {backbone.name} is read from; it has "
            f"{', '.join(map(str, store.layers))}. Extract it too"
        )
    return problems


def _foreign_teacher(backbone: Backbone, store: Store) -> list[str]:
    """Why the states of a store are those of another model, of the same shape."""
    teacher, stored = backbone.teacher, store.spec.teacher_weights_digest
    stands_for_itself = backbone.teacher_digest == teacher.core_digest
    if stands_for_itself and stored == teacher.weights_digest:
        return []
    try:
        files = store.read_teacher_files()
        found = teacher_from_files(files).core_digest if files else stored
    except (TeacherError, StoreError, ObjectError) as error:
        return [f"{store.location}: {error}"]
    if files:
        expected = [backbone.teacher_digest]
    else:  # a store made from arrays: with the teacher's head, without, or as the run knew it
        expected = [teacher.weights_digest, dataclasses.replace(teacher, head=None).weights_digest]
        expected = [*(expected if stands_for_itself else []), *_known_to(backbone.trained)]
    if found in expected:
        return []
    return [
        f"{store.location} holds states of a {store.spec.teacher} whose weights have digest {found[:16]}; "
        f"{backbone.name} has {' or '.join(digest[:16] for digest in expected)}. Give the STORE that was extracted "
        "with these weights, or the TEACHER and WEIGHTS of that store"
    ]


def _known_to(trained: Trained | None) -> list[str]:
    return [] if trained is None else [trained.teacher_digest]


def misfits(teacher: Teacher, trained: Trained, identity_problem: str | None = None) -> list[str]:
    """Why this Raptor cannot stand for this teacher.

    Args:
        teacher: At any image size.
        trained: A finished run.
        identity_problem: Why this is not the teacher that it was trained on, if that is so.
    """
    span, last, run = trained.raptor.span, teacher.n_layers - 1, f"RUN={trained.location}"
    problems = []
    if identity_problem is not None:
        problems.append(f"{run} {identity_problem}")
    if span.start != 0:
        problems.append(f"{run} begins at state {span.start}; a probe needs one that begins at state 0, the embedding")
    if span.stop != last:
        problems.append(f"{run} ends at state {span.stop}; a probe needs one that reaches state {last}, the last one")
    dim = trained.result["blocks"][0]["dim"]
    if dim != teacher.dim:
        problems.append(f"the blocks of {run} have {dim} channels, {teacher.name} has {teacher.dim}")
    return problems

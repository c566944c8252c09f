"""Teachers of other kinds than a ViT with weights of its own, added by other packages.

A package adds a kind by an entry point of the group "teacher_kinds" in its pyproject.toml: the kind's name, and a
module with the two functions below. So a store of such a teacher's states is planned, verified and repaired like any
other, and nothing here knows what the kind is.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from infra.console import UserError

if TYPE_CHECKING:
    import torch

GROUP = "teacher_kinds"


@runtime_checkable
class TeacherKind(Protocol):
    """What the module of a kind has; both as the functions of pipeline.teacher, and they return its Teacher."""

    def load(
        self,
        name: str,
        *,
        image_size: int | tuple[int, int] | None,
        head: str | None,
        device: "str | torch.device",
        compute: str,
    ) -> Any:
        """As load_teacher; the name is the kind, a colon and a place."""

    def from_files(
        self,
        files: Mapping[str, bytes],
        device: "str | torch.device",
        compute: str | None,
        image_size: int | tuple[int, int] | None,
    ) -> Any:
        """As teacher_from_files; the config among the files names the kind."""


def kind_of(name: str) -> str | None:
    """The kind that a teacher's name begins with; None for a plain name."""
    kind, colon, _ = name.partition(":")
    return kind if colon and kind in _names() else None


def find_kind(kind: str) -> TeacherKind:
    """The module of a kind.

    Raises:
        UserError: No installed package has it.
    """
    for entry in entry_points(group=GROUP, name=kind):
        return entry.load()
    raise UserError(
        f"this teacher is of the kind {kind!r:.40}, and there are {', '.join(_names()) or 'none'} here. Install the "
        "package that has it; if it is this one, make venv does"
    )


def _names() -> list[str]:
    return sorted({entry.name for entry in entry_points(group=GROUP)})

"""What sources have in common: what counts as an image, and how everything that is wrong with them is told at once."""

from collections.abc import Sequence

from infra.console import UserError, counted

#: What counts as an image, in any case: torchvision's list.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

MAX_NAMED = 10  # problems spelled out in one message
MAX_IMAGE_NBYTES = 2**28  # of one encoded image; more is a bomb, or no image


class SourceError(UserError):
    """A source cannot be listed or read: a matter of files, permissions or networks, never of one image's content.

    Attributes:
        tried_again: It may have passed, and was tried until a deadline; trying again at once is of no use.
    """

    def __init__(self, message: str, *, tried_again: bool = False) -> None:
        super().__init__(message)
        self.tried_again = tried_again


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def error_reason(error: Exception) -> str:
    """An error in a few words, without the paths and numbers that OSError adds."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def shorten(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def join_problems(heading: str, problems: Sequence[str]) -> str:
    """One message for all problems, a line each, the first ten spelled out."""
    rest = len(problems) - MAX_NAMED
    shown = [*problems[:MAX_NAMED], *([f"and {rest:,} more"] if rest > 0 else [])]
    return f"{heading}, {counted(len(problems), 'problem')}:\n  " + "\n  ".join(shown)

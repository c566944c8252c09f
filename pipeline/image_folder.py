"""A folder of class folders of images on this machine, listed exactly as torchvision's ImageFolder lists it."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from infra.console import counted
from pipeline.source_errors import (
    IMAGE_EXTENSIONS,
    SourceError,
    error_reason,
    is_image_name,
    join_problems,
    shorten,
)
from storage_schemas.samples import Sample, Samples

TELL_EVERY = 10_000  # images between two calls of a progress callback


@dataclass
class LeftOut:
    """Files in class folders that are taken for no images, as a listing has met them.

    Attributes:
        n: How many.
        first: The first of them by name.
    """

    n: int = 0
    first: str = ""

    def add(self, name: str) -> None:
        """Count a file."""
        self.n, self.first = self.n + 1, min(self.first or name, name)

    def clear(self) -> None:
        """Count anew."""
        self.n, self.first = 0, ""


@dataclass(frozen=True)
class ImageFolderSource:
    """A folder of class folders of images.

    Classes are the folders in `root`, sorted by name. Below each, folders are sorted by their whole path and files
    by name within their folder; a file counts if its name ends, in any case, in one of IMAGE_EXTENSIONS. Links are
    followed, to files and to folders. Unlike torchvision's, a class folder may be empty: it keeps its label.

    Attributes:
        root: The folder that holds the class folders.
        classes: Class names in label order; None takes the class folders of `root`. A split that lacks some classes
            of another is given the other's list, so that labels agree.
    """

    root: str | os.PathLike[str]
    classes: tuple[str, ...] | None = None
    _left_out: LeftOut = field(default_factory=LeftOut, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple:  # it travels as its location
        return type(self), (self.root, self.classes)

    @property
    def name(self) -> str:
        """The folder's own name: no location, so that a moved tree stays the same source."""
        return Path(self.root).resolve().name

    def class_names(self) -> list[str]:
        """Names of the class folders, in label order.

        Raises:
            SourceError: The root is missing, unreadable or holds no folder.
        """
        if self.classes is not None:
            return list(self.classes)
        names = folders_in(self.root)
        if not names:
            raise SourceError(no_class_folders(str(self.root), names_in(self.root)))
        return names

    def listing(self, progress: Callable[[int], None] | None = None) -> Samples:
        """All samples in the source's order.

        One `stat` per file, so a million files on a network disk take minutes.

        Args:
            progress: Called with the number of images seen so far, every 10,000 and at the end.

        Raises:
            SourceError: Something cannot be listed, or there is no image at all; every problem is named, up to ten.
        """
        problems: list[str] = []
        present = set(folders_in(self.root))
        self._left_out.clear()
        samples = Samples.of(_told(self._samples(present, problems), progress or (lambda n_seen: None)))
        if problems:
            raise SourceError(join_problems(f"{self.root} cannot be listed", problems))
        if not samples:
            raise SourceError(no_images(str(self.root), len(present)))
        return samples

    def check_has_images(self) -> None:
        """Refuse, without a whole listing, class folders that hold no image.

        Raises:
            SourceError: There is none.
        """
        problems: list[str] = []
        present = set(folders_in(self.root))
        if next(self._samples(present, problems), None) is None and not problems:  # lists one class, as a rule
            raise SourceError(no_images(str(self.root), len(present)))

    def _samples(self, present: set[str], problems: list[str]) -> Iterator[Sample]:
        for label, class_name in enumerate(self.class_names()):
            if class_name in present:
                yield from _list_class(self.root, class_name, label, problems, self._left_out)

    def notes(self, samples: Samples) -> list[str]:
        """What a person should know of the last listing and that stops nothing: what was left out, empty classes."""
        stray = [name for name in names_in(self.root) if is_image_name(name) and not _is_folder(self.root, name)]
        return folder_notes(self.class_names(), samples, stray, self._left_out)

    def read(self, sample: Sample) -> bytes:
        """The bytes of one file.

        Raises:
            SourceError: It cannot be read, now; says why. Never a verdict on the image.
        """
        name = sample.sample_id
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise SourceError(f"sample {name!r} is no path below the image folder; nothing outside it is read")
        try:
            return Path(self.root, relative).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise SourceError(f"cannot read sample {name!r} below {self.root}: {error_reason(error)}") from error


def folder_notes(class_names: list[str], samples: Samples, stray: list[str], left_out: LeftOut) -> list[str]:
    """Notes on a folder of class folders; `stray` are the images beside those, `left_out` what is within them."""
    filled = set(samples.table["class_name"].unique().to_pylist())
    empty = [name for name in class_names if name not in filled]
    notes = []
    if empty:
        notes.append(f"{counted(len(empty), 'class')} without images, which keep their labels: {shorten(empty)}")
    if stray:
        notes.append(f"{counted(len(stray), 'image')} outside of class folders, left out: {shorten(stray)}")
    if left_out.n:
        notes.append(f"{counted(left_out.n, 'file')} with other endings left out, such as {left_out.first!r}")
    return notes


def no_class_folders(root: str, names: list[str]) -> str:
    """What is wrong with a folder that holds these files and no folder."""
    if not names:
        return f"the image folder {root} is empty; expected class folders with images in them, or tars"
    n_images = sum(is_image_name(name) for name in names)
    return (
        f"{root} holds no class folders, but {counted(n_images, 'image')} and "
        f"{counted(len(names) - n_images, 'other file')}; expected one folder per class with its images inside: "
        "move the images into such folders"
    )


def no_images(root: str, n_folders: int) -> str:
    """What is wrong with class folders that hold no image."""
    return (
        f"{root} has {counted(n_folders, 'class folder')} and no image in any of them; "
        f"expected files ending in {' '.join(IMAGE_EXTENSIONS)} (in any case) inside class folders. "
        f"Tars of images beside such folders are named as IMAGES={root}/*.tar"
    )


def folders_in(root: str | os.PathLike[str]) -> list[str]:
    """Names of the folders right below a folder, links to folders included, sorted; errors as `names_in`."""
    return [name for name in names_in(root) if _is_folder(root, name)]


def names_in(root: str | os.PathLike[str]) -> list[str]:
    """Names of everything right below a folder, sorted.

    Raises:
        SourceError: It is missing, no folder, or unreadable.
    """
    try:
        return sorted(os.listdir(root))
    except FileNotFoundError:
        raise SourceError(
            f"there is no image folder {root}; expected a folder of class folders or of tars, or one with train/ and "
            "val/ of such (or IMAGES=digits)"
        ) from None
    except NotADirectoryError:
        raise SourceError(f"{root} is a file; expected a folder of class folders or of tars") from None
    except OSError as error:
        raise SourceError(f"cannot list the image folder {root}: {error_reason(error)}") from error


def _is_folder(root: str | os.PathLike[str], name: str) -> bool:
    return os.path.isdir(os.path.join(root, name))


def _told(samples: Iterator[Sample], progress: Callable[[int], None]) -> Iterator[Sample]:
    n_seen = 0
    for sample in samples:
        yield sample
        n_seen += 1
        if n_seen % TELL_EVERY == 0:
            progress(n_seen)
    progress(n_seen)


def _list_class(
    root: str | os.PathLike[str], class_name: str, label: int, problems: list[str], left_out: LeftOut
) -> Iterator[Sample]:
    """Samples of one class folder in torchvision's order; what cannot be listed is added to problems."""
    base = os.path.join(root, "")
    for path in _image_paths(os.path.join(base, class_name), problems, left_out):
        sample_id = path[len(base) :].replace(os.sep, "/")
        nbytes = _file_nbytes(path, sample_id, problems)
        if nbytes is not None:
            yield Sample(sample_id=sample_id, label=label, class_name=class_name, nbytes=nbytes)


def _image_paths(top: str, problems: list[str], left_out: LeftOut) -> Iterator[str]:
    """Image files in a folder and all below it, links followed, each loop of links cut and reported.

    Sorted by the path of their folder, then by name: torchvision sorts what os.walk yields, so that "a-b" comes before
    "a/b" although the walk meets it later.
    """
    names_of: dict[str, list[str]] = {}
    ahead: list[tuple[str, tuple[str, ...]]] = [(top, ())]
    while ahead:
        folder, above = ahead.pop()
        real = os.path.realpath(folder)
        if real in above:
            problems.append(f"{folder}: a link back to a folder that contains it; remove the link")
            continue
        names_of[folder] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _leads_to_folder(entry):
                        ahead.append((entry.path, (*above, real)))
                    elif is_image_name(entry.name):
                        names_of[folder].append(entry.name)
                    else:
                        left_out.add(entry.name)
        except OSError as error:
            problems.append(f"{folder}: {error_reason(error)}")
    for folder in sorted(names_of):
        for name in sorted(names_of[folder]):
            yield os.path.join(folder, name)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; its stat will report it
        return False


def _file_nbytes(path: str, sample_id: str, problems: list[str]) -> int | None:
    try:
        sample_id.encode()
        status = os.stat(path)
    except UnicodeEncodeError:
        problems.append(f"{sample_id!r}: the name is not UTF-8, and a store keeps names as text; rename the file")
    except OSError as error:
        dangling = error.errno == errno.ENOENT and os.path.islink(path)
        problems.append(f"{sample_id}: {'a link to nothing' if dangling else error_reason(error)}")
    else:
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        problems.append(f"{sample_id}: not a regular file, so reading it might never end")
    return None

"""Where images come from: an ImageFolder tree or the built-in digits.

A source lists its samples in a fixed order and reads one by its id. The order of a tree is torchvision's ImageFolder's,
file for file, because a shuffle of it (`storage_order`) decides which sample is row i of a store: row i here is row i
of a store that the published extraction script wrote.

A source is a small frozen value: it travels to other processes as its location, never with its listing.
"""

import errno
import os
import random
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from infra.console import UserError
from pipeline.digits import N_CLASSES, N_DIGITS, SPLITS, digits_split, encode_pgm, load_digit_arrays

#: What counts as an image, in any case: torchvision's list.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

DIGITS = "digits"

_IMAGENET_DIRS = {*SPLITS, "test"}
_MAX_NAMED = 10  # problems spelled out in one message


class SourceError(UserError):
    """A source cannot be listed or read: a matter of files, permissions or networks, never of one image's content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedSample:
    """One image as the listing sees it.

    Attributes:
        sample_id: Its name for ever: the path below the source's root, with forward slashes.
        label: Place of its class in the source's class list.
        class_name: Name of the class folder.
        nbytes: Size of the file.
    """

    sample_id: str
    label: int
    class_name: str
    nbytes: int


def storage_order(n_samples: int, seed: int = 42) -> list[int]:
    """Places in the listing in the order of a store's rows: row i holds listed sample `storage_order(n)[i]`.

    Source: KempnerInstitute/raptor:data/precompute_dinov2_act.py seeds `random` with 42 and shuffles range(n).
    """
    order = list(range(n_samples))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class ImageFolderSource:
    """A folder of class folders of images, listed exactly as torchvision's ImageFolder lists it.

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
        names = _folders_in(self.root)
        if not names:
            raise SourceError(_no_class_folders(self.root))
        return names

    def listing(self, progress: Callable[[int], None] | None = None) -> list[ListedSample]:
        """All samples in the source's order.

        One `stat` per file, so a million files on a network disk take minutes.

        Args:
            progress: Called with the number of files seen so far, after each class folder.

        Raises:
            SourceError: Something cannot be listed, or there is no image at all; every problem is named, up to ten.
        """
        samples: list[ListedSample] = []
        problems: list[str] = []
        present = set(_folders_in(self.root))
        for label, class_name in enumerate(self.class_names()):
            if class_name in present:
                samples.extend(_list_class(self.root, class_name, label, problems))
            if progress is not None:
                progress(len(samples))
        if problems:
            raise SourceError(_join_problems(f"{self.root} cannot be listed", problems))
        if not samples:
            raise SourceError(
                f"{self.root} has {_count(len(present), 'class folder')} and no image in any of them; "
                f"expected files ending in {' '.join(IMAGE_EXTENSIONS)} (in any case) inside class folders"
            )
        return samples

    def notes(self, samples: list[ListedSample]) -> list[str]:
        """What a person should know of a listing and that stops nothing: empty classes, images outside of classes."""
        filled = {sample.class_name for sample in samples}
        empty = [name for name in self.class_names() if name not in filled]
        stray = [name for name in _names_in(self.root) if _is_image_name(name) and not _is_folder(self.root, name)]
        notes = []
        if empty:
            notes.append(f"{_count(len(empty), 'class')} without images, which keep their labels: {_shorten(empty)}")
        if stray:
            notes.append(f"{_count(len(stray), 'image')} outside of class folders, left out: {_shorten(stray)}")
        return notes

    def read(self, sample_id: str) -> bytes:
        """The bytes of one file.

        Raises:
            SourceError: It cannot be read, now; says why. Never a verdict on the image.
        """
        relative = PurePosixPath(sample_id)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise SourceError(f"sample {sample_id!r} is no path below the image folder; nothing outside it is read")
        try:
            return Path(self.root, relative).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise SourceError(f"cannot read sample {sample_id!r} below {self.root}: {_reason(error)}") from error


@dataclass(frozen=True)
class DigitsSource:
    """The built-in digits of one split, in `load_digits` order, as PGM files that exist only in memory.

    Attributes:
        split: "train" or "val"; which digit is in which is fixed (`pipeline.digits.digits_split`).
    """

    split: str = "train"

    def __post_init__(self) -> None:
        digits_split(self.split)  # refuses an unknown split at once

    @property
    def name(self) -> str:
        """The name of the built-in images."""
        return DIGITS

    def class_names(self) -> list[str]:
        """ "0" to "9", in label order."""
        return [str(digit) for digit in range(N_CLASSES)]

    def listing(self, progress: Callable[[int], None] | None = None) -> list[ListedSample]:
        """All samples in `load_digits` order; ids such as "train/3/0013.pgm" end in the place in that order."""
        levels, labels = load_digit_arrays()
        samples = [
            ListedSample(
                sample_id=self._sample_id(place, int(labels[place])),
                label=int(labels[place]),
                class_name=str(labels[place]),
                nbytes=len(encode_pgm(levels[place])),
            )
            for place in digits_split(self.split)
        ]
        if progress is not None:
            progress(len(samples))
        return samples

    def notes(self, samples: list[ListedSample]) -> list[str]:
        """Nothing: the digits have no surprises."""
        return []

    def read(self, sample_id: str) -> bytes:
        """The bytes of one digit's PGM file.

        Raises:
            SourceError: The digits have no such sample.
        """
        levels, labels = load_digit_arrays()
        place = _place_in(sample_id)
        if place is not None and sample_id == self._sample_id(place, int(labels[place])):
            return encode_pgm(levels[place])
        raise SourceError(f"the digits have no sample {sample_id!r} in {self.split}; an id reads like train/3/0013.pgm")

    def _sample_id(self, place: int, label: int) -> str:
        return f"{self.split}/{label}/{place:04d}.pgm"


Source = ImageFolderSource | DigitsSource


def open_sources(images: str) -> dict[str, Source]:
    """The sources that an IMAGES value names, by split.

    Args:
        images: "digits", or a folder. A folder with train/ and val/ (each holding class folders) gives both; the same
            goes for one of the two beside nothing but test/. Any other folder is one source, under the name "".

    Raises:
        SourceError: The folder is missing, unreadable, empty, or without class folders.
    """
    if images == DIGITS:
        return {split: DigitsSource(split) for split in SPLITS}
    if not images:
        raise SourceError("no images were named; expected IMAGES=digits or a folder of class folders")
    if "://" in images:
        raise SourceError(f"{images} is an address; images are read from a local folder so far. Copy or mount it there")
    folders = _folders_in(images)
    splits = [split for split in SPLITS if split in folders]
    if not splits or (len(splits) == 1 and not _IMAGENET_DIRS.issuperset(folders)):
        source = ImageFolderSource(images)
        source.class_names()  # says now what is missing
        return {"": source}
    return _open_splits(images, splits)


def _open_splits(images: str, splits: list[str]) -> dict[str, Source]:
    roots = {split: os.path.join(images, split) for split in splits}
    classes = {split: tuple(ImageFolderSource(root).class_names()) for split, root in roots.items()}
    first = classes[splits[0]]
    # A split that lacks classes of the first is labelled by the first's list; one with others keeps its own.
    return {
        split: ImageFolderSource(root, first if set(classes[split]) < set(first) else None)
        for split, root in roots.items()
    }


def _list_class(
    root: str | os.PathLike[str], class_name: str, label: int, problems: list[str]
) -> Iterator[ListedSample]:
    """Samples of one class folder in torchvision's order; what cannot be listed is added to problems."""
    base = os.path.join(root, "")
    for entry in _image_entries(os.path.join(base, class_name), problems):
        sample_id = entry.path[len(base) :].replace(os.sep, "/")
        nbytes = _file_nbytes(entry, sample_id, problems)
        if nbytes is not None:
            yield ListedSample(sample_id=sample_id, label=label, class_name=class_name, nbytes=nbytes)


def _image_entries(top: str, problems: list[str]) -> list[os.DirEntry[str]]:
    """Image files in a folder and all below it, links followed, each loop of links cut and reported.

    Sorted by the path of their folder, then by name: torchvision sorts what os.walk yields, so that "a-b" comes before
    "a/b" although the walk meets it later.
    """
    images: list[tuple[str, str, os.DirEntry[str]]] = []
    ahead: list[tuple[str, tuple[str, ...]]] = [(top, ())]
    while ahead:
        folder, above = ahead.pop()
        real = os.path.realpath(folder)
        if real in above:
            problems.append(f"{folder}: a link back to a folder that contains it; remove the link")
            continue
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError as error:
            problems.append(f"{folder}: {_reason(error)}")
            continue
        ahead.extend((entry.path, (*above, real)) for entry in listed if _leads_to_folder(entry))
        images.extend(
            (folder, entry.name, entry)
            for entry in listed
            if _is_image_name(entry.name) and not _leads_to_folder(entry)
        )
    return [entry for _, _, entry in sorted(images, key=lambda image: image[:2])]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; its stat will report it
        return False


def _file_nbytes(entry: os.DirEntry[str], sample_id: str, problems: list[str]) -> int | None:
    try:
        sample_id.encode()
        status = entry.stat()
    except UnicodeEncodeError:
        problems.append(f"{sample_id!r}: the name is not UTF-8, and a store keeps names as text; rename the file")
    except OSError as error:
        what = "a link to nothing" if entry.is_symlink() and error.errno == errno.ENOENT else _reason(error)
        problems.append(f"{sample_id}: {what}")
    else:
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        problems.append(f"{sample_id}: not a regular file, so reading it might never end")
    return None


def _folders_in(root: str | os.PathLike[str]) -> list[str]:
    return [name for name in _names_in(root) if _is_folder(root, name)]


def _names_in(root: str | os.PathLike[str]) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except FileNotFoundError:
        raise SourceError(
            f"there is no image folder {root}; expected a folder of class folders, or one with train/ and val/ of such "
            "(or IMAGES=digits)"
        ) from None
    except NotADirectoryError:
        raise SourceError(f"{root} is a file; expected a folder of class folders") from None
    except OSError as error:
        raise SourceError(f"cannot list the image folder {root}: {_reason(error)}") from error


def _is_folder(root: str | os.PathLike[str], name: str) -> bool:
    return os.path.isdir(os.path.join(root, name))


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _no_class_folders(root: str | os.PathLike[str]) -> str:
    names = _names_in(root)
    if not names:
        return f"the image folder {root} is empty; expected class folders with images in them"
    n_images = sum(_is_image_name(name) for name in names)
    return (
        f"{root} holds no class folders, but {_count(n_images, 'image')} and "
        f"{_count(len(names) - n_images, 'other file')}; expected one folder per class with its images inside: "
        "move the images into such folders"
    )


def _place_in(sample_id: str) -> int | None:
    """The place in `load_digits` order that a digit's id ends in, if it is one of this form."""
    found = re.fullmatch(r"\w+/\d/(\d{4})\.pgm", sample_id, re.ASCII)
    place = int(found[1]) if found else N_DIGITS
    return place if place < N_DIGITS else None


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _count(n: int, what: str) -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{n:,} {what if n == 1 else plural}"


def _shorten(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def _join_problems(heading: str, problems: list[str]) -> str:
    rest = len(problems) - _MAX_NAMED
    shown = [*problems[:_MAX_NAMED], *([f"and {rest:,} more"] if rest > 0 else [])]
    return f"{heading}, {_count(len(problems), 'problem')}:\n  " + "\n  ".join(shown)

"""Where images come from: class folders, WebDataset tars, or the built-in digits; on this machine, S3 or elsewhere.

A source lists its samples in a fixed order and reads one of them. The order of a tree is torchvision's ImageFolder's,
file for file, because a shuffle of it (`storage_order`) decides which sample is row i of a store: row i here is row i
of a store that the published extraction script wrote.

A source is a small frozen value: it travels to other processes as its location, never with its listing.
"""

import dataclasses
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from infra.console import counted
from infra.fsspec_objects import open_read_only
from pipeline.digits import N_CLASSES, N_DIGITS, SPLITS, digits_split, encode_pgm, load_digit_arrays
from pipeline.image_folder import ImageFolderSource, folders_in, names_in
from pipeline.remote_folder import RemoteFolderSource, list_level
from pipeline.source_errors import SourceError, shorten
from pipeline.tar_source import COMPRESSED_TARS, TAR, TarSource, is_tar_pattern, split_pattern
from storage_schemas.samples import Sample, Samples

__all__ = [
    "DIGITS",
    "DigitsSource",
    "ImageFolderSource",
    "RemoteFolderSource",
    "Source",
    "SourceError",
    "TarSource",
    "images_name",
    "open_sources",
    "storage_order",
]

DIGITS = "digits"

_IMAGENET_DIRS = {*SPLITS, "test"}


def storage_order(n_samples: int, seed: int = 42) -> list[int]:
    """Places in the listing in the order of a store's rows: row i holds listed sample `storage_order(n)[i]`.

    Source: KempnerInstitute/raptor:data/precompute_dinov2_act.py seeds `random` with 42 and shuffles range(n).
    """
    order = list(range(n_samples))
    random.Random(seed).shuffle(order)
    return order


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

    def listing(self, progress: Callable[[int], None] | None = None) -> Samples:
        """All samples in `load_digits` order; ids such as "train/3/0013.pgm" end in the place in that order."""
        levels, labels = load_digit_arrays()
        samples = [
            Sample(
                sample_id=self._sample_id(place, int(labels[place])),
                label=int(labels[place]),
                class_name=str(labels[place]),
                nbytes=len(encode_pgm(levels[place])),
            )
            for place in digits_split(self.split)
        ]
        if progress is not None:
            progress(len(samples))
        return Samples.of(samples)

    def notes(self, samples: Samples) -> list[str]:
        """Nothing: the digits have no surprises."""
        return []

    def read(self, sample: Sample) -> bytes:
        """The bytes of one digit's PGM file.

        Raises:
            SourceError: The digits have no such sample.
        """
        levels, labels = load_digit_arrays()
        sample_id = sample.sample_id
        place = _place_in(sample_id)
        if place is not None and sample_id == self._sample_id(place, int(labels[place])):
            return encode_pgm(levels[place])
        raise SourceError(f"the digits have no sample {sample_id!r} in {self.split}; an id reads like train/3/0013.pgm")

    def _sample_id(self, place: int, label: int) -> str:
        return f"{self.split}/{label}/{place:04d}.pgm"


Source = ImageFolderSource | RemoteFolderSource | TarSource | DigitsSource


def open_sources(images: str) -> dict[str, Source]:
    """The sources that an IMAGES value names, by split.

    Args:
        images: "digits"; or a folder of class folders, or of tars; or tars by a pattern such as
            /data/train-{000000..000146}.tar. A folder with train/ and val/ (of class folders or tars) gives both; the
            same goes for one of the two beside nothing but test/. Any other is one source, under the name "".

    Raises:
        SourceError: The folder is missing, unreadable, empty, or holds neither class folders nor tars.
        UserError: There is no driver for such an address.
    """
    if images == DIGITS:
        return {split: DigitsSource(split) for split in SPLITS}
    if not images:
        raise SourceError("no images were named; expected IMAGES=digits, a folder of class folders, or tars")
    if is_tar_pattern(images):
        tars = TarSource(*split_pattern(images))
        tars.tars()  # says now what is missing
        return {"": tars}
    root = images.rstrip("/") or "/"
    folders, _ = _level(root)
    splits = [split for split in SPLITS if split in folders]
    if not splits or (len(splits) == 1 and not _IMAGENET_DIRS.issuperset(folders)):
        return {"": _open_folder(root)}
    return _open_splits(root, splits)


def images_name(images: str) -> str:
    """What to call the images: the name of their folder, or what their tars have in common."""
    if not is_tar_pattern(images):
        return images.rstrip("/").rpartition("/")[2]
    root, pattern = split_pattern(images)
    return TarSource(root, pattern).name


def _open_splits(root: str, splits: list[str]) -> dict[str, Source]:
    sources = {split: _open_folder(f"{root.rstrip('/')}/{split}") for split in splits}
    first, *others = sources.items()
    for split, source in others:
        if isinstance(first[1], TarSource) or isinstance(source, TarSource | DigitsSource):
            continue  # labels are in the tars
        # A split that lacks classes of the first is labelled by the first's list; one with others keeps its own.
        names = first[1].class_names()
        if set(source.class_names()) < set(names):
            sources[split] = dataclasses.replace(source, classes=tuple(names))
    return sources


def _open_folder(root: str) -> Source:
    folders, names = _level(root)
    if not folders and any(name.lower().endswith(TAR) for name in names):
        return TarSource(root)
    compressed = [name for name in names if name.lower().endswith(COMPRESSED_TARS)]
    if not folders and compressed:
        raise SourceError(
            f"{root} holds {counted(len(compressed), 'compressed tar')}, in which no image can be read alone: "
            f"{shorten(compressed)}; unpack each once, as with gunzip"
        )
    source = RemoteFolderSource(root) if "://" in root else ImageFolderSource(root)
    source.class_names()  # says now what is missing
    return source


def _level(root: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files right below a root."""
    if "://" in root:
        return list_level(open_read_only(root))
    folders = folders_in(root)
    return folders, sorted(set(names_in(root)) - set(folders))


def _place_in(sample_id: str) -> int | None:
    """The place in `load_digits` order that a digit's id ends in, if it is one of this form."""
    found = re.fullmatch(r"\w+/\d/(\d{4})\.pgm", sample_id, re.ASCII)
    place = int(found[1]) if found else N_DIGITS
    return place if place < N_DIGITS else None

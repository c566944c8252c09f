"""Images and the maps that belong to them, as files of this machine: listed, checked before anything runs, and read.

Only headers are read while checking: a hundred thousand files take a minute, not an hour.
"""

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image

from infra.console import Progress, UserError
from pipeline.preprocess import (
    PNG_HEAD_NBYTES,
    BadImageError,
    decode_png_values,
    decode_rgb,
    png_bits,
    read_size,
)
from trainer.probes.task import Asked

_N_LISTED = 20
_N_SILENT = 2000  # pairs that are checked before anybody could wonder
_Header = TypeVar("_Header")
_Train = TypeVar("_Train")
_Evaluation = TypeVar("_Evaluation")
_THREADS = 16  # they wait for a disk or a network


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its map, by their paths below the root of the data set, with /."""

    image: str
    map: str


@dataclass(frozen=True, kw_only=True)
class MapKind:
    """What maps have to be.

    Attributes:
        what: In messages: "mask", "depth map".
        bits: Of a pixel.
        size: Height and width that image and map must have, px; None: any, but both the same.
    """

    what: str
    bits: int
    size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """Checked pairs.

    Attributes:
        root: Folder of the data set.
        pairs: In the order of their indices.
        kind: Of the maps.
        identity: Count, and a digest of names and sizes.
    """

    root: str
    pairs: Sequence[Pair]
    kind: MapKind
    identity: Mapping[str, Any]

    def read(
        self, index: int
    ) -> tuple[Image.Image, UInt8[np.ndarray, "height width"] | UInt16[np.ndarray, "height width"]]:
        """One image, RGB, and its map's numbers. Safe to call from many threads.

        Raises:
            UserError: A file is gone or damaged, or not what it was when it was checked; names it.
        """
        pair = self.pairs[index]
        path, map_path = self.path(pair.image), self.path(pair.map)
        try:
            image = decode_rgb(_bytes_of(path))
        except BadImageError as error:
            raise UserError(f"{path}: {error}. Bring it back from a copy") from error
        try:
            values = decode_png_values(_bytes_of(map_path))
        except BadImageError as error:
            raise UserError(f"{map_path}: {error}. Bring it back from a copy") from error
        found = (values.shape[0], values.shape[1], 8 * values.itemsize)
        if found != (image.height, image.width, self.kind.bits):
            raise UserError(
                f"{map_path} has {found[0]} x {found[1]} px of {found[2]} bits, its image {path} {image.height} x "
                f"{image.width} of {self.kind.bits} expected: one of them was changed after it was checked"
            )
        return image, values

    def path(self, name: str) -> str:
        """Where a file of a pair is."""
        return os.path.join(self.root, name)


@dataclass(frozen=True, kw_only=True)
class OfPairs:
    """What every data set of pairs has beside `load`; see `trainer.probes.task.LabelledImages`.

    Attributes:
        files: Checked.
    """

    files: PairFiles

    def __len__(self) -> int:
        return len(self.files.pairs)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Count, and a digest of names and sizes."""
        return self.files.identity


def check_pairs(root: str, pairs: Sequence[Pair], kind: MapKind, *, label: str) -> tuple[PairFiles, list[str]]:
    """Look at the header of every file.

    Returns:
        The pairs, and what is wrong with them, one line each with the file's name.
    """
    digest, problems = hashlib.sha256(), []
    with _shown(len(pairs), "pairs", label) as progress, ThreadPoolExecutor(_THREADS) as threads:
        for pair, (nbytes, wrong) in zip(pairs, threads.map(lambda pair: _look(root, pair, kind), pairs)):
            line = f"{pair.image}\t{nbytes[0]}\t{pair.map}\t{nbytes[1]}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))  # a name may be any bytes
            problems += wrong
            if progress is not None:
                progress.advance()
    identity = {"n_samples": len(pairs), "files": digest.hexdigest()}
    return PairFiles(root=root, pairs=pairs, kind=kind, identity=identity), problems


def check_images(root: str, names: Iterable[str], n_images: int, *, label: str) -> list[str]:
    """Look at the header of every image.

    Args:
        root: Folder that they lie below.
        names: Their paths below it.
        n_images: How many, for a progress bar.
        label: Of that.

    Returns:
        What is wrong, one line each with the file's name, the first twenty.
    """

    def look(name: str) -> list[str]:
        wrong: list[str] = []
        _header(root, name, wrong, _image_size)
        return wrong

    problems, left = list[str](), iter(names)
    with _shown(n_images, "images", label) as progress, ThreadPoolExecutor(_THREADS) as threads:
        while some := list(itertools.islice(left, _N_SILENT)):  # the pool would take all of a million at once
            problems += itertools.chain.from_iterable(threads.map(look, some))
            if progress is not None:
                progress.advance(len(some))
    more = [f"and {len(problems) - _N_LISTED:,} more"] if len(problems) > _N_LISTED else []
    return [*problems[:_N_LISTED], *more]


def _shown(n: int, unit: str, label: str) -> AbstractContextManager[Progress | None]:
    return Progress(total=n, unit=unit, label=f"check {label}") if n > _N_SILENT else nullcontext()


def refuse(root: str, problems: Sequence[str], advice: str) -> None:
    """Stop if there are problems.

    Raises:
        UserError: Lists them, the first twenty if there are more.
    """
    if problems:
        more = [f"and {len(problems) - _N_LISTED:,} more"] if len(problems) > _N_LISTED else []
        counted = f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}"
        raise UserError("\n  ".join([f"{root} has {counted}:", *problems[:_N_LISTED], *more]) + f"\n{advice}")


def typed_problems(asked: Asked, *, missing: str) -> list[str]:
    """What is wrong with IMAGES and HEAD before any file is looked at.

    Args:
        asked: What was typed.
        missing: What to say if IMAGES was not typed.
    """
    found = []
    if asked.head is not None:
        found.append(f"HEAD={asked.head}: the readout of this task begins with random values; leave HEAD out")
    if asked.images is None:
        found.append(missing)
    elif "://" in asked.images:
        found.append(f"IMAGES={asked.images}: this task reads files of this machine; copy the data set to a folder")
    return found


def open_images(
    asked: Asked, open_: Callable[[str], tuple[_Train, _Evaluation]], *, problems: Sequence[str]
) -> tuple[_Train, _Evaluation]:
    """What `open_` makes of IMAGES.

    Args:
        asked: What was typed.
        open_: Takes the folder.
        problems: Those that are known already, with `typed_problems`.

    Raises:
        UserError: Lists those, and that IMAGES is not what `open_` expects.
    """
    found, opened = list(problems), None
    if asked.images is not None and "://" not in asked.images:
        try:
            opened = open_(os.path.expanduser(asked.images))
        except UserError as error:
            found.append(str(error))
    if found or opened is None:
        raise UserError("\n  ".join(found))
    return opened


def names_in(folder: str, suffix: str) -> list[str]:
    """Names of the files in a folder that end so, in any case, sorted; none if there is no such folder.

    Hidden ones, such as a Mac leaves beside those that it copies, are left out.
    """
    try:
        return sorted(name for name in os.listdir(folder) if name.lower().endswith(suffix) and name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        return []


def _look(root: str, pair: Pair, kind: MapKind) -> tuple[tuple[int, int], list[str]]:
    """Sizes in bytes, and what is wrong."""
    problems: list[str] = []
    image, image_nbytes = _header(root, pair.image, problems, _image_size)
    found, map_nbytes = _header(root, pair.map, problems, _map_header)
    if found is not None:
        *size, bits = found
        if bits != kind.bits:
            problems.append(f"{pair.map}: {bits} bits a pixel, expected a {kind.what} of {kind.bits}")
        if image is not None and tuple(size) != image:
            problems.append(f"{pair.map}: {_px(size)}, but its image {pair.image} has {_px(image)}")
    if image is not None and kind.size is not None and image != kind.size:
        problems.append(f"{pair.image}: {_px(image)}, expected {_px(kind.size)}")
    return (image_nbytes, map_nbytes), problems


def _header(
    root: str, name: str, problems: list[str], read: Callable[[io.BufferedReader], _Header]
) -> tuple[_Header | None, int]:
    try:
        with open(os.path.join(root, name), "rb") as stream:
            return read(stream), os.fstat(stream.fileno()).st_size
    except FileNotFoundError:
        problems.append(f"{name}: missing")
    except (OSError, BadImageError) as error:
        problems.append(f"{name}: {error.strerror if isinstance(error, OSError) else error}")
    return None, 0


def _image_size(stream: io.BufferedReader) -> tuple[int, int]:
    width, height = read_size(stream)
    return height, width


def _map_header(stream: io.BufferedReader) -> tuple[int, int, int]:
    """Height, width, bits a pixel."""
    head = stream.read(PNG_HEAD_NBYTES)
    bits = png_bits(head)
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big"), bits


def _px(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} px (height x width)"


def _bytes_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. It was there when it was checked") from error

"""WebDataset tars of images and labels, here, on S3 or wherever fsspec reads."""

import glob
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from infra.console import counted
from infra.fsspec_objects import ReadOnlyObjects, open_read_only
from infra.objects import ObjectError, ObjectInfo, check_key, read_range
from pipeline.source_errors import IMAGE_EXTENSIONS, SourceError, error_reason, join_problems, shorten
from pipeline.tar_walk import BLOCK_NBYTES, TarWalk, member_differs
from storage_schemas.samples import Sample, Samples, repeated_ids

TAR = ".tar"
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_TARS = 100_000

_TARS_AT_ONCE = 32  # at an address, where walking one is mostly waiting
_LOCAL_TARS_AT_ONCE = 8  # enough for network disks
_TELL_S = 0.5


@dataclass(frozen=True)
class TarSource:
    """Tars whose samples are members that share a name up to the first dot: an image, and its label in `.cls`.

    Tars are sorted by name, samples are in tar order, and class names are the labels. A sample's id is the tar's name,
    `/` and the image's name in it.

    Listing reads headers and labels only: one request of 8 KiB an image (tars of images of less than 16 KiB are read
    through), 32 tars at once. ImageNet's 1.28 million images take 10 of 140 GB, some minutes, and half a dollar at
    Amazon's price of requests. Reading an image is one request.

    Attributes:
        root: The folder that the tars are in, here or at an address.
        pattern: Which files below `root` are the tars: `*`, `?`, `[...]` within a name, `{a,b}` and `{000..146}`.
    """

    root: str
    pattern: str = f"*{TAR}"

    def __reduce__(self) -> tuple:  # it travels as its location; clients are made anew
        return type(self), (self.root, self.pattern)

    @cached_property
    def _objects(self) -> ReadOnlyObjects:
        return open_read_only(self.root)

    @property
    def name(self) -> str:
        """What the tars have in common in their name, else the name of their folder."""
        return images_stem(self.pattern) or os.path.basename(self.root.rstrip("/"))

    def tars(self) -> list[ObjectInfo]:
        """The tars, sorted by name.

        Raises:
            SourceError: Some that the pattern names are missing or no tars, or there are none; tells all, up to ten.
        """
        patterns = expand_braces(self.pattern)
        remote = "://" in self.root
        found = _matching(self._list(), patterns) if remote else _local_matches(self.root, patterns)
        named = {pattern for pattern in patterns if not _has_wildcard(pattern)}
        problems = [f"{self.root}/{name} is missing" for name in sorted(named - {tar.key for tar in found})]
        problems += [f"{self.root}/{what}" for tar in found if (what := _name_problem(tar.key))]
        if not found and not problems:
            problems = [f"no file of {self.root} is named {self.pattern}"]
        if problems:
            raise SourceError(join_problems(f"the tars of IMAGES={self.root}/{self.pattern} cannot be read", problems))
        return sorted(found, key=lambda tar: tar.key)

    def _list(self) -> list[ObjectInfo]:
        try:
            return list(self._objects.list(_literal_head(self.pattern)))
        except ObjectError as error:
            raise SourceError(f"cannot list the tars of {self.root}: {error}") from error

    def listing(self, progress: Callable[[int], None] | None = None) -> Samples:
        """All samples in the source's order; about 100 bytes each.

        Args:
            progress: Called with the number of images seen so far, twice a second and at the end.

        Raises:
            SourceError: A tar cannot be read, or is not what it should be; tells all problems, up to ten.
        """
        walks = [TarWalk(self._objects, tar.key, tar.nbytes) for tar in self.tars()]
        n_at_once = _TARS_AT_ONCE if "://" in self.root else _LOCAL_TARS_AT_ONCE
        with ThreadPoolExecutor(n_at_once, thread_name_prefix="list-tars") as pool:
            futures = [pool.submit(Samples.of, walk.samples()) for walk in walks]
            try:
                _wait(futures, walks, progress or (lambda n_seen: None))
                samples = Samples.join([future.result() for future in futures])
            except ObjectError as error:
                raise SourceError(f"cannot list the tars of {self.root}: {error}", tried_again=True) from error
            finally:
                for walk, future in zip(walks, futures):
                    future.cancel()
                    walk.stopped = True
        problems = [problem for walk in walks for problem in walk.problems]
        problems += [f"{name!r} is there {n} times" for name, n in repeated_ids(samples)]
        if problems:
            raise SourceError(join_problems(f"the tars of {self.root} cannot be used", problems))
        if not samples:
            raise SourceError(
                f"{counted(len(walks), 'tar')} in {self.root} hold no image; expected members that end in "
                f"{' '.join(IMAGE_EXTENSIONS)}, each with a label in a member of the same name that ends in .cls"
            )
        return samples

    def notes(self, samples: Samples) -> list[str]:
        """Tars without images; what is in tars and is no sample has stopped the listing, or belongs to nobody."""
        filled = set(samples.table["tar"].unique().to_pylist())
        empty = [tar.key for tar in self.tars() if tar.key not in filled]
        return [f"{counted(len(empty), 'tar')} without images: {shorten(empty)}"] if empty else []

    def read(self, sample: Sample) -> bytes:
        """The bytes of one image: one ranged read, of its header too, which tells whether the tar is still the same.

        Raises:
            SourceError: It cannot be read, now; says why. Never a verdict on the image.
        """
        tar, offset = sample.tar, sample.offset
        if tar is None or offset is None or offset < BLOCK_NBYTES or not sample.sample_id.startswith(f"{tar}/"):
            raise SourceError(f"sample {sample.sample_id!r} lies in no tar; IMAGES are tars, but the store's were not")
        try:
            data = read_range(self._objects, tar, offset - BLOCK_NBYTES, BLOCK_NBYTES + sample.nbytes)
        except (ObjectError, ValueError) as error:  # ValueError: a name that no object can have
            raise SourceError(
                f"cannot read sample {sample.sample_id!r} below {self.root}: {error}", tried_again="://" in self.root
            ) from error
        what = member_differs(bytes(data[:BLOCK_NBYTES]), sample.sample_id.removeprefix(f"{tar}/"), sample.nbytes)
        if what:
            raise SourceError(
                f"{self.root}/{tar} was changed since it was listed: {sample.sample_id!r} was at {offset:,}, now {what}"
            )
        return bytes(memoryview(data)[BLOCK_NBYTES:])


def is_tar_pattern(images: str) -> bool:
    """Whether an IMAGES value names tars, and no folder."""
    named = images.lower().endswith((TAR, *COMPRESSED_TARS))
    return (named or _has_wildcard(images) or "{" in images) and not os.path.isdir(images)


def split_pattern(images: str) -> tuple[str, str]:
    """The folder, and the pattern below it, of an IMAGES value that names tars.

    Raises:
        SourceError: A bucket or a root folder would be part of the pattern.
    """
    literal = _literal_head(images)
    folder = literal[: literal.rfind("/") + 1] if literal != images else images[: images.rfind("/") + 1]
    root = folder if folder == "/" else folder.rstrip("/")
    if root.endswith(":") or ("://" in images and "/" not in images.partition("://")[2]):
        raise SourceError(
            f"{images} names no tars in a bucket; give a pattern such as s3://bucket/train-{{000..146}}.tar"
        )
    return root or ".", images[len(folder) :]


def images_stem(pattern: str) -> str:
    """What the names of tars have in common: "train" of "train-{000..146}.tar"."""
    name = pattern.rpartition("/")[2]
    return re.split(r"[*?\[{]|\.tar|\.tgz", name, maxsplit=1)[0].rstrip("-_.")


def expand_braces(pattern: str) -> list[str]:
    """All that a pattern of `{a,b}` and `{000..146}` stands for, as `webdataset` reads it.

    Raises:
        SourceError: More than 100,000.
    """
    done, ahead = dict[str, None](), [pattern]
    while ahead:
        text = ahead.pop()
        found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
        if found is None:
            done[text] = None
            continue
        choices = _numbers(found[1], found[2]) if found[1] else found[3].split(",")
        if len(choices) + len(ahead) + len(done) > MAX_TARS:
            raise SourceError(f"{pattern} stands for more than {MAX_TARS:,} tars; use * in place of numbers")
        ahead += [f"{text[: found.start()]}{choice}{text[found.end() :]}" for choice in reversed(choices)]
    return list(done)


def _numbers(first: str, last: str) -> list[str]:
    low, high = int(first[-18:]), int(last[-18:])
    places = range(low, high + 1) if low <= high else range(low, high - 1, -1)
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    return [f"{n:0{width}d}" for n in places[: MAX_TARS + 1]]


def _has_wildcard(pattern: str) -> bool:
    return any(c in pattern for c in "*?[")


def _literal_head(pattern: str) -> str:
    return re.split(r"[*?\[{]", pattern, maxsplit=1)[0]


def _matching(infos: Iterable[ObjectInfo], patterns: list[str]) -> list[ObjectInfo]:
    """Objects that match any pattern; a wildcard stays within a name and takes no hidden files."""
    named, wild = set(patterns), [pattern.split("/") for pattern in patterns if _has_wildcard(pattern)]
    return [info for info in infos if info.key in named or any(_fits(info.key.split("/"), parts) for parts in wild)]


def _fits(parts: list[str], pattern: list[str]) -> bool:
    return len(parts) == len(pattern) and all(
        fnmatchcase(part, wanted) and not (part.startswith(".") and not wanted.startswith("."))
        for part, wanted in zip(parts, pattern)
    )


def _local_matches(root: str, patterns: list[str]) -> list[ObjectInfo]:
    """Files, links to files among them."""
    names = {name for pattern in patterns for name in _local_names(root, pattern)}
    try:
        return [ObjectInfo(key=name, nbytes=os.stat(os.path.join(root, name)).st_size) for name in names]
    except OSError as error:
        raise SourceError(f"{error.filename}: {error_reason(error)}") from error


def _local_names(root: str, pattern: str) -> list[str]:
    if _has_wildcard(pattern):
        return glob.glob(pattern, root_dir=root)
    return [pattern] if os.path.lexists(os.path.join(root, pattern)) else []


def _name_problem(name: str) -> str | None:
    if name.lower().endswith(COMPRESSED_TARS):
        return f"{name} is compressed, so no image in it can be read alone; unpack it once: gunzip {name}"
    if not name.lower().endswith(TAR):
        return f"{name} is no {TAR} file"
    try:
        check_key(name)
    except ValueError:
        return f"{name!r}: tars of such a name are not read; rename it"
    return None


def _wait(futures: list[Future[Samples]], walks: list[TarWalk], progress: Callable[[int], None]) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, _TELL_S, FIRST_EXCEPTION)
        progress(sum(walk.n_seen for walk in walks))
        for future in done:
            future.result()

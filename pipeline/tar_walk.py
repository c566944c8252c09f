"""Walk a tar by its headers: which members there are and where, without reading them and without trusting any of it.

Headers are parsed by `tarfile`, pax and GNU long names with them, over ranged reads. Nothing is ever extracted: a
member's name is only a name, and its bytes are read from where they lie.
"""

import re
import tarfile
from collections.abc import Iterator

from infra.objects import GetRange, read_range
from pipeline.source_errors import IMAGE_EXTENSIONS, is_image_name
from storage_schemas.samples import Sample

BLOCK_NBYTES = tarfile.BLOCKSIZE
MAX_HEADER_NBYTES = 2**15  # of a member, with pax records and long names, of which file systems allow 4 KiB
MAX_LABEL_NBYTES = 32
MOST_PROBLEMS = 10  # of one tar; then it is left

_JUMP_NBYTES = 2**13  # read after a jump: the headers and labels between two images, as a rule
_MOST_AHEAD_NBYTES = 2**20
_READ_THROUGH_NBYTES = 2**14  # a gap so small costs less to read than another request
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_LABEL = re.compile(rb"\s*(-?[0-9]{1,18})\s*")


class TarError(Exception):
    """This place of a tar cannot be understood, and so nothing behind it."""


class TarWalk:
    """The samples of one tar, in its order. `n_seen` counts them while they come, `problems` says what is wrong.

    A sample is a run of members that share a key, the path up to the first dot of its last part, as `webdataset` has
    it. Its image is the member whose extension is an image's, its label the integer in `.cls`; others are passed by.

    Args:
        objects: Where the tar is.
        key: Of the tar there; it is also the first part of every sample_id.
        nbytes: Size of the tar.
    """

    def __init__(self, objects: GetRange, key: str, nbytes: int) -> None:
        self.n_seen = 0
        self.problems: list[str] = []
        self.stopped = False
        self._tar = key
        self._file = _Window(objects, key, nbytes)
        self._group = _Group("")

    def samples(self) -> Iterator[Sample]:
        """All samples; stops early after `MOST_PROBLEMS` problems, or where headers cannot be understood."""
        try:
            for info in self._members():
                if self.stopped or len(self.problems) >= MOST_PROBLEMS:
                    return
                yield from self._add(info)
        except TarError as error:
            self.problems.append(f"{self._tar}: {error}")
            return
        yield from self._end_group()

    def _members(self) -> Iterator[tarfile.TarInfo]:
        tar, last = _open(self._file), "its beginning"
        place = 0
        while True:
            info = _next_header(tar, self._file, place, last)
            if info is None:
                return
            last = repr(info.name)
            what = _refusal(info, self._file.nbytes) or _hidden_size(info, self._file)
            if what:
                self.problems.append(f"{self._tar}: {last}: {what}")
            if info.offset_data + max(info.size, 0) > self._file.nbytes or tar.offset <= place:
                return  # what follows cannot be found; the problem is named above
            place = tar.offset
            if not what and info.isreg():
                yield info

    def _add(self, info: tarfile.TarInfo) -> Iterator[Sample]:
        name = info.name.removeprefix("./")
        found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, re.DOTALL)
        if found is None or re.match(r"__[^/]*__($|/)", name):
            return  # no extension, or about the whole tar: webdataset passes these by too
        key, extension = found[1], found[2].lower()
        if key != self._group.key:
            yield from self._end_group()
            self._group = _Group(key)
        if extension == "cls":
            self._group.labels.append(self._label(info))
        elif f".{extension}" in IMAGE_EXTENSIONS:
            self._group.images.append((name, info.offset_data, info.size))

    def _label(self, info: tarfile.TarInfo) -> int | None:
        text = self._file.at(info.offset_data, min(info.size, MAX_LABEL_NBYTES + 1))
        found = _LABEL.fullmatch(text)
        if found is None or info.size > MAX_LABEL_NBYTES:
            self.problems.append(f"{self._tar}: {info.name!r}: a label is an integer as text; found {text!r}")
            return None
        return int(found[1])

    def _end_group(self) -> Iterator[Sample]:
        group, self._group = self._group, _Group("")
        what = group.problem()
        if what:
            self.problems.append(f"{self._tar}: {group.key!r}: {what}")
        elif group.images and group.labels[0] is not None:
            (name, offset, nbytes), label = group.images[0], group.labels[0]
            self.n_seen += 1
            yield Sample(
                sample_id=f"{self._tar}/{name}",
                label=label,
                class_name=str(label),
                nbytes=nbytes,
                tar=self._tar,
                offset=offset,
            )


class _Group:
    """The members of one sample, as far as they have come."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.images: list[tuple[str, int, int]] = []
        self.labels: list[int | None] = []

    def problem(self) -> str | None:
        hint = "; the members of a sample follow one another"
        if len(self.images) > 1:
            return f"{len(self.images)} images of one sample: {', '.join(name for name, *_ in self.images)}"
        if len(self.labels) > 1:
            return f"{len(self.labels)} labels of one sample"
        if self.images and not self.labels:
            return f"an image without a label; expected a member {self.key}.cls with an integer as text{hint}"
        if self.labels and not self.images:
            return f"a label without an image; expected a member that ends in {' '.join(IMAGE_EXTENSIONS)}{hint}"
        return None


def member_differs(header: bytes, name: str, nbytes: int) -> str | None:
    """How a member's own header differs from what a listing once found there; None if it does not.

    Long names stand in headers of their own before it, and are not compared.
    """
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return "no member begins there"
    if not info.isreg() or info.size != nbytes:
        return f"{info.name!r} of {info.size:,} bytes is there"
    if name.isascii() and len(name) < 100 and info.name.removeprefix("./") != name:
        return f"{info.name!r} is there"
    return None


def _open(file: "_Window") -> tarfile.TarFile:
    for magic, (what, tool) in _COMPRESSED.items():
        if file.at(0, len(magic)) == magic:
            raise TarError(f"is compressed with {what}, so no image in it can be read alone; unpack it once: {tool}")
    file.begin()
    try:
        return tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
    except _NO_HEADER as error:
        raise TarError(f"is no tar ({error})") from error


_NO_HEADER = (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError)


def _next_header(tar: tarfile.TarFile, file: "_Window", place: int, last: str) -> tarfile.TarInfo | None:
    """The member whose headers begin at `place`; None at the end of the tar."""
    block = file.at(place, BLOCK_NBYTES)
    if len(block) < BLOCK_NBYTES:
        raise TarError(f"is cut off after {last}, at {file.nbytes:,} bytes; copy it again")
    if not block.strip(b"\0"):
        if file.at(place, tarfile.RECORDSIZE).strip(b"\0"):
            raise TarError(f"goes on behind its end mark, after {last}: several tars put together? Pack them anew")
        return None
    file.begin(place)
    try:
        return tarfile.TarInfo.fromtarfile(tar)
    except _NO_HEADER as error:
        raise TarError(f"after {last}: no header of a tar ({error}); copy it again, or pack it anew") from error


def _refusal(info: tarfile.TarInfo, nbytes: int) -> str | None:
    """Why a member is not taken; None if it is a plain file, or a folder, all of which lies in the tar."""
    if info.issym() or info.islnk():
        return f"is a link, to {info.linkname!r}; pack the files themselves (tar --dereference --hard-dereference)"
    if info.issparse():
        return "is sparse; pack it whole"
    if not (info.isreg() or info.isdir()):
        return f"is a device, pipe or of another kind (type {info.type!r}); only plain files are read"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "is no relative path; pack it by one"
    if "\0" in info.name or "\\" in info.name or not _is_utf8(info.name):
        return "has a name that is no plain UTF-8 text; rename it"
    if info.size < 0 or info.offset_data + info.size > nbytes:
        left = nbytes - info.offset_data
        return f"declares {info.size:,} bytes, of which the tar has {left:,}: cut off or forged; copy the tar again"
    return None


def _hidden_size(info: tarfile.TarInfo, file: "_Window") -> str | None:
    """Why the header right before an image's bytes does not say what it is, so that a read could not check it."""
    if not (info.isreg() and is_image_name(info.name)):
        return None
    what = member_differs(
        file.at(info.offset_data - BLOCK_NBYTES, BLOCK_NBYTES), info.name.removeprefix("./"), info.size
    )
    return what and f"its extended header says otherwise than its own, where {what}; pack it anew"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Window:
    """A tar as `tarfile` wants it, over ranged reads: a little after each jump, more while reading goes straight on.

    So it takes one request an image where those are larger than 16 KiB, and reads tars of small ones through.
    """

    def __init__(self, objects: GetRange, key: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self._objects, self._key = objects, key
        self._place = self._start = 0
        self._buffer = b""
        self._ahead = _JUMP_NBYTES
        self._left = 0

    def begin(self, place: int = 0) -> None:
        """Go to the headers of the next member; they have MAX_HEADER_NBYTES at most."""
        self._place, self._left = place, MAX_HEADER_NBYTES

    def seek(self, place: int) -> None:
        self._place = place

    def tell(self) -> int:
        return self._place

    def read(self, n: int) -> bytes:
        """For `tarfile`, which may ask for whatever a header declares.

        Raises:
            ValueError: Headers of one member are larger than any should be.
        """
        self._left -= n
        if n < 0 or self._left < 0:
            raise ValueError(f"headers of more than {MAX_HEADER_NBYTES:,} bytes for one member")
        data = self.at(self._place, n)
        self._place += len(data)
        return data

    def at(self, place: int, n: int) -> bytes:
        """Up to n bytes from a place on, fewer at the end of the tar."""
        n = min(n, self.nbytes - place)
        if n <= 0:
            return b""
        if not self._start <= place <= place + n <= self._start + len(self._buffer):
            self._fetch(place, n)
        return self._buffer[place - self._start : place - self._start + n]

    def _fetch(self, place: int, n: int) -> None:
        gap = place - (self._start + len(self._buffer))
        straight_on = place and -BLOCK_NBYTES <= gap <= _READ_THROUGH_NBYTES
        self._ahead = min(2 * self._ahead, _MOST_AHEAD_NBYTES) if straight_on else _JUMP_NBYTES
        nbytes = min(max(n, self._ahead), self.nbytes - place)
        self._buffer = bytes(read_range(self._objects, self._key, place, nbytes))
        self._start = place

"""Tars of images for tests: by webdataset's own writer, and by hand where it would not write such things."""

import io
import tarfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import webdataset


def write_tar(path: Path, samples: Iterable[Mapping[str, object]]) -> Path:
    """With webdataset's TarWriter; each sample has __key__ and members by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def read_by_webdataset(path: Path) -> list[dict[str, Any]]:
    """The samples of a tar as webdataset reads it."""
    with open(path, "rb") as file:
        members = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        return list(webdataset.tariterators.group_by_keys(members))


def image_tars(folder: Path, images: Mapping[str, bytes], *, n_tars: int = 3, stem: str = "train") -> list[Path]:
    """Images by name ("class0/003.jpg"; the number in the class is the label), in order, over some tars."""
    names = list(images)
    paths = []
    for i in range(n_tars):
        chosen = names[i * len(names) // n_tars : (i + 1) * len(names) // n_tars]
        samples = [
            {"__key__": key, extension: images[name], "cls": name.split("/")[0].removeprefix("class").encode()}
            for name in chosen
            for key, _, extension in [name.partition(".")]
        ]
        paths.append(write_tar(folder / f"{stem}-{i:06d}.tar", samples))
    return paths


def tar_of(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar's bytes: files by name, and members that are headers alone."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return sink.getvalue()


def header(name: str, kind: bytes = tarfile.REGTYPE, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    """A member's header."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def sample(key: str, data: bytes = b"image", label: bytes = b"3") -> list[tuple[str, bytes]]:
    """The members of one sample."""
    return [(f"{key}.cls", label), (f"{key}.jpg", data)]

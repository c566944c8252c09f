"""Files of weights, here or at an address, read without running anything that they hold."""

import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file

from infra.console import UserError
from infra.fsspec_objects import open_read_only, split_key
from infra.objects import ObjectError, ObjectMissingError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

_TORCH_PROTOCOL = 2


class WeightsError(UserError):
    """Weights are missing, unreadable, pickled code, or another model's; `problems` lists them if there are several."""

    def __init__(self, title: str, problems: Sequence[str] = ()) -> None:
        self.title = title
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{title}:", *self.problems]) if problems else title)

    def __reduce__(self) -> tuple:
        return type(self), (self.title, self.problems)


def read_weights(location: str | os.PathLike[str]) -> Any:
    """What a weights file holds, on the CPU: tensors by name, or whatever a training script put around them.

    A file at an address is fetched into memory, whole.

    Args:
        location: A local path, s3://bucket/key, or any URL that fsspec has a driver for; a .safetensors, .pth, .pt or
            .bin file, and all but the first as `torch.save` writes them.

    Raises:
        WeightsError: It is missing, cannot be fetched, is damaged, or holds pickled code, which is never run; or it
            would unpack to far more than it holds.
    """
    where = os.fspath(location)
    remote = "://" in where
    path = PurePosixPath(urlsplit(where).path if remote else where)
    if not remote and not os.path.isfile(where):
        raise WeightsError(f"there is no weights file {where}; expected a file here or at an address such as s3://")
    if path.suffix.lower() not in SUFFIXES:
        raise WeightsError(
            f"{where} ends in {path.suffix or 'nothing'}; weights are read from {', '.join(SUFFIXES)} files"
        )
    source: str | bytes = _fetch(where) if remote else where
    try:
        if path.suffix.lower() == ".safetensors":
            return load_safetensors(source) if isinstance(source, bytes) else load_file(source)
        _check_archive(io.BytesIO(source) if isinstance(source, bytes) else source, where)
        _check_pickle(source, where)
        loaded = torch.load(
            io.BytesIO(source) if isinstance(source, bytes) else source, map_location="cpu", weights_only=True
        )
        problems = list(_tensor_problems(loaded, ""))
    except WeightsError:
        raise
    except Exception as error:  # the unpickler fails on junk in many ways: KeyError, EOFError, struct.error, ...
        raise WeightsError(_why_not_loaded(where, path, error)) from error
    if problems:
        raise WeightsError(where, problems)
    return loaded


def _check_archive(file: io.BytesIO | str, where: str) -> None:
    """See that an archive unpacks to no more than it holds: torch.save compresses nothing and stores all of it once.

    Raises:
        WeightsError: It says otherwise.
    """
    if not zipfile.is_zipfile(file):
        return  # written by an old version of torch, or damaged; torch will say
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        held = archive.start_dir  # bytes before the directory
    unpacked = sum(record.file_size for record in records)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or unpacked > held:
        raise WeightsError(
            f"{where} is an archive of {held:,} bytes that would unpack to {unpacked:,}, as torch.save writes none. "
            "Write it anew with torch.save where it was made"
        )


def _check_pickle(source: str | bytes, where: str) -> None:
    """See that a pickle is of the protocol that torch.save writes: of others torch says that running them may help.

    Raises:
        WeightsError: It is of a later one.
    """
    if isinstance(source, bytes):
        head = source[:2]
    else:
        with open(source, "rb") as file:
            head = file.read(2)
    if len(head) == 2 and head[0] == 0x80 and head[1] > _TORCH_PROTOCOL:  # pickle's PROTO, and its number
        raise WeightsError(
            f"{where} holds a pickle of protocol {head[1]}, which torch.save does not write: pickled code, which is "
            "never run here. Save a state dict with torch.save where it was made"
        )


def _tensor_problems(value: Any, name: str) -> Iterator[str]:
    """Tensors that are not plain numbers in memory: without values, sparse, or few numbers that claim to be many."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensor_problems(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, torch.Tensor):
        if (
            value.layout != torch.strided
            or value.is_meta
            or value.is_nested
            or value.is_quantized
            or value.is_complex()
        ):
            yield f"{name!r} is no plain tensor, but {value.dtype}, {value.layout}, on {value.device}"
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            yield f"{name!r} is of shape {list(value.shape)} over only {value.untyped_storage().nbytes():,} bytes"


def _fetch(location: str) -> bytes:
    folder, key = split_key(location)
    try:
        return open_read_only(folder).get(key)
    except ObjectMissingError as error:
        raise WeightsError(f"there is no weights file {location}") from error
    except (ObjectError, ValueError) as error:  # ValueError: a name that no object can have
        raise WeightsError(f"the weights {location} cannot be fetched: {error}") from error


def _why_not_loaded(where: str, path: PurePosixPath, error: Exception) -> str:
    name = re.search(r"GLOBAL (\S+)", str(error))
    if name is None:
        return _damaged(where, path, error)
    # The published trainer pickles whole modules, which only its own source folder can read.
    return (
        f"{where} holds a pickled {name[1]}: pickled code, which is never run here. "
        "If you trust it, save its state dict where it was made, from the folder of the code that made it:\n"
        f"    python -c \"import torch; m = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        f"torch.save(m.state_dict(), '{path.stem}.state.pt')\"\n"
        f"  and give {path.stem}.state.pt"
    )


def _damaged(where: str, path: PurePosixPath, error: Exception) -> str:
    # One sentence: torch goes on with the advice to run whatever the file holds.
    said = re.search(r"Unsupported operand.*", str(error)) or re.search(r"[^.\n]*", str(error))
    why = f"{type(error).__name__}: {said[0]}" if said and said[0] else type(error).__name__
    return f"{where} is no whole {path.suffix.lower()} file of weights, or a damaged one ({why}): copy it again"

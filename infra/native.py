"""The one piece of C: built with the machine's compiler when first needed, and done without where there is none."""

import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("read_rows.c")
_FLAGS = ("-O3", "-shared", "-fPIC")
_BUILD_S = 60
_building = threading.Lock()


def read_rows_function() -> "ctypes._NamedFuncPointer | None":
    """The compiled `raptor_read_rows`, or None on a machine without a compiler or of another kind of processor.

    The first call on a machine takes about a second. Python threads run beside it while it works.
    """
    library = _library()
    return library.raptor_read_rows if library else None


def scatter_rows_function() -> "ctypes._NamedFuncPointer | None":
    """The compiled `raptor_scatter_rows`, or None where there is none, as above."""
    library = _library()
    return library.raptor_scatter_rows if library else None


def _library() -> ctypes.CDLL | None:
    with _building:
        return _load()


@cache
def _load() -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None or platform.machine() not in ("x86_64", "aarch64") or sys.platform != "linux":
        return None
    try:
        with _cache_folder() as folder:
            library = ctypes.CDLL(str(_build(compiler, folder)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"infra/read_rows.c could not be built with {compiler}; reading goes on in Python, more slowly: {detail}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    library.raptor_init()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    read, scatter = library.raptor_read_rows, library.raptor_scatter_rows
    read.argtypes = [ctypes.c_char_p, number, pointer, number, pointer, number, number, pointer, number]
    read.argtypes += [ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(number)]
    read.restype = ctypes.c_int
    scatter.argtypes = [pointer, pointer, number, pointer, number, number]
    scatter.restype = ctypes.c_uint32
    return library


def _compiler() -> str | None:
    named = os.environ.get("CC")
    candidates = [named] if named else ["cc", "gcc", "clang"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _build(compiler: str, folder: Path) -> Path:
    """The shared library of this source, from the folder if it was built before. Many processes may build at once."""
    recipe = "\0".join([_SOURCE.read_text(), platform.machine(), *_FLAGS])
    library = folder / f"read_rows-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{secrets.token_hex(4)}.tmp")
        command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_S)
            os.replace(made, library)
        finally:
            made.unlink(missing_ok=True)
    return library


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """Beside the packages of the virtual environment, or else one that is gone after loading."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        yield Path(sys.prefix) / "native"
        return
    with tempfile.TemporaryDirectory(prefix="read_rows-") as folder:
        yield Path(folder)

"""This checkout's packages as one zip file, for a cluster whose image lacks them or has older ones."""

import tomllib
import zipfile
from pathlib import Path

from infra.console import UserError, human_bytes

MAX_NBYTES = 100 * 2**20  # what Ray's dashboard takes
_N_NAMED = 8
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same files make the same zip, which Ray then does not upload again


def code_files(checkout: Path) -> list[Path]:
    """Every file of the packages that pyproject.toml names: no data, no stores, no environment, no tests.

    Raises:
        UserError: This is no checkout of the project.
    """
    project = checkout / "pyproject.toml"
    if not project.exists():
        raise UserError(f"there is no {project}: WORKING_DIR=1 uploads the checkout that it is typed in")
    packages = tomllib.loads(project.read_text())["tool"]["setuptools"]["packages"]
    folders = sorted({name.partition(".")[0] for name in packages})
    found = [path for folder in folders for path in (checkout / folder).rglob("*")]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def pack_code(checkout: Path, to: Path) -> int:
    """Write the zip file; returns its bytes.

    Args:
        checkout: Folder of the project.
        to: The zip file.

    Raises:
        UserError: It would be larger than Ray takes; names the largest files.
    """
    files = code_files(checkout)
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            info = zipfile.ZipInfo(str(path.relative_to(checkout)), _LONG_AGO)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(info, path.read_bytes())
    nbytes = to.stat().st_size
    if nbytes > MAX_NBYTES:
        largest = sorted(files, key=lambda path: -path.stat().st_size)[:_N_NAMED]
        raise UserError(
            "\n  ".join(
                [
                    f"the packages of this checkout are {human_bytes(nbytes)} as a zip file; Ray takes at most "
                    f"{human_bytes(MAX_NBYTES)}. The largest files:",
                    *(f"{human_bytes(path.stat().st_size):>8}  {path.relative_to(checkout)}" for path in largest),
                    "Move out what is no code, or build an image that holds it",
                ]
            )
        )
    return nbytes

"""Room on local disks, looked at before anything is written."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from infra.console import human_bytes


def disk_shortage(needs: Iterable[tuple[str, int]]) -> str | None:
    """What does not fit, as text; None if all of it does.

    Places on one file system are added up; places with a scheme, such as s3://, have no disk that could be full.

    Args:
        needs: Location of each store and the bytes still to be written there.
    """
    needed: dict[int, tuple[Path, int]] = {}
    for location, nbytes in needs:
        if "://" in location:
            continue
        place = Path(location).absolute()
        while not place.exists():
            place = place.parent
        device = place.stat().st_dev
        needed[device] = (place, needed.get(device, (place, 0))[1] + nbytes)
    for place, nbytes in needed.values():
        free = shutil.disk_usage(place).free
        if nbytes > free:
            return f"{place} has {human_bytes(free)} free and up to {human_bytes(nbytes)} are needed"
    return None

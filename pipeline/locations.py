"""Where things are: folders of this machine, and s3://bucket/prefix."""

import os


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is an address, and no path of this machine."""
    return "://" in os.fspath(location)


def full_location(location: str) -> str:
    """The same place for every process: addresses as they are, paths from the root on."""
    return location if is_remote(location) else os.path.abspath(location)


def plain_location(location: str) -> str:
    """One spelling of a place: ~ is the home, and nothing ends in a slash."""
    return location.rstrip("/") if is_remote(location) else os.path.normpath(os.path.expanduser(location))


def is_bare_bucket(location: str) -> bool:
    """Whether an address names a whole bucket."""
    return is_remote(location) and "/" not in location.partition("://")[2].rstrip("/")


def lies_in(location: str, folder: str) -> bool:
    """Whether one place is another, or below it."""
    if is_remote(location) != is_remote(folder):
        return False
    if not is_remote(location):
        location, folder = os.path.realpath(location), os.path.realpath(folder)
    location, folder = location.rstrip("/"), folder.rstrip("/")
    return location == folder or location.startswith(f"{folder}/")

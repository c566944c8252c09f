"""Where analyses read and write: the store that is asked, the place for what is saved, and what to type again."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePath

from infra.console import UserError, say
from infra.objects import (
    Get,
    ObjectAccessError,
    ObjectError,
    ObjectMissingError,
    Objects,
    ObjectTooLargeError,
    open_objects,
)
from infra.s3_settings import split_location
from storage_schemas import Store, open_store
from storage_schemas.documents import MAX_DOCUMENT_NBYTES
from storage_schemas.errors import StoreError
from storage_schemas.find import find_stores
from storage_schemas.keys import STORE_KEY

DEFAULT_STORE = "data/stores/digits"


def store_name(store: str) -> str:
    """Last part of a store's place; one called train or val is named with its folder."""
    path = PurePath(os.path.normpath(store))
    return f"{path.parent.name}-{path.name}" if path.name in ("train", "val") and path.parent.name else path.name


def make_command(target: str, variables: Mapping[str, object]) -> str:
    """What to type for it: `make target NAME=value`, without those that are None."""
    typed = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items() if value is not None]
    return " ".join(["make", target, *typed])


def flags_text(flags: Mapping[str, tuple[object, object]]) -> str | None:
    """For ARGS=: flags, by name, whose value is not the default that comes after it; None if there is none."""
    given = [f"--{name} {value}" for name, (value, default) in flags.items() if value != default]
    return " ".join(given) or None


def open_train(location: str, problems: list[str]) -> Store | None:
    """A store, or the store train of a folder; None, with the reason added to problems, if there is none."""
    try:
        found = find_stores(location)
        place = found.get("", found.get("train"))
        if place is None:
            problems.append(f"STORE={location} has a store val but none called train: make extract")
            return None
        return open_store(place)
    except (StoreError, ObjectError, UserError) as error:
        problems.append(f"STORE={location}: {error}")
        return None


def committed_text(store: Store, what: str) -> str | None:
    """How much of a store that is not finished is there, said aloud and for a page; None for a finished one.

    Args:
        store: That is read.
        what: Comes out of it, such as "phases".
    """
    if store.is_complete:
        return None
    say(f"{store.location} is not finished: {what} of the {store.n_valid:,} images that are there")
    return f"{store.n_committed:,} of {store.n_samples:,} samples are committed: the store is not finished"


def open_out(place: str, store: str, problems: list[str]) -> Objects | None:
    """A place to save to, outside all stores; None, with the reason added to problems, if it will not do."""
    try:
        if _lies_in_a_store(place, store):
            problems.append(f"OUT={place} lies in a store, which is never written to: give another folder")
            return None
        objects = open_objects(place)
        objects.check_writable()
        return objects
    except (ObjectError, UserError) as error:
        problems.append(f"OUT={place}: {error}")
        return None


def _lies_in_a_store(place: str, store: str) -> bool:
    if "://" in place:
        return f"{place.rstrip('/')}/".startswith(f"{store.rstrip('/')}/") or _lies_in_a_store_on_s3(place)
    folder = Path(place).resolve()
    around = [folder, *folder.parents]
    return Path(store).resolve() in around or any((parent / STORE_KEY).exists() for parent in around)


def _lies_in_a_store_on_s3(place: str) -> bool:
    bucket, prefix = split_location(place)
    objects = open_objects(f"s3://{bucket}")
    parts = prefix.split("/") if prefix else []
    return any(_is_there(objects, "/".join([*parts[:n], STORE_KEY])) for n in range(len(parts), -1, -1))


def _is_there(objects: Get, key: str) -> bool:
    try:
        objects.get(key, at_most=MAX_DOCUMENT_NBYTES)
    except ObjectTooLargeError:
        return True
    except (ObjectMissingError, ObjectAccessError):  # many accounts may only use some prefixes of a bucket
        return False
    return True

"""BLOCKS as a person gives them: spelled out, as the JSON that `make phases` saved, or not at all."""

import json
import os
import shlex
from pathlib import Path

from infra.console import UserError
from infra.objects import ObjectError, open_objects
from storage_schemas import Span
from storage_schemas.documents import MAX_DOCUMENT_NBYTES
from storage_schemas.errors import SchemaError
from trainer.commands.start import store_name

PHASES = "data/phases"


def find_blocks(typed: str, store: str, *, phases: str = PHASES) -> str:
    """The spans, as "0-7,7-10,10-12".

    Args:
        typed: Spans, a JSON that make phases saved (local or s3://bucket/key), or nothing: the one below data/phases
            for this store.
        store: As typed.
        phases: Folder of the saved phases, by store.

    Raises:
        UserError: There are no such spans; names the command that finds some.
    """
    if typed and not typed.endswith(".json"):
        return typed.replace(" ", "")
    place = typed or _saved(Path(phases, store_name(store)), store)
    folder, _, name = place.rpartition("/")
    try:
        document = json.loads(open_objects(folder or ".").get(name, at_most=MAX_DOCUMENT_NBYTES))
        blocks = document["blocks"]
    except (ObjectError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"BLOCKS={place} is no file of make phases ({error}). {_how_to(store)}") from error
    if not isinstance(blocks, list) or not all(isinstance(span, str) for span in blocks) or not blocks:
        raise UserError(f"BLOCKS={place} holds no contiguous spans. {_how_to(store)}")
    return ",".join(blocks)


def parse_spans(blocks: str, variable: str = "BLOCKS") -> list[Span]:
    """Spans before the store is known that they have to fit.

    Raises:
        UserError: They are none.
    """
    try:
        return [Span.parse(text.strip()) for text in blocks.split(",")]
    except SchemaError as error:
        raise UserError(f"{variable}={blocks}: expected a-b with 0 <= a < b, such as 0-7") from error


def _saved(folder: Path, store: str) -> str:
    """The phases saved for a store, if there are some and it is clear which."""
    found = sorted(folder.glob("*.json"))
    if not found:
        raise UserError(f"BLOCKS is missing, and there are no saved phases in {folder}. {_how_to(store)}")
    if len(found) > 1:
        choices = "".join(f"\n  BLOCKS={path}" for path in found)
        raise UserError(f"BLOCKS is missing, and {folder} has several phases; choose one:{choices}")
    return os.fspath(found[0])


def _how_to(store: str) -> str:
    return f"Give them, such as BLOCKS=0-7,7-10,10-12, or find them: make phases K=3 STORE={shlex.quote(store)}"

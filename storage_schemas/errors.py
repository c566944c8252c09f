"""What can be wrong with a store, as exceptions that name the place, both values and the next step."""

from collections.abc import Sequence
from dataclasses import dataclass

from infra.console import ExitCode, UserError


class StoreError(UserError):
    """Base of everything this package raises about a store; a door prints its message without a traceback."""


class SchemaError(StoreError):
    """A document or a request does not fit the format; `problems` holds every one found, not the first."""

    def __init__(self, title: str, problems: Sequence[str]) -> None:
        self.title = title
        self.problems = tuple(problems)
        super().__init__("\n  ".join([f"{title}:", *self.problems]))

    def __reduce__(self) -> tuple:
        return type(self), (self.title, self.problems)


class ChecksumError(StoreError):
    """Bytes differ from what the commit says; `key` names the object."""

    exit_code = ExitCode.PROBLEMS

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple:
        return type(self), (self.key, str(self))


class NotCommittedError(StoreError):
    """Rows were asked for that are not in the store: their shard has no commit, or their image was bad."""


class NotAStoreError(StoreError):
    """There is no store.json where a store was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One finding of `verify`.

    Attributes:
        key: The object, relative to the store.
        what: What is wrong, in a few words.
        expected: The value that the commit or identity gives.
        found: The value that is there.
        shard: The shard to extract again, or None if the object belongs to no shard.
    """

    key: str
    what: str
    expected: str
    found: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.key}: {self.what}; expected {self.expected}, found {self.found}"

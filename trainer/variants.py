"""Which models are the same but for their seed, and what to call them in a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage_schemas.documents import canonical_json

TEACHER, RAPTOR, BLOCK = "teacher", "raptor", "block"

#: Settings of a training that change nothing that is learned.
_ONLY_WATCHING = ("seed", "log_every", "validate_every", "validation_samples", "checkpoint_every")
#: What tells two variants apart is looked for here first.
_TELLING = ("recipe", "n_steps", "loss", "depth_scaling", "teacher_forcing_minimum", "peak_learning_rate")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What was measured.

    Attributes:
        what: "teacher", "raptor" from state 0 to the last one, or "block", which is less.
        teacher: Its name.
        spans: Of the blocks; () for a teacher.
        seed: Of the training; None for a teacher.
        settings: Of the training, as JSON values; {} where they are not known.
        label: A name that was given; "" for none.
        imported: Whether the weights come from elsewhere.
        teacher_weights: `Teacher.core_digest` of the teacher; "" where it is not known. No part of the key: a table
            refuses teachers of one name with different weights.
    """

    what: str
    teacher: str
    spans: tuple[str, ...] = ()
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    imported: bool = False
    teacher_weights: str = ""

    @classmethod
    def of_teacher(cls, name: str, weights: str = "") -> "Model":
        """The teacher itself."""
        return cls(what=TEACHER, teacher=name, teacher_weights=weights)

    @property
    def n_blocks(self) -> int:
        return len(self.spans)

    @property
    def key(self) -> str:
        """The same for models that differ in nothing but the seed."""
        document = {
            "what": self.what,
            "teacher": self.teacher,
            "spans": self.spans,
            "settings": self.learning,
            "label": self.label,
            "imported": self.imported,
        }
        return canonical_json(document).decode()

    @property
    def learning(self) -> dict[str, Any]:
        """The settings that decide what is learned, but for the seed."""
        return {name: value for name, value in self.settings.items() if name not in (*_ONLY_WATCHING, "spans")}

    def is_teacher_of(self, other: "Model") -> bool:
        """Whether this is the teacher that the other model was fitted to, or the same teacher: by name and weights."""
        same = (self.teacher, self.teacher_weights) == (other.teacher, other.teacher_weights)
        return self.what == TEACHER and same and not self.label


def variant_order(model: Model) -> tuple[Any, ...]:
    """Teachers, then Raptors by their number of blocks, then blocks from the first layer on."""
    first = (TEACHER, RAPTOR, BLOCK).index(model.what)
    layers = [tuple(map(int, span.split("-"))) for span in model.spans]
    return first, model.teacher, model.n_blocks, model.imported, layers, model.key


def name_variants(models: Iterable[Model]) -> dict[str, str]:
    """Names by key: the shortest that differ, such as "teacher", "k=3", "k=3 0-7,7-10,10-12", "k=1 n_steps=600"."""
    by_key = {model.key: model for model in models}
    names: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    n_teachers = len({model.teacher for model in by_key.values()})
    for key, model in by_key.items():
        groups.setdefault(_base(model, n_teachers), []).append(key)
    for base, keys in groups.items():
        details = _details([by_key[key] for key in keys])
        names |= {key: " ".join([base, *detail]) for key, detail in zip(keys, details)}
    return names


def _base(model: Model, n_teachers: int) -> str:
    if model.label:
        return model.label
    of = f" {model.teacher}" if n_teachers > 1 else ""
    if model.what == TEACHER:
        return f"teacher{of}"
    if model.what == BLOCK:
        name = f"{'block' if model.n_blocks == 1 else 'blocks'} {','.join(model.spans)}"
    else:
        name = f"k={model.n_blocks}"
    return f"{'imported ' * model.imported}{name}{of and f' of{of}'}"


def _details(models: Sequence[Model]) -> list[list[str]]:
    """Words that tell these models apart: as few settings as it takes, the most telling first."""
    words: list[list[str]] = [[] for _ in models]
    if len({model.spans for model in models}) > 1:
        words = [[",".join(model.spans)] for model in models]
    settings = [model.learning for model in models]
    others = sorted({name for one in settings for name in one} - set(_TELLING))
    for name in (*_TELLING, *others):
        if len({tuple(word) for word in words}) == len(models):
            break
        values = [_text(one.get(name, "unknown")) for one in settings]
        if len(set(values)) > 1:
            words = [[*word, f"{name}={value}"] for word, value in zip(words, values)]
    return words


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return "/".join(f"{number:g}" for number in value.values())
    return str(value)

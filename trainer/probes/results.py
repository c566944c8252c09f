"""What a finished probe has to show: `result.json` in its place, and how to find all of them.

    {"format_version": 1, "result": {the fields of ProbeResult}, "digest": ...}

A sealed document (`storage_schemas.documents`). Two results are of the same probe if their `key` is equal: that a table
counts such a one only once, or refuses it, is the table's matter.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from infra.console import UserError
from infra.objects import Objects, ObjectTooLargeError, open_objects
from storage_schemas.documents import MAX_DOCUMENT_NBYTES, seal, unseal
from storage_schemas.errors import SchemaError

RESULT_KEY = "result.json"
DEFAULT_PROBES = "data/probes"

_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One probe. All values are plain JSON.

    Attributes:
        task: "imagenet", "ade20k", "nyuv2" or "digits".
        metric: What `last` and `best` are: "top-1" and "mIoU" as shares from 0 to 1, "RMSE (m)" in metres.
        higher_is_better: Of the metric.
        what: "teacher" or "raptor".
        label: Name of the row in a table: LABEL if it was given, else the teacher's name, or "Raptor k=3". Results with
            the same label are averaged over `model_seed`.
        spans: Of the Raptor, such as ["0-7", "7-10", "10-12"]; [] for a teacher.
        run: Location of the RUN; None for a teacher.
        run_weights: sha256 of the RUN's weights file; None for a teacher.
        teacher: Name of the teacher: of the embedding and the final norm.
        teacher_weights: `Teacher.core_digest` of that teacher: the same at every image size and with every head.
        seed: Of the probe: readout, order, augmentation.
        model_seed: Of the Raptor's training; None for a teacher.
        raptor_settings: What decided what the Raptor learned but seed and spans: its `TrainConfig` without those and
            without what only watches (`Model.learning`); of imported weights what is known. {} for a teacher.
        compute: Arithmetic of the teacher's part: "float32", "tf32", "bfloat16" or "float16".
        initial: The metric before the first epoch; it counts as epoch 0.
        last: The metric after the last epoch.
        best: The best over all epochs. It is chosen on the very samples that it is reported on, so it flatters.
        best_epoch: 0 is the untrained readout.
        best_chosen_on_reported_samples: True, always; so that no reader takes `best` for a held-out figure.
        history: All values of the metric and its companions, by epoch from 0.
        teacher_head: The metric of the teacher's own head on the same samples; None where it was not measured.
        n_train: Training samples.
        n_evaluation: Samples reported on.
        compat: Whether defects of the published code were restored.
        settings: `ProbeSettings`.
        data: Identity of the data: digests and counts, of training and evaluation.
        task_identity: Further values of the task, such as what the readout began with.
    """

    task: str
    metric: str
    higher_is_better: bool
    what: str
    label: str
    spans: list[str]
    run: str | None
    run_weights: str | None
    teacher: str
    teacher_weights: str
    seed: int
    model_seed: int | None
    raptor_settings: dict[str, Any]
    compute: str
    initial: float
    last: float
    best: float
    best_epoch: int
    best_chosen_on_reported_samples: bool
    history: list[dict[str, float]]
    teacher_head: float | None
    n_train: int
    n_evaluation: int
    compat: bool
    settings: dict[str, Any]
    data: dict[str, Any]
    task_identity: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two results of one table may share: task, row, and seeds of model and probe."""
        return self.task, self.label, self.model_seed, self.seed


def write_result(objects: Objects, result: ProbeResult) -> None:
    """Write it; from then on the probe is finished."""
    objects.put(RESULT_KEY, seal({"format_version": _FORMAT_VERSION, "result": asdict(result)}))


def read_result(objects: Objects, key: str = RESULT_KEY) -> ProbeResult:
    """The result of the probe in a place.

    Raises:
        ObjectMissingError: There is none: the probe is not finished.
        UserError: The document was changed, or is of another format.
    """
    try:
        document = unseal(key, objects.get(key, at_most=MAX_DOCUMENT_NBYTES))
    except (SchemaError, ObjectTooLargeError) as error:
        raise UserError(f"{objects.location}: {error}. Delete it and run the same make probe again") from error
    values = document.get("result")
    problems = _problems(document.get("format_version"), values)
    if problems or not isinstance(values, dict):
        raise UserError(
            "\n  ".join([f"{objects.location}/{key} is no result of a probe:", *problems, "Probe again elsewhere"])
        )
    return ProbeResult(**values)


def read_results(location: str = DEFAULT_PROBES) -> dict[str, ProbeResult]:
    """All finished probes below a folder or prefix, by location, sorted.

    Raises:
        UserError: One of them cannot be read; lists all of these.
    """
    objects = open_objects(location)
    found: dict[str, ProbeResult] = {}
    problems = []
    for info in sorted(objects.list(), key=lambda info: info.key):
        if info.key == RESULT_KEY or info.key.endswith(f"/{RESULT_KEY}"):
            place = f"{objects.location}/{info.key}".removesuffix(f"/{RESULT_KEY}")
            try:
                found[place] = read_result(objects, info.key)
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError("\n  ".join([f"{location} holds results that cannot be read:", *problems]))
    return found


def _problems(version: object, values: object) -> list[str]:
    if version != _FORMAT_VERSION:
        return [f"it has format {version!r}, this code reads {_FORMAT_VERSION}"]
    if not isinstance(values, Mapping):
        return ["it has no 'result'"]
    names = {field.name for field in fields(ProbeResult)}
    problems = [f"{name} is missing" for name in sorted(names - values.keys())]
    problems += [f"{name} is unknown" for name in sorted(values.keys() - names)]
    types: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("task", "metric", "what", "label", "teacher", "teacher_weights", "compute"), str),
        **dict.fromkeys(("initial", "last", "best"), (int, float)),
        **dict.fromkeys(("history", "spans"), list),
        "seed": int,
        "raptor_settings": dict,
        "model_seed": (int, type(None)),
        "teacher_head": (int, float, type(None)),
    }
    problems += [
        f"{name} is {values[name]!r:.60}"
        for name, kind in types.items()
        if name in values and not isinstance(values[name], kind)
    ]
    return problems

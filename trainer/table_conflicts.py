"""What keeps results from making one table: the same thing twice, and what was measured on different data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from trainer.table_sources import FoundProbe, FoundRun
from trainer.variants import name_variants

#: Of a probe's task: the file that its readout begins with and the size of images, which fit one teacher.
_OF_A_TEACHER = ("head", "pixel_size")

_T = TypeVar("_T")
_Found = TypeVar("_Found", bound=FoundRun | FoundProbe)


def conflicts(runs: Sequence[FoundRun], probes: Sequence[FoundProbe]) -> list[str]:
    """All that is there twice, with both places, and all that does not belong together, each with what to do."""
    return [
        *_duplicates(runs, probes),
        *_mixed_teachers(runs, probes),
        *_mixed_data(runs),
        *_mixed_probes(probes),
    ]


def _duplicates(runs: Sequence[FoundRun], probes: Sequence[FoundProbe]) -> list[str]:
    names = name_variants([*(run.model for run in runs), *(probe.model for probe in probes)])
    of_runs = _twice(runs, lambda run: (run.model.key, run.model.seed))
    of_probes = _twice(probes, lambda one: (one.model.key, one.task, one.result.model_seed, one.result.seed))
    return [
        *(
            f"{names[one.model.key]}, seed {one.model.seed}, is there twice: {one.location} and {other.location}. "
            "Delete one, or give RUNS= without it"
            for one, other in of_runs
        ),
        *(
            f"{names[one.model.key]}{_model_seed(one)}, probe of {one.task} with seed {one.result.seed}, is "
            f"there twice: {one.location} and {other.location}. Delete one, or give PROBES= without it"
            for one, other in of_probes
        ),
    ]


def _model_seed(probe: FoundProbe) -> str:
    return "" if probe.result.model_seed is None else f", model seed {probe.result.model_seed}"


def _twice(items: Sequence[_T], key: Callable[[_T], object]) -> list[tuple[_T, _T]]:
    first: dict[object, _T] = {}
    return [(first[key(item)], item) for item in items if first.setdefault(key(item), item) is not item]


def _mixed_data(runs: Sequence[FoundRun]) -> list[str]:
    """Runs on other stores, listed by store."""
    stores: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        if run.validation is not None:  # imported weights may have been measured on nothing yet
            stores.setdefault(run.data_key, []).append(run.location)
    if len(stores) < 2:
        return []
    return [
        "runs were trained or validated on different data, which are not averaged. Give RUNS= of one of these:",
        *(f"  {_about_data(key)}: {_some(places)}" for key, places in stores.items()),
    ]


def _about_data(key: Sequence[str]) -> str:
    train, validation, *_ = key
    return f"store {train[:12]} validated on {validation if ' ' in validation else validation[:12]}"


def _mixed_probes(probes: Sequence[FoundProbe]) -> list[str]:
    problems: list[str] = []
    for task in sorted({probe.task for probe in probes}):
        of_task = [probe for probe in probes if probe.task == task]
        for what, value_of in (
            ("data", lambda one: one.result.data),
            ("settings", lambda one: {**one.result.settings, "compat": one.result.compat}),
            ("metrics", lambda one: {"metric": one.result.metric}),
            ("arithmetic", lambda one: {"compute": one.result.compute}),
            ("tasks", _identity_of_all),
        ):
            problems += _mixed(f"probes of {task}", what, of_task, value_of)
        for teacher in sorted({probe.result.teacher for probe in of_task}):
            of_teacher = [probe for probe in of_task if probe.result.teacher == teacher]
            problems += _mixed(f"probes of {task} with {teacher}", "tasks", of_teacher, _identity_of_a_teacher)
    return problems


def _mixed_teachers(runs: Sequence[FoundRun], probes: Sequence[FoundProbe]) -> list[str]:
    """Teachers of one name with different weights, over all runs and tasks."""
    problems = []
    every: list[FoundRun | FoundProbe] = [*runs, *probes]
    found = [one for one in every if one.model.teacher_weights]  # a store may hold no teacher
    for teacher in sorted({one.model.teacher for one in found}):
        own = [one for one in found if one.model.teacher == teacher]
        problems += _mixed(
            f"results of {teacher}",
            "weights",
            own,
            lambda one: {"teacher": one.model.teacher_weights},
            "RUNS= and PROBES=",
        )
    return problems


def _identity_of_all(probe: FoundProbe) -> dict[str, Any]:
    """What all probes of a task share, whatever their teacher."""
    known = probe.result.task_identity
    shared: dict[str, Any] = {name: value for name, value in known.items() if name not in _OF_A_TEACHER}
    return shared | ({"begins with a head": known["head"] != "random"} if "head" in known else {})


def _identity_of_a_teacher(probe: FoundProbe) -> dict[str, Any]:
    return {name: probe.result.task_identity.get(name) for name in _OF_A_TEACHER}


def _mixed(
    results_of: str,
    what: str,
    found: Sequence[_Found],
    value_of: Callable[[_Found], Mapping[str, Any]],
    give: str = "PROBES=",
) -> list[str]:
    groups: list[tuple[Mapping[str, Any], list[str]]] = []
    for one in found:
        value = value_of(one)
        known = next((places for other, places in groups if other == value), None)
        if known is None:
            groups.append((value, [one.location]))
        else:
            known.append(one.location)
    if len(groups) < 2:
        return []
    differing = {
        name for value, _ in groups for name in value if any(other.get(name) != value[name] for other, _ in groups)
    }
    return [
        f"{results_of} have different {what}, which are not compared. Give {give} of one of these:",
        *(
            f"  {', '.join(f'{name} {_short(value.get(name))}' for name in sorted(differing))}: {_some(places)}"
            for value, places in groups
        ),
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _some(places: Sequence[str]) -> str:
    shown = ", ".join(places[:3])
    return shown if len(places) <= 3 else f"{shown} and {len(places) - 3} more"

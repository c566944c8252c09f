"""Where a table's numbers come from: finished runs and probes below some places, local or S3."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infra.console import UserError
from infra.objects import ObjectError, ObjectMissingError, Objects, ObjectTooLargeError, open_objects
from storage_schemas.documents import MAX_DOCUMENT_NBYTES, unseal
from storage_schemas.errors import SchemaError
from trainer.probes.results import ProbeResult, read_result
from trainer.raptor_teacher import read_ends
from trainer.run_files import CONFIG_KEY, RESULT_KEY, RunFiles
from trainer.variants import BLOCK, RAPTOR, TEACHER, Model

_SHOWN = 12  # letters of a digest


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A finished run.

    Attributes:
        location: Of the RUN.
        model: What was trained.
        data: Digests of what it was trained and validated on, by name.
        validation: Of the finished model, as `trainer.validation.Validation`; None if imported and not validated.
        baselines: As `trainer.validation.Baselines`; None without a head.
        weights: sha256 of the file with the weights.
        metrics: Lines of its metrics.jsonl, by step.
    """

    location: str
    model: Model
    data: Mapping[str, Any]
    validation: Mapping[str, Any] | None
    baselines: Mapping[str, Any] | None
    weights: str
    metrics: Sequence[Mapping[str, Any]]

    @property
    def data_key(self) -> tuple[str, ...]:
        """The same for runs that may be compared: on the same samples, states and teacher."""
        names = ("train", "validation", "shards", "validation_shards", "teacher")
        return tuple(str(self.data.get(name, "unknown")) for name in names)


@dataclass(frozen=True, kw_only=True)
class FoundProbe:
    """A finished probe.

    Attributes:
        location: Of its folder.
        model: What was probed.
        result: What it found.
    """

    location: str
    model: Model
    result: ProbeResult

    @property
    def task(self) -> str:
        return self.result.task


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that lies below the places that were given.

    Attributes:
        runs: Finished runs, sorted by place.
        probes: Finished probes, sorted by place.
        unfinished: Places of runs that have no result yet.
    """

    runs: Sequence[FoundRun]
    probes: Sequence[FoundProbe]
    unfinished: Sequence[str]


def find_results(places: Sequence[str]) -> Found:
    """All finished runs and probes in or below some places; what is there by two ways counts once.

    Args:
        places: Folders or s3://bucket/prefix, of one run or probe, or of many at any depth.

    Raises:
        UserError: Nothing is there, or some of it cannot be read; lists all of that.
    """
    results: dict[str, Objects] = {}
    configs: set[str] = set()
    problems: list[str] = []
    for place in places:
        try:
            for folder, name in _documents(place):
                if name == RESULT_KEY:
                    results[folder] = open_objects(folder)
                else:
                    configs.add(folder)
        except (ObjectError, UserError) as error:
            problems.append(f"{place}: {error}")
    runs: list[FoundRun] = []
    probes: list[tuple[str, ProbeResult]] = []
    for folder in sorted(results):
        try:
            if _is_probe(results[folder]):
                probes.append((folder, read_result(results[folder])))
            else:
                runs.append(read_run(results[folder]))
        except (ObjectError, UserError) as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n  ".join(["some results cannot be read:", *problems]))
    if not results:
        raise UserError(
            f"no finished run and no probe in or below {', '.join(places)}. Train first (make train, make raptor, make "
            "probe), or give RUNS= and PROBES="
        )
    by_weights = {run.weights: run.model for run in runs}
    return Found(
        runs=runs,
        probes=[
            FoundProbe(location=place, model=_probed_model(result, by_weights), result=result)
            for place, result in probes
        ],
        unfinished=[place for place in sorted(configs - results.keys()) if not _lies_in_one_of(place, configs)],
    )


def _lies_in_one_of(place: str, folders: Collection[str]) -> bool:
    """Whether it is a part of another folder, as a RUN holds the ends of its teacher."""
    return any(place.startswith(f"{folder}/") for folder in folders)


def _documents(place: str) -> list[tuple[str, str]]:
    """(folder, name) of every result.json and config.json in or below a place."""
    found = []
    for info in open_objects(place).list():
        folder, _, name = info.key.rpartition("/")
        if name in (RESULT_KEY, CONFIG_KEY):
            found.append((f"{place.rstrip('/')}/{folder}" if folder else place.rstrip("/"), name))
    return found


def _is_probe(objects: Objects) -> bool:
    """Whether a result.json, sound or not, is that of a probe."""
    try:
        document = unseal(RESULT_KEY, objects.get(RESULT_KEY, at_most=MAX_DOCUMENT_NBYTES))
    except (SchemaError, ObjectTooLargeError) as error:
        raise UserError(
            f"{objects.location}: {error}. It is no result of ours, or was changed: move it away, or give RUNS= and "
            "PROBES= without it"
        ) from error
    return "result" in document


def read_run(objects: Objects) -> FoundRun:
    """One finished run.

    Raises:
        UserError: It is none, or its documents do not fit each other.
    """
    run = RunFiles(objects)
    result, config = run.read_result(), run.read_config()
    if result is None or config is None:
        raise UserError(f"{objects.location} has a {RESULT_KEY} but no {CONFIG_KEY}: bring it back from a copy")
    try:
        return FoundRun(
            location=objects.location,
            model=_trained_model(result, config, _teacher_weights(run, result)),
            data=config["data"],
            validation=result.get("validation"),
            baselines=result.get("baselines"),
            weights=result["weights_sha256"],
            metrics=run.read_metrics(),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{objects.location}: {RESULT_KEY} and {CONFIG_KEY} are not those of a run that this version knows "
            f"({type(error).__name__}: {error})"
        ) from error


def _teacher_weights(run: RunFiles, result: Mapping[str, Any]) -> str:
    """core_digest of its teacher: a result says it, or of an older run what it keeps of the teacher."""
    if "teacher_weights" in result:
        return str(result["teacher_weights"])
    ends = read_ends(run)
    return "" if ends is None else ends.core_digest


def _trained_model(result: Mapping[str, Any], config: Mapping[str, Any], teacher_weights: str) -> Model:
    settings = config["train"]
    spans = tuple(result["spans"])
    start, stop = int(spans[0].partition("-")[0]), int(spans[-1].partition("-")[2])
    # Stage 2 names the blocks that it began with. One block without them is stage 1's, even over the whole depth.
    imported = "imported" in result
    alone = len(spans) == 1 and "blocks" not in config and not imported
    whole = start == 0 and stop == result["last_layer"] and not alone
    return Model(
        what=RAPTOR if whole else BLOCK,
        teacher=result["teacher"],
        spans=spans,
        seed=settings["seed"],
        settings=settings,
        imported=imported,
        teacher_weights=teacher_weights,
    )


def _probed_model(result: ProbeResult, by_weights: Mapping[str, Model]) -> Model:
    """That of the run with these weights, if it is here or where the probe found it; what the probe says, if not."""
    default_label = result.teacher if result.what == TEACHER else f"Raptor k={len(result.spans)}"
    label = "" if result.label == default_label else result.label
    if result.what == TEACHER:
        return Model(what=TEACHER, teacher=result.teacher, label=label, teacher_weights=result.teacher_weights)
    known = by_weights.get(result.run_weights or "") or _model_of_run(result.run, result.run_weights)
    if known is not None:
        return replace(known, label=label, teacher_weights=result.teacher_weights)
    # Where nobody knows how it was trained, nothing says that another one was trained alike: it stays alone.
    alone = {"weights": (result.run_weights or result.run or "unknown")[:_SHOWN]}
    return Model(
        what=RAPTOR,
        teacher=result.teacher,
        spans=tuple(result.spans),
        seed=result.model_seed,
        settings=result.raptor_settings or alone,
        label=label,
        teacher_weights=result.teacher_weights,
    )


def _model_of_run(location: str | None, weights: str | None) -> Model | None:
    """Of a run outside the places that were given; None if it cannot be read any more, or holds other weights now."""
    if location is None:
        return None
    try:
        run = read_run(open_objects(location))
    except (UserError, ObjectMissingError):
        return None
    return run.model if run.weights == weights else None

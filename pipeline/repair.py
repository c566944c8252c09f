"""Mend a store: rewrite damaged documents, drop damaged shards and extract them again.

A store keeps no paths, so the images come from the settings. While store.json is sound it says everything else; when it
is not, the settings have to describe the store, and the digest in its commits tells whether they do.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from infra.console import JobError, UserError, say
from infra.objects import ObjectError, Objects, open_objects
from pipeline.config import ExtractConfig, check_config, of_one_split, split_location
from pipeline.extract import extract_planned
from pipeline.job import ExtractResult
from pipeline.place import check_writable
from pipeline.run_config import RunConfig, check_run
from pipeline.run_log import at_work
from pipeline.settings import PlannedStore, make_teacher, plan_split
from pipeline.sources import Source, open_sources
from pipeline.teacher import Teacher, teacher_from_files
from pipeline.teacher_kinds import kind_of
from storage_schemas.create import StoreDocument, identity_differences, plan_documents, read_store_document
from storage_schemas.documents import sha256, unseal
from storage_schemas.errors import NotAStoreError, Problem, SchemaError
from storage_schemas.keys import INDEX_KEY, STORE_KEY, TEACHER_PREFIX, commit_key, is_owned
from storage_schemas.reader import list_commits
from storage_schemas.spec import StoreSpec
from storage_schemas.verify import verify_store


def repair(config: ExtractConfig, run: RunConfig) -> list[ExtractResult]:
    """Find and mend everything that is wrong with the stores of a config; extract again what has to be.

    Args:
        config: images, and what the extraction was given where it differed from the defaults.
        run: How to extract.

    Raises:
        UserError: Images or settings are not those of the store; nothing was changed.
        JobError: Something is wrong that cannot be mended; it is named.
    """
    check_run(run)
    check_config(config)
    sources = open_sources(config.images)
    try:
        config, only = of_one_split(config, sources)
        sources = {only: sources[only]} if only else sources
        check_writable(split_location(config, split) for split in sources)
        planned = [_plan(config, split, source) for split, source in sources.items()]
        for store in planned:
            objects = open_objects(store.location)
            with at_work(objects, say):
                objects.sweep()
                _mend(store, objects)
    except ObjectError as error:
        raise JobError(f"{error}. Repair can be started again at any time") from error
    results = extract_planned(planned, run)
    remaining = [
        f"{store.location}/{problem}" for store in planned for problem in verify_store(open_objects(store.location))
    ]
    if remaining and all(result.complete for result in results):
        raise JobError("\n  ".join(["these problems are left:", *remaining]))
    return results


def _plan(config: ExtractConfig, split: str, source: Source) -> PlannedStore:
    """What the store should be, as far as possible from itself."""
    location = split_location(config, split)
    objects = open_objects(location)
    try:
        document = read_store_document(objects, location)
    except (NotAStoreError, SchemaError) as error:
        if isinstance(error, NotAStoreError) and not list_commits(objects):
            raise  # nothing of a store is here to be mended
        planned, expected = _plan_from_settings(config, split, source)
        _check_against_commits(objects, expected, location)
        return planned
    if not _commits_name(objects, document):
        try:  # a sound store.json, but is it this store's?
            planned, expected = _plan_from_settings(config, split, source)
        except UserError:
            expected = document
        if expected.digest != document.digest and _commits_name(objects, expected):
            return planned
    config = _settings_of(document.spec, config)
    teacher = _teacher_of(objects, document, config)
    planned = plan_split(config, teacher, teacher.to_files(), split, source, say)
    expected, _ = plan_documents(planned.spec, planned.samples, planned.teacher_files)
    different = identity_differences(objects, document, expected, planned.samples)
    if different:
        raise UserError(
            "\n  ".join([f"IMAGES or the teacher are not those of {location}; nothing was changed:", *different])
        )
    return planned


def _plan_from_settings(config: ExtractConfig, split: str, source: Source) -> tuple[PlannedStore, StoreDocument]:
    """What the settings alone say that the store should be."""
    teacher = make_teacher(config)
    planned = plan_split(config, teacher, teacher.to_files(), split, source, say)
    return planned, plan_documents(planned.spec, planned.samples, planned.teacher_files)[0]


def _settings_of(spec: StoreSpec, config: ExtractConfig) -> ExtractConfig:
    """The settings that lead to this identity; images, store, weights and head stay as given."""
    return dataclasses.replace(
        config,
        teacher=config.teacher if kind_of(config.teacher or "") else spec.teacher,
        image_size=spec.preprocessing["image_size"],
        resize_size=spec.preprocessing["resize_size"],
        interpolation=spec.preprocessing["interpolation"],
        format=spec.backend,
        precision=spec.precision,
        codec=spec.codec,
        shuffle=None if spec.shuffle == "none" else spec.shuffle,
        compute=spec.compute,
        layers=",".join(map(str, spec.layers)),
        limit=spec.n_samples,
        samples_per_shard=spec.samples_per_shard,
        samples_per_chunk=spec.samples_per_chunk,
        micro_batch=spec.micro_batch,
        order_seed=spec.order_seed,
    )


def _teacher_of(objects: Objects, document: StoreDocument, config: ExtractConfig) -> Teacher:
    """The teacher in the store, or, if its files are damaged, the one that the settings name."""
    files = {}
    for key, digest in document.documents.items():
        if key.startswith(TEACHER_PREFIX):
            try:
                data = objects.get(key)
            except ObjectError:
                data = b""
            if sha256(data) != digest:
                say(f"{document.spec.teacher} in {objects.location} is damaged; loading it as TEACHER and WEIGHTS say")
                return make_teacher(config)
            files[key.removeprefix(TEACHER_PREFIX)] = data
    return teacher_from_files(files)


def _mend(planned: PlannedStore, objects: Objects) -> None:
    document, documents = plan_documents(planned.spec, planned.samples, planned.teacher_files)
    if not _has_its_identity(objects, document):
        say(f"rewriting {planned.location}/{STORE_KEY}")
        objects.put(STORE_KEY, document.to_bytes())
    problems = verify_store(objects)
    for key in sorted({problem.key for problem in problems} & set(documents)):
        say(f"rewriting {planned.location}/{key}")
        objects.put(key, documents[key])
    again = sorted({problem.shard for problem in problems if problem.shard is not None})
    for shard in again:
        say(f"shard {shard} will be extracted again")
        objects.delete(commit_key(shard))  # first of all: from now on the shard does not exist
    if again:
        objects.delete(INDEX_KEY)  # else it would say that all of them are committed, and their commits are lost
    _drop(objects, [p for p in problems if p.shard is None and p.key not in documents])


def _has_its_identity(objects: Objects, planned: StoreDocument) -> bool:
    """Whether store.json is whole, and no other store's that was put in its place."""
    try:
        found = read_store_document(objects, objects.location)
    except (NotAStoreError, SchemaError):
        return False
    return _commits_name(objects, found) or not _commits_name(objects, planned)


def _drop(objects: Objects, problems: Sequence[Problem]) -> None:
    """Delete what should not be there; the index is written anew once all shards are committed."""
    for problem in problems:
        if problem.key == INDEX_KEY or is_owned(problem.key):
            say(f"deleting {objects.location}/{problem.key}: {problem.what}")
            objects.delete(problem.key)
        else:
            say(f"left alone, not ours: {objects.location}/{problem.key}")


def _commits_name(objects: Objects, document: StoreDocument) -> bool:
    """Whether a commit belongs to this store.json, or none to any."""
    named = _named_by_commits(objects)
    first = next(named, document.digest)
    return document.digest == first or document.digest in named


def _named_by_commits(objects: Objects) -> Iterator[str]:
    """The digests of store.json that commits name, one after the other."""
    for key in list_commits(objects):
        try:
            store = unseal(key, objects.get(key)).get("store")
        except SchemaError:
            continue  # a damaged commit names nothing; its shard is extracted again
        if isinstance(store, str):
            yield store


def _check_against_commits(objects: Objects, expected: StoreDocument, location: str) -> None:
    """Commits name the store.json that they belong to, also when it is damaged or gone."""
    named: dict[str, int] = {}
    for store in _named_by_commits(objects):
        named[store] = named.get(store, 0) + 1
    if named and expected.digest not in named:
        commonest = max(named, key=lambda digest: named[digest])
        raise UserError(
            f"{location}/{STORE_KEY} is damaged, and these variables describe another store: its commits belong to one "
            f"with digest {commonest[:16]}, the variables give {expected.digest[:16]}. Give the variables of the "
            "extraction (IMAGES, TEACHER, WEIGHTS, PRECISION ...); nothing was changed"
        )

"""`make import`: published weights into a RUN."""

import os
import shlex
from pathlib import PurePosixPath
from typing import Annotated

import tyro

from infra.console import ExitCode, UserError
from infra.objects import open_objects
from infra.s3_settings import use_endpoint
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import Span
from storage_schemas.errors import SchemaError
from trainer.data import TrainingData, open_training_data
from trainer.imported import check_fits, identity_without_store, read_published, run_identity, write_run
from trainer.judge import describe
from trainer.machine import Machine
from trainer.raptor import span_problems
from trainer.run_files import RunFiles
from trainer.validation import Validation

DEFAULT_RUNS = "data/runs/imported"


def import_command(
    *,
    source: Annotated[str, tyro.conf.arg(name="from")] = "",
    blocks: str = "",
    run: str = "",
    store: str | None = None,
    teacher: str | None = None,
    weights: str | None = None,
    head: str | None = None,
    heads: int | None = None,
    seed: int = 0,
    device: str | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Make a finished run of published weights: probes, tables, stage 2 and extraction take it like one trained here.

    Args:
        source: A state dict of a published stage-1 block or Raptor: a .safetensors, .pt or .pth file, here or at
            s3://. A pickled module is refused with the line that saves its state dict where it was made.
        blocks: Span a-b of each block, in order: 0-7 for a stage-1 block, 0-7,7-10,10-12 for a published Raptor of 3.
        run: Where to: a folder or s3://bucket/prefix; empty: data/runs/imported/<name of the file>.
        store: Of the images and the teacher that the weights were trained on: it gives the teacher, and the weights are
            validated on it.
        teacher: Without a store: a timm ViT.
        weights: Of that teacher: a file in timm's or Meta's naming.
        head: A linear classifier of 2 dim values: Meta's ..._linear_head.pth, for one layer.
        heads: Attention heads of each block. None: one per 64 channels, as published.
        seed: That the weights were trained with, for the table.
        device: To validate on, for example cpu or cuda:0. None: the GPU if there is one.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    use_endpoint(endpoint_url)
    _check_typed(source, blocks, store, teacher, weights)
    spans = _parse_spans(blocks)
    imported = read_published(source, spans, heads)
    machine = Machine.found(device)
    data = _open_data(store, blocks, head, machine) if store is not None else None
    found = data.teacher if data is not None else _load_teacher(teacher, weights, head)
    if found is None:
        raise UserError(f"STORE={store} holds no teacher. Give TEACHER= and WEIGHTS= in its place")
    check_fits(imported, found)
    location = run or f"{DEFAULT_RUNS}/{PurePosixPath(source).name.partition('.')[0]}"
    files = RunFiles(open_objects(location))
    files.check_writable()
    identity = run_identity(imported, data.identity if data is not None else identity_without_store(found), seed)
    if files.is_of(identity) and files.read_result() is not None:
        print(f"{location} holds these weights already; there is nothing to do")
        return ExitCode.OK
    with files.exclusive():
        files.claim(identity)
        result = write_run(imported, files, found, data, machine)
    n = len(spans)
    print(f"{location}: {n} {'block' if n == 1 else 'blocks'} for {found.name}, spans {', '.join(result['spans'])}")
    if result["validation"] is not None:
        print(f"validated: {describe(Validation(**result['validation']))}")
    whole = spans[0].start == 0 and spans[-1].stop == result["last_layer"]
    if whole:
        print(f"next  make probe TASK=imagenet RUN={shlex.quote(location)} IMAGES=/data/imagenet")
    else:
        more = "" if store is not None else ", with OTHER_STORE=1 as these weights name no store"
        print(
            "next  import the blocks of the other spans too; then give make raptor all of them, in order, as "
            f"RUNS={location},...{more}"
        )
    return ExitCode.OK


def _check_typed(source: str, blocks: str, store: str | None, teacher: str | None, weights: str | None) -> None:
    problems = []
    if not source:
        problems.append("FROM is missing: give the file of the weights")
    if not blocks:
        problems.append("BLOCKS is missing: give the span of each block, such as 0-7, or 0-7,7-10,10-12")
    if (store is None) == (teacher is None):
        problems.append(
            "give either STORE, which holds the teacher of these weights, or TEACHER and WEIGHTS: a Raptor has its "
            "teacher's embedding, final norm and head"
        )
    if store is not None and weights is not None:
        problems.append(f"WEIGHTS={weights} are a TEACHER's, and STORE={store} has its own")
    if problems:
        raise UserError("\n  ".join(["make import cannot start:", *problems]))


def _parse_spans(text: str) -> list[Span]:
    try:
        spans = [Span.parse(part.strip()) for part in text.split(",")]
    except SchemaError as error:
        raise UserError(f"BLOCKS={text}: {error}. Expected a-b for each block, such as 0-7,7-10,10-12") from error
    if problems := list(span_problems(spans)):
        raise UserError("\n  ".join([f"BLOCKS={text} is not one stretch of the depth:", *problems]))
    return spans


def _open_data(store: str, blocks: str, head: str | None, machine: Machine) -> TrainingData:
    return open_training_data(store, blocks, variable="BLOCKS", head=head, device=machine.device)


def _load_teacher(name: str | None, weights: str | None, head: str | None) -> Teacher:
    assert name is not None
    return load_teacher(name, None if weights is None else os.path.expanduser(weights), head=head)

"""`make import`: published weights into a RUN."""

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated

import torch
import tyro

from infra.console import ExitCode, UserError
from infra.objects import open_objects
from infra.s3_settings import use_endpoint
from pipeline.teacher import Teacher, load_teacher
from storage_schemas import Span
from storage_schemas.errors import SchemaError
from trainer.checkpoint import import_reference, load_weights_file
from trainer.commands.start import make_command, or_problem
from trainer.data import TrainingData, open_training_data
from trainer.imported import Imported, check_fits, identity_without_store, read_published, run_identity, write_run
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
    problems = _typed_problems(source, blocks, store, teacher, weights, heads, seed)
    spans = or_problem(lambda: _parse_spans(blocks), problems) if blocks else None
    machine = or_problem(lambda: Machine.found(device), problems)
    on = torch.device("cpu") if machine is None else machine.device
    imported = _read(source, spans, heads, problems)
    data = None
    if store is not None:
        data = or_problem(lambda: _open_data(store, blocks if spans else None, head, on), problems)
        found = None if data is None else data.teacher
        if data is not None and found is None:
            problems.append(f"STORE={store} holds no teacher. Give TEACHER= and WEIGHTS= in its place")
    else:
        found = None if teacher is None else or_problem(lambda: _load_teacher(teacher, weights, head), problems)
    if imported is not None and found is not None:
        or_problem(lambda: check_fits(imported, found), problems)
    if problems or imported is None or found is None or machine is None:
        raise UserError("\n  ".join(["make import cannot start:", *problems]))
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
    n = len(imported.spans)
    print(f"{location}: {n} {'block' if n == 1 else 'blocks'} for {found.name}, spans {', '.join(result['spans'])}")
    if result["validation"] is not None:
        print(f"validated: {describe(Validation(**result['validation']))}")
    whole = imported.spans[0].start == 0 and imported.spans[-1].stop == result["last_layer"]
    if whole:
        data_of = {"digits_vit": ("digits", "STORE", store or "data/stores/digits")}
        task, variable, place = data_of.get(found.name, ("imagenet", "IMAGES", "/data/imagenet"))
        print(f"next  {make_command('probe', {'TASK': task, 'RUN': location, variable: place})}")
    else:
        more = "" if store is not None else ", with OTHER_STORE=1 as these weights name no store"
        print(
            "next  import the blocks of the other spans too; then give make raptor all of them, in order, as "
            f"RUNS={location},...{more}"
        )
    return ExitCode.OK


def _typed_problems(
    source: str,
    blocks: str,
    store: str | None,
    teacher: str | None,
    weights: str | None,
    heads: int | None,
    seed: int,
) -> list[str]:
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
    if heads is not None and heads < 1:
        problems.append(f"HEADS={heads}: expected 1 or more")
    if seed < 0:
        problems.append(f"SEED={seed}: expected 0 or more")
    return problems


def _parse_spans(text: str) -> list[Span]:
    try:
        spans = [Span.parse(part.strip()) for part in text.split(",")]
    except SchemaError as error:
        raise UserError(f"BLOCKS={text}: {error}. Expected a-b for each block, such as 0-7,7-10,10-12") from error
    if problems := list(span_problems(spans)):
        raise UserError("\n  ".join([f"BLOCKS={text} is not one stretch of the depth:", *problems]))
    return spans


def _read(source: str, spans: Sequence[Span] | None, heads: int | None, problems: list[str]) -> Imported | None:
    """The weights; None if something is wrong with them, or with what they are to be read as."""
    if not source:
        return None
    if spans is not None and (heads is None or heads >= 1):
        return or_problem(lambda: read_published(source, spans, heads), problems)
    or_problem(lambda: import_reference(load_weights_file(source)), problems)  # whatever its spans, it can be looked at
    return None


def _open_data(store: str, blocks: str | None, head: str | None, device: torch.device) -> TrainingData:
    try:
        return open_training_data(store, blocks, variable="BLOCKS", head=head, device=device)
    except UserError as error:
        lines = [
            line for line in str(error).splitlines() if line != "make raptor cannot start:"
        ]  # whose blocks they are
        raise UserError("\n".join(lines).strip()) from error


def _load_teacher(name: str, weights: str | None, head: str | None) -> Teacher:
    return load_teacher(name, None if weights is None else os.path.expanduser(weights), head=head)

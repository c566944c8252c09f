"""`make probe`: a readout on a frozen teacher or Raptor."""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import torch

from infra.console import ExitCode, UserError, human_duration, stop_on_signals
from infra.objects import open_objects
from infra.s3_settings import use_endpoint
from pipeline.teacher import COMPUTES
from trainer.commands.start import or_problem, store_name
from trainer.machine import Machine, torch_threads
from trainer.probes.open_backbone import Places, open_backbone
from trainer.probes.probe_files import ProbeFiles
from trainer.probes.report import finished_report, start_report
from trainer.probes.results import DEFAULT_PROBES, ProbeResult
from trainer.probes.task import Asked, TaskKind, find_task
from trainer.probes.train_probe import Probe, train_probe


def probe_command(
    *,
    task: str = "",
    run: str | None = None,
    teacher: str | None = None,
    weights: str | None = None,
    store: str | None = None,
    images: str | None = None,
    head: str | None = None,
    out: str | None = None,
    label: str = "",
    seed: int = 0,
    compat: bool = False,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    compute: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    endpoint_url: str | None = None,
) -> int:
    """Train a small readout on the last state of a frozen teacher, or of a Raptor. The same command again resumes.

    Args:
        task: imagenet, ade20k, nyuv2 or digits.
        run: A finished Raptor from state 0 to the last: a folder or s3://bucket/prefix. None probes the teacher.
        teacher: A timm ViT, or digits_vit; None: the one that the run was trained on, or the one in the store.
        weights: Of the teacher, as for make extract; with teacher.
        store: A store, or a folder with the stores train and val. digits reads its features there (None:
            data/stores/digits); imagenet evaluates on its val; all take the teacher from it.
        images: The data set: a folder with train/ and val/ of class folders (imagenet), ADEChallengeData2016 (ade20k),
            the folder that holds data/nyu2_train.csv (nyuv2).
        head: File of a linear head that the readout begins with (imagenet); also the one that a RUN was trained with.
        out: Folder or s3://bucket/prefix for the result; None: data/probes/<store or teacher>/<what>-<task>-seed<seed>.
        label: Name of the row in the table of results; empty: the teacher's name, or such as "Raptor k=3".
        seed: Of the readout, the order of samples and their augmentation.
        compat: Restore the defects of the published code that published numbers depend on.
        epochs: In the place of the recipe's number.
        batch_size: Samples of a step, in the place of the recipe's.
        learning_rate: In the place of the recipe's.
        compute: Of the teacher's blocks: float32, tf32, bfloat16 or float16; None: as in the store, else float32.
        device: For example cpu or cuda:0. None: the GPU if there is one.
        threads: Of torch on a CPU; a probe is repeated bit for bit with the same number. None: one for teachers of
            fewer than 256 channels, else one per core.
        endpoint_url: S3 endpoint, such as http://127.0.0.1:9000; None is AWS_ENDPOINT_URL, else Amazon's.
    """
    began = time.monotonic()
    use_endpoint(endpoint_url)
    problems = _number_problems(
        {"THREADS": (threads, 1), "SEED": (seed, 0), "EPOCHS": (epochs, 1), "BATCH_SIZE": (batch_size, 1)}
    )
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        problems.append(f"LEARNING_RATE={learning_rate}: expected a number above 0")
    if compute is not None and compute not in COMPUTES:
        problems.append(f"COMPUTE={compute}: expected one of {', '.join(COMPUTES)}")
    kind = or_problem(lambda: find_task(task), problems)
    machine = or_problem(lambda: Machine.found(device), problems)
    if kind is None or machine is None:
        raise UserError("\n  ".join(["make probe cannot start:", *problems]))
    if compat and not kind.has_compat:
        problems.append(f"COMPAT=1: TASK={kind.name} has no defect of the published code to restore; leave COMPAT out")
    place = store or kind.default_store
    changes = {"n_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    asked = Asked(
        images=images,
        store=place,
        head=head,
        compat=compat,
        seed=seed,
        changes={} if problems else changes,  # what is wrong is listed; the recipe's serve to find more
        device=machine.device,
    )
    places = Places(
        run=run,
        teacher=teacher,
        weights=weights,
        store=place,
        head=head,
        compute=compute if compute in COMPUTES else None,
    )
    probe = _open(kind, asked, places, label, problems)
    torch.set_num_threads(threads or torch_threads(probe.backbone.teacher.dim))
    files = ProbeFiles(open_objects(out or default_out(place, probe, run)))
    result = files.read_result() if files.is_of(probe.identity()) else None
    done = f"This probe is finished; there is nothing to do. For another one give OUT, or delete {files.location}"
    if result is None:
        result = _train(probe, files)
        if result is None:
            return ExitCode.INTERRUPTED
        done = f"This command took {human_duration(time.monotonic() - began)}."
    print(finished_report(result, files.location))
    print(f"\n{done}")
    return ExitCode.OK


def _number_problems(typed: Mapping[str, tuple[int | None, int]]) -> list[str]:
    """By the names that were typed: a value, None where there was none, and the least it may be."""
    return [
        f"{name}={value}: expected {least} or more"
        for name, (value, least) in typed.items()
        if value is not None and value < least
    ]


def _open(kind: TaskKind, asked: Asked, places: Places, label: str, known: Sequence[str]) -> Probe:
    """Backbone and task, or one error with all that is wrong with them, and with what is known to be wrong already."""
    problems, opened = [*known, *kind.check(asked)], None
    backbone = open_backbone(places, kind, asked.device, problems)
    problems = list(dict.fromkeys(problems))  # a STORE that is none is missed by the task and by the backbone
    if backbone is not None:
        try:
            opened = kind.open(asked, backbone)
        except UserError as error:
            said = {line.strip() for problem in problems for line in problem.splitlines()}  # the task finds them again
            lines = [line for line in str(error).splitlines() if not line.startswith("make probe")]  # its own heading
            problems += [line.removeprefix("  ") for line in lines if line.strip() not in said]
    if problems or backbone is None or opened is None:
        raise UserError("\n  ".join([f"make probe TASK={kind.name} cannot start:", *problems]))
    return Probe(task=opened, backbone=backbone, seed=asked.seed, label=label, compat=asked.compat)


def _train(probe: Probe, files: ProbeFiles) -> ProbeResult | None:
    """Train to the end; None if a signal asked to stop before it."""
    with files.exclusive() as still_ours:
        files.claim(probe.identity())
        print(start_report(probe, files.location), file=sys.stderr)
        with stop_on_signals() as signalled:

            def stop() -> bool:
                still_ours()
                return signalled()

            result = train_probe(probe, files, stop=stop)
    if result is None:
        print(f"stopped; everything is saved in {files.location}. The same command goes on", file=sys.stderr)
    return result


def default_out(store: str | None, probe: Probe, run: str | None) -> str:
    """data/probes/<store or teacher>/<what>-<task>-seed<seed>."""
    where = store_name(store) if store else probe.backbone.teacher_name
    what = PurePath(os.path.normpath(run)).name if run else "teacher"
    return f"{DEFAULT_PROBES}/{where}/{what}-{probe.task.name}-seed{probe.seed}"

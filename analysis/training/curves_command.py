"""`make curves`: what changed while a teacher was trained, from its checkpoints or from records of another training."""

from pathlib import Path

from analysis.page import PAGE, Origin, Section, save_page
from analysis.partitions import MIN_SIZE
from analysis.places import make_command, open_out
from analysis.training.records import EpochRecord, read_records, record_line
from infra.console import Progress, UserError, say
from infra.objects import Objects

DEFAULT_CHECKPOINTS = "data/teachers/digits_vit"
DEFAULT_OUT = "data/curves"
RECORDS = "epoch_summaries.jsonl"
_DEPTH = 12


def curves_command(
    *,
    checkpoints: str = DEFAULT_CHECKPOINTS,
    records: str = "",
    out: str = "",
    k: int = 3,
    raptor_steps: int = 200,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Curves over a training of digits_vit: similarity, phases, spectra, ways of tokens, fit of a Raptor, losses.

    Interrupt it whenever you like: the same command goes on with the checkpoint that it was at. A checkpoint takes some
    seconds, and 0.7 s of processor time more for each step of its Raptor.

    Args:
        checkpoints: Folder of make teacher KEEP=0,1,2,5,10,20,40,60.
        records: In their place, a file of the Transformer Geometry Observatory, epoch_summaries.jsonl: spectra only.
        out: Folder or s3://bucket/prefix for report.html, tables/*.csv, epoch_summaries.jsonl and what is measured of
            each checkpoint; empty: data/curves/<last part of checkpoints>.
        k: Phases, and blocks of the Raptor.
        raptor_steps: Steps of 16 images that a Raptor is trained for at each checkpoint; 0: none.
        seed: Of the Raptors.
        device: Where teacher and Raptor run: cpu, cuda or cuda:0.
    """
    problems = []
    if not 1 <= k <= _DEPTH // MIN_SIZE:
        problems.append(f"K={k}: expected 1 to {_DEPTH // MIN_SIZE} phases, of {MIN_SIZE} layers or more")
    if raptor_steps < 0:
        problems.append(f"RAPTOR_STEPS={raptor_steps}: expected 0 or more")
    source = records or checkpoints
    place = out or f"{DEFAULT_OUT}/{Path(source).stem if records else Path(source).name}"
    saved = open_out(place, f"{source}/checkpoints", problems)
    typed = {
        "CHECKPOINTS": checkpoints if checkpoints != DEFAULT_CHECKPOINTS and not records else None,
        "RECORDS": records or None,
        "OUT": out or None,
        "K": k if k != 3 else None,
        "RAPTOR_STEPS": raptor_steps if raptor_steps != 200 else None,
        "SEED": seed if seed else None,
    }
    command = make_command("curves", typed)
    if problems or saved is None:
        raise UserError("\n  ".join(["make curves cannot start:", *problems]))
    if records:
        sections, found = _of_records(Path(records), command)
    else:
        sections, found = _of_checkpoints(Path(checkpoints), saved, k, raptor_steps, seed, device, command)
    saved.put(RECORDS, "".join(f"{record_line(one)}\n" for one in found).encode())
    save_page(saved, f"Curves over the training of {source}", {"from": source, "command": command}, sections)
    print(f"saved  {place}/{PAGE}, {place}/tables/*.csv, {place}/{RECORDS}: {len(found)} epochs")
    return 0


def _of_records(path: Path, command: str) -> tuple[list[Section], list[EpochRecord]]:
    from analysis.training.spectra_sections import spectra_over_training  # torch and timm take seconds to import

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"RECORDS={path}: {error}") from error
    found = read_records(text, f"RECORDS={path}")
    if len(found) < 2:
        raise UserError(f"RECORDS={path} has {len(found)} epoch; curves need 2 or more")
    origin = Origin(data=f"the training that {path.name} records", n_images=0, seed=None, command=command)
    return [spectra_over_training(found, origin)], found


def _of_checkpoints(
    folder: Path, saved: Objects, k: int, raptor_steps: int, seed: int, device: str, command: str
) -> tuple[list[Section], list[EpochRecord]]:
    from analysis.training.measure import MeasureSettings
    from analysis.training.runs import measure_run
    from analysis.training.sections import paths_section, training_section
    from analysis.training.spectra_sections import decay_section, sample_size_section, spectra_over_training
    from trainer.teacher_checkpoints import read_checkpoints

    checkpoints = read_checkpoints(folder)
    if len(checkpoints) < 2:
        raise UserError(f"{folder} has the checkpoint of 1 epoch; curves need 2 or more: make teacher KEEP=")
    if checkpoints[0].epoch != 0:
        say(f"{folder} has no checkpoint of epoch 0, the untrained model: the curves begin at {checkpoints[0].epoch}")
    settings = MeasureSettings(k=k, raptor_steps=raptor_steps, seed=seed)
    with Progress(total=(raptor_steps + 1) * len(checkpoints), unit="steps", label="checkpoints") as progress:
        run = measure_run(
            folder.name,
            checkpoints,
            saved,
            settings,
            device=device,
            began=lambda one: progress.say(f"epoch {one.epoch}: similarity, phases, spectra, Raptor"),
            kept=lambda one: progress.advance(raptor_steps + 1),
            progress=progress.advance,
        )
    data = f"digits, held-out, for {len(checkpoints)} checkpoints of {folder}"
    origin = Origin(data=data, n_images=run.last.measured.n_images, seed=seed, command=command)
    last = run.last.measured
    return [
        training_section([run], origin),
        spectra_over_training(run.records, origin),
        decay_section(run, origin),
        sample_size_section(last.n_vectors, last.plane.axes.shape[1], last.record, origin),
        paths_section(run, origin),
    ], run.records
